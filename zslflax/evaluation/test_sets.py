"""Opens the test sets that a config describes: a source of images, and the classes of their labels."""

import dataclasses
import logging
from typing import ClassVar

from ml_collections import ConfigDict

from zslflax.data.sources import shapes
from zslflax.data.sources.base import Source
from zslflax.data.sources.labelled import LabelledImages
from zslflax.data.sources.opening import open_source
from zslflax.errors import UserError
from zslflax.evaluation.hierarchy import Hierarchy
from zslflax.evaluation.label_space import LabelSpace, mark_classes, read_label_space, repeated_names
from zslflax.evaluation.wordnet import WordNet, read_wordnet

log = logging.getLogger("zslflax")


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
            source_names=source.class_names if isinstance(source, LabelledImages) else None,
            wordnet=wordnet,
        )
    if fields.data == "shapes":
        unseen = mark_classes(shapes.CLASS_NAMES, [shapes.CLASS_NAMES[i] for i in shapes.UNSEEN])
        return LabelSpace(shapes.CLASS_NAMES, unseen, shapes.SYNONYMS)
    return None
