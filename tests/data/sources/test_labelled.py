"""Labelled images in the formats of their datasets, and the errors for faulty data."""

import csv
import logging
import os
import pickle

import numpy as np
import pytest

from tests.testing.images import jpeg, write
from tests.testing.shards import write_tar
from zslflax.config import default_config
from zslflax.data import images, pipeline
from zslflax.data.images import BadSample
from zslflax.data.sources.labelled import LabelledImages
from zslflax.data.sources.opening import open_source
from zslflax.data.sources.ready_sets import READERS
from zslflax.evaluation.label_space import read_label_space
from zslflax.evaluation.metrics import zero_shot_metrics
from zslflax.evaluation.results import flat_names

DATA = default_config().data


def read_labels(source) -> dict:
    """The labels of each image, as ids if the source has ids, by (file name, grey value)."""
    records = [source[i] for i in range(len(source))]
    assert all(record["text"] == () for record in records)
    ids = source.classes or range(1000)
    return {
        (record["name"].rpartition("/")[2], int(images.decode(record["image"]).mean())): {
            ids[label] for label in record["label"]
        }
        for record in records
    }


def test_subfolders_are_classes(tmp_path):
    for value, path in enumerate(["n02/x.JPEG", "n01/a.jpg", "n01/deep/b.png", "n10/c.webp"]):
        write(tmp_path / path, jpeg(50 * value))
    for path in ("n02/notes.txt", ".hidden/d.jpg", "readme.md"):
        write(tmp_path / path, b"")
    source = open_source(f"folder:{tmp_path}", DATA, "test")
    assert source.classes == ["n01", "n02", "n10"] and len(source) == 4
    assert read_labels(source) == {("a.jpg", 50): {"n01"}, ("b.png", 100): {"n01"}, ("x.JPEG", 0): {"n02"}} | {
        ("c.webp", 150): {"n10"}
    }
    batch = next(pipeline.eval_batches(pickle.loads(pickle.dumps(source)), batch_size=4, image_size=8, resize=8))
    assert batch["labels"] == [(0,), (0,), (1,), (2,)] and batch["valid"].all()


def test_what_programs_leave_in_folders_is_neither_a_class_nor_an_image(tmp_path):
    for path in ("cat/a.jpg", "cat/b.tif", "cat/c.JFIF", "cat/d.avif", "dog/e.bmp"):
        write(tmp_path / path, jpeg(0))
    clutter = (".ipynb_checkpoints/x.jpg", "@eaDir/x.jpg", "__MACOSX/cat/._a.jpg", "cat/._a.jpg", "lost+found/x.jpg")
    for path in (*clutter, *(f"cat/{path}" for path in clutter)):
        write(tmp_path / path, jpeg(0))
    source = open_source(str(tmp_path), DATA, "test")
    assert source.classes == ["cat", "dog"]
    assert [name.removeprefix(f"{tmp_path}/") for name in source.names()] == [
        *("cat/a.jpg", "cat/b.tif", "cat/c.JFIF", "cat/d.avif", "dog/e.bmp")
    ]


def test_a_pipe_that_is_named_like_an_image_is_a_bad_sample(tmp_path):
    write(tmp_path / "cat" / "a.jpg", jpeg(0))
    os.mkfifo(tmp_path / "cat" / "b.jpg")
    with open(tmp_path / "cat" / "c.jpg", "wb") as file:
        file.truncate(30 << 30)  # a sparse file of 30 GB
    source = open_source(str(tmp_path), DATA, "test")
    assert source[0]["image"] == jpeg(0)
    for index, file, message in ((1, "b.jpg", "its file is no regular file"), (2, "c.jpg", "its file is larger than")):
        with pytest.raises(BadSample, match=message) as error:
            source[index]
        assert error.value.name == str(tmp_path / "cat" / file)


def test_numeric_class_ids_are_in_numerical_order(tmp_path):
    for name in ("0", "10", "2"):
        write(tmp_path / name / "a.jpg", jpeg(0))
    assert open_source(str(tmp_path), DATA, "test").classes == ["0", "2", "10"]


