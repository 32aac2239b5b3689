"""Indexes of tar files: where their members are. An index is built once and kept beside its tar file."""

import collections
import concurrent.futures
import contextlib
import functools
import hashlib
import logging
import os
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
from tqdm import tqdm

from zslflax.data import storage
from zslflax.data.addresses import is_remote, without_credentials
from zslflax.data.images import IMAGE_EXTENSIONS
from zslflax.data.remote_files import Fingerprint, has_version
from zslflax.data.retries import DEFAULT_LIMITS, ReadLimits, with_retries
from zslflax.data.sources.index_file import TarIndex, is_consistent, read_index, write_index
from zslflax.data.sources.tar_format import BLOCK, SPARSE, iter_members
from zslflax.errors import MissingFileError, MissingLibraryError, StorageError, UserError, nearest_names
from zslflax.files import cache_folder

log = logging.getLogger("zslflax")

SUFFIX = ".index.npz"
ONE_UNREADABLE_IN = 20  # shards: of so many, one may be unreadable and is left out
PROBED_MEMBERS = 3  # whose headers are compared when a stored index is loaded
CAPTION_OR_LABEL = {b"txt", b"json", b"cls"}  # extensions
IMAGES = {extension.encode() for extension in IMAGE_EXTENSIONS}
MEMBER_NAME = re.compile(rb"((?:.*/)?[^./]+)\.([^/]*)", re.DOTALL)  # webdataset's: the key ends at the first dot

Member = tuple[int, int, int, int, int]  # sample, extension, offset, size, CRC-32 of the header


def load_indexes(paths: Sequence[str], limits: ReadLimits) -> list[tuple[str, TarIndex]]:
    """The indexes of tar files, with their paths; several are built at a time, with a progress bar.

    One shard in `ONE_UNREADABLE_IN` may be damaged, compressed or not a tar file: it is logged, and left out as a
    whole.

    Raises:
        MissingFileError: names the files that are missing.
        StorageError, MissingLibraryError: the storage cannot be read.
        UserError: more shards are unreadable; gives the reasons for the first of them.
    """
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        loading = pool.map(functools.partial(load_index_or_reason, limits=limits), paths)
        results = list(tqdm(loading, "indexing shards", len(paths), delay=2, disable=None, leave=False))
    raise_missing([path for path, result in zip(paths, results) if result is None], len(paths))
    reasons = [result for result in results if isinstance(result, str)]
    if len(reasons) > len(paths) // ONE_UNREADABLE_IN:
        first = "\n".join(reasons[:5]) + ("\n…" if len(reasons) > 5 else "")
        raise UserError(first if len(reasons) == 1 else f"{len(reasons)} of {len(paths)} shards: {first}")
    for reason in reasons:
        log.error("left out, with all its samples: %s", reason)
    return [(path, result) for path, result in zip(paths, results) if isinstance(result, TarIndex)]


def load_index_or_reason(path: str, limits: ReadLimits) -> TarIndex | str | None:
    """The index of a tar file, or the reason why the file is unreadable, or None if there is no such file."""
    try:
        return load_index(path, limits)
    except FileNotFoundError:
        return None
    except (StorageError, MissingLibraryError):
        raise  # other shards would fail in the same way
    except UserError as error:
        return str(error)


def raise_missing(missing: Sequence[str], total: int) -> None:
    """Raises a MissingFileError that names the missing files, if there are any."""
    if not missing:
        return
    if total == 1 and not is_remote(missing[0]) and (folder := Path(missing[0]).parent).is_dir():
        near = nearest_names(Path(missing[0]).name, os.listdir(folder), 3, cutoff=0.6)
        hint = f"; nearest there: {near}" if near else ""
        raise MissingFileError(f"there is no file or folder {missing[0]}{hint}")
    names = "".join(f"\n  {without_credentials(path)}" for path in missing[:5])
    names += "\n  …" if len(missing) > 5 else ""
    folders = {Path(path).parent for path in missing if not is_remote(path)}
    folders = {folder for folder in folders if not folder.is_dir()}
    hint = f"\nthere is no folder {min(folders)}" if folders else ""
    raise MissingFileError(f"{len(missing)} of {total} shards are missing:{names}{hint}")


def load_index(path: str, limits: ReadLimits = DEFAULT_LIMITS) -> TarIndex:
    """The stored index of a tar file; a new one if there is none that fits the file."""
    fingerprint = storage.read_fingerprint(path, limits)
    places = index_places(path)
    for place in places:
        index = read_index(place)
        if index is not None and index.fingerprint.tolist() == list(fingerprint):
            known = is_remote(path) and has_version(fingerprint)  # and not worth further requests
            if is_consistent(index) and (known or has_probed_headers(path, index, limits)):
                return index
            log.info("the index %s is of another file and is built anew", place)
    index = with_retries(path, lambda: build_index(path, fingerprint, limits), limits)
    if not any(write_index(index, place) for place in places):
        where = " or ".join(str(place.parent) for place in places) or "a cache, because HOME is not set"
        log.warning("the index of %s cannot be kept in %s", without_credentials(path), where)
    return index


