"""Reads class names and prompt templates, from files or as written in a config or on the command line."""

import os
from collections.abc import Sequence

from ml_collections import ConfigDict

from zslflax.errors import UserError
from zslflax.files import check_local, read_text

SHOWN_CHARACTERS = 80  # of a long argument in an error message


def read_class_names(spec: str) -> list[str]:
    """Reads class names from a file with one name per line (UTF-8), or from the argument itself, "cat,dog,…".

    The position of a name is its label: no name is dropped or merged, and an empty one is an error. Blank lines at the
    end of a file and blanks around a name are ignored.

    >>> read_class_names("cat, red circle")
    ['cat', 'red circle']

    Raises:
        UserError: a name is empty, or the argument is neither a file nor at least two names.
    """
    if is_file(spec):
        return read_lines(spec)
    check_local(spec, "the file of class names")
    if "," not in spec:
        raise UserError(f"{spec!r} is neither a file that exists nor names with commas between them")
    names = [name.strip() for name in spec.split(",")]
    if "" in names:
        start = spec if len(spec) <= SHOWN_CHARACTERS else spec[: SHOWN_CHARACTERS - 1] + "…"
        raise UserError(f"name {names.index('') + 1} of {len(names)} is empty in {start!r}")
    return names


def read_templates(spec: str | Sequence[str]) -> list[str]:
    """Reads prompt templates from a file with one template per line, or takes one or several as they are.

    >>> read_templates("a photo of a {}.")
    ['a photo of a {}.']

    Raises:
        UserError: there is no template, or one has no `{}` for the class name.
    """
    if isinstance(spec, str) and is_file(spec):
        templates, place = read_lines(spec), f"{spec}, line"
    else:
        templates, place = [spec] if isinstance(spec, str) else list(spec), "template"
    if not templates:
        raise UserError("expected at least one prompt template, such as 'a photo of a {}.', found none")
    for number, template in enumerate(templates, start=1):
        if "{}" not in template:
            raise UserError(f"{place} {number}: {template!r} has no {{}} for the class name, and is no file")
    return templates


def resolve_templates(config: ConfigDict) -> None:
    """Replaces a file name in `config.eval.templates` by the templates in the file, so that the run keeps them."""
    templates = config.eval.templates
    config.eval.templates = tuple(read_templates(templates[0] if len(templates) == 1 else templates))


def is_file(spec: str) -> bool:
    """Whether a specification names a file; one that is too long for a file name does not."""
    return os.path.isfile(os.path.expanduser(spec))


def read_lines(path: str) -> list[str]:
    """Reads the lines of a file without surrounding blanks and without blank lines at the end.

    Raises:
        UserError: the file is empty, or a line before the last one is.
    """
    # Only the line ends of a text file separate lines; str.splitlines also splits at characters within a name.
    lines = [line.strip() for line in read_text(path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{path} is empty; expected one entry a line")
    if "" in lines:
        raise UserError(f"{path}, line {lines.index('') + 1} is empty: fill or remove it (lines are labels, in order)")
    return lines
