"""What classes are called, and in which sentences: label spaces and prompt templates."""

import collections
import dataclasses
import difflib
import os
import re

import numpy as np

from zslflax.errors import UserError
from zslflax.evaluation.class_lists import read_classes
from zslflax.evaluation.wordnet import WordNet
from zslflax.inference.prompts import read_class_names

CODE = re.compile(r"n\d{8}|/[a-z]/.+|\d+")  # ids that are no names: of WordNet, Open Images' MIDs, numbers


@dataclasses.dataclass(frozen=True, eq=False)
class LabelSpace:
    """The classes that images are recognised among; a label is an index into `names`.

    Attributes:
        names: c names. They are not keys: two classes may share one.
        unseen: bool [c], the classes whose figures are reported apart, because training never named them.
        synonyms: other names of the same c classes, in the same order, or None.
        ids: c different ids, which are keys, or None where classes are known by their number alone.
    """

    names: list[str]
    unseen: np.ndarray
    synonyms: list[str] | None = None
    ids: list[str] | None = None

    def __post_init__(self):
        c = len(self.names)
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
        return len(self.names)

    @classmethod
    def read(
        cls,
        names: str = "",
        unseen: str = "",
        synonyms: str = "",
        *,
        classes: str = "",
        own: list[str] | None = None,
        wordnet: WordNet | None = None,
    ) -> "LabelSpace":
        """A label space from what a config says and a source brings along.

        Args:
            names: what `read_class_names` takes, in the order of the classes; "": as the file of classes calls
                them, or else WordNet, or else, unless they are codes, their ids are their names.
            unseen: one or more of the names, or of the ids, likewise; "" means none.
            synonyms: like `names`; "" means none.
            classes: the ids, as `read_classes` takes them; "": `own`.
            own: the ids of the classes that a source knows; None where its labels are numbers of names.
            wordnet: names WordNet's ids.
        """
        ids, named = read_classes(classes) if classes else (None if own is None else list(own), {})
        if names:
            called = read_class_names(names)
        elif ids is None:
            raise UserError("expected names or classes, because the source's labels are only numbers")
        else:
            called = name_ids(ids, named, wordnet)
        if ids is not None and len(called) != len(ids):
            raise UserError(
                f"expected a name for each of {len(ids)} classes ({', '.join(ids[:3])}, …), in their order, "
                f"found {len(called)}; where the source lacks some of them, give all ids as a file of classes"
            )
        known = {*called, *(ids or ())}
        several = unseen not in known and ("," in unseen or os.path.isfile(unseen))
        chosen = read_class_names(unseen) if several else [unseen] if unseen else []
        keys = ids if ids is not None and set(chosen) <= set(ids) else called
        return cls(called, members(keys, chosen), read_class_names(synonyms) if synonyms else None, ids)

    def relabel(self, labels, classes: list[str] | None = None) -> tuple[list[tuple[int, ...]], int]:
        """A source's labels as labels of this space: (n tuples, how many labels are none of its classes).

        Args:
            labels: n tuples of indices into `classes`, or where that is None, into `names`.
            classes: the ids of the classes that the source knows. Those that are not in this space leave no
                label, so that an image may be left without.

        Raises:
            ValueError: none of the source's classes is in this space; or a label is no index.
        """
        own = range(len(self)) if classes is None else classes
        given = [label for of_image in labels for label in of_image]
        if given and not 0 <= min(given) <= max(given) < len(own):
            raise UserError(f"expected labels below {len(own)}, found {min(given)} … {max(given)}")
        if classes is None:
            return [tuple(of_image) for of_image in labels], 0
        places = {i: label for label, i in enumerate(self.ids or ())}
        place = [places.get(i) for i in classes]
        if len(place) and set(place) == {None}:
            raise UserError(
                f"none of the source's {len(classes)} classes, such as {classes[0]!r}, is in the label space; "
                + (f"its ids are such as {self.ids[0]!r}" if self.ids else "it has no ids, only names")
            )
        found = [tuple(place[label] for label in of_image if place[label] is not None) for of_image in labels]
        return found, len(given) - sum(map(len, found))


def name_ids(ids: list[str], known: dict[str, str], wordnet: WordNet | None) -> list[str]:
    """What classes are called: what is known, or else WordNet, or else the id itself if it is no code."""
    unnamed = [i for i in ids if i not in known]
    if wordnet is not None:
        known = known | dict(zip(unnamed, wordnet.names(unnamed)))
    elif codes := [i for i in unnamed if CODE.fullmatch(i)]:
        raise UserError(
            f"{len(codes)} of {len(ids)} classes have no name, the first is {codes[0]!r}: give names, a file "
            "of classes with names, or for WordNet's ids the folder of its database"
        )
    return [known.get(i, i) for i in ids]


def members(names, chosen) -> np.ndarray:
    """Which of the c names are chosen, bool [c]: all classes that share a chosen name.

    A chosen name that isn't there is an error that says which one is nearest.
    """
    known = set(names)
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise UserError(f"{name!r} is none of the {len(names)} class names{hint}")
    chosen = set(chosen)
    return np.array([name in chosen for name in names], bool)


def repeated(names) -> dict[str, list[int]]:
    """The names that several classes share, with these classes: to name a twin counts as a miss."""
    classes = collections.defaultdict(list)
    for i, name in enumerate(names):
        classes[name].append(i)
    return {name: ids for name, ids in classes.items() if len(ids) > 1}
