"""What every data source provides: random access to records of images, captions and labels."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol, TypedDict

import numpy as np


class Record(TypedDict):
    """One sample of a source.

    Attributes:
        image: an encoded image, or its pixels, uint8 [height, width, 3].
        text: its captions: none, one or several.
        label: the indices of its true classes: none, one or several.
        name: identifies the sample in messages and in files such as `data.exclude`: "SHARD:KEY", a path.
    """

    image: bytes | np.ndarray
    text: tuple[str, ...]
    label: tuple[int, ...]
    name: str


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

    def names(self) -> Iterator[str]:
        """Yields the names of all records in order, without reading them."""
