"""Training samples that are left out by name."""

import csv
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zslflax.errors import UserError

log = logging.getLogger("zslflax")


class Subset:
    """A source's records at some of its numbers; can be pickled where the source can."""

    def __init__(self, source: Sequence, numbers: np.ndarray):
        self.source, self.numbers = source, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> dict:
        return self.source[int(self.numbers[index])]


def exclude_samples(sources: Sequence, file: str) -> list:
    """The sources without the samples that a file names; how many are left out is logged.

    Args:
        sources: whose `names()` are those of their records, in order.
        file: a CSV with a header and a column `name`, such as `zslflax.noise` writes; "" leaves nothing out.

    Raises:
        ValueError: no column `name`, or none of the names is one of the sources'.
    """
    if not file:
        return list(sources)
    with open(Path(file).expanduser(), newline="", encoding="utf-8-sig") as lines:
        table = csv.DictReader(lines)
        if "name" not in (table.fieldnames or ()):
            raise UserError(f"data.exclude: {file} has the columns {table.fieldnames}, expected one called name")
        excluded = {row["name"] for row in table}
    remaining = []
    for source in sources:
        kept = np.array([name not in excluded for name in source.names()], bool)
        remaining.append(source if kept.all() else Subset(source, np.flatnonzero(kept)))
    before, after = sum(map(len, sources)), sum(map(len, remaining))
    if excluded and before == after:
        raise UserError(
            f"data.exclude: none of the {len(excluded)} names in {file} is in data.train, with names like "
            f"{next(iter(sources[0].names()))!r}, those of the file like {min(excluded)!r}"
        )
    log.info(
        "%d of %d training samples are left out, of the %d that %s names",
        before - after,
        before,
        len(excluded),
        file,
    )
    return remaining
