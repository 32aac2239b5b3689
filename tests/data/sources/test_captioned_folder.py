"""Folders of images with captions beside them, and folders that are opened as what they hold."""

import io
import json
import logging
import os
import pickle

import numpy as np
import pytest
from PIL import Image

from tests.testing.images import jpeg, write
from tests.testing.shards import samples, write_tar
from zslflax.config import default_config
from zslflax.data import images
from zslflax.data.images import BadSample
from zslflax.data.sources.labelled import ClassTars
from zslflax.data.sources.opening import open_source
from zslflax.data.sources.webdataset import WebDataset

DATA = default_config().data


def contents(source) -> dict:
    """Grey value, captions and labels of each record, by its path."""
    records = [source[i] for i in range(len(source))]
    assert [record["name"] for record in records] == list(source.names())
    assert [source.read_annotations(i) for i in range(len(source))] == [
        {key: record[key] for key in ("text", "label", "name")} for record in records
    ]
    return {
        record["name"]: (round(float(images.decode(record["image"]).mean()), -1), record["text"], record["label"])
        for record in records
    }


def test_captions_and_labels_are_in_the_files_beside_the_images(tmp_path, caplog):
    for i, name in enumerate(["a.jpg", "B.JPEG", "in/c.v2.png", "in/d.webp", "in/e.bmp", "f.jpg", "g.jpg", "g.png"]):
        write(tmp_path / name, jpeg(10 * i))
    write(tmp_path / "a.txt", " a cat \n")
    write(tmp_path / "B.TXT", "a dog")
    write(tmp_path / "in/c.v2.json", json.dumps({"captions": ["a hen", "a bird"], "label": 3}))
    write(tmp_path / "in/d.txt.json", json.dumps(["a fox", "red"]))
    write(tmp_path / "in/e.txt", "an owl")
    write(tmp_path / "in/e.cls", "4, 5")
    write(tmp_path / "g.txt", "a goose")
    write(tmp_path / "readme.txt", "no image")
    write(tmp_path / "movie.mp4", b"")
    for clutter in (".ipynb_checkpoints/a.jpg", "@eaDir/a.jpg", "._a.jpg", "Thumbs.db"):
        write(tmp_path / clutter, jpeg(0))
    with caplog.at_level(logging.INFO):
        source = open_source(str(tmp_path), DATA, "train")
    expected = {
        "B.JPEG": (10, ("a dog",), ()),
        "a.jpg": (0, ("a cat",), ()),
        "g.jpg": (60, ("a goose",), ()),
        "in/c.v2.png": (20, ("a hen", "a bird"), (3,)),
        "in/d.webp": (30, ("a fox", "red"), ()),
        "in/e.bmp": (40, ("an owl",), (4, 5)),
    }
    assert contents(source) == {f"{tmp_path}/{name}": value for name, value in expected.items()}
    assert source.excluded == {"no_caption": 1, "no_image": 1, "same_key": 1} and source.classes is None
    assert "1 of 7 images have no caption beside them and are left out (f)" in caplog.text
    assert "1 captions have no image beside them (readme)" in caplog.text
    assert "other files: 1 × mp4" in caplog.text
    for spec in (f"folder:{tmp_path}", f"{tmp_path}/"):
        assert list(open_source(spec, DATA, "test").names()) == list(source.names())
    again = pickle.loads(pickle.dumps(source))
    assert again[3] == source[3] and again.fingerprint() == source.fingerprint()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
def test_images_beside_captions_may_have_any_extension_or_none(tmp_path, format):
    file = io.BytesIO()
    Image.new("RGB", (9, 8), (200, 200, 200)).save(file, format)
    for name in ("a", "b.large", "c.v2.dat"):
        write(tmp_path / name, file.getvalue())
        write(tmp_path / f"{name.removesuffix('.large').removesuffix('.dat')}.txt", name)
    write(tmp_path / "d.dat", b"no image")
    write(tmp_path / "d.txt", "nothing")
    write(tmp_path / "e.dat", file.getvalue())
    source = open_source(str(tmp_path), DATA, "train")
    assert contents(source) == {f"{tmp_path}/{name}": (200, (name,), ()) for name in ("a", "b.large", "c.v2.dat")}
    assert source.excluded == {"no_image": 1}


def test_a_folder_may_have_the_name_of_a_published_test_set(tmp_path, monkeypatch):
    write(tmp_path / "pets/a.jpg", jpeg(0))
    write(tmp_path / "pets/a.txt", "a cat")
    monkeypatch.chdir(tmp_path)
    assert open_source("pets", DATA, "train")[0]["text"] == ("a cat",)


def test_several_captions_in_a_text_file(tmp_path):
    write(tmp_path / "a.jpg", jpeg(0))
    write(tmp_path / "a.txt", "a cat\na pet\n")
    config = default_config().data
    config.captions_per_line = True
    assert open_source(str(tmp_path), config, "train")[0]["text"] == ("a cat", "a pet")


