"""Label spaces from files and from the command line."""

import numpy as np
import pytest

from zslflax.evaluation.label_space import LabelSpace, mark_classes, read_label_space, repeated_names
from zslflax.evaluation.wordnet import WordNet


def write(path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def test_all_classes_that_share_an_unseen_name_are_unseen(tmp_path):
    unseen = write(tmp_path / "unseen.txt", b"crane\n")
    space = read_label_space("crane,owl,crane,kiwi", unseen, "hoist,barn owl,bird,fruit")
    assert space.class_names == ["crane", "owl", "crane", "kiwi"] and len(space) == 4
    assert space.synonyms == ["hoist", "barn owl", "bird", "fruit"]
    np.testing.assert_array_equal(space.unseen, [True, False, True, False])
    np.testing.assert_array_equal(read_label_space("a,b", "b").unseen, [False, True])
    plain = read_label_space("a,b")
    assert plain.synonyms is None and plain.unseen.dtype == bool and not plain.unseen.any()


def test_fields_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match="'red circel' is none of the 2 class names; .* is 'red circle'"):
        mark_classes(["red circle", "owl"], ["owl", "red circel"])
    with pytest.raises(ValueError, match="'red circel' is none of the 2 class names; .* is 'red circle'"):
        read_label_space("red circle,owl", "red circel")
    with pytest.raises(ValueError, match="each of 3 names, in their order, found 2"):
        read_label_space("a,b,c", synonyms="d,e")
    with pytest.raises(ValueError, match="each of 2 names, found shape"):
        LabelSpace(["a", "b"], np.zeros(3, bool))


def test_names_that_several_classes_share_are_found():
    assert repeated_names(["crane", "owl", "crane", "kiwi"]) == {"crane": [0, 2]}


WORDNET = WordNet(
    {"n00000001": ("animal", "beast"), "n00000002": ("dog",), "n00000003": ("dog", "frank")},
    {"n00000001": (), "n00000002": ("n00000001",), "n00000003": ("n00000001",)},
)


def test_classes_get_their_names_from_files_wordnet_or_ids(tmp_path):
    ids = write(tmp_path / "ids.txt", b"n00000002\nn00000001\nn00000003\n")
    space = read_label_space(classes=ids, wordnet=WORDNET, unseen="dog")
    assert space.class_names == ["dog", "animal, beast", "dog, frank"]
    assert space.ids == ["n00000002", "n00000001", "n00000003"]
    np.testing.assert_array_equal(space.unseen, [True, False, False])
    unseen = write(tmp_path / "unseen.txt", b"n00000003\nn00000001\n")  # ids, where names are no keys
    np.testing.assert_array_equal(read_label_space("a,a,a", unseen, classes=ids).unseen, [False, True, True])
    one = read_label_space("a,b,a", "n00000003", classes=ids)
    np.testing.assert_array_equal(one.unseen, [False, False, True])
    assert read_label_space(source_classes=["cat", "hot dog"]).class_names == ["cat", "hot dog"]
    assert read_label_space("x,y", source_classes=["n00000001", "n00000002"]).class_names == ["x", "y"]
    assert read_label_space(source_classes=["n00000001"], wordnet=WORDNET).class_names == ["animal, beast"]
    assert read_label_space("x,y").ids is None
    source = {"source_classes": ["n00000003", "n00000002"], "source_names": ["sausage", "hound"]}
    assert read_label_space(**source).class_names == ["sausage", "hound"]
    two = write(tmp_path / "two.txt", b"n00000002\nn00000003\n")
    assert read_label_space(classes=two, **source).class_names == ["hound", "sausage"]
    assert read_label_space(classes=two, wordnet=WORDNET, **source).class_names == ["dog", "dog, frank"]
    named = write(tmp_path / "named.txt", b"n00000002\tpuppy\n")
    assert read_label_space(classes=f"{named},{two}", **source).class_names == ["puppy", "sausage"]

    for codes in (["n00000001", "cat"], ["/m/011k07", "cat"], ["0", "cat"]):
        with pytest.raises(ValueError, match=f"1 of 2 classes have no name, the first is '{codes[0]}'"):
            read_label_space(source_classes=codes)
    with pytest.raises(ValueError, match="2 of 2 ids are not in this WordNet, the first is 'n1'"):
        read_label_space(source_classes=["n1", "n2"], wordnet=WORDNET)
    with pytest.raises(ValueError, match=r"for each of 3 classes \(0, 1, 5, …\), in their order, found 2"):
        read_label_space("x,y", source_classes=["0", "1", "5"])
    with pytest.raises(ValueError, match="expected names or classes"):
        read_label_space()
    with pytest.raises(ValueError, match="a different id for each of 2 names, .* found 2, 1 of them"):
        LabelSpace(["a", "b"], np.zeros(2, bool), ids=["n1", "n1"])


def test_labels_of_a_source_are_translated_into_labels_of_the_space():
    space = read_label_space(source_classes=["cat", "dog", "owl"])
    labels, outside = space.relabel([(0, 2), (1,), (), (2, 1)], ["owl", "kiwi", "cat"])
    assert labels == [(2, 0), (), (), (0,)] and outside == 2
    assert space.relabel([(0, 2), ()]) == ([(0, 2), ()], 0)
    assert space.relabel([], ["owl"]) == ([], 0)
    with pytest.raises(ValueError, match="none of the source's 2 classes, such as 'ox', is .* such as 'cat'"):
        space.relabel([(0,)], ["ox", "kiwi"])
    with pytest.raises(ValueError, match="such as 'cat', is in .* has no ids"):
        read_label_space("cat,dog").relabel([(0,)], ["cat", "dog"])
    for label in (-1, 3):
        with pytest.raises(ValueError, match="labels below 3, found"):
            space.relabel([(0,), (label,)])
    with pytest.raises(ValueError, match="labels below 1, found 0 … 1"):
        space.relabel([(0, 1)], ["cat"])
