"""Small files: written whole or not at all, read with errors that name the file."""

import csv
import io
import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from zslflax.errors import MissingFileError, StorageError, UserError


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path beside `path`, then renames it: readers see the old file or the new one.

    Raises:
        OSError: of `write`, or of the rename; no temporary file is left.
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
        StorageError: names the file.
    """
    try:
        write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file atomically."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False))


def read_text(path: str | Path) -> str:
    """The contents of a UTF-8 file, without a byte order mark.

    Raises:
        MissingFileError: there is no such file.
        UserError: it cannot be read, or is not UTF-8; names the file.
    """
    path = Path(path).expanduser()
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise MissingFileError(f"there is no file {path}") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise StorageError(f"{path} cannot be read: {error.strerror or error}") from error


def read_json(path: str | Path, kind: type = dict) -> Any:
    """The value of a JSON file, which must be of type `kind`.

    Raises:
        MissingFileError, UserError: as `read_text`; or the file is not JSON, or of another type.
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
    path: str | Path, delimiter: str = ",", quoting: Any = csv.QUOTE_MINIMAL
) -> Iterator[tuple[int, list[str]]]:
    """Yields the non-blank rows of a CSV or TSV file one at a time: (line number from 1, stripped fields).

    Only CR and LF end a row: captions may hold the other separators that `str.splitlines` splits at.

    Raises:
        MissingFileError, UserError: as `read_text`; or the file is not valid CSV.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, quoting=quoting)
    try:
        for row in reader:
            fields = [field.strip() for field in row]
            if any(fields):
                yield reader.line_num, fields
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num} is not valid CSV: {error}") from error


def read_rows(path: str | Path, delimiter: str = ",", quoting: Any = csv.QUOTE_MINIMAL) -> list[tuple[int, list[str]]]:
    """All rows that `iter_rows` yields."""
    return list(iter_rows(path, delimiter, quoting))


def read_columns(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, fields) of the named columns of a CSV file with a header.

    Raises:
        MissingFileError, UserError: as `read_text`; or a column is missing, or a row has another number of fields.
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
