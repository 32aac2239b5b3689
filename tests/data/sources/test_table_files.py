"""Tables of images with captions or labels: CSV, TSV and parquet files, and the errors for faulty ones."""

import json
import logging
import os
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.testing.images import jpeg, write
from tests.testing.range_server import serve
from zslflax.config import default_config
from zslflax.data import images
from zslflax.data.images import BadSample
from zslflax.data.sources.arrow_files import ArrowTable
from zslflax.data.sources.opening import open_source

DATA = default_config().data


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The home folder, whose cache has the copies of tables."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def labels(source) -> list:
    return [source[i]["label"] for i in range(len(source))]


def texts(source) -> list:
    return [source.read_annotations(i)["text"] for i in range(len(source))]


def grey(source) -> list:
    return [int(images.decode(source[i]["image"]).mean()) for i in range(len(source))]


def read_labels(source) -> dict:
    """The labels of each image as ids, by (file name, grey value)."""
    assert all(source[i]["text"] == () for i in range(len(source)))
    of_image = zip(source.names(), grey(source), labels(source), strict=True)
    return {(name.rpartition("/")[2], value): {source.classes[i] for i in of} for name, value, of in of_image}


@pytest.mark.parametrize("header", ["filepath,title", "Image,Caption", "url,text,path", "img_path,caption"])
def test_columns_are_found_by_their_names(tmp_path, header):
    write(tmp_path / "in/a.jpg", jpeg(50))
    row = {"filepath": "in/a.jpg", "image": "in/a.jpg", "img_path": "in/a.jpg", "path": "in/a.jpg", "url": "x.jpg"}
    row |= {"title": "a cat", "caption": "a cat", "text": "a cat"}
    fields = ",".join(row[name.lower()] for name in header.split(","))
    source = open_source(str(write(tmp_path / "pairs.csv", f"{header}\n{fields}\n")), DATA, "train")
    assert source[0] == {"image": jpeg(50), "text": ("a cat",), "label": (), "name": f"{tmp_path}/in/a.jpg"}


def test_columns_can_be_named(tmp_path):
    write(tmp_path / "a.jpg", jpeg(50))
    write(tmp_path / "x.csv", "caption,where,de,fr\nno,a.jpg,eine Katze,un chat\n")
    spec = f"{tmp_path}/x.csv#image=where,caption=de,caption=fr"
    for named in (spec, f"csv:{spec}"):
        source = open_source(named, DATA, "train")
        assert texts(source) == [("eine Katze", "un chat")] and grey(source) == [50]
    with pytest.raises(ValueError, match="x.csv has no column Where; found: caption, where, de, fr"):
        open_source(f"{tmp_path}/x.csv#image=Where", DATA, "train")
    with pytest.raises(ValueError, match="names columns by 'where'; expected image=COLUMN, caption=COLUMN"):
        open_source(f"{tmp_path}/x.csv#where", DATA, "train")
    with pytest.raises(ValueError, match="x.csv has no column of images .* found: caption, where, de, fr; name it: "):
        open_source(f"{tmp_path}/x.csv", DATA, "train")
    write(tmp_path / "x#1.csv", "path,caption\na.jpg,a cat\n")
    assert texts(open_source(f"{tmp_path}/x#1.csv", DATA, "train")) == [("a cat",)]


def test_rows_of_one_image_are_one_record_with_several_captions(tmp_path, caplog):
    for i, name in enumerate("abc"):
        write(tmp_path / f"{name}.jpg", jpeg(50 * i))
    rows = [
        "b.jpg\ta dog, big",
        "a.jpg\ta cat",
        'b.jpg\t"a ""good"" dog"',
        "c.jpg\t",
        "gone.jpg\ta hen",
        "a.jpg\ta cat",
    ]
    file = write(tmp_path / "pairs.tsv", "\n".join(["filepath\ttitle", *rows]))
    with caplog.at_level(logging.WARNING):
        source = open_source(str(file), DATA, "train")
    assert texts(source) == [("a dog, big", 'a "good" dog'), ("a cat",)] and grey(source) == [50, 0]
    assert source.excluded == {"no_caption": 1, "missing_images": 1}
    assert "1 of 4 rows have no caption and are left out" in caplog.text
    assert "1 of 3 annotated images are not in" in caplog.text and "(gone.jpg)" in caplog.text
    assert texts(open_source(str(file), DATA, "test")) == [*texts(source), ()]


