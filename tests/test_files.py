"""Small files that are read: their contents, and errors that name the file and say what is wrong."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from zslflax import files
from zslflax.errors import MissingFileError, StorageError, UserError


@pytest.mark.parametrize(
    "content, kind, message",
    [
        (b"\xff\xfe", dict, r"a.json is not UTF-8 \(byte 0 is 0xff\)"),
        (b'{"a": ', dict, "a.json is not valid JSON"),
        (b"[1]", dict, "a.json holds a JSON list, expected dict"),
    ],
)
def test_json_that_cannot_be_read(tmp_path, content, kind, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        files.read_json(tmp_path / "a.json", kind)


def test_a_file_that_does_not_exist_or_is_a_folder(tmp_path):
    with pytest.raises(MissingFileError, match=f"there is no file {tmp_path}/a"):
        files.read_text(tmp_path / "a")
    with pytest.raises(StorageError, match=f"{tmp_path} cannot be read: Is a directory"):
        files.read_text(tmp_path)


def test_rows_have_line_numbers_and_stripped_fields(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffname,text\r\n\r\n a ,"one,\u2028two "\r\nb,c\r\n'.encode())
    assert files.read_rows(path) == [(1, ["name", "text"]), (3, ["a", "one,\u2028two"]), (4, ["b", "c"])]
    path.write_text("a\tb,c\n")
    assert files.read_rows(path, delimiter="\t") == [(1, ["a", "b,c"])]


def test_columns_by_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b,c\n1,2,3\n\n4,5,6\n")
    assert list(files.read_columns(path, ["c", "a"])) == [(2, ["3", "1"]), (4, ["6", "4"])]
    with pytest.raises(UserError, match="a.csv has no column d; found: a, b, c"):
        list(files.read_columns(path, ["a", "d"]))
    path.write_text("a,b\n1,2\n3\n")
    with pytest.raises(UserError, match="a.csv, line 3 has 1 fields, the header 2"):
        list(files.read_columns(path, ["a"]))
    path.write_text("")
    with pytest.raises(UserError, match="a.csv has no column a; found: nothing"):
        list(files.read_columns(path, ["a"]))


@pytest.mark.parametrize("text", ['a,b\n1,"2\n3,4\n5,6\n', 'a,b\n1,"2" inch\n'])
def test_a_quote_in_a_csv_file_that_would_take_other_rows_is_refused(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(UserError, match="a.csv, line . is not valid CSV"):
        list(files.read_columns(tmp_path / "a.csv", ["b"]))


@pytest.mark.parametrize("path", ["gs://b/m", "s3://b/m", "https://h/m", Path("gs://b/m"), "file:///m"])
def test_an_address_is_no_local_path(path):
    with pytest.raises(UserError, match="--export is '.*', an address; expected a path on this machine"):
        files.local_path(path, "--export")


@pytest.mark.parametrize("path", ["", " "])
def test_an_empty_path_is_not_the_working_directory(path):
    with pytest.raises(UserError, match="--data is empty; expected a path"):
        files.local_path(path, "--data")


def test_local_paths_keep_their_colons_and_expand_the_home_folder(monkeypatch):
    assert files.local_path("a:b/c", "x") == Path("a:b/c") and files.local_path("package:m/f", "x").parts[-1] == "f"
    monkeypatch.setenv("HOME", "/somewhere")
    assert files.local_path("~/a", "x") == Path("/somewhere/a")


def test_a_missing_home_folder_is_named(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "getuid", lambda: 2**31)  # a user without an entry, as in many containers
    with pytest.raises(UserError, match="~/a is in the home folder, but HOME is not set"):
        files.local_path("~/a", "x")


def test_bytes_come_from_regular_files_of_limited_size_alone(tmp_path):
    (tmp_path / "a").write_bytes(bytes(100))
    assert files.read_bytes(tmp_path / "a", 100) == bytes(100)
    with pytest.raises(UserError, match="a is larger than the 99 bytes allowed"):
        files.read_bytes(tmp_path / "a", 99)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match=f"{path} is no regular file"):
            files.read_bytes(path, 100)
    with pytest.raises(MissingFileError, match="there is no file"):
        files.read_bytes(tmp_path / "b", 100)


def test_tensors_that_are_cut_off_absent_or_a_pointer_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(MissingFileError, match="there is no file"), files.open_tensors(path):
        pass
    save_file({"x": np.arange(100.0)}, path)
    with files.open_tensors(path) as file:
        np.testing.assert_array_equal(file.get_tensor("x"), np.arange(100.0))
    whole = path.read_bytes()
    for damaged in (whole[:-10], whole[:20], b"", b"x" * 200):
        path.write_bytes(damaged)
        with pytest.raises(
            UserError, match=rf"{path} is no safetensors file, or is cut off or damaged \({len(damaged)} b"
        ):
            with files.open_tensors(path):
                pass
    for name in ("model.safetensors", "config.json"):
        path = tmp_path / name
        path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        with pytest.raises(UserError, match=f"{path} is a Git LFS pointer"):
            if path.suffix == ".json":
                files.read_json(path)
            else:
                files.open_tensors(path).__enter__()


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        ("chat\nélan\n".encode("latin-1"), "WINDOWS-1252"),
        ("chat\nélan\n".encode("utf-16"), "UTF-16"),
        ("chat\ncafe\n".encode("utf-16-le"), "UTF-16"),
    ],
)
def test_texts_of_other_encodings_name_the_file_and_the_conversion(tmp_path, data, encoding):
    path = tmp_path / "names.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{path} is not UTF-8 \(.*\); save it as UTF-8: iconv -f {encoding}"):
        files.read_text(path)
