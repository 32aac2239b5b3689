"""Indexes of tar files: where their members are. An index is built once and kept beside its tar file."""

import concurrent.futures
import dataclasses
import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from zslflax.data import storage
from zslflax.data.sources.tar_format import iter_members
from zslflax.data.storage import Fingerprint
from zslflax.errors import MissingFileError, MissingLibraryError, StorageError, UserError
from zslflax.files import write_atomically

log = logging.getLogger("zslflax")

SUFFIX = ".index.npz"
ONE_UNREADABLE_IN = 20  # shards: of so many, one may be unreadable and is left out
MEMBER_NAME = re.compile(rb"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # webdataset's: the key ends at the first dot


@dataclasses.dataclass(frozen=True)
class TarIndex:
    """The members of one tar file, grouped by key: m members of n samples.

    Attributes:
        keys: bytes [n], the members' names up to the first dot.
        extensions: str [e], what follows that dot, in lower case.
        sample: int32 [m], each member's index in `keys`.
        extension: int32 [m], each member's index in `extensions`.
        offset: int64 [m], bytes, where each member's contents begin; `tar_format.SPARSE` for a sparse member.
        size: int64 [m], bytes.
        fingerprint: int64 [3], of the tar file (`zslflax.data.storage`).
    """

    keys: np.ndarray
    extensions: np.ndarray
    sample: np.ndarray
    extension: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    fingerprint: np.ndarray


def load_indexes(paths: Sequence[str]) -> list[tuple[str, TarIndex]]:
    """The indexes of tar files, with their paths; several are built at a time, with a progress bar.

    One shard in `ONE_UNREADABLE_IN` may be damaged, compressed or not a tar file: it is logged, and left out as a
    whole.

    Raises:
        MissingFileError: names the files that are missing.
        StorageError, MissingLibraryError: the storage cannot be read.
        UserError: more shards are unreadable; gives the reasons for the first of them.
    """
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        loading = pool.map(load_index_or_reason, paths)
        results = list(tqdm(loading, "indexing shards", len(paths), delay=2, disable=None, leave=False))
    raise_missing([path for path, result in zip(paths, results) if result is None], len(paths))
    reasons = [result for result in results if isinstance(result, str)]
    if len(reasons) > len(paths) // ONE_UNREADABLE_IN:
        first = "\n".join(reasons[:5]) + ("\n…" if len(reasons) > 5 else "")
        raise UserError(first if len(reasons) == 1 else f"{len(reasons)} of {len(paths)} shards: {first}")
    for reason in reasons:
        log.error("left out, with all its samples: %s", reason)
    return [(path, result) for path, result in zip(paths, results) if isinstance(result, TarIndex)]


def load_index_or_reason(path: str) -> TarIndex | str | None:
    """The index of a tar file, or the reason why the file is unreadable, or None if there is no such file."""
    try:
        return load_index(path)
    except FileNotFoundError:
        return None
    except (StorageError, MissingLibraryError):
        raise  # other shards would fail in the same way
    except UserError as error:
        return str(error)


def raise_missing(missing: Sequence[str], total: int) -> None:
    """Raises a MissingFileError that names the missing shards, if there are any."""
    if not missing:
        return
    names = "".join(f"\n  {storage.without_credentials(path)}" for path in missing[:5])
    names += "\n  …" if len(missing) > 5 else ""
    folders = {Path(path).parent for path in missing if not storage.is_remote(path)}
    folders = {folder for folder in folders if not folder.is_dir()}
    hint = f"\nthere is no folder {min(folders)}" if folders else ""
    raise MissingFileError(f"{len(missing)} of {total} shards are missing:{names}{hint}")


def load_index(path: str) -> TarIndex:
    """The stored index of a tar file; a new one if there is none or the file has changed."""
    fingerprint = storage.read_fingerprint(path)
    places = index_places(path)
    for place in places:
        index = read_index(place)
        if index is not None and index.fingerprint.tolist() == list(fingerprint):
            return index
    index = storage.with_retries(path, lambda: build_index(path, fingerprint))
    if not any(write_index(index, place) for place in places):
        where = " or ".join(str(place.parent) for place in places)
        log.warning("the index of %s cannot be kept in %s", storage.without_credentials(path), where)
    return index


def index_places(path: str) -> list[Path]:
    """Where the index of a tar file may be: beside a local file or in the cache; of a remote file in the cache."""
    remote = storage.is_remote(path)
    name = hashlib.sha256((path if remote else str(Path(path).resolve())).encode()).hexdigest()[:32]
    cached = Path.home() / ".cache" / "zslflax" / "index" / f"{name}.npz"
    return [cached] if remote else [Path(path + SUFFIX), cached]


def read_index(place: Path) -> TarIndex | None:
    """A stored index, or None if there is none or it cannot be read."""
    try:
        with open(place, "rb") as file, np.load(file) as arrays:
            return TarIndex(**arrays)
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy and zipfile raise many types on a damaged file, which will be replaced
        log.info("the index %s cannot be read (%s) and is built anew", place, error)
        return None


def write_index(index: TarIndex, place: Path) -> bool:
    """Stores an index; returns whether that was possible."""

    def write(path: Path) -> None:
        with open(path, "wb") as file:  # given a path, numpy would append .npz to it
            np.savez(file, **dataclasses.asdict(index))

    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.parent.stat().st_mode & 0o222:
            return False  # read-only, which root would otherwise not notice
        write_atomically(place, write)
    except OSError:
        return False
    return True


def build_index(path: str, fingerprint: Fingerprint) -> TarIndex:
    """Groups the members of a tar file by key. A key that comes again with an extension that it has is a new sample."""
    keys: list[bytes] = []
    extensions: dict[bytes, int] = {}
    newest_sample: dict[bytes, int] = {}  # of each key
    taken: set[tuple[int, int]] = set()  # (sample, extension)
    members: list[tuple[int, int, int, int]] = []
    with storage.open_stream(path, fingerprint) as file:
        for name, offset, size in iter_members(file, storage.without_credentials(path)):
            match = MEMBER_NAME.fullmatch(name)
            if not match:
                continue
            key = match[1]
            extension = extensions.setdefault(match[2].lower(), len(extensions))
            sample = newest_sample.get(key)
            if sample is None or (sample, extension) in taken:
                sample = newest_sample[key] = len(keys)
                keys.append(key)
            taken.add((sample, extension))
            members.append((sample, extension, offset, size))
    table = np.array(members, np.int64).reshape(-1, 4).T
    return TarIndex(
        keys=np.array(keys, np.bytes_),
        extensions=np.array([e.decode(errors="replace") for e in extensions], np.str_),
        sample=table[0].astype(np.int32),
        extension=table[1].astype(np.int32),
        offset=table[2],
        size=table[3],
        fingerprint=np.array(fingerprint, np.int64),
    )
