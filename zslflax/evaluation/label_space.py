"""Label spaces: the classes that images are classified among, with their names and ids."""

import collections
import dataclasses
import os
import re
from collections.abc import Collection, Sequence

import numpy as np

from zslflax.data.sources.class_lists import read_classes
from zslflax.errors import UserError, nearest_names
from zslflax.evaluation.labels import Labels
from zslflax.evaluation.wordnet import WordNet
from zslflax.inference.prompts import read_class_names

CODE = re.compile(r"n\d{8}|/[a-z]/.+|\d+")  # ids that are not names: WordNet's, Open Images' MIDs, numbers


@dataclasses.dataclass(frozen=True, eq=False)
class LabelSpace:
    """The classes that images are classified among. A label is an index into `class_names`.

    Attributes:
        class_names: c names. Two classes may have the same name.
        unseen: bool [c], the classes that training never named; their metrics are also reported separately.
        synonyms: a second name of each of the c classes, in the same order, or None.
        ids: c different ids, or None where classes are known by their number alone.
    """

    class_names: list[str]
    unseen: np.ndarray
    synonyms: list[str] | None = None
    ids: list[str] | None = None

    def __post_init__(self) -> None:
        c = len(self.class_names)
        if np.shape(self.unseen) != (c,):
            raise UserError(f"expected `unseen` for each of {c} names, found shape {np.shape(self.unseen)}")
        if self.synonyms is not None and len(self.synonyms) != c:
            raise UserError(
                f"expected a synonym for each of {c} names, in their order, found {len(self.synonyms)}; "
                "repeat the name where there is no other"
            )
        if self.ids is not None and not len(self.ids) == len(set(self.ids)) == c:
            raise UserError(
                f"expected a different id for each of {c} names, in their order, found {len(self.ids)}, "
                f"{len(set(self.ids))} of them different"
            )

    def __len__(self) -> int:
        return len(self.class_names)

    def relabel(self, labels: Labels, source_classes: Sequence[str] | None = None) -> tuple[list[tuple[int, ...]], int]:
        """Translates a source's labels into labels of this space.

        Args:
            labels: n tuples of indices into `source_classes`, or into `class_names` where that is None.
            source_classes: the ids of the source's classes. A class that is not in this space leaves no label, so that
                an image may have none.

        Returns:
            n tuples of labels, and how many labels were left out.

        Raises:
            UserError: none of the source's classes is in this space, or a label is out of range.
        """
        num_classes = len(self if source_classes is None else source_classes)
        given = [label for image_labels in labels for label in image_labels]
        if given and not 0 <= min(given) <= max(given) < num_classes:
            raise UserError(f"expected labels below {num_classes}, found {min(given)} … {max(given)}")
        if source_classes is None:
            return [tuple(image_labels) for image_labels in labels], 0
        own_labels = {i: label for label, i in enumerate(self.ids or ())}
        translated = [own_labels.get(i) for i in source_classes]
        if translated and set(translated) == {None}:
            raise UserError(
                f"none of the source's {len(source_classes)} classes, such as {source_classes[0]!r}, is in the label "
                f"space; " + (f"its ids are such as {self.ids[0]!r}" if self.ids else "it has no ids, only names")
            )
        found = [
            tuple(own for label in image_labels if (own := translated[label]) is not None) for image_labels in labels
        ]
        return found, len(given) - sum(map(len, found))


def read_label_space(
    class_names: str = "",
    unseen: str = "",
    synonyms: str = "",
    *,
    classes: str = "",
    source_classes: Sequence[str] | None = None,
    source_names: Sequence[str] | None = None,
    wordnet: WordNet | None = None,
) -> LabelSpace:
    """Makes a label space from the fields of a test set in the config and the classes that its source knows.

    Args:
        class_names: as `read_class_names` takes them, in the order of the classes. "": the names in the file of
            classes, or else those of the source, or in WordNet, or else the ids themselves, unless they are codes.
        unseen: some of the names, or of the ids, in the same form; "" for none.
        synonyms: in the form and order of `class_names`; "" for none.
        classes: the ids, as `read_classes` takes them; "": `source_classes`.
        source_classes: the ids of the classes that a source knows; None where its labels are indices into the names.
        source_names: the names of these classes, where the source has them besides the ids.
        wordnet: names WordNet's ids.

    Raises:
        UserError: the number of names and ids differ, a class has no name, or an unseen class is not among the classes.
    """
    known: dict[str, str] = {}
    ids = None if source_classes is None else list(source_classes)
    if ids and source_names is not None and not (classes and wordnet):  # WordNet's names are of another form
        known = dict(zip(ids, source_names))
    if classes:
        ids, file_names = read_classes(classes)
        known |= file_names
    if class_names:
        names = read_class_names(class_names)
    elif ids is None:
        raise UserError("expected names or classes, because the source's labels are only numbers")
    else:
        names = names_of_ids(ids, known, wordnet)
    if ids is not None and len(names) != len(ids):
        raise UserError(
            f"expected a name for each of {len(ids)} classes ({', '.join(ids[:3])}, …), in their order, "
            f"found {len(names)}; where the source lacks some of them, give all ids as a file of classes"
        )
    is_list = unseen not in {*names, *(ids or ())} and ("," in unseen or os.path.isfile(unseen))
    chosen = read_class_names(unseen) if is_list else [unseen] if unseen else []
    keys = ids if ids is not None and set(chosen) <= set(ids) else names
    return LabelSpace(names, mark_classes(keys, chosen), read_class_names(synonyms) if synonyms else None, ids)


def names_of_ids(ids: Sequence[str], known: dict[str, str], wordnet: WordNet | None) -> list[str]:
    """The name of each class: the known one, or else WordNet's, or else the id itself if it is not a code."""
    unnamed = [i for i in ids if i not in known]
    if wordnet is not None:
        known = known | dict(zip(unnamed, wordnet.names(unnamed)))
    elif codes := [i for i in unnamed if CODE.fullmatch(i)]:
        raise UserError(
            f"{len(codes)} of {len(ids)} classes have no name, the first is {codes[0]!r}: give names, a file "
            "of classes with names, or for WordNet's ids the folder of its database"
        )
    return [known.get(i, i) for i in ids]


def mark_classes(names: Sequence[str], chosen: Collection[str]) -> np.ndarray:
    """Which of the c names are chosen, bool [c]: all classes that share a chosen name.

    >>> mark_classes(["crane", "owl", "crane"], ["crane"]).tolist()
    [True, False, True]

    Raises:
        UserError: a chosen name is not among the names; names the nearest one.
    """
    known = set(names)
    for name in chosen:
        if name not in known:
            near = nearest_names(name, known)
            raise UserError(f"{name!r} is none of the {len(names)} class names; the nearest is {near!r}")
    chosen = set(chosen)
    return np.array([name in chosen for name in names], bool)


def repeated_names(names: Sequence[str]) -> dict[str, list[int]]:
    """The names that several classes share, with these classes.

    >>> repeated_names(["crane", "owl", "crane"])
    {'crane': [0, 2]}
    """
    classes = collections.defaultdict(list)
    for i, name in enumerate(names):
        classes[name].append(i)
    return {name: ids for name, ids in classes.items() if len(ids) > 1}