def test_a_numbered_family_of_columns_has_several_captions(tmp_path):
    write(tmp_path / "a.jpg", jpeg(0))
    write(tmp_path / "x.csv", "file_name,caption_0,caption_1,caption_2\na.jpg,a cat,,a pet\n")
    assert texts(open_source(f"{tmp_path}/x.csv", DATA, "train")) == [("a cat", "a pet")]


def test_a_file_without_a_header(tmp_path):
    write(tmp_path / "x.csv", "a.jpg,a cat\nb.jpg,a dog\n")
    with pytest.raises(ValueError, match="x.csv has no line with the names of its columns.*sed -i"):
        open_source(f"{tmp_path}/x.csv", DATA, "train")


def test_the_copy_in_the_cache_is_used_again_and_replaced_by_newer_ones(tmp_path, home):
    write(tmp_path / "a.jpg", jpeg(0))
    file = write(tmp_path / "x.csv", "path,caption\na.jpg,a cat\n")
    first = open_source(str(file), DATA, "train")
    (copy,) = home.rglob("*.arrow")
    written = copy.stat().st_mtime_ns
    again = open_source(str(file), DATA, "train")
    assert copy.stat().st_mtime_ns == written and again.fingerprint() == first.fingerprint()
    write(file, "path,caption\na.jpg,a dog\n")
    os.utime(file, (1, 1))
    assert texts(open_source(str(file), DATA, "train")) == [("a dog",)]
    assert len(list(home.rglob("*.arrow"))) == 1
    assert texts(first) == [("a cat",)]


def test_the_fingerprint_tells_changed_images_and_not_a_copied_folder(tmp_path):
    write(tmp_path / "x/a.jpg", jpeg(0))
    write(tmp_path / "x/x.csv", "path,caption\na.jpg,a cat\n")
    before = open_source(f"{tmp_path}/x/x.csv", DATA, "train").fingerprint()
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    os.utime(tmp_path / "y/x.csv", (1, 1))
    assert open_source(f"{tmp_path}/y/x.csv", DATA, "train").fingerprint() == before
    os.utime(tmp_path / "y/a.jpg", (1, 1))
    assert open_source(f"{tmp_path}/y/x.csv", DATA, "train").fingerprint() != before


def test_a_source_is_pickled_as_the_path_of_its_table(tmp_path, home):
    rows = "".join(f"{i}.jpg,caption {i}\n" for i in range(3000))
    for i in range(3000):
        write(tmp_path / f"{i}.jpg", b"")
    write(tmp_path / "x.csv", f"path,caption\n{rows}")
    source = open_source(f"{tmp_path}/x.csv", DATA, "train")
    pickled = pickle.dumps(source)
    assert len(pickled) < 2000
    assert pickle.loads(pickled).read_annotations(2999)["text"] == ("caption 2999",)
    next(home.rglob("*.arrow")).write_bytes(b"")
    with pytest.raises(ValueError, match="is no Arrow file, or is cut off"):
        pickle.loads(pickled)


def test_images_at_addresses_are_fetched(tmp_path, caplog):
    write(tmp_path / "files/a.jpg", jpeg(50))
    with serve(tmp_path / "files") as server, caplog.at_level(logging.WARNING):
        write(tmp_path / "x.csv", f"url,caption\n{server.url}/a.jpg,a cat\n{server.url}/gone.jpg,a dog\nfile:///x,no\n")
        source = open_source(f"{tmp_path}/x.csv", DATA, "train")
        assert source[0]["image"] == jpeg(50) and source[0]["name"] == f"{server.url}/a.jpg"
        with pytest.raises(BadSample, match="its address cannot be fetched: there is no file"):
            source[1]
        with pytest.raises(BadSample, match="its address begins with file://, which is not fetched"):
            source[2]
    assert "3 images are at addresses" in caplog.text and "img2dataset --url_list" in caplog.text


