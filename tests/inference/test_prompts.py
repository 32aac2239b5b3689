"""Class names and prompt templates, from files and from the command line."""

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
