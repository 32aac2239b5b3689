"""Files are written whole or not at all, and errors name them."""

import errno
import json
import os

import pytest

from zslflax import saving
from zslflax.errors import MissingFileError, StorageError, UserError


def test_json_is_replaced_as_a_whole(tmp_path):
    saving.write_json(tmp_path / "a.json", {"x": 1})
    saving.write_json(tmp_path / "a.json", {"x": [1, 2]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1, 2]} and len(list(tmp_path.iterdir())) == 1


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    (tmp_path / "a.txt").write_text("old")

    def fail(partial):
        partial.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        saving.write_atomically(tmp_path / "a.txt", fail)
    assert (tmp_path / "a.txt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_storage_errors_name_the_file_and_keep_their_cause(tmp_path, number):
    with pytest.raises(StorageError, match=f"{tmp_path}/a cannot be written: {os.strerror(number)}") as raised:
        with saving.storage_errors(tmp_path / "a"):
            raise OSError(number, os.strerror(number))
    assert isinstance(raised.value, UserError) and raised.value.__cause__.errno == number


def test_a_file_name_that_is_no_text_is_named(tmp_path):
    with pytest.raises(UserError, match=r"a.json cannot hold '/data/caf\\udce9/x', which is no text in UTF-8; rename"):
        saving.write_json(tmp_path / "a.json", {"shards": ["/data/caf\udce9/x", "another"]})
    assert not list(tmp_path.iterdir())


def test_other_errors_pass_through(tmp_path):
    for error in (ValueError("a bug"), MissingFileError("there is no file b")):
        with pytest.raises(type(error), match=str(error)), saving.storage_errors(tmp_path / "a"):
            raise error
