"""Some of a source's samples: those that no file excludes by name (`data.exclude`), or those of some classes."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from zslflax.data.sources.base import Annotations, Record, Source, hash_values
from zslflax.errors import UserError, nearest_names
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


class ClassSubset(Subset):
    """The records of some of a source's classes, itself a `Source`; labels are the positions of the kept classes.

    Args:
        source: of all records.
        class_ids: the ids of the classes that the source's labels index.
        kept: the ids of the classes to keep. A record that has none of them is left out.

    Raises:
        UserError: a label is not below the number of `class_ids`.
    """

    def __init__(self, source: Source, class_ids: Sequence[str], kept: Sequence[str]):
        labels = [source.read_annotations(index)["label"] for index in range(len(source))]
        highest = max(itertools.chain([-1], *labels))
        if highest >= len(class_ids):
            raise UserError(
                f"the images have labels up to {highest}, but there are {len(class_ids)} class names, for 0 to "
                f"{len(class_ids) - 1}; give the names of all labels, in their order"
            )
        label_of_id = {class_id: label for label, class_id in enumerate(kept)}
        self.relabelled = {old: label_of_id[i] for old, i in enumerate(class_ids) if i in label_of_id}
        self.kept = list(kept)
        indices = [i for i, record_labels in enumerate(labels) if not self.relabelled.keys().isdisjoint(record_labels)]
        super().__init__(source, np.array(indices, np.int64))

    @property
    def classes(self) -> list[str] | None:
        return self.kept

    @property
    def negatives(self) -> Sequence[tuple[int, ...]] | None:
        negatives = super().negatives
        return None if negatives is None else [self.relabel(record_labels) for record_labels in negatives]

    def __getitem__(self, index: int) -> Record:
        record = super().__getitem__(index)
        record["label"] = self.relabel(record["label"])
        return record

    def read_annotations(self, index: int) -> Annotations:
        """Reads a record without its image."""
        annotations = super().read_annotations(index)
        annotations["label"] = self.relabel(annotations["label"])
        return annotations

    def relabel(self, labels: Sequence[int]) -> tuple[int, ...]:
        """The labels that are kept, as positions of the kept classes."""
        return tuple(self.relabelled[label] for label in labels if label in self.relabelled)


def keep_classes(
    source: Source, kept: Sequence[str], class_ids: Sequence[str] | None = None, name: str = "the list of classes"
) -> Source:
    """The records of some classes of a source, such as the novel classes of a few-shot dataset.

    Args:
        source: of all records.
        kept: ids of classes; the new labels are their positions.
        class_ids: the ids that the labels of a source index that has no `classes` of its own.
        name: of `kept`, for messages.

    Raises:
        UserError: a class is unknown, comes twice, or has no record; or a label is not below the number of `class_ids`.
    """
    class_ids = source.classes or class_ids
    if class_ids is None:
        raise UserError(f"{name} selects classes by name, but the labels are numbers; give the class names too")
    known = set(class_ids)
    if unknown := [class_id for class_id in kept if class_id not in known]:
        near = nearest_names(unknown[0], class_ids)
        raise UserError(
            f"{name} has {len(unknown)} classes that the images lack, such as {unknown[0]!r}; nearest: {near}"
        )
    if len(set(kept)) < len(kept):
        raise UserError(f"{name} has {next(i for i in kept if list(kept).count(i) > 1)!r} twice")
    subset = ClassSubset(source, class_ids, kept)
    if not len(subset):
        raise UserError(f"none of the {len(source)} images is of the classes of {name}")
    return subset


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
