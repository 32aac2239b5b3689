"""Writes local files and folders whole or not at all. Errors name what cannot be written."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from zslflax.errors import FolderExistsError, StorageError, UserError


@contextlib.contextmanager
def storage_errors(path: Path, advice: str = "") -> Iterator[None]:
    """Turns an OSError, such as a full disk or a missing permission, into a `StorageError` that names the path.

    So does an error of safetensors, which has its own kind.

    Args:
        path: what is written.
        advice: what to change, for the message.
    """
    try:
        yield
    except UserError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"{path} cannot be written: {reason}{advice and f'; {advice}'}") from error


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Creates a folder; removes what was written into it, if the block fails or is interrupted.

    Raises:
        FolderExistsError: it is not empty.
        StorageError: it, or a file in it, cannot be written.
    """
    with storage_errors(folder):
        existed = folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FolderExistsError(f"{folder} is not empty; name a new folder")
        try:
            yield
        except BaseException:
            with contextlib.suppress(OSError):  # the first error says what is wrong
                for path in folder.iterdir():
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                if not existed:
                    folder.rmdir()
            raise


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Calls `write` with a temporary path in the same folder, then renames that file to `path`.

    A reader sees the old file or the new one, never a part of it. No temporary file is left behind after an error.

    Raises:
        OSError: of `write` or of the rename.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file atomically.

    Raises:
        UserError: the text has a file name that is no UTF-8.
        StorageError: the file cannot be written.
    """
    try:
        with storage_errors(path):
            write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    except UnicodeEncodeError as error:  # a lone surrogate stands for a byte of a file name that is no UTF-8
        start = max(text.rfind('"', 0, error.start) + 1, error.start - 200)
        raise UserError(
            f"{path} cannot hold {text[start : error.end + 40].partition(chr(34))[0]!r}, which is no text in UTF-8; "
            "rename the file or folder of this name, or set LC_ALL=C.UTF-8"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, atomically.

    Raises:
        StorageError: the file cannot be written.
    """
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False))
