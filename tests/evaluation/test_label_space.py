"""Label spaces from files and from the command line."""

import numpy as np
import pytest

from zslflax.evaluation.label_space import LabelSpace, members, repeated
from zslflax.evaluation.wordnet import WordNet


def write(path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def test_label_space_marks_every_class_of_an_unseen_name(tmp_path):
    unseen = write(tmp_path / "unseen.txt", b"crane\n")
    space = LabelSpace.read("crane,owl,crane,kiwi", unseen, "hoist,barn owl,bird,fruit")
    assert space.names == ["crane", "owl", "crane", "kiwi"] and len(space) == 4
    assert space.synonyms == ["hoist", "barn owl", "bird", "fruit"]
    np.testing.assert_array_equal(space.unseen, [True, False, True, False])
    np.testing.assert_array_equal(LabelSpace.read("a,b", "b").unseen, [False, True])
    plain = LabelSpace.read("a,b")
    assert plain.synonyms is None and plain.unseen.dtype == bool and not plain.unseen.any()


def test_label_space_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="'red circel' is none of the 2 class names; .* is 'red circle'"):
        members(["red circle", "owl"], ["owl", "red circel"])
    with pytest.raises(ValueError, match="'red circel' is none of the 2 class names; .* is 'red circle'"):
        LabelSpace.read("red circle,owl", "red circel")
    with pytest.raises(ValueError, match="each of 3 names, in their order, found 2"):
        LabelSpace.read("a,b,c", synonyms="d,e")
    with pytest.raises(ValueError, match="each of 2 names, found shape"):
        LabelSpace(["a", "b"], np.zeros(3, bool))


def test_repeated_names():
    assert repeated(["crane", "owl", "crane", "kiwi"]) == {"crane": [0, 2]}


WORDNET = WordNet(
    {"n00000001": ("animal", "beast"), "n00000002": ("dog",), "n00000003": ("dog", "frank")},
    {"n00000001": (), "n00000002": ("n00000001",), "n00000003": ("n00000001",)},
)


def test_what_classes_are_called(tmp_path):
    ids = write(tmp_path / "ids.txt", b"n00000002\nn00000001\nn00000003\n")
    space = LabelSpace.read(classes=ids, wordnet=WORDNET, unseen="dog")
    assert space.names == ["dog", "animal, beast", "dog, frank"]
    assert space.ids == ["n00000002", "n00000001", "n00000003"]
    np.testing.assert_array_equal(space.unseen, [True, False, False])
    unseen = write(tmp_path / "unseen.txt", b"n00000003\nn00000001\n")  # ids, where names are no keys
    np.testing.assert_array_equal(LabelSpace.read("a,a,a", unseen, classes=ids).unseen, [False, True, True])
    one = LabelSpace.read("a,b,a", "n00000003", classes=ids)
    np.testing.assert_array_equal(one.unseen, [False, False, True])
    assert LabelSpace.read(own=["cat", "hot dog"]).names == ["cat", "hot dog"]
    assert LabelSpace.read("x,y", own=["n00000001", "n00000002"]).names == ["x", "y"]
    assert LabelSpace.read(own=["n00000001"], wordnet=WORDNET).names == ["animal, beast"]
    assert LabelSpace.read("x,y").ids is None

    for codes in (["n00000001", "cat"], ["/m/011k07", "cat"], ["0", "cat"]):
        with pytest.raises(ValueError, match=f"1 of 2 classes have no name, the first is '{codes[0]}'"):
            LabelSpace.read(own=codes)
    with pytest.raises(ValueError, match="2 of 2 ids are not in this WordNet, the first is 'n1'"):
        LabelSpace.read(own=["n1", "n2"], wordnet=WORDNET)
    with pytest.raises(ValueError, match=r"for each of 3 classes \(0, 1, 5, …\), in their order, found 2"):
        LabelSpace.read("x,y", own=["0", "1", "5"])
    with pytest.raises(ValueError, match="expected names or classes"):
        LabelSpace.read()
    with pytest.raises(ValueError, match="a different id for each of 2 names, .* found 2, 1 of them"):
        LabelSpace(["a", "b"], np.zeros(2, bool), ids=["n1", "n1"])


def test_labels_of_a_source_become_labels_of_the_space():
    space = LabelSpace.read(own=["cat", "dog", "owl"])
    labels, outside = space.relabel([(0, 2), (1,), (), (2, 1)], ["owl", "kiwi", "cat"])
    assert labels == [(2, 0), (), (), (0,)] and outside == 2
    assert space.relabel([(0, 2), ()]) == ([(0, 2), ()], 0)
    assert space.relabel([], ["owl"]) == ([], 0)
    with pytest.raises(ValueError, match="none of the source's 2 classes, such as 'ox', is .* such as 'cat'"):
        space.relabel([(0,)], ["ox", "kiwi"])
    with pytest.raises(ValueError, match="such as 'cat', is in .* has no ids"):
        LabelSpace.read("cat,dog").relabel([(0,)], ["cat", "dog"])
    for label in (-1, 3):
        with pytest.raises(ValueError, match="labels below 3, found"):
            space.relabel([(0,), (label,)])
    with pytest.raises(ValueError, match="labels below 1, found 0 … 1"):
        space.relabel([(0, 1)], ["cat"])
