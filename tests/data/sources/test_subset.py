"""Samples that are left out by name, and classes that are kept."""

import numpy as np
import pytest

from zslflax.data.sources.labelled import LabelledImages
from zslflax.data.sources.subset import Subset, exclude_samples, keep_classes


class Named(list):
    """A source of which each record is its name."""

    def names(self):
        return iter(self)


def test_named_samples_are_left_out(tmp_path, caplog):
    file = tmp_path / "some.csv"
    file.write_text('score,name\n0.1,"a:2, and more"\n0.2,b:0\n0.3,elsewhere\n')
    a, b, c = Named(["a:0", "a:1", "a:2, and more"]), Named(["b:0"]), Named(["c:0"])
    with caplog.at_level("INFO", logger="zslflax"):
        remaining = exclude_samples([a, b, c], str(file))
    assert [[source[i] for i in range(len(source))] for source in remaining] == [["a:0", "a:1"], [], ["c:0"]]
    assert [list(source.names()) for source in remaining] == [["a:0", "a:1"], [], ["c:0"]]
    assert "excluded 2 of 5 training samples" in caplog.text and "names 3" in caplog.text
    assert exclude_samples([a, b], "") == [a, b]
    file.write_text(file.read_text(), encoding="utf-8-sig")  # as spreadsheets write it
    assert list(map(len, exclude_samples([a, b, c], str(file)))) == [2, 0, 1]
    with pytest.raises(ValueError, match="none of the 3 names .*names like 'c:0'; the file has names like 'a:2"):
        exclude_samples([c], str(file))
    file.write_text("score,caption\n0.1,x\n")
    with pytest.raises(ValueError, match="has no column name; found: score, caption"):
        exclude_samples([a], str(file))


def test_captions_in_the_file_may_hold_any_line_separator(tmp_path):
    """Only CR and LF end a row of a CSV file."""
    file = tmp_path / "some.csv"
    file.write_text("name,caption\na:0,one\u2028two\x85three\x0cfour\na:2,x\n", encoding="utf-8")
    (remaining,) = exclude_samples([Named(["a:0", "a:1", "a:2"])], str(file))
    assert list(remaining.names()) == ["a:1"]


def test_a_subset_has_the_classes_and_negatives_of_its_records():
    source = LabelledImages(["a", "b", "c"], [(0,), (1,), (0,)], ["x", "y"], [(1,), (), (1,)], {"missing_images": 4})
    subset = Subset(source, np.array([0, 2]))
    assert (subset.classes, subset.negatives, subset.excluded) == (["x", "y"], [(1,), (1,)], {"missing_images": 4})
    assert list(subset.names()) == ["a", "c"]


def test_kept_classes_are_numbered_in_their_order():
    labels = [(0,), (1, 2), (3,), (2,), ()]
    source = LabelledImages(list("abcde"), labels, ["ant", "bee", "cat", "dog"], [(3,), (), (0,), (1,), ()])
    kept = keep_classes(source, ["dog", "bee"])
    assert kept.classes == ["dog", "bee"] and list(kept.names()) == ["b", "c"]
    assert [kept.read_annotations(i)["label"] for i in range(2)] == [(1,), (0,)]
    assert kept.negatives == [(), ()] and keep_classes(source, ["cat", "ant"]).negatives == [(), (), ()]
    assert keep_classes(source, ["cat"], ["not", "asked"]).classes == ["cat"]


def test_labels_without_names_are_kept_by_names_that_others_give(tmp_path):
    for name in "ab":
        (tmp_path / name).write_bytes(b"image")
    source = LabelledImages([tmp_path / "a", tmp_path / "b"], [(0,), (1,)])
    kept = keep_classes(source, ["bee"], ["ant", "bee"])
    assert len(kept) == 1 and kept[0] == {"image": b"image", "label": (0,), "name": str(tmp_path / "b"), "text": ()}
    with pytest.raises(ValueError, match="the labels are numbers; give the class names too"):
        keep_classes(source, ["bee"])


def test_classes_that_cannot_be_kept_are_refused():
    source = LabelledImages(["a", "b"], [(0,), (0,)], ["ant", "bee"])
    with pytest.raises(ValueError, match="novel.txt has 1 classes that the images lack, such as 'bea'; nearest: bee"):
        keep_classes(source, ["ant", "bea"], name="novel.txt")
    with pytest.raises(ValueError, match="has 'ant' twice"):
        keep_classes(source, ["ant", "ant"])
    with pytest.raises(ValueError, match="none of the 2 images is of the classes"):
        keep_classes(source, ["bee"])