def test_folders_without_images_or_classes(tmp_path, caplog):
    (tmp_path / "n01").mkdir()
    with pytest.raises(ValueError, match="none of the 1 subfolders .* has an image"):
        open_source(str(tmp_path), DATA, "test")
    write(tmp_path / "n02" / "a.jpg", jpeg(0))
    with caplog.at_level(logging.WARNING):
        assert open_source(str(tmp_path), DATA, "test").classes == [
            "n01",
            "n02",
        ]  # a class without images is a candidate nonetheless
    assert "1 classes of" in caplog.text and "(n01)" in caplog.text
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        open_source(f"folder:{tmp_path / 'none'}", DATA, "test")
    with pytest.raises(ValueError, match="n02 holds no captions.* subfolders or tars named by class; found: 1 × jpg"):
        open_source(str(tmp_path / "n02"), DATA, "test")
    write(tmp_path / "n03.tar", b"")
    with pytest.raises(ValueError, match="found both: n01, n03.tar"):
        open_source(str(tmp_path), DATA, "test")


def test_tars_are_classes(tmp_path):
    write_tar(tmp_path / "n02.tar", [(f"n02_{i}.JPEG", jpeg(10 * i)) for i in range(3)])
    write_tar(tmp_path / "n01.tar", [])  # a class counts even without images
    write_tar(tmp_path / "n03.tar", [("n03_7.JPEG", jpeg(200))])
    source = open_source(f"folder:{tmp_path}", DATA, "test")
    assert source.classes == ["n01", "n02", "n03"]
    assert [source[i]["label"] for i in range(len(source))] == [(1,), (1,), (1,), (2,)]
    assert source[3]["name"].endswith("n03.tar:n03_7")
    assert int(images.decode(source[2]["image"]).mean()) == 20
    again = pickle.loads(pickle.dumps(source))
    assert again[3] == source[3]


def test_an_unreadable_tar_does_not_change_the_labels_of_other_classes(tmp_path):
    for i in range(20):
        write_tar(tmp_path / f"n{i:02}.tar", [(f"n{i:02}_0.JPEG", jpeg(10 * i))])
    (tmp_path / "n05.tar").write_bytes(b"<html>not found</html>" * 100)
    source = open_source(f"folder:{tmp_path}", DATA, "test")
    assert len(source.classes) == 20
    assert [record["label"] for record in source] == [(i,) for i in range(20) if i != 5]


OPEN_IMAGES = [
    ("ImageID", "Source", "LabelName", "Confidence"),
    ("0001eeaf4aed83f9", "verification", "/m/0cmf2", "1"),
    ("0001eeaf4aed83f9", "verification", "/m/015p6", "0"),
    ("0001eeaf4aed83f9", "crowdsource-verification", "/m/0cmf2", "1"),
    ("000595fe6fee6369", "verification", "/m/015p6", "1.0"),
    ("000595fe6fee6369", "verification", "/m/04rky", "1"),
    ("000595fe6fee6369", "crowdsource-verification", "/m/04rky", "0"),
    ("00075905539074f2", "verification", "/m/04rky", "0"),
    ("ffffffffffffffff", "verification", "/m/9", "1"),
]


def open_images(folder, rows=OPEN_IMAGES):
    for value, name in enumerate(["0001eeaf4aed83f9", "000595fe6fee6369", "train_f/00075905539074f2"]):
        write(folder / "images" / f"{name}.jpg", jpeg(50 * value))
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return f"open_images:{folder / 'images'},{folder / 'labels.csv'}"


