"""What classes are called, and in which sentences: label spaces and prompt templates."""

import collections
import dataclasses
import difflib
import os

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class LabelSpace:
    """The classes that images are recognised among; a label is an index into `names`.

    Attributes:
        names: c names. They are not keys: two classes may share one.
        unseen: bool [c], the classes whose figures are reported apart, because training never named them.
        synonyms: other names of the same c classes, in the same order, or None.
    """

    names: list[str]
    unseen: np.ndarray
    synonyms: list[str] | None = None

    def __post_init__(self):
        c = len(self.names)
        if np.shape(self.unseen) != (c,):
            raise ValueError(f"expected `unseen` for each of {c} names, found shape {np.shape(self.unseen)}")
        if self.synonyms is not None and len(self.synonyms) != c:
            raise ValueError(
                f"expected a synonym for each of {c} names, in their order, found {len(self.synonyms)}; "
                "repeat the name where there is no other"
            )

    def __len__(self) -> int:
        return len(self.names)

    @classmethod
    def read(cls, names: str, unseen: str = "", synonyms: str = "") -> "LabelSpace":
        """A label space from what `read_names` takes; `unseen` is one or more of the names; "" means none."""
        read = read_names(names)
        chosen = [unseen] if unseen in read else read_names(unseen) if unseen else []
        return cls(read, members(read, chosen), read_names(synonyms) if synonyms else None)


def members(names, chosen) -> np.ndarray:
    """Which of the c names are chosen, bool [c]: all classes that share a chosen name.

    A chosen name that isn't there is an error that says which one is nearest.
    """
    known = set(names)
    for name in chosen:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; the nearest is {near[0]!r}" if near else ""
            raise ValueError(f"{name!r} is none of the {len(names)} class names{hint}")
    chosen = set(chosen)
    return np.array([name in chosen for name in names], bool)


def read_names(spec: str) -> list[str]:
    """Class names: a file with one name a line (UTF-8), or the names themselves, "cat,dog,…", at least two.

    The place of a name is its label, so nothing is dropped or merged; an empty name is an error, blank lines
    at a file's end are not. Blanks around a name go.
    """
    if os.path.isfile(spec):
        return [name for _, name in numbered_lines(spec)]
    if "," not in spec:
        raise ValueError(f"{spec!r} is neither a file that exists nor names with commas between them")
    names = [name.strip() for name in spec.split(",")]
    if "" in names:
        raise ValueError(f"name {names.index('') + 1} of {len(names)} is empty in {shortened(spec)!r}")
    return names


def read_templates(spec) -> list[str]:
    """Prompts with `{}` where the name goes: a file with one a line, one template, or a sequence of them."""
    if isinstance(spec, str) and os.path.isfile(spec):
        numbered = numbered_lines(spec)
        place = f"{spec}, line"
    else:
        numbered = list(enumerate([spec] if isinstance(spec, str) else spec, start=1))
        place = "template"
    if not numbered:
        raise ValueError("expected at least one prompt template, such as 'a photo of a {}.', found none")
    for number, template in numbered:
        if "{}" not in template:
            raise ValueError(f"{place} {number}: {template!r} has no {{}} for the class name, and is no file")
    return [template for _, template in numbered]


def numbered_lines(path: str) -> list[tuple[int, str]]:
    """A file's lines without surrounding blanks, numbered from 1; an empty one among them is an error."""
    with open(path, encoding="utf-8-sig") as file:
        lines = [line.strip() for line in file]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise ValueError(f"{path} is empty; expected one entry a line")
    if "" in lines:
        raise ValueError(
            f"{path}, line {lines.index('') + 1} is empty: fill or remove it (lines are labels, in order)"
        )
    return list(enumerate(lines, start=1))


def repeated(names) -> dict[str, list[int]]:
    """The names that several classes share, with these classes: to name a twin counts as a miss."""
    classes = collections.defaultdict(list)
    for i, name in enumerate(names):
        classes[name].append(i)
    return {name: ids for name, ids in classes.items() if len(ids) > 1}


def shortened(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
