"""Where the members of a tar file are: found once, and kept beside it."""

import concurrent.futures
import dataclasses
import hashlib
import logging
import os
import re
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from zslflax.data import storage
from zslflax.data.sources.tar_format import members
from zslflax.data.storage import Stamp
from zslflax.errors import MissingFileError, UserError

log = logging.getLogger("zslflax")

SUFFIX = ".index.npz"
LEFT_OUT = 20  # of so many shards, one may be unreadable without ending the run
NAME = re.compile(rb"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # webdataset's: the key ends at the first dot


@dataclasses.dataclass(frozen=True)
class TarIndex:
    """The members of one tar file, by sample: m files of n keys.

    Attributes:
        keys: bytes [n], the members' names up to the first dot.
        extensions: str [e], what follows that dot, in lower case.
        sample: int32 [m], which of the keys.
        extension: int32 [m], which of the extensions.
        offset, size: int64 [m], bytes; the offset of what is stored sparse is `tar_format.UNREADABLE`.
        stamp: int64 [3], of the tar file, as `zslflax.data.storage` has it.
    """

    keys: np.ndarray
    extensions: np.ndarray
    sample: np.ndarray
    extension: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    stamp: np.ndarray


def load_indices(paths: Sequence[str]) -> list[tuple[str, TarIndex]]:
    """Tar files and their indices, several at a time; a progress bar on a terminal where it takes a while.

    One shard in `LEFT_OUT` may be damaged, compressed or no tar file: it is logged, and left out as a whole.

    Raises:
        FileNotFoundError: names what is missing.
        ValueError: more of them than that; the reason for each of the first.
    """
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        indices = pool.map(load_or_explain, paths)
        indices = list(tqdm(indices, "indexing shards", len(paths), delay=2, disable=None, leave=False))
    raise_missing([path for path, index in zip(paths, indices) if index is None], len(paths))
    reasons = [index for index in indices if isinstance(index, str)]
    if len(reasons) > len(paths) // LEFT_OUT:
        shown = "\n".join(reasons[:5]) + ("\n…" if len(reasons) > 5 else "")
        raise UserError(shown if len(reasons) == 1 else f"{len(reasons)} of {len(paths)} shards: {shown}")
    for reason in reasons:
        log.error("left out, with all its samples: %s", reason)
    return [(path, index) for path, index in zip(paths, indices) if isinstance(index, TarIndex)]


def load_or_explain(path: str) -> TarIndex | str | None:
    """An index, or why there is none; None where there is no such file."""
    try:
        return load_index(path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        return str(error)


def raise_missing(missing: Sequence[str], total: int) -> None:
    """Raises FileNotFoundError if anything is missing, with its names."""
    if not missing:
        return
    names = "".join(f"\n  {storage.shown(path)}" for path in missing[:5])
    names += "\n  …" if len(missing) > 5 else ""
    folders = {Path(path).parent for path in missing if not storage.is_remote(path)}
    folders = {folder for folder in folders if not folder.is_dir()}
    why = f"\nthere is no folder {min(folders)}" if folders else ""
    raise MissingFileError(f"{len(missing)} of {total} shards are missing:{names}{why}")


def load_index(path: str) -> TarIndex:
    """The index that is kept of a tar file, or a new one where there is none or the file has changed."""
    stamp = storage.read_stamp(path)
    places = index_places(path)
    for place in places:
        index = read_index(place)
        if index is not None and index.stamp.tolist() == list(stamp):
            return index
    index = storage.retried(path, lambda: build_index(path, stamp))
    if not any(write_index(index, place) for place in places):
        where = " or ".join(str(place.parent) for place in places)
        log.warning("the index of %s cannot be kept in %s", storage.shown(path), where)
    return index


def index_places(path: str) -> list[Path]:
    """Where an index may be: beside a local tar file, or in the cache, where all of remote ones are."""
    remote = storage.is_remote(path)
    name = hashlib.sha256((path if remote else str(Path(path).resolve())).encode()).hexdigest()[:32]
    cached = Path.home() / ".cache" / "zslflax" / "index" / f"{name}.npz"
    return [cached] if remote else [Path(path + SUFFIX), cached]


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


def build_index(path: str, stamp: Stamp) -> TarIndex:
    """Groups a tar file's members by key; a key that comes again with an extension it has is a new sample."""
    keys, extensions, newest, taken, rows = [], {}, {}, set(), []
    with storage.open_stream(path, stamp) as file:
        for name, offset, size in members(file, storage.shown(path)):
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
