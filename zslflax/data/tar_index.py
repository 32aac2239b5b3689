"""Where the members of a tar file are: found once, and kept beside it."""

import concurrent.futures
import dataclasses
import functools
import hashlib
import logging
import os
import re
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

log = logging.getLogger("zslflax")

SUFFIX = ".index.npz"
FORMAT = 1  # of index files; others are built anew
BLOCK = 512
NAME = re.compile(rb"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # webdataset's: the key ends at the first dot
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}


@dataclasses.dataclass(frozen=True)
class TarIndex:
    """The members of one tar file, by sample: m files of n keys.

    Attributes:
        keys: bytes [n], the members' names up to the first dot.
        extensions: str [e], what follows that dot, in lower case.
        sample: int32 [m], which of the keys.
        extension: int32 [m], which of the extensions.
        offset, size: int64 [m], bytes.
        stamp: int64 [3], the format of the index, the tar file's size and time of modification.
    """

    keys: np.ndarray
    extensions: np.ndarray
    sample: np.ndarray
    extension: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    stamp: np.ndarray


def load_indices(paths: Sequence[Path]) -> list[TarIndex]:
    """The indices of tar files, several at a time; a progress bar on a terminal where it takes a while."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        indices = pool.map(load_index, paths)
        return list(tqdm(indices, "indexing shards", len(paths), delay=2, disable=None, leave=False))


def load_index(path: Path) -> TarIndex:
    """The index that is kept of a tar file, or a new one where there is none or the file has changed."""
    stamp = stamp_of(os.stat(path))
    places = path.with_name(path.name + SUFFIX), cache_place(path)
    for place in places:
        index = read_index(place)
        if index is not None and index.stamp.tolist() == list(stamp):
            return index
    index = build_index(path, stamp)
    if not any(write_index(index, place) for place in places):
        log.warning("the index of %s can be kept neither beside it nor in %s", path, places[1].parent)
    return index


def stamp_of(status: os.stat_result) -> tuple[int, int, int]:
    return FORMAT, status.st_size, status.st_mtime_ns


def cache_place(path: Path) -> Path:
    """Where the index goes if the tar file's folder is read-only."""
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    return Path.home() / ".cache" / "zslflax" / "index" / f"{name}.npz"


def read_index(place: Path) -> TarIndex | None:
    try:
        with open(place, "rb") as file, np.load(file) as arrays:
            return TarIndex(**arrays)
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy and zipfile raise many kinds on a damaged file, which is replaced
        log.info("the index %s is not readable (%s) and built anew", place, error)
        return None


def write_index(index: TarIndex, place: Path) -> bool:
    """Writes an index whole or not at all; False where that is not possible."""
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.parent.stat().st_mode & 0o222:
            return False  # meant to be left alone, which root would otherwise not notice
        try:
            with open(temporary, "wb") as file:
                np.savez(file, **dataclasses.asdict(index))
            os.replace(temporary, place)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError:
        return False
    return True


def build_index(path: Path, stamp: tuple[int, int, int]) -> TarIndex:
    """Groups a tar file's members by key; a key that comes again with an extension it has is a new sample."""
    keys, extensions, newest, taken, rows = [], {}, {}, set(), []
    with open(path, "rb", buffering=1 << 16) as file:
        for name, offset, size in members(file, path):
            match = NAME.fullmatch(name)
            if not match:
                continue
            key = match[1]
            extension = extensions.setdefault(match[2].lower(), len(extensions))
            sample = newest.get(key)
            if sample is None or (sample, extension) in taken:
                sample = newest[key] = len(keys)
                keys.append(key)
            taken.add((sample, extension))
            rows.append((sample, extension, offset, size))
    table = np.array(rows, np.int64).reshape(-1, 4).T
    return TarIndex(
        keys=np.array(keys, np.bytes_),
        extensions=np.array([e.decode(errors="replace") for e in extensions], np.str_),
        sample=table[0].astype(np.int32),
        extension=table[1].astype(np.int32),
        offset=table[2],
        size=table[3],
        stamp=np.array(stamp, np.int64),
    )


