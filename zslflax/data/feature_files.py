"""Features on disk: a row for each image of a source, and rows that are found by the tokens of a text.

Several processes may read and write the same files at once. There are no locks: two processes that compute the same row
write the same bytes. A row is followed by its checksum, so that a row that was written in part is computed again.
"""

import functools
import hashlib
import json
import logging
import os
import struct
import time
import uuid
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from zslflax.errors import UserError
from zslflax.saving import storage_errors, write_json

log = logging.getLogger("zslflax")

FLOAT_TYPES: dict[str, Any] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
MISSING, COMPUTED, UNREADABLE = range(3)  # status of a row
RECENT_TEXTS = 1 << 16  # texts of this process that are found by a dict, before they join the sorted keys
KEY_BYTES = 16  # of the hash of a text's tokens
KEY_ENTRY = np.dtype([("key", "<u8", 2), ("checksum", "<u4")])

ADVICE = "set features.folder to a folder with more space that can be written"
feature_errors = functools.partial(storage_errors, advice=ADVICE)


def folder_path(root: Path, kind: str, identity: dict[str, Any]) -> Path:
    """The folder of the features with this identity, whether it exists or not.

    Args:
        root: `config.features.folder`.
        kind: the beginning of the folder's name.
        identity: all that the features depend on, as a JSON value.
    """
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return root.expanduser() / f"{kind}-{digest[:32]}"


def open_folder(root: Path, kind: str, identity: dict[str, Any]) -> Path:
    """The folder of `folder_path`, which is created if it is missing; the identity is written into it, for people.

    Raises:
        StorageError: the folder cannot be written.
    """
    folder = folder_path(root, kind, identity)
    with feature_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "identity.json").exists():
        write_json(folder / "identity.json", identity)
    return folder


def to_stored(values: np.ndarray, dtype: Any, folder: Path) -> np.ndarray:
    """Features fp32 in the type in which they are stored.

    Raises:
        UserError: a number is too large for the type.
    """
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(values.astype(dtype))
    if not np.isfinite(stored.astype(np.float32)).all() and np.isfinite(values).all():
        raise UserError(
            f"a feature of {np.abs(values).max():.0f} is too large for {np.dtype(dtype).name} in {folder}; set "
            "features.dtype to bfloat16 or float32"
        )
    return stored


def write_fully(descriptor: int, data: bytes, offset: int | None = None) -> None:
    """Writes all bytes at an offset, or at the end of a file that was opened for appending."""
    while data:
        count = os.write(descriptor, data) if offset is None else os.pwrite(descriptor, data, offset)
        data, offset = data[count:], None if offset is None else offset + count


def checksum(row: np.ndarray, start: int) -> int:
    """The CRC-32 of a row of stored numbers, from a start that depends on the row's place."""
    return zlib.crc32(row.tobytes(), start & 0xFFFFFFFF)


