"""Local files: their paths, and readers of text, JSON, CSV, bytes and safetensors. Errors name the file."""

import contextlib
import csv
import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError, safe_open

from zslflax.errors import MissingFileError, StorageError, UserError

LFS_START = b"version https://git-lfs.github.com/spec/"  # how a Git LFS pointer starts
MAX_PROBED = 4096  # characters in which the encoding of a file is looked for
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")  # `Path` turns "gs://bucket" into "gs:/bucket"


def expand_user(path: str | Path) -> Path:
    """A path in which "~" is replaced by the home folder.

    Raises:
        UserError: there is no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(
            f"{path} is in the home folder, but HOME is not set and this user has none; set HOME, or give another path"
        ) from error


def local_path(path: str | Path, name: str) -> Path:
    """The path of a local file or folder that the user named, with "~" expanded.

    >>> local_path("runs/demo", "--workdir")
    PosixPath('runs/demo')

    Args:
        path: what the user gave.
        name: of the option or config field, for the message.

    Raises:
        UserError: it is empty, or an address such as gs://bucket/folder, or there is no home folder.
    """
    if not str(path).strip():  # `Path` takes it for the working directory
        raise UserError(f"{name} is empty; expected a path")
    check_local(path, name)
    return expand_user(path)


def check_local(path: str | Path, name: str) -> None:
    """Refuses an address, such as gs://bucket/folder, where `local_path` needs a path on this machine."""
    if ADDRESS.match(str(path)):
        raise UserError(
            f"{name} is {str(path)!r}, an address; expected a path on this machine. Use a local folder and copy it "
            "afterwards or before, or mount the bucket"
        )


def cache_folder() -> Path | None:
    """The folder for what can be made again, ~/.cache/zslflax; None where there is no home folder."""
    try:
        return Path.home() / ".cache" / "zslflax"
    except RuntimeError:
        return None


def read_text(path: str | Path) -> str:
    """The contents of a UTF-8 file, without a byte order mark.

    Raises:
        MissingFileError: the file does not exist.
        UserError: the file is not UTF-8.
        StorageError: the file cannot be read.
    """
    path = local_path(path, "the file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise MissingFileError(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is {error.object[error.start]:#04x}"
        raise UserError(f"{path} is not UTF-8 ({found}); {conversion(error.object)}") from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error
    if "\0" in text[:MAX_PROBED]:
        raise UserError(f"{path} is not UTF-8 (it has characters 0); {conversion(text[:MAX_PROBED].encode())}")
    check_no_pointer(path, text[: len(LFS_START)].encode())
    return text


def conversion(data: bytes) -> str:
    """How to convert the contents of a text file to UTF-8, by a guess at their encoding."""
    wide = data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:MAX_PROBED]
    encoding = "UTF-16" if wide else "WINDOWS-1252"
    return f"save it as UTF-8: iconv -f {encoding} -t UTF-8 FILE > NEW, if it is {encoding}"


def check_no_pointer(path: Path, start: bytes) -> None:
    """Refuses the pointer that Git leaves in place of a large file where Git LFS is not installed."""
    if start.startswith(LFS_START):
        raise UserError(f"{path} is a Git LFS pointer and not the file itself; run `git lfs pull` in its repository")


