"""Image files in folders: finds and reads them, and reports those that are missing."""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from zslflax.data.images import MAX_FILE_BYTES, BadSample, has_image_extension, is_clutter
from zslflax.data.sources.base import file_version, hash_values
from zslflax.errors import MissingFileError, UserError
from zslflax.files import read_bytes

log = logging.getLogger("zslflax")
T = TypeVar("T")

MAX_EXAMPLES = 3  # in a message
IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"II*\0", b"MM\0*")  # but for WebP and AVIF


class PackedNames:
    """File names, in a few bytes more than they have: lists of Python's strings would take 60 more for each.

    >>> names = PackedNames(["a.jpg", "in/b.jpg"])
    >>> len(names), names[1]
    (2, 'in/b.jpg')
    """

    def __init__(self, names: Iterable[str]):
        encoded = list(map(os.fsencode, names))  # names need not be UTF-8
        self.buffer, self.ends = b"".join(encoded), np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:
        return os.fsdecode(self.buffer[self.ends[index] : self.ends[index + 1]])


def read_image_file(path: str) -> bytes:
    """The contents of an image file.

    Raises:
        BadSample: the file cannot be read, or has more than `images.MAX_FILE_BYTES`. Its name is the path, and its
            message is without the path, because the pipeline counts bad samples by their message.
    """
    try:
        return read_bytes(Path(path), MAX_FILE_BYTES)
    except MissingFileError as error:
        raise BadSample("its file cannot be read: there is no file", name=path) from error
    except UserError as error:
        raise BadSample(f"its file {str(error).removeprefix(path).strip()}", name=path) from error


def find_images(folder: Path) -> list[str]:
    """The paths of all files below a folder that are named like images, sorted; without `images.CLUTTER`."""
    found: list[str] = []
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_clutter(name)]
        found += [os.path.join(path, name) for name in names if has_image_extension(name) and not is_clutter(name)]
    return sorted(found)


def starts_like_image(path: str) -> bool:
    """Whether a file starts as an image of one of `images.FORMATS` does, whatever its name."""
    try:
        start = read_start(path)
    except OSError:
        return False
    in_container = (start[:4], start[8:12]) == (b"RIFF", b"WEBP") or start[4:12] in (b"ftypavif", b"ftypavis")
    return in_container or start.startswith(IMAGE_STARTS)


def read_start(path: str) -> bytes:
    """The first bytes of a regular file; b"" of anything else, such as a pipe."""
    if not os.path.isfile(path):
        return b""
    with open(path, "rb") as file:
        return file.read(12)


def fingerprint_of_files(paths: Iterable[str], folder: str = "") -> str:
    """Of the paths, sizes and modification times of files.

    Args:
        paths: of the files.
        folder: that has all of them, whose own path does not count; "": whole paths count.
    """
    return hash_values("files", [(path[len(folder) :], *file_version(path)) for path in paths])


def sorted_by_id(by_id: dict[str, T]) -> list[T]:
    """The values in the order of their ids: as numbers if all ids are whole numbers, or else as strings."""
    if all(i.isascii() and i.isdigit() for i in by_id):
        return [by_id[i] for i in sorted(by_id, key=lambda i: (int(i), i))]
    return [by_id[i] for i in sorted(by_id)]


def existing_keys(paths: dict[str, Path], where: str) -> list[str]:
    """The keys of the paths at which there is a file; the number of missing files is logged."""
    present = [key for key, path in paths.items() if path.is_file()]
    kept = set(present)
    report_missing(len(paths) - len(present), len(paths), [key for key in paths if key not in kept], where)
    return present


def report_missing(missing: int, total: int, keys: Sequence[str], where: str) -> None:
    """Logs how many annotated images are missing; raises a MissingFileError if none is left."""
    if missing == total:
        raise MissingFileError(
            f"none of the {total} annotated images is in {where}{format_examples(keys)}"
            if total
            else f"there are no annotations of images in {where}"
        )
    if missing:
        log.warning("%d of %d annotated images are not in %s%s", missing, total, where, format_examples(keys))


def format_examples(keys: Sequence[str]) -> str:
    """The first of the keys in brackets, for a message; "" if there are none."""
    return f" ({', '.join(keys[:MAX_EXAMPLES])}{', …' if len(keys) > MAX_EXAMPLES else ''})" if keys else ""
