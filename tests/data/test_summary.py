"""What `zslflax data` says of a source."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from tests.testing.images import jpeg, write
from zslflax.data.__main__ import main
from zslflax.data.sources.labelled import LabelledImages
from zslflax.data.summary import draw_examples, format_summary, summarise_source


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """A CSV file of four images, of which one is damaged and one is missing."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write(tmp_path / "b.jpg", b"no image")
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    Image.new("RGB", (300, 10)).save(tmp_path / "c.webp")
    rows = ["a.png,a cat", "a.png,a small cat", "b.jpg,a dog", "c.webp,a bird", "d.jpg,none"]
    return write(tmp_path / "pairs.csv", "\n".join(["path,caption", *rows]))


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["zslflax.data", *map(str, arguments)])
    main()


def test_the_command_describes_training_data(pairs, tmp_path, monkeypatch, capsys):
    run(monkeypatch, pairs, "--json", f"--picture={tmp_path}/out.png")
    assert json.loads(capsys.readouterr().out) == {
        "source": str(pairs),
        "split": "train",
        "samples": 3,
        "left_out": {"missing_images": 1},
        "classes": None,
        "read": 3,
        "unreadable": {"the data is not an image: it starts with b'no image'": 1},
        "captions": {"min": 1, "mean": 1.5, "max": 2},
        "labels": {"min": 0, "mean": 0.0, "max": 0},
        "image_size": {"min": [30, 20], "median": [300, 10], "max": [300, 10]},
        "longest_caption": "a small cat",
    }
    with Image.open(tmp_path / "out.png") as drawn:
        assert drawn.size[0] > 2 * 160


def test_the_table(pairs, monkeypatch, capsys):
    run(monkeypatch, pairs)
    assert capsys.readouterr().out.splitlines() == [
        f"{pairs}, train",
        "samples          3",
        "left out         1 × missing_images",
        "unreadable       1 × the data is not an image: it starts with b'no image'",
        "captions         1 to 2 per sample, 1.5 on average",
        "labels           none",
        "longest caption  3 words, 11 characters: a small cat",
        "image size       min 30 × 20, median 300 × 10, max 300 × 10 pixels",
    ]


def test_data_without_captions_is_described_as_a_test_set(tmp_path, monkeypatch, capsys):
    for i, name in enumerate(("cat/a.jpg", "dog/b.jpg")):
        write(tmp_path / name, jpeg(100 * i))
    run(monkeypatch, tmp_path)
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path}, test\n") and "classes          2: cat, dog" in printed
    assert "labels           1 per sample" in printed
    with pytest.raises(ValueError, match="holds no captions"):
        run(monkeypatch, tmp_path, "--split=train")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        run(monkeypatch, tmp_path / "none.csv")


def test_samples_are_evenly_spaced(tmp_path):
    paths = [write(tmp_path / f"{i:02}.jpg", jpeg(0) if i % 2 else b"") for i in range(20)]
    source = LabelledImages(paths, [(i,) for i in range(20)])
    assert summarise_source(source, samples=5)["read"] == 5
    summary = summarise_source(source, samples=0)
    assert summary["read"] == 20 and summary["unreadable"] == {"the image is empty": 10}
    assert "unreadable       10 × the image is empty" in format_summary(summary)
    assert draw_examples(LabelledImages(paths[:1], [(0,)])) is None


def test_the_picture_has_the_images(tmp_path):
    source = LabelledImages([write(tmp_path / "a.jpg", jpeg(200))], [(0,)], ["cat"])
    drawn = np.asarray(draw_examples(source))
    assert (np.abs(drawn.astype(int) - 200) <= 2).all(axis=-1).sum() > 100 * 100
