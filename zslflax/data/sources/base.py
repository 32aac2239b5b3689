"""What every data source provides: random access to records of images, captions and labels."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypedDict

import numpy as np

from zslflax.data.retries import DEFAULT_LIMITS, ReadLimits

MAX_DIGESTED = 1 << 26  # bytes of a file that are read for its digest; a tenth of a second
DIGESTED_PART = 1 << 20  # bytes of each part of a larger file


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """How a source is opened, apart from its specification.

    Attributes:
        require_captions: whether it is for training: captions are needed.
        images_alone: whether images need neither captions nor labels.
        captions_per_line: whether each line of a text file is a caption of its own.
        limits: of the time that reads from servers take.
    """

    require_captions: bool = False
    images_alone: bool = False
    captions_per_line: bool = False
    limits: ReadLimits = DEFAULT_LIMITS


class Annotations(TypedDict):
    """What is known of a sample besides its image.

    Attributes:
        text: its captions: none, one or several.
        label: the indices of its true classes: none, one or several.
        name: identifies the sample in messages and in files such as `data.exclude`: "SHARD:KEY", a path.
    """

    text: tuple[str, ...]
    label: tuple[int, ...]
    name: str


class Record(Annotations):
    """One sample of a source.

    Attributes:
        image: an encoded image, or its pixels, uint8 [height, width, 3].
    """

    image: bytes | np.ndarray


class Source(Protocol):
    """A dataset with random access to its records.

    Threads may share a source. It can be pickled, so that worker processes can read it.

    Attributes:
        classes: the ids of the classes that `label` indexes, or None: `label` indexes a list that others have.
        negatives: for each record, the indices of the classes that are known not to be on its image; or None.
        excluded: how many images or annotations the source left out, by reason.
    """

    @property
    def classes(self) -> list[str] | None: ...

    @property
    def negatives(self) -> Sequence[tuple[int, ...]] | None: ...

    @property
    def excluded(self) -> Mapping[str, int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Reads a record.

        Raises:
            BadSample: the record cannot be read; with the sample's name.
        """

    def read_annotations(self, index: int) -> Annotations:
        """Reads a record without its image.

        Raises:
            BadSample: as for the record, where it is not the image that cannot be read.
        """

    def names(self) -> Iterator[str]:
        """Yields the names of all records in order, without reading them."""

    def fingerprint(self) -> str:
        """A digest that changes when an image of the source may have changed, or the images' number or order.

        Features of images are kept under it (`zslflax.data.image_features`).
        """


def hash_values(*values: Any) -> str:
    """The SHA-256 of values that JSON can hold, for fingerprints.

    >>> hash_values("a.jpg", 10) == hash_values("a.jpg", 11)
    False
    """
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


def file_version(path: str) -> tuple[int, int]:
    """The size of a file and its modification time in nanoseconds, for fingerprints; -1 where there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return -1, -1
    return status.st_size, status.st_mtime_ns


def content_digest(path: str | Path) -> str:
    """The SHA-256 of a file's size and contents; of a file beyond `MAX_DIGESTED`, of three parts of it.

    Unlike `file_version`, it is the same for a copy.
    """
    size = os.stat(path).st_size
    spans = (
        [(0, size)]
        if size <= MAX_DIGESTED
        else [(start, DIGESTED_PART) for start in (0, size // 2, size - DIGESTED_PART)]
    )
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start, length in spans:
            file.seek(start)
            digest.update(file.read(length))
    return digest.hexdigest()
