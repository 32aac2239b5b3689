"""The file that keeps the index of a tar file: NumPy arrays, which are checked before they are believed."""

import dataclasses
import logging
import zipfile
from pathlib import Path

import numpy as np

from zslflax.data.sources.tar_format import BLOCK, SPARSE
from zslflax.saving import write_atomically

log = logging.getLogger("zslflax")

KINDS = dict(keys="S", extensions="U", sample="i", extension="i", offset="i", size="i", header="u", fingerprint="i")


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
        header: uint32 [m], CRC-32 of the block before the contents, which has the member's name, size and time; 0 for
            a sparse member.
        fingerprint: int64 [3], of the tar file (`zslflax.data.storage`).
    """

    keys: np.ndarray
    extensions: np.ndarray
    sample: np.ndarray
    extension: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    header: np.ndarray
    fingerprint: np.ndarray


def read_index(place: Path) -> TarIndex | None:
    """A stored index, or None if there is none or it cannot be read."""
    try:
        with zipfile.ZipFile(place) as file:
            return TarIndex(**{name: read_array(file, name, kind) for name, kind in KINDS.items()})
    except FileNotFoundError:
        return None
    except Exception as error:  # numpy and zipfile raise many types on a damaged file, which will be replaced
        log.info("the index %s cannot be read (%s) and is built anew", place, error)
        return None


def read_array(file: zipfile.ZipFile, name: str, kind: str) -> np.ndarray:
    """An array of one dimension; it takes no more memory than the file has bytes, whatever its header says.

    Raises:
        ValueError: the array is compressed, or of another kind or size than its header says.
    """
    info = file.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
        raise ValueError(f"{name} is compressed")
    with file.open(info) as stream:
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError(f"{name} has an unknown format")
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
        data = stream.read()
    if dtype.kind != kind or len(shape) != 1 or shape[0] * dtype.itemsize != len(data):
        raise ValueError(f"{name} is {dtype} {list(shape)} with {len(data)} bytes")
    return np.frombuffer(data, dtype) if dtype.itemsize else np.zeros(shape, dtype)


def is_consistent(index: TarIndex) -> bool:
    """Whether an index can be one of a tar file of the size in its fingerprint."""
    members = {len(array) for array in (index.sample, index.extension, index.offset, index.size, index.header)}
    if len(members) != 1 or index.fingerprint.shape != (3,):
        return False
    within = lambda array, stop: not len(array) or (array.min() >= 0 and array.max() < stop)
    sparse = index.offset == SPARSE
    starts = index.offset[~sparse]
    return bool(
        within(index.sample, len(index.keys))
        and within(index.extension, len(index.extensions))
        and within(index.size, np.iinfo(np.int64).max)
        and within(starts - BLOCK, max(1, index.fingerprint[1]))
        and not (starts % BLOCK).any()
    )


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