def test_labels_of_several_words_are_one_class_unless_separated(tmp_path, caplog):
    for name in "abc":
        write(tmp_path / f"{name}.jpg", jpeg(0))
    text = "path,labels\na.jpg,golden retriever\nb.jpg,cat\nc.jpg,golden retriever\n"
    with caplog.at_level(logging.WARNING):
        source = open_source(str(write(tmp_path / "x.csv", text)), DATA, "test")
    assert source.classes == ["cat", "golden retriever"] and labels(source) == [(1,), (0,), (1,)]
    assert "'golden retriever' is one class" in caplog.text and "separate several by ;" in caplog.text
    codes = "path,labels\na.jpg,/m/01 /m/02\nb.jpg,7 12\nc.jpg,n01440764\n"
    source = open_source(str(write(tmp_path / "y.csv", codes)), DATA, "test")
    assert source.classes == ["/m/01", "/m/02", "12", "7", "n01440764"]


def test_csv_of_paths_and_labels(tmp_path):
    for name, value in (("a.jpg", 0), ("in/b.jpg", 50), ("c.jpg", 100), ("d.jpg", 150)):
        write(tmp_path / name, jpeg(value))
    text = "split,path,labels\ntest,a.jpg,n2 n1\ntest,in/b.jpg,\ntest,c.jpg, n1 n1\ntest,c.jpg,n3\n"
    source = open_source(f"csv:{write(tmp_path / 'x.csv', text)}", DATA, "test")
    assert source.classes == ["n1", "n2", "n3"] and source.excluded == {}
    assert read_labels(source) == {
        ("a.jpg", 0): {"n1", "n2"},
        ("b.jpg", 50): set(),
        ("c.jpg", 100): {"n1", "n3"},
    }
    # With any ";" in the column, ids may contain blanks.
    text = "path,labels\r\na.jpg,hot dog; owl\r\nd.jpg,hot dog\r\n"
    source = open_source(str(write(tmp_path / "y.csv", text)), DATA, "test")
    assert read_labels(source) == {("a.jpg", 0): {"hot dog", "owl"}, ("d.jpg", 150): {"hot dog"}}
    source = open_source(str(write(tmp_path / "z.csv", "path,labels\na.jpg,10\nd.jpg,9\n")), DATA, "test")
    assert source.classes == ["9", "10"]


def test_faulty_csv(tmp_path, caplog):
    write(tmp_path / "a.jpg", jpeg(0))

    def read(text):
        return open_source(str(write(tmp_path / "x.csv", text)), DATA, "test")

    with pytest.raises(ValueError, match="x.csv has no column of captions or labels .*; found: path, kind; name it: "):
        read("path,kind\na.jpg,n1\n")
    with pytest.raises(ValueError, match="x.csv has no column of images .*; found: nothing"):
        read("")
    with pytest.raises(ValueError, match="x.csv, line 3 has 1 fields, the header 2"):
        read("path,labels\na.jpg,n1\nb.jpg\n")
    with pytest.raises(ValueError, match="x.csv, line 2: the path is empty"):
        read("path,labels\n,n1\n")
    with pytest.raises(FileNotFoundError, match=r"none of the 2 annotated images is in .* \(b.jpg, c.jpg\)"):
        read("path,labels\nb.jpg,n1\nc.jpg,n1\n")
    with pytest.raises(FileNotFoundError, match="there are no annotations"):
        read("path,labels\n")
    with pytest.raises(FileNotFoundError, match="there is no file .*none.csv"):
        open_source(str(tmp_path / "none.csv"), DATA, "test")
    with caplog.at_level(logging.WARNING):
        source = read("path,labels\na.jpg,n1\nb.jpg,n2\n")
    assert len(source) == 1 and source.classes == ["n1", "n2"] and source.excluded == {"missing_images": 1}
    assert "1 of 2 annotated images are not in" in caplog.text and "(b.jpg)" in caplog.text


