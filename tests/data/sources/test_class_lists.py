"""Lists of classes in the formats of ImageNet, Open Images and ML-Images: reading, union and errors."""

import pytest

from zslflax.data.sources.class_lists import read_classes
from zslflax.evaluation.label_space import read_label_space

ML_IMAGES = b"category_index\tcategory_id\tindex_of_parent_category\tcategory name\n"


def write(path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def test_classes_are_read_in_the_format_of_each_dataset(tmp_path):
    plain = write(tmp_path / "ids.txt", b"n2\nn1\n\n")
    assert read_classes(plain) == (["n2", "n1"], {})
    words = write(tmp_path / "words.txt", b"n3\tcrane, hoist\nn1\tcrane\n")  # ImageNet's words.txt
    assert read_classes(words) == (["n3", "n1"], {"n3": "crane, hoist", "n1": "crane"})
    # Not line ends, although str.splitlines splits there.
    separators = write(tmp_path / "separators.txt", "n1\ta\u2028b\nn2\tc\x0bd\n".encode())
    assert read_classes(separators) == (["n1", "n2"], {"n1": "a\u2028b", "n2": "c\x0bd"})
    # Tencent ML-Images' dictionary.
    lines = b'0\tn00002452\t-1\tthing\n1\tn05220461\t0\t"body" part, limb\n'
    dictionary = write(tmp_path / "d.txt", ML_IMAGES + lines)
    assert read_classes(dictionary) == (
        ["n00002452", "n05220461"],
        {"n00002452": "thing", "n05220461": '"body" part, limb'},
    )
    first = write(tmp_path / "first.txt", b"n00002452\t-1\tthing\nn05220461\t0\tbody part, limb\n")
    names = {"n00002452": "thing", "n05220461": "body part, limb"}
    assert read_classes(first) == (["n00002452", "n05220461"], names)
    # Open Images' class descriptions, which older versions have without a header.
    rows = b'/m/011k07,Tortoise\n/m/0_k,"Pot, ""iron"""\n/m/2,Tortoise\n'
    expected = (
        ["/m/011k07", "/m/0_k", "/m/2"],
        {"/m/011k07": "Tortoise", "/m/0_k": 'Pot, "iron"', "/m/2": "Tortoise"},
    )
    assert read_classes(write(tmp_path / "bare.csv", rows)) == expected
    header = "\ufeffLabelName,DisplayName\r\n".encode()
    assert read_classes(write(tmp_path / "new.csv", header + rows)) == expected


def test_files_are_united_by_id_and_the_first_place_and_name_count(tmp_path):
    many = write(tmp_path / "21k.txt", b"n3\tcrane\nn1\tcrane\n")
    few = write(tmp_path / "1k.txt", b"n4\towl\nn1\tbird\n")
    ids, names = read_classes(f"{many},{few}")
    assert ids == ["n3", "n1", "n4"] and names == {"n3": "crane", "n1": "crane", "n4": "owl"}
    assert read_label_space(classes=f"{many},{few}").class_names == ["crane", "crane", "owl"]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.csv", b"/m/1,dog\n/m/2,\n", "line 2: the name is empty"),
        ("a.csv", b"/m/1,dog\n,cat\n", "line 2: the id is empty"),
        ("a.csv", b"/m/1\n/m/2\n", r"starts with \['/m/1'\], expected ID,NAME"),
        ("a.csv", b"/m/1,dog,1\n", r"starts with \['/m/1', 'dog', '1'\], expected ID,NAME"),
        ("a.csv", b"/m/1,dog\n/m/2,Pot, iron\n", "line 2 has 3 fields, the first 2"),
        ("a.csv", b"LabelName,DisplayName\n", "has no classes"),
        ("a.txt", b"n1\nn2\tdog\n", "line 2 has 2 fields, the first 1"),
        ("a.txt", b"n1\nn2\nn1\n", "line 3: the id 'n1' is that of line 1 too"),
        ("a.txt", b"n1\tdog\n\t\nn2\t\n", "line 3: the name is empty"),
        ("a.txt", b"n1\t0\tdog\n", "expected ID or ID <tab> NAME"),
        ("a.txt", ML_IMAGES + b"0\tn1\t-1\tdog\n2\tn2\t-1\tcat\n", "line 3: .* number is 2, expected 1"),
        ("a.txt", ML_IMAGES + b"0\tn1\t-1\tdog\n1\tn2\t-1\n", "line 3 has 1 fields, the first 2"),
        ("a.txt", b"\n", "has no classes"),
    ],
)
def test_malformed_files_of_classes_are_refused(tmp_path, name, data, message):
    with pytest.raises(ValueError, match=message):
        read_classes(write(tmp_path / name, data))


def test_a_synset_mapping_has_ids_and_names_and_json_is_refused(tmp_path):
    path = tmp_path / "LOC_synset_mapping.txt"
    path.write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    names = {"n01440764": "tench, Tinca tinca", "n01443537": "goldfish"}
    assert read_classes(str(path)) == (["n01440764", "n01443537"], names)
    for text in ('["n01440764"]', '{"0": ["n01440764", "tench"]}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="mapping.txt is JSON; expected lines with the ids"):
            read_classes(str(path))


def test_a_missing_file_of_classes_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no file 'none.txt' of classes"):
        read_classes(write(tmp_path / "ids.txt", b"n1\n") + ",none.txt")
