"""Training samples that are left out by name (`data.exclude`)."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from zslflax.data.sources.base import Annotations, Record, Source, hash_values
from zslflax.errors import UserError
from zslflax.files import read_columns

log = logging.getLogger("zslflax")


def whole_source(source: Source) -> Source:
    """The source that a `Subset` takes its records from; any other source itself."""
    return source.source if isinstance(source, Subset) else source


class Subset:
    """Some of a source's records, itself a `Source`.

    Args:
        source: of all records.
        indices: int [n], ascending, of the records to keep.
    """

    def __init__(self, source: Source, indices: np.ndarray):
        self.source, self.indices = source, indices

    @property
    def classes(self) -> list[str] | None:
        return self.source.classes

    @property
    def negatives(self) -> Sequence[tuple[int, ...]] | None:
        negatives = self.source.negatives
        return None if negatives is None else [negatives[index] for index in self.indices]

    @property
    def excluded(self) -> Mapping[str, int]:
        return self.source.excluded

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.source[int(self.indices[index])]

    def read_annotations(self, index: int) -> Annotations:
        """Reads a record without its image."""
        return self.source.read_annotations(int(self.indices[index]))

    def fingerprint(self) -> str:
        """Of the whole source and the kept indices."""
        return hash_values("subset", self.source.fingerprint(), np.asarray(self.indices).tolist())

    def names(self) -> Iterator[str]:
        """Yields the names of the kept records in order, without reading the records."""
        kept = np.zeros(len(self.source), bool)
        kept[self.indices] = True
        return itertools.compress(self.source.names(), kept)


def exclude_samples(sources: Sequence[Source], path: str) -> list[Source]:
    """The sources without the samples that a file names. The number of excluded samples is logged.

    Args:
        sources: the training data.
        path: a CSV file with a header and a column `name`, such as `zslflax.noise` writes; "" excludes nothing.

    Raises:
        MissingFileError, UserError: the file cannot be read, has no column `name`, or names no sample of the sources.
    """
    if not path:
        return list(sources)
    excluded = {name for _, (name,) in read_columns(path, ["name"])}
    remaining: list[Source] = []
    for source in sources:
        kept = np.array([name.strip() not in excluded for name in source.names()], bool)
        remaining.append(source if kept.all() else Subset(source, np.flatnonzero(kept)))
    before, after = sum(map(len, sources)), sum(map(len, remaining))
    if excluded and before == after:
        raise UserError(
            f"data.exclude: none of the {len(excluded)} names in {path} is in data.train, which has names like "
            f"{next(iter(sources[0].names()))!r}; the file has names like {min(excluded)!r}"
        )
    log.info("excluded %d of %d training samples; %s names %d", before - after, before, path, len(excluded))
    return remaining
