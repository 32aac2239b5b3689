"""Samples that are left out by name."""

import numpy as np
import pytest

from zslflax.data.sources.labelled import LabelledImages
from zslflax.data.sources.subset import Subset, exclude_samples


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
