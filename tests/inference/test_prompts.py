"""Class names and prompt templates, from files and from the command line."""

import json

import pytest

from zslflax.config import default_config
from zslflax.inference.prompts import read_class_names, read_templates, resolve_templates


def write(path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def test_class_names_of_a_file_are_labelled_by_their_line(tmp_path):
    text = "\ufefftench, Tinca tinca\r\n  crème brûlée \r\ncrane\r\ncrane\r\n\r\n"
    path = write(tmp_path / "names.txt", text.encode())
    assert read_class_names(path) == ["tench, Tinca tinca", "crème brûlée", "crane", "crane"]
    # str.splitlines would end lines here; a text file does not.
    path = write(tmp_path / "separators.txt", "a\u2028b\nc\x0bd".encode())
    assert read_class_names(path) == ["a\u2028b", "c\x0bd"]


def test_class_names_may_be_written_with_commas_between_them():
    assert read_class_names("cat, red circle ,cat") == ["cat", "red circle", "cat"]
    many = [f"name {i}" for i in range(5000)]  # longer than a file name may be
    assert read_class_names(",".join(many)) == many


def test_errors_name_the_class_name_that_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"names.txt, line 2 is empty"):
        read_class_names(write(tmp_path / "names.txt", b"a\n \nc\n"))
    with pytest.raises(ValueError, match="is empty; expected one entry a line"):
        read_class_names(write(tmp_path / "none.txt", b"\n\n"))
    with pytest.raises(ValueError, match="name 2 of 3 is empty"):
        read_class_names("a,,b")
    with pytest.raises(ValueError, match="'/no/such/names.txt' is neither a file"):
        read_class_names("/no/such/names.txt")


def test_templates_come_from_a_file_or_as_they_are(tmp_path):
    path = write(tmp_path / "templates.txt", b"a photo of a {}.\n{}\n")
    assert read_templates(path) == ["a photo of a {}.", "{}"]
    assert read_templates("a {}, really") == ["a {}, really"]
    assert read_templates(("{}", "one {}")) == ["{}", "one {}"]
    with pytest.raises(ValueError, match="templates.txt, line 2: 'a photo'"):
        read_templates(write(tmp_path / "templates.txt", b"{}\na photo\n"))
    with pytest.raises(ValueError, match=r"template 1: '/no/such.txt' has no {} .* is no file"):
        read_templates("/no/such.txt")
    with pytest.raises(ValueError, match="at least one"):
        read_templates(())


def test_resolve_templates_replaces_a_file_by_its_templates(tmp_path):
    config = default_config()
    config.eval.templates = (write(tmp_path / "templates.txt", b"a photo of a {}.\n{}\n"),)
    resolve_templates(config)
    assert config.eval.templates == ("a photo of a {}.", "{}")
    resolve_templates(config)
    assert config.eval.templates == ("a photo of a {}.", "{}")


@pytest.mark.parametrize(
    "value",
    [
        ["cat", "golden retriever"],
        {"0": "cat", "1": "golden retriever"},
        {"0": ["n02121808", "cat"], "1": ["n02099601", "golden retriever"]},
        {"golden retriever": 1, "cat": 0},
    ],
)
def test_class_names_may_be_json(tmp_path, value):
    (tmp_path / "names.json").write_text(json.dumps(value, indent=1))
    assert read_class_names(str(tmp_path / "names.json")) == ["cat", "golden retriever"]
    assert read_class_names(json.dumps(value)) == ["cat", "golden retriever"]


@pytest.mark.parametrize("value", [{"0": "cat", "2": "dog"}, [1, 2], [], {"a": {"b": 1}}, ["cat", ""], {"cat": True}])
def test_json_of_another_form_is_refused(tmp_path, value):
    (tmp_path / "names.json").write_text(json.dumps(value))
    with pytest.raises(ValueError, match="names.json is JSON, expected a list of names"):
        read_class_names(str(tmp_path / "names.json"))


@pytest.mark.parametrize(
    "lines",
    [
        ["n01440764 tench, Tinca tinca", "n01443537 goldfish, Carassius auratus"],
        ["n01440764\ttench", "n01443537\tgoldfish"],
        ["/m/01,Cat", "/m/0bt9lr,Dog"],
        ["id,name", "7,cat", "9,dog"],
        ["0,cat", "1,dog"],
        ["1: cat", "2: dog"],
    ],
)
def test_ids_beside_class_names_are_refused(tmp_path, lines):
    (tmp_path / "names.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="names.txt has lines such as .*, with an id beside the name, expected names"):
        read_class_names(str(tmp_path / "names.txt"))


def test_names_with_commas_and_numbers_in_a_file_are_names(tmp_path):
    names = ["tench, Tinca tinca", "747 aircraft", "7 up", "[unused]", "id card"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    assert read_class_names(str(tmp_path / "names.txt")) == names
