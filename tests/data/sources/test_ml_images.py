"""Tencent ML-Images: annotation lists with file names and addresses."""

import pytest

from tests.testing.images import jpeg, write
from zslflax.config import default_config
from zslflax.data import images
from zslflax.data.sources.ml_images import read_ml_images
from zslflax.data.sources.opening import open_source


def test_labels_are_those_of_the_lines(tmp_path):
    for value, name in enumerate(["4473324750_o.jpg", "7239_6997334729_o.jpg", "sub/3035.jpg"]):
        write(tmp_path / "images" / name, jpeg(50 * value))
    lines = (
        "https://farm5.example.com/4041/4473324750_o.jpg\t1193:0.8\t1053:0.8\n"
        "https://c4.example.com/8/7239/6997334729_o.jpg  3:1  5193:0.9  3:1 \n"
        "\n"
        "sub/3035.jpg 7\n"
        "gone.jpg\t9416:1.0\n"
    )
    file = write(tmp_path / "list.txt", lines)
    source = open_source(f"ml_images:{tmp_path / 'images'},{file}", default_config().data, "test")
    assert source.classes is None and source.excluded == {"missing_images": 1}
    assert source.labels == [(1193, 1053), (3, 5193), (7,)]
    assert [int(images.decode(source[i]["image"]).mean()) for i in range(3)] == [0, 50, 100]
    for line in ("sub/3035.jpg n01:1", "sub/3035.jpg 7:1.5", "sub/3035.jpg -1:1", "sub/3035.jpg 7:0"):
        write(file, line)
        with pytest.raises(ValueError, match="list.txt, line 1: found '.*', expected CLASS:CONFIDENCE"):
            read_ml_images(f"{tmp_path / 'images'},{file}")
    write(file, "sub/3035.jpg 7:1\nsub/3035.jpg 8:1\n")
    with pytest.raises(ValueError, match="list.txt, line 2: sub/3035.jpg comes a second time"):
        read_ml_images(f"{tmp_path / 'images'},{file}")