class RowFile:
    """A fixed number of rows on disk, each of which is missing, computed or unreadable.

    Rows are written with `pwrite` and not through the memory map: hosts that share the files over a network then do
    not overwrite their neighbours' rows.

    Args:
        folder: from `open_folder`; the identity contains the count, the width and the type.
        count: n, rows.
        width: f, numbers in a row.
        dtype: of the numbers, one of `FLOAT_TYPES`.

    Raises:
        StorageError: a file cannot be opened for writing.
    """

    def __init__(self, folder: Path, count: int, width: int, dtype: Any):
        self.folder, self.count, self.width, self.dtype = folder, count, width, np.dtype(dtype)
        self.descriptors: dict[str, int] = {}
        self.rows = self.open_array("rows", self.dtype, (count, width))
        self.checksums = self.open_array("checksums", np.dtype("<u4"), (count,))
        self.status = self.open_array("status", np.dtype(np.uint8), (count,))
        self.verified = np.zeros(count, bool)  # rows whose checksum this process has compared

    def open_array(self, name: str, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
        """A read-only map of a file, which is extended by zeros where it is too short."""
        path, size = self.folder / name, int(np.prod(shape)) * dtype.itemsize
        with feature_errors(path):
            self.descriptors[name] = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            if os.fstat(self.descriptors[name]).st_size < size:
                os.ftruncate(self.descriptors[name], size)  # takes space on the disk as rows are written
            return np.asarray(np.memmap(path, dtype, "r", shape=shape))

    def write_entries(self, name: str, numbers: np.ndarray, entries: Sequence[bytes]) -> None:
        """Writes entries of equal size into the file of an array of `open_array`.

        Raises:
            StorageError: the disk is full.
        """
        with feature_errors(self.folder):
            for number, entry in zip(numbers.tolist(), entries):
                write_fully(self.descriptors[name], entry, number * len(entry))

    def close(self) -> None:
        """Closes the files; the object must not be used afterwards."""
        while self.descriptors:
            os.close(self.descriptors.popitem()[1])

    def __del__(self) -> None:
        self.close()

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Reads rows.

        Args:
            numbers: int [b], of rows.

        Returns:
            fp32 [b, f], and the status of each row, uint8 [b]. A damaged row is `MISSING`; its numbers mean nothing.
        """
        rows, checksums, status = self.rows[numbers], self.checksums[numbers].tolist(), self.status[numbers]
        for i in np.flatnonzero((status == COMPUTED) & ~self.verified[numbers]):
            if checksum(rows[i], int(numbers[i])) == checksums[i]:
                self.verified[numbers[i]] = True
            else:
                status[i] = MISSING
                log.warning("row %d in %s is damaged and is computed again", numbers[i], self.folder)
        return rows.astype(np.float32), status

    def write(self, numbers: np.ndarray, values: np.ndarray) -> None:
        """Writes computed rows: first the row, then its checksum, then its status.

        Args:
            numbers: int [b], of rows.
            values: fp32 [b, f].

        Raises:
            StorageError: the disk is full.
            UserError: a number is too large for the type.
        """
        size = self.width * self.dtype.itemsize
        stored = to_stored(values, self.dtype, self.folder)
        with feature_errors(self.folder):
            for number, row in zip(numbers.tolist(), stored):
                write_fully(self.descriptors["rows"], row.tobytes(), number * size)
                write_fully(self.descriptors["checksums"], struct.pack("<I", checksum(row, number)), number * 4)
                write_fully(self.descriptors["status"], bytes([COMPUTED]), number)

    def mark_unreadable(self, numbers: np.ndarray) -> None:
        """Notes that the images of rows cannot be read."""
        with feature_errors(self.folder):
            for number in numbers.tolist():
                write_fully(self.descriptors["status"], bytes([UNREADABLE]), number)


class TextFile:
    """Rows on disk that are found by 128-bit keys. Each process appends to files of its own.

    A segment is a pair of files: NAME.rows has rows of f numbers, and NAME.keys a `KEY_ENTRY` for each row, which is
    written after it. What other processes append while this one runs is not seen; the same row is then computed
    and kept twice.

    Args:
        folder: from `open_folder`; the identity contains the width and the type.
        width: f, numbers in a row.
        dtype: of the numbers, one of `FLOAT_TYPES`.

    Raises:
        StorageError: a file cannot be read.
    """

    def __init__(self, folder: Path, width: int, dtype: Any):
        self.folder, self.width, self.dtype = folder, width, np.dtype(dtype)
        self.segments: list[np.ndarray] = []  # rows of each segment
        self.own: tuple[Path, int, int] | None = None  # the base name of this process's segment, and its two files
        self.entries = np.empty(0, KEY_ENTRY)  # sorted by the first half of the key; of equal keys the newest is last
        self.places = np.empty((0, 2), np.int64)  # of each entry: segment, position in it
        self.verified = np.empty(0, bool)  # entries whose checksum this process has compared
        self.recent: dict[bytes, np.ndarray] = {}  # stored rows of this process that are not among `entries` yet
        with feature_errors(folder):
            self.add_segments(sorted(path.with_suffix("") for path in folder.glob("*.keys")))

    def add_segments(self, paths: Sequence[Path]) -> None:
        """Maps segments, and sorts their keys among the others."""
        entries, places = [self.entries], [self.places]
        for path in paths:
            keys = np.fromfile(path.with_suffix(".keys"), np.uint8)
            rows_size = path.with_suffix(".rows").stat().st_size
            count = min(len(keys) // KEY_ENTRY.itemsize, rows_size // (self.width * self.dtype.itemsize))
            if count:
                entries.append(keys[: count * KEY_ENTRY.itemsize].view(KEY_ENTRY))
                places.append(np.stack([np.full(count, len(self.segments)), np.arange(count)], axis=1))
                rows_path = path.with_suffix(".rows")
                self.segments.append(np.asarray(np.memmap(rows_path, self.dtype, "r", shape=(count, self.width))))
        joined, joined_places = np.concatenate(entries), np.concatenate(places)
        order = np.argsort(joined["key"][:, 0], kind="stable")
        self.entries, self.places = joined[order], joined_places[order]
        self.verified = np.zeros(len(order), bool)

    def find(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Finds rows.

        Args:
            keys: b of `KEY_BYTES` bytes each.

        Returns:
            fp32 [b, f], and whether each row was found undamaged, bool [b]; the numbers of other rows mean nothing.
        """
        rows, found = np.zeros((len(keys), self.width), self.dtype), np.zeros(len(keys), bool)
        wanted = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
        entry = np.searchsorted(self.entries["key"][:, 0], wanted[:, 0], side="right") - 1
        found[entry >= 0] = (self.entries["key"][entry[entry >= 0]] == wanted[entry >= 0]).all(axis=1)
        segment, place = self.places[entry[found]].T
        for number in np.unique(segment):
            rows[np.flatnonzero(found)[segment == number]] = self.segments[number][place[segment == number]]
        for i in np.flatnonzero(found).tolist():
            if not self.verified[entry[i]]:
                found[i] = checksum(rows[i], zlib.crc32(keys[i])) == self.entries["checksum"][entry[i]]
                self.verified[entry[i]] = found[i]
                if not found[i] and keys[i] not in self.recent:
                    log.warning("the features of a text in %s are damaged and are computed again", self.folder)
        for i, key in enumerate(keys):
            if key in self.recent:
                rows[i], found[i] = self.recent[key], True
        return rows.astype(np.float32), found

    def add(self, keys: Sequence[bytes], values: np.ndarray) -> np.ndarray:
        """Appends rows, and returns them as `find` will, fp32 [b, f].

        Args:
            keys: b of `KEY_BYTES` bytes each.
            values: fp32 [b, f].

        Raises:
            StorageError: the folder cannot be written, or the disk is full.
            UserError: a number is too large for the type.
        """
        stored = to_stored(values, self.dtype, self.folder)
        entries = np.empty(len(keys), KEY_ENTRY)
        entries["key"] = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
        entries["checksum"] = [checksum(row, zlib.crc32(key)) for key, row in zip(keys, stored)]
        with feature_errors(self.folder):
            path, keys_file, rows_file = self.own or self.open_own_segment()
            self.own = None  # a segment is not used any more after an error
            write_fully(rows_file, stored.tobytes())
            write_fully(keys_file, entries.tobytes())
            self.own = path, keys_file, rows_file
        self.recent |= zip(keys, stored)
        if len(self.recent) > RECENT_TEXTS:
            self.close()
            self.add_segments([path])
            self.recent.clear()
        return stored.astype(np.float32)

    def open_own_segment(self) -> tuple[Path, int, int]:
        """Creates an empty segment, whose name is later than those of the others."""
        path = self.folder / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        keys_file, rows_file = (os.open(path.with_suffix(suffix), flags, 0o666) for suffix in (".keys", ".rows"))
        return path, keys_file, rows_file

    def close(self) -> None:
        """Ends this process's segment; the next row begins another."""
        if self.own is not None:
            os.close(self.own[1])
            os.close(self.own[2])
            self.own = None

    def __del__(self) -> None:
        self.close()