def parquet_table(**columns) -> pa.Table:
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.table(columns).replace_schema_metadata(metadata)


def encoded(*values) -> list:
    return [{"bytes": jpeg(value), "path": None} for value in values]


def test_parquet_with_images(tmp_path, home):
    for number, start in enumerate((0, 100)):
        table = parquet_table(
            id=[1, 2, 3],
            image=encoded(*range(start, start + 60, 20)),
            captions=[["a cat", "a pet"], [], ["a dog"]],
            label=[0, 1, -1],
        )
        parquet.write_table(table, tmp_path / f"train-{number}.parquet")
    source = open_source(f"{tmp_path}/train-*.parquet", DATA, "train")
    assert texts(source) == [("a cat", "a pet"), ("a dog",)] * 2 and source.excluded == {"no_caption": 2}
    assert grey(source) == [0, 40, 100, 140] and labels(source) == [(0,), ()] * 2 and source.classes == ["cat", "dog"]
    assert list(source.names())[1] == f"{tmp_path}/*.parquet:2"
    assert pickle.loads(pickle.dumps(source))[1] == source[1]
    again = open_source(str(tmp_path), DATA, "train")
    assert again.fingerprint() == source.fingerprint() and len(list(home.rglob("*.arrow"))) == 1
    with pytest.raises(ValueError, match="has parquet files of train, and none of test"):
        open_source(str(tmp_path), DATA, "test")


def test_parquet_with_paths_and_names_in_capitals(tmp_path):
    write(tmp_path / "a.jpg", jpeg(50))
    parquet.write_table(pa.table({"URL": ["a.jpg", "b.jpg"], "TEXT": ["a cat", "a dog"]}), tmp_path / "x.parquet")
    source = open_source(f"{tmp_path}/x.parquet", DATA, "train")
    assert texts(source) == [("a cat",)] and grey(source) == [50] and source.excluded == {"missing_images": 1}


def test_captions_in_structs_and_class_ids(tmp_path):
    table = pa.table(
        {
            "image": pa.array([jpeg(0), jpeg(50)], pa.binary()),
            "sentences": [[{"raw": "a cat", "id": 1}, {"raw": "a pet", "id": 2}], [{"raw": "a dog", "id": 3}]],
            "category": [["n02", "n10"], ["n01"]],
        }
    )
    parquet.write_table(table, tmp_path / "x.parquet")
    source = open_source(f"parquet:{tmp_path}/x.parquet", DATA, "test")
    assert texts(source) == [("a cat", "a pet"), ("a dog",)] and source.classes == ["n01", "n02", "n10"]
    assert labels(source) == [(1, 2), (0,)] and grey(source) == [0, 50]


def test_faulty_parquet(tmp_path):
    parquet.write_table(pa.table({"image": [1], "caption": ["a"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="x.parquet has no column of images .* found: image, caption"):
        open_source(f"{tmp_path}/x.parquet", DATA, "train")
    parquet.write_table(pa.table({"image": encoded(0), "n": [1.0]}), tmp_path / "y.parquet")
    with pytest.raises(ValueError, match="y.parquet has no column of captions .* found: image, n"):
        open_source(f"{tmp_path}/y.parquet", DATA, "train")
    write(tmp_path / "z.parquet", b"<html>")
    with pytest.raises(ValueError, match="z.parquet cannot be read"):
        open_source(f"{tmp_path}/z.parquet", DATA, "train")
    with pytest.raises(ValueError, match="expected a path on this machine"):
        open_source("s3://bucket/x.parquet", DATA, "train")


def test_both_formats_of_arrow_files(tmp_path):
    table = pa.table({"n": np.arange(5)})
    for name, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        with new(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    both = ArrowTable([tmp_path / "stream", tmp_path / "file"])
    assert [both.value("n", row) for row in range(len(both))] == [0, 1, 2, 3, 4] * 2