def read_bytes(path: Path, limit: int) -> bytes:
    """The contents of a regular file of at most `limit` bytes.

    A named pipe, a device or a file without end is refused, and never waited for.

    Raises:
        MissingFileError: the file does not exist.
        UserError: it is larger, no regular file, or a Git LFS pointer.
        StorageError: the file cannot be read.
    """
    try:
        # Opening a pipe would wait for a writer without O_NONBLOCK.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path} is no regular file, but a pipe, a device or a folder")
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise MissingFileError(f"there is no file {path}") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder, expected a file") from None
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error
    if len(data) > limit:
        raise UserError(f"{path} is larger than the {limit:,} bytes allowed")
    check_no_pointer(path, data)
    return data


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[safe_open]:
    """Opens a safetensors file, whose tensors are read as NumPy arrays.

    Raises:
        MissingFileError: the file does not exist.
        UserError: it is no safetensors file, is cut off or damaged, or is a Git LFS pointer.
        StorageError: the file cannot be read.
    """
    try:
        with open(path, "rb") as raw:
            check_no_pointer(path, raw.read(len(LFS_START)))
        with safe_open(path, "numpy") as file:
            yield file
    except FileNotFoundError:
        raise MissingFileError(f"there is no file {path}") from None
    except SafetensorError as error:
        raise UserError(
            f"{path} is no safetensors file, or is cut off or damaged ({path.stat().st_size:,} bytes): {error}; "
            "copy or download it again"
        ) from error
    except UserError:
        raise
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error


def read_json(path: str | Path, kind: type = dict) -> Any:
    """The value in a JSON file.

    Args:
        path: the file.
        kind: the type that the value must have.

    Raises:
        MissingFileError, StorageError: as `read_text`.
        UserError: the file is not JSON, or its value has another type.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, kind):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, expected {kind.__name__}")
    return value


def iter_rows(
    path: str | Path, delimiter: str = ",", quoting: Literal[0, 1, 2, 3] = csv.QUOTE_MINIMAL
) -> Iterator[tuple[int, list[str]]]:
    """Yields the rows of a CSV or TSV file that are not blank: (line number from 1, fields without surrounding blanks).

    Only CR and LF end a row. Captions may hold the other characters at which `str.splitlines` splits.

    Raises:
        MissingFileError, StorageError: as `read_text`.
        UserError: the file is not valid CSV.
    """
    path = local_path(path, "the file")
    try:
        # Read in parts: files of pairs have gigabytes.
        with open(path, encoding="utf-8-sig", newline="") as file:
            start = file.read(MAX_PROBED)
            if "\0" in start or start.startswith(LFS_START.decode()):
                read_text(path)  # raises the error
            file.seek(0)
            # Without `strict`, a quote that is never closed takes all rows after it into its field.
            reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True)
            try:
                for row in reader:
                    fields = [field.strip() for field in row]
                    if any(fields):
                        yield reader.line_num, fields
            except csv.Error as error:
                raise UserError(
                    f"{path}, line {reader.line_num} is not valid CSV: {error}. A field with quotation marks is "
                    "quoted, and its own are doubled"
                ) from error
    except (UnicodeDecodeError, OSError):
        read_text(path)  # raises the error with its place and its remedy
        raise


def read_rows(
    path: str | Path, delimiter: str = ",", quoting: Literal[0, 1, 2, 3] = csv.QUOTE_MINIMAL
) -> list[tuple[int, list[str]]]:
    """All rows that `iter_rows` yields."""
    return list(iter_rows(path, delimiter, quoting))


def read_columns(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    r"""Yields (line number, fields of the named columns) for each row of a CSV file with a header.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "labels.csv"
    ...     _ = path.write_text("path,size,label\na.jpg,30,cat\nb.jpg,20,dog\n")
    ...     list(read_columns(path, ["label", "path"]))
    [(2, ['cat', 'a.jpg']), (3, ['dog', 'b.jpg'])]

    Raises:
        MissingFileError, StorageError: as `read_text`.
        UserError: the file has no such column, or a row has another number of fields than the header.
    """
    rows = iter_rows(path)
    _, header = next(rows, (0, []))
    if missing := [column for column in columns if column not in header]:
        raise UserError(f"{path} has no column {', '.join(missing)}; found: {', '.join(header) or 'nothing'}")
    indices = [header.index(column) for column in columns]
    for number, row in rows:
        if len(row) != len(header):
            raise UserError(f"{path}, line {number} has {len(row)} fields, the header {len(header)}")
        yield number, [row[i] for i in indices]


def hash_arrays(arrays: dict[str, np.ndarray]) -> str:
    """Returns the SHA-256 of the names, types, shapes and contents of arrays."""
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