def members(file: BinaryIO, path: Path) -> Iterator[tuple[bytes, int, int]]:
    """Yields (name, offset, size) of a tar file's regular files: ustar, pax and GNU.

    A tenth of what `tarfile` needs, which makes minutes for millions of members.

    Raises:
        ValueError: compressed, no tar file, or damaged in the middle. A file that ends early is only logged.
    """
    at, name, size = 0, None, None
    while True:
        file.seek(at)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            log.warning("the shard %s is truncated: the mark of its end is missing", path)
            return
        if header[0] == 0 and not any(header):
            return
        kind, stored, body = header[156:157], stored_size(header), at + BLOCK
        if stored is None:
            raise ValueError(not_a_tar(path, header, at))
        if kind in b"xL":  # for the next member, a pax header or GNU's long name
            extra = file.read(stored)
            if kind == b"L":
                name = extra.rstrip(b"\0")
            elif len(extra) == stored and (b"path=" in extra or b"size=" in extra):
                records = pax_records(extra)
                name = records.get(b"path", name)
                size = int(records[b"size"]) if b"size" in records else size
        elif kind in b"07\0":
            stored = stored if size is None else size
            yield name or plain_name(header), body, stored
            name = size = None
        elif kind in b"123456":  # links, devices, folders: without contents, whatever the header says
            stored, name, size = 0, None, None
        at = body + -(-stored // BLOCK) * BLOCK


def number(field: bytes) -> int:
    """A number in octal digits, or in GNU's binary form."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    return int(field.strip(b" \0") or b"0", 8)


def plain_name(header: bytes) -> bytes:
    name = header[:100].rstrip(b"\0")
    prefix = header[345:500].rstrip(b"\0") if header[257:263] == b"ustar\0" else b""  # GNU has times there
    return prefix + b"/" + name if prefix else name


def pax_records(body: bytes) -> dict[bytes, bytes]:
    """Parses "LENGTH KEY=VALUE\\n…", where the length counts the whole record."""
    records, at = {}, 0
    while at < len(body) and body[at : at + 1] != b"\0":
        blank = body.index(b" ", at)
        end = at + int(body[at:blank])
        key, _, value = body[blank + 1 : end - 1].partition(b"=")
        records[key], at = value, end
    return records


def stored_size(header: bytes) -> int | None:
    """The size of a member's contents; None if this is no header: not ustar's, nor, by its sum, an older."""
    try:
        if header[257:262] == b"ustar" or number(header[148:156]) == checksum(header):
            return number(header[124:136])
    except ValueError:
        pass
    return None


def checksum(header: bytes) -> int:
    return sum(header) - sum(header[148:156]) + 8 * ord(" ")


def not_a_tar(path: Path, header: bytes, at: int) -> str:
    if at:
        return f"the shard {path} is damaged at byte {at}: expected the header of a member; fetch it again"
    for start, compression in COMPRESSIONS.items():
        if header.startswith(start):
            return f"the shard {path} is compressed ({compression}), but shards are read in place: unpack it"
    return f"{path} is no tar file: it starts with {header[:16]!r}"


class OpenFile:
    """A file that several threads read at once, by position; closed when nobody refers to it any more."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self.descriptor, size, offset)

    def __del__(self):
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@functools.lru_cache(maxsize=256)  # open at once, in each process
def open_file(path: str, stamp: tuple[int, int, int]) -> OpenFile:
    """Opens a tar file for reading.

    Raises:
        ValueError: it is not the file that was indexed.
    """
    file = OpenFile(path)
    if stamp_of(os.fstat(file.descriptor)) != stamp:
        raise ValueError(f"the shard {path} has been changed while it was in use; start again")
    return file