def test_the_fingerprint_tells_changed_images_and_not_a_moved_folder(tmp_path):
    for name in "ab":
        write(tmp_path / "x" / f"{name}.jpg", jpeg(0))
        write(tmp_path / "x" / f"{name}.txt", name)
    before = open_source(str(tmp_path / "x"), DATA, "train").fingerprint()
    os.rename(tmp_path / "x", tmp_path / "y")
    source = open_source(str(tmp_path / "y"), DATA, "train")
    assert source.fingerprint() == before
    write(tmp_path / "y" / "a.jpg", jpeg(100))
    os.utime(tmp_path / "y" / "a.jpg", (1, 1))
    assert source.fingerprint() != before


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    write(tmp_path / f"{name}.jpg", jpeg(100))
    write(tmp_path / f"{name}.txt", "coffee")
    source = open_source(str(tmp_path), DATA, "train")
    assert source[0]["text"] == ("coffee",) and list(source.names()) == [f"{tmp_path}/{name}.jpg"]
    assert len(source.fingerprint()) == 64


def test_unreadable_files_are_bad_samples(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.jpg", jpeg(0))
        write(tmp_path / f"{name}.json", '{"caption": "a cat"}')
    source = open_source(str(tmp_path), DATA, "train")
    os.remove(tmp_path / "a.jpg")
    write(tmp_path / "b.json", "{")
    os.remove(tmp_path / "c.json")
    for index, message in ((0, "its file cannot be read"), (1, "JSON is damaged"), (2, "the file beside it cannot")):
        with pytest.raises(BadSample, match=message) as error:
            source[index]
        assert error.value.name == f"{tmp_path}/{'abc'[index]}.jpg" and str(tmp_path) not in str(error.value)


def test_json_without_captions_is_no_caption(tmp_path):
    for name in ("cat/a", "dog/b"):
        write(tmp_path / f"{name}.jpg", jpeg(0))
        write(tmp_path / f"{name}.json", '{"width": 9}')
    source = open_source(str(tmp_path), DATA, "test")
    assert source.classes == ["cat", "dog"] and source.labels == [(0,), (1,)]
    with pytest.raises(ValueError, match="none of the 2 images in .* has a caption.*found: 2 × jpg, 2 × json"):
        open_source(str(tmp_path), DATA, "train")


def test_a_folder_of_shards_as_img2dataset_writes_it(tmp_path):
    for shard in range(2):
        write_tar(tmp_path / f"{shard:05}.tar", samples(range(3 * shard, 3 * shard + 3)))
        write(tmp_path / f"{shard:05}.parquet", b"PAR1")
        write(tmp_path / f"{shard:05}_stats.json", "{}")
    source = open_source(str(tmp_path), DATA, "train")
    assert isinstance(source, WebDataset) and [source[i]["text"] for i in (0, 5)] == [("caption 0",), ("caption 5",)]
    pattern = open_source(f"{tmp_path}/*.tar", DATA, "train")
    assert source.fingerprint() == pattern.fingerprint() and list(source.names()) == list(pattern.names())
    assert isinstance(open_source(str(tmp_path), DATA, "test"), WebDataset)  # they have captions: shards, not classes
    deeper = tmp_path / "deeper"
    os.mkdir(deeper)
    write_tar(deeper / "part" / "0.tar", samples(range(2)))
    assert len(open_source(str(deeper), DATA, "train")) == 2


def test_a_folder_of_tars_without_captions_holds_classes(tmp_path):
    write_tar(tmp_path / "n01.tar", [("1.jpg", jpeg(0))])
    assert isinstance(open_source(str(tmp_path), DATA, "test"), ClassTars)
    with pytest.raises(ValueError, match="have no captions: expected KEY.txt"):
        open_source(str(tmp_path), DATA, "train")


def test_images_alone_are_enough_where_captions_and_labels_are_not_needed(tmp_path):
    write(tmp_path / "a.jpg", jpeg(10))
    with pytest.raises(ValueError, match="holds no captions"):
        open_source(f"folder:{tmp_path}", DATA, "train", captions=False)
    write(tmp_path / "in" / "b.jpg", jpeg(20))
    write(tmp_path / "c.jpg", jpeg(30))
    write(tmp_path / "c.txt", "a cat")
    source = open_source(f"folder:{tmp_path}", DATA, "train", captions=False, images_alone=True)
    expected = {"a.jpg": (10, (), ()), "c.jpg": (30, ("a cat",), ()), os.path.join("in", "b.jpg"): (20, (), ())}
    assert contents(source) == {str(tmp_path / name): values for name, values in expected.items()}
    assert source.classes is None and not source.excluded


def test_an_empty_folder(tmp_path):
    for split in ("train", "test"):
        with pytest.raises(ValueError, match="holds no captions.*found: nothing"):
            open_source(str(tmp_path), DATA, split)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        open_source(f"folder:{tmp_path}/none", DATA, "train")


def test_the_index_has_the_size_of_the_names(tmp_path):
    for i in range(200):
        write(tmp_path / f"{i:03}.jpg", b"")
        write(tmp_path / f"{i:03}.txt", "")
    source = open_source(str(tmp_path), DATA, "train")
    assert len(pickle.dumps(source)) < 200 * 40 + 2000 and source.files.dtype == np.int16
