"""Opens the test sets that a config describes: a source of images, and the classes of their labels."""

import logging
from typing import NamedTuple

from zslflax.data.sources import shapes
from zslflax.data.sources.base import Source
from zslflax.data.sources.opening import open_source
from zslflax.errors import UserError
from zslflax.evaluation.hierarchy import Hierarchy
from zslflax.evaluation.label_space import LabelSpace, members, repeated
from zslflax.evaluation.wordnet import WordNet

log = logging.getLogger("zslflax")


class TestSet(NamedTuple):
    """A test set that has been opened.

    Attributes:
        name: its key in `config.eval.sets`.
        source: of images, labels and captions.
        labels: the classes of its labels, or None where it has captions only.
        hierarchy: of these classes, or None where the config gives no WordNet.
    """

    name: str
    source: Source
    labels: LabelSpace | None
    hierarchy: Hierarchy | None = None


def open_sets(config) -> list[TestSet]:
    """Opens every test set whose `data` is given, so that what is wrong with one is known before training starts."""
    return [open_set(name, test, config) for name, test in config.eval.sets.items() if test.data]


def open_set(name: str, test, config) -> TestSet:
    source = open_source(test.data, config.data, "test")
    wordnet = WordNet.read(test.wordnet) if test.wordnet else None
    labels = label_space(test, source.classes, wordnet)
    if labels is not None and (twins := repeated(labels.names)):
        log.info(
            "%s: several classes are called %r (%d such names); a twin counts as a miss",
            name,
            next(iter(twins)),
            len(twins),
        )
    if wordnet is not None and (labels is None or labels.ids is None):
        raise UserError(f"eval.sets.{name}: wordnet is given, but classes have no ids; give a file of classes")
    hierarchy = None if wordnet is None else Hierarchy(labels.ids, wordnet.hypernyms)
    return TestSet(name, source, labels, hierarchy)


def label_space(test, own: list[str] | None, wordnet: WordNet | None) -> LabelSpace | None:
    """The classes of one of the config's test sets; None where neither the config nor the source names any."""
    if test.class_names or test.classes or own is not None:
        return LabelSpace.read(
            test.class_names, test.unseen, test.synonyms, classes=test.classes, own=own, wordnet=wordnet
        )
    if test.data == "shapes":
        unseen = members(shapes.CLASS_NAMES, [shapes.CLASS_NAMES[i] for i in shapes.UNSEEN])
        return LabelSpace(shapes.CLASS_NAMES, unseen, shapes.SYNONYMS)
    return None
