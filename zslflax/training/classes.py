"""The classes of a classifier: their names, their images, and the sentences that describe them."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from zslflax.config import is_classifier
from zslflax.data.sources.base import Source
from zslflax.data.sources.subset import keep_classes
from zslflax.errors import UserError, nearest_names
from zslflax.files import read_json
from zslflax.inference.prompts import read_class_names
from zslflax.losses import classification


def needs_class_names(config: ConfigDict) -> bool:
    """Whether a config leaves the names of a classifier's classes to its training data."""
    return is_classifier(config) and not config.model.class_names


def resolve_class_names(config: ConfigDict, sources: Sequence[Source] | None = None) -> tuple[str, ...]:
    """The names of a classifier's classes: of the config, of its file, or else of the training data; () for two towers.

    Args:
        config: the whole config.
        sources: the training data, where `needs_class_names`.

    Raises:
        UserError: there are fewer than two names, one comes twice, or two towers are given names.
    """
    names = tuple(config.model.class_names)
    if not is_classifier(config):
        if names:
            raise UserError(
                f"model.class_names is given, but objective.name {config.objective.name} trains two towers, which have "
                f"no classes; expected one of {', '.join(classification.OBJECTIVES)}, or no class names"
            )
        return ()
    if len(names) == 1:
        names = tuple(read_class_names(names[0]))
    if not names:
        names = tuple(sources[0].classes or ()) if sources else ()
        if not names:
            spec = config.data.train[0]
            raise UserError(f"the images of {spec} have no class names; give model.class_names, such as a file of them")
    if len(names) < 2:
        raise UserError(f"there is only one class, {names[0]!r}; a classifier needs at least two")
    if len(set(names)) < len(names):
        raise UserError(f"the class name {next(n for n in names if names.count(n) > 1)!r} comes twice")
    return names


def with_classes(source: Source, class_names: Sequence[str]) -> Source:
    """A source whose labels index `class_names`; images of other classes are left out.

    The labels of a source without class names index `class_names` already.
    """
    if source.classes is None or list(source.classes) == list(class_names):
        return source
    return keep_classes(source, class_names, name="model.class_names")


def read_sentences(path: str, class_names: Sequence[str]) -> list[str]:
    """The sentences of all classes, in the order of the names, from a JSON file {"cat": ["A cat has …", …], …}.

    Raises:
        UserError: the file has another form, or no sentences for a class.
    """
    by_class = read_json(Path(path).expanduser(), dict)
    if missing := [name for name in class_names if not by_class.get(name)]:
        raise UserError(
            f"objective.sentences: {path} has no sentences for {len(missing)} of the {len(class_names)} classes, such "
            f"as {missing[0]!r}; nearest: {nearest_names(missing[0], by_class)}"
        )
    sentences = [sentence for name in class_names for sentence in by_class[name]]
    if wrong := [sentence for sentence in sentences if not isinstance(sentence, str) or not sentence.strip()]:
        raise UserError(f"objective.sentences: {path} has {wrong[0]!r} among the sentences, expected texts")
    return sentences
