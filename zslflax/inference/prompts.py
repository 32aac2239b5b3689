"""Reads class names and prompt templates, from files or as written in a config or on the command line."""

import json
import os
import re
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from zslflax.errors import UserError
from zslflax.files import check_local, read_text

ID_AND_NAME = re.compile(r"(n\d{8}|/[a-z]/\w+|\d+)(?:[\s,;:]+)\S")  # WordNet's ids, Open Images' MIDs, numbers
HEADER = re.compile(r"(id|index|label|wnid|labelname|class_?id)\s*[,;\t]\s*\w*(name|class|label)\w*$", re.IGNORECASE)
SHOWN_CHARACTERS = 80  # of a long argument in an error message


def read_class_names(spec: str) -> list[str]:
    """Reads class names from a file with one name per line (UTF-8), or from the argument itself, "cat,dog,…".

    The position of a name is its label: no name is dropped or merged, and an empty one is an error. Blank lines at the
    end of a file and blanks around a name are ignored. The file or the argument may be JSON: a list of names, or an
    object from labels to names, to [id, name] or from names to labels.

    >>> read_class_names("cat, red circle")
    ['cat', 'red circle']

    Raises:
        UserError: a name is empty, the argument is neither a file nor at least two names, or the file has ids beside
            its names.
    """
    if is_file(spec):
        if (names_in_json := names_from_json(read_text(spec), spec)) is not None:
            return names_in_json
        lines = read_lines(spec)
        check_no_ids(lines, spec)
        return lines
    if (names_in_json := names_from_json(spec, "the list of class names")) is not None:
        return names_in_json
    check_local(spec, "the file of class names")
    if "," not in spec:
        raise UserError(f"{spec!r} is neither a file that exists nor names with commas between them")
    names = [name.strip() for name in spec.split(",")]
    if "" in names:
        start = spec if len(spec) <= SHOWN_CHARACTERS else spec[: SHOWN_CHARACTERS - 1] + "…"
        raise UserError(f"name {names.index('') + 1} of {len(names)} is empty in {start!r}")
    return names


def names_from_json(text: str, source: str) -> list[str] | None:
    """The class names in JSON: ["cat", "dog"], {"0": "cat"}, {"0": ["n02121808", "cat"]} or {"cat": 0}.

    Returns:
        The names, or None where the text is not JSON.

    Raises:
        UserError: it is JSON of another form; names `source`.
    """
    if not text.lstrip().startswith(("[", "{")):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if source.endswith(".json"):
            raise UserError(f"{source} is not valid JSON") from None
        return None
    if isinstance(value, dict):
        value = names_in_order(value)
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name.strip() for name in value):
        raise UserError(
            f'{source} is JSON, expected a list of names, ["cat", "dog"], or an object with the label of each, from 0, '
            'such as {"0": "cat"} or {"cat": 0}'
        )
    return [name.strip() for name in value]


def names_in_order(value: dict[str, Any]) -> list[Any]:
    """The names in a JSON object, in the order of the labels 0 to n - 1; [] if these are not its labels."""
    if all(isinstance(label, int) for label in value.values()):
        value = {str(label): name for name, label in value.items()}
    if sorted(value) != sorted(map(str, range(len(value)))):
        return []
    names = [value[str(label)] for label in range(len(value))]
    return [name[1] if isinstance(name, list) and len(name) == 2 else name for name in names]


def check_no_ids(lines: Sequence[str], path: str) -> None:
    """Raises a UserError if every line of a file has an id or a number before its name."""
    codes = [code[1] if (code := ID_AND_NAME.match(line)) else None for line in lines]
    numbered = codes[0] in ("0", "1") and codes == [str(i + int(codes[0])) for i in range(len(codes))]
    ids = all(code is not None and not code.isdigit() for code in codes)
    if len(lines) > 1 and (numbered or ids or HEADER.match(lines[0])):
        raise UserError(
            f"{path} has lines such as {lines[-1]!r}, with an id beside the name, expected names alone; remove the ids "
            "(cut), or in a config give the file as eval.sets.NAME.classes"
        )


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


def check_queries(queries: Sequence[str]) -> None:
    """Raises a UserError if a sentence is empty: every image would be as good an answer as any other."""
    if blank := [number for number, query in enumerate(queries, start=1) if not query.strip()]:
        raise UserError(f"query {blank[0]} of {len(queries)} is empty; expected a sentence")


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