def index_places(path: str) -> list[Path]:
    """Where the index of a tar file may be: beside a local file or in the cache; of a remote file in the cache."""
    remote = is_remote(path)
    name = hashlib.sha256(path.encode() if remote else os.fsencode(Path(path).resolve())).hexdigest()[:32]
    beside = [] if remote else [Path(path + SUFFIX)]
    cache = cache_folder()
    return beside if cache is None else [*beside, cache / "index" / f"{name}.npz"]


def discard_index(path: str) -> None:
    """Removes the stored indexes of a tar file, which turned out to be of another file."""
    for place in index_places(path):
        with contextlib.suppress(OSError):
            place.unlink()


def has_probed_headers(path: str, index: TarIndex, limits: ReadLimits) -> bool:
    """Whether the headers of the first, the middle and the last member are those that the index knows.

    A file that was replaced by one of equal size may have the same fingerprint: some servers tell no version, and
    copies can keep the time of the original.
    """
    members = np.flatnonzero(index.offset != SPARSE)
    probed = members[np.unique(np.linspace(0, len(members) - 1, PROBED_MEMBERS).astype(int))] if len(members) else []
    spans = [(int(index.offset[i]) - BLOCK, BLOCK) for i in probed]
    fingerprint = cast(Fingerprint, tuple(index.fingerprint.tolist()))
    headers = storage.read_spans(path, fingerprint, spans, limits)
    return all(zlib.crc32(header) == index.header[i] for i, header in zip(probed, headers, strict=True))


def build_index(path: str, fingerprint: Fingerprint, limits: ReadLimits = DEFAULT_LIMITS) -> TarIndex:
    """Groups the members of a tar file by key. A key that comes again with an extension that it has is a new sample."""
    keys: list[bytes] = []
    extensions: dict[bytes, int] = {}
    newest_sample: dict[bytes, int] = {}  # of each key
    taken: set[tuple[int, int]] = set()  # (sample, extension)
    members: list[Member] = []
    dotted: dict[int, bytes] = {}  # from a member to its extension as written, where that has dots
    with storage.open_stream(path, fingerprint, limits) as file:
        for name, offset, size in iter_members(file, without_credentials(path)):
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
            if b"." in match[2]:
                dotted[len(members)] = match[2]
            header = 0
            if offset != SPARSE:
                file.seek(offset - BLOCK)
                header = zlib.crc32(file.read(BLOCK))
            members.append((sample, extension, offset, size, header))
    if dotted:
        keys, members = split_dotted_keys(keys, extensions, members, dotted)
    table = np.array(members, np.int64).reshape(-1, 5).T
    return TarIndex(
        keys=np.array(keys, np.bytes_),
        extensions=np.array([e.decode(errors="replace") for e in extensions], np.str_),
        sample=table[0].astype(np.int32),
        extension=table[1].astype(np.int32),
        offset=table[2],
        size=table[3],
        header=table[4].astype(np.uint32),
        fingerprint=np.array(fingerprint, np.int64),
    )


def split_dotted_keys(
    keys: list[bytes], extensions: dict[bytes, int], members: list[Member], dotted: dict[int, bytes]
) -> tuple[list[bytes], list[Member]]:
    """Gives samples of their own to keys with dots: "photo.v2.jpg" and "photo.v2.txt" become the sample "photo.v2".

    An image with dots in its extension is one if a caption or label goes with it, or if no file of its key has a plain
    extension. Others, such as KEY.seg.png beside KEY.jpg, stay further files of KEY.

    Args:
        keys, extensions, members: of `build_index`; new extensions are added.
        dotted: from a member to its extension as written.

    Returns:
        The new keys and members.
    """
    found: dict[tuple[int, bytes], set[bytes]] = collections.defaultdict(set)
    for member, extension in dotted.items():
        prefix, _, last = extension.rpartition(b".")
        found[members[member][0], prefix].add(last.lower())
    with_plain = {sample for member, (sample, *_) in enumerate(members) if member not in dotted}
    own = {
        (sample, prefix)
        for (sample, prefix), lasts in found.items()
        if lasts & IMAGES and (lasts & CAPTION_OR_LABEL or sample not in with_plain)
    }
    new_keys: list[bytes] = []
    numbers: dict[tuple[int, bytes], int] = {}
    new_members: list[Member] = []
    for member, (sample, number, offset, size, header) in enumerate(members):
        prefix, _, last = dotted.get(member, b"").rpartition(b".")
        if (sample, prefix) in own:
            number = extensions.setdefault(last.lower(), len(extensions))
        else:
            prefix = b""
        if (sample, prefix) not in numbers:
            numbers[sample, prefix] = len(new_keys)
            new_keys.append(keys[sample] + (b"." + prefix if prefix else b""))
        new_members.append((numbers[sample, prefix], number, offset, size, header))
    return new_keys, new_members