def test_open_images_distinguishes_labels_and_negatives(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        source = open_source(open_images(tmp_path), DATA, "test")
    assert read_labels(source) == {
        ("0001eeaf4aed83f9.jpg", 0): {"/m/0cmf2"},
        ("000595fe6fee6369.jpg", 50): {"/m/015p6"},
        ("00075905539074f2.jpg", 100): set(),
    }
    assert [{source.classes[c] for c in no} for no in source.negatives] == [{"/m/015p6"}, set(), {"/m/04rky"}]
    assert source.excluded == {"missing_images": 1, "disputed_labels": 1, "unnamed_labels": 0}
    assert "1 of 4 annotated images are not in" in caplog.text and "(ffffffffffffffff)" in caplog.text
    assert "1 labels of" in caplog.text and "count as neither" in caplog.text


def test_faulty_open_images(tmp_path):
    def read(*rows):
        return open_source(open_images(tmp_path, [*OPEN_IMAGES[:1], *rows]), DATA, "test")

    with pytest.raises(
        ValueError, match="labels.csv, line 2: the confidence is '0.7', expected a person's verdict, 1 or 0"
    ):
        read(("0001eeaf4aed83f9", "machine", "/m/1", "0.7"))
    with pytest.raises(ValueError, match="labels.csv, line 2: the label is empty"):
        read(("0001eeaf4aed83f9", "verification", "", "1"))
    with pytest.raises(FileNotFoundError, match="none of the 1 annotated images"):
        read(("ffffffffffffffff", "verification", "/m/1", "1"))
    spec = open_images(tmp_path, [("ImageID", "Source", "LabelName"), ("0001eeaf4aed83f9", "v", "/m/1")])
    with pytest.raises(ValueError, match="no column Confidence; found: ImageID, Source, LabelName"):
        open_source(spec, DATA, "test")
    with pytest.raises(FileNotFoundError, match="there is no file .*none.csv; expected open_images:FOLDER"):
        open_source(f"open_images:{tmp_path},none.csv", DATA, "test")
    with pytest.raises(FileNotFoundError, match="none is not a folder; expected open_images:FOLDER"):
        open_source("open_images:none,none.csv", DATA, "test")
    with pytest.raises(ValueError, match="expected open_images:FOLDER or open_images:FOLDER,LABELS.csv, found"):
        open_source("open_images:none", DATA, "test")
    spec = open_images(tmp_path)
    write(tmp_path / "images" / "again" / "000595fe6fee6369.png", jpeg(1))
    with pytest.raises(ValueError, match="two files are called by the same image id: .*000595fe6fee6369"):
        open_source(spec, DATA, "test")


def test_labelled_images_are_refused_for_training(tmp_path):
    for reader in READERS:
        with pytest.raises(ValueError, match="is a test set, and training needs pairs"):
            open_source(f"{reader}:{tmp_path}", DATA, "train")
    write(tmp_path / "cat" / "a.jpg", jpeg(0))
    with pytest.raises(ValueError, match="holds no captions: expected tar shards, or images with .*; found: 1 × jpg"):
        open_source(f"folder:{tmp_path}", DATA, "train")


def test_a_file_that_vanishes_raises_bad_sample(tmp_path):
    source = LabelledImages([tmp_path / "gone.jpg"], [(0,)], ["cat"])
    with pytest.raises(BadSample, match="its file cannot be read: there is no file") as caught:
        source[0]
    assert caught.value.name == str(tmp_path / "gone.jpg")


def test_open_images_from_files_to_metrics(tmp_path):
    source = open_source(open_images(tmp_path), DATA, "test")
    descriptions = "/m/zz,Never seen\n/m/04rky,Mammal\n/m/0cmf2,Airplane\n/m/015p6,Bird\n"
    file = write(tmp_path / "class-descriptions.csv", descriptions)
    space = read_label_space(classes=str(file), source_classes=source.classes)
    labels, outside = space.relabel(source.labels, source.classes)
    negatives, _ = space.relabel(source.negatives, source.classes)
    assert [[space.class_names[c] for c in of_image] for of_image in labels] == [["Airplane"], ["Bird"], []]
    assert negatives == [(3,), (), (1,)] and outside == 0
    class_emb = np.eye(4, dtype=np.float32)
    image_emb = np.array([[0, 0, 1, 2], [0, 0, 0, 1], [9, 9, 9, 9]], np.float32)
    found = flat_names(zero_shot_metrics(image_emb, class_emb, labels, negatives=negatives, ks=(1, 2)))
    assert found["hit@1"] == 0.5 and found["hit@2"] == 1.0
    assert (found["labelled"], found["unlabelled"]) == (2, 1)
    # Only the class bird counts: the first image is not a bird and scores 2, the second is one and scores 1.
    assert found["mAP"] == 0.5
