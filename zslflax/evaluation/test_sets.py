"""Opens and checks the test sets that a config describes: a source of images, and the classes of their labels."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from zslflax.data.addresses import is_remote
from zslflax.data.images import BadSample
from zslflax.data.sources import shapes
from zslflax.data.sources.base import Annotations, Source
from zslflax.data.sources.labelled import ClassTars, LabelledImages
from zslflax.data.sources.opening import open_source
from zslflax.data.sources.subset import whole_source
from zslflax.data.sources.webdataset import WebDataset
from zslflax.errors import UserError
from zslflax.evaluation.hierarchy import Hierarchy
from zslflax.evaluation.label_space import LabelSpace, mark_classes, read_label_space, repeated_names
from zslflax.evaluation.wordnet import WordNet, read_wordnet

log = logging.getLogger("zslflax")
CHECKED = 20_000  # samples whose labels are read before training; about a second


@dataclasses.dataclass(frozen=True)
class TestSet:
    """An open test set.

    Attributes:
        name: its key in `config.eval.sets`.
        source: its records.
        label_space: the classes of its labels, or None for captions alone.
        hierarchy: of these classes, or None where the config gives no WordNet.
    """

    __test__: ClassVar[bool] = False  # pytest collects classes with this name in files with this name

    name: str
    source: Source
    label_space: LabelSpace | None
    hierarchy: Hierarchy | None = None


class TrueLabels(NamedTuple):
    """What is true of the n images of a test set, as labels in its label space.

    Attributes:
        labels: n tuples.
        negatives: n tuples of the labels that an image is known not to have, or None.
        excluded: how many images or labels were left out, by reason.
    """

    labels: list[tuple[int, ...]]
    negatives: list[tuple[int, ...]] | None
    excluded: dict[str, int]


def open_test_sets(config: ConfigDict) -> list[TestSet]:
    """Opens every test set whose `data` is given, so that a mistake in one is found before training starts.

    Raises:
        UserError: a source or a file of classes cannot be read, or they do not fit together.
    """
    return [open_test_set(name, fields, config.data) for name, fields in config.eval.sets.items() if fields.data]


def open_test_set(name: str, fields: ConfigDict, data_config: ConfigDict) -> TestSet:
    """Opens one test set.

    Args:
        name: its key in `config.eval.sets`.
        fields: as `eval_set` in zslflax/config.py describes them.
        data_config: `config.data`.
    """
    source = open_source(fields.data, data_config, "test")
    wordnet = read_wordnet(fields.wordnet) if fields.wordnet else None
    label_space = open_label_space(fields, source, wordnet)
    if label_space is not None and (repeated := repeated_names(label_space.class_names)):
        log.info(
            "%s: %d names, such as %r, belong to several classes; the right name of a wrong class counts as a miss",
            name,
            len(repeated),
            next(iter(repeated)),
        )
    if wordnet is None:
        return TestSet(name, source, label_space)
    if label_space is None or label_space.ids is None:
        raise UserError(f"eval.sets.{name}: wordnet is given, but classes have no ids; give a file of classes")
    return TestSet(name, source, label_space, Hierarchy(label_space.ids, wordnet.hypernyms))


def open_label_space(fields: ConfigDict, source: Source, wordnet: WordNet | None) -> LabelSpace | None:
    """The classes of a test set; None where neither the config nor the source names any."""
    if fields.class_names or fields.classes or source.classes is not None:
        return read_label_space(
            fields.class_names,
            fields.unseen,
            fields.synonyms,
            classes=fields.classes,
            source_classes=source.classes,
            source_names=source.class_names if isinstance(source, (ClassTars, LabelledImages)) else None,
            wordnet=wordnet,
        )
    if fields.data == "shapes":
        unseen = mark_classes(shapes.CLASS_NAMES, [shapes.CLASS_NAMES[i] for i in shapes.UNSEEN])
        return LabelSpace(shapes.CLASS_NAMES, unseen, shapes.SYNONYMS)
    return None


def true_labels(test_set: TestSet, sample: Iterable[int], labels: list[tuple[int, ...]]) -> TrueLabels:
    """Translates the labels of samples into those of the test set's label space.

    Args:
        test_set: of the samples.
        sample: the index of each sample in the source.
        labels: of each sample, as the source has them.

    Raises:
        UserError: a label is not the index of a class; names the sample.
    """
    source, label_space = test_set.source, test_set.label_space
    negatives, excluded = None, dict(source.excluded)
    if source.negatives is not None:
        negatives = [source.negatives[i] for i in sample]
    if label_space is None:
        return TrueLabels(labels, negatives, excluded)
    if source.classes is not None:
        labels, excluded["labels_outside"] = label_space.relabel(labels, source.classes)
        if negatives is not None:
            negatives, _ = label_space.relabel(negatives, source.classes)
    c = len(label_space)
    for i, image_labels in zip(sample, labels):
        if image_labels and not 0 <= min(image_labels) <= max(image_labels) < c:
            name = source.read_annotations(int(i))["name"]
            raise UserError(
                f"eval.sets.{test_set.name}: sample {name} has the label {max(image_labels)}, but there are "
                f"{c} names, 0 … {c - 1}; labels count from 0 in their order"
            )
    return TrueLabels(labels, negatives, excluded)


def check_test_sets(test_sets: Sequence[TestSet], seen: int = CHECKED) -> None:
    """Checks the labels of test sets before anything is measured on them, and warns of what cannot be measured.

    Args:
        test_sets: from `open_test_sets`.
        seen: samples whose labels are read, evenly spread; all of a smaller test set. Of shards on a server, a
            hundredth.

    Raises:
        UserError: a label is not the index of a class.
    """
    if not test_sets:
        log.warning("NOTHING WILL BE MEASURED: no test set has data; give one, as in eval.sets.test.data=…")
    for test_set in test_sets:
        annotations = read_some_annotations(test_set.source, seen)
        labels = [tuple(found["label"]) for found in annotations.values()]
        labelled = any(true_labels(test_set, list(annotations), labels).labels)
        captions = any(text.strip() for found in annotations.values() for text in found["text"])
        if not captions and not (labelled and test_set.label_space is not None):
            reason = f"their labels have no names; give eval.sets.{test_set.name}.class_names"
            log.warning(
                "NOTHING WILL BE MEASURED on eval.sets.%s: %d samples that were read have no captions, and %s",
                test_set.name,
                len(annotations),
                reason if labelled else "no labels among its classes",
            )


def read_some_annotations(source: Source, count: int) -> dict[int, Annotations]:
    """The annotations of samples by their index; unreadable ones are left out."""
    whole = whole_source(source)
    if isinstance(whole, WebDataset) and any(map(is_remote, whole.paths)):
        count //= 100
    found = {}
    for index in np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)).tolist():
        with contextlib.suppress(BadSample):
            found[index] = source.read_annotations(index)
    return found
