"""Class names and prompt templates: from files, or written out with commas between them."""

import os

from zslflax.errors import UserError


def read_names(spec: str) -> list[str]:
    """Class names: a file with one name a line (UTF-8), or the names themselves, "cat,dog,…", at least two.

    The place of a name is its label, so nothing is dropped or merged; an empty name is an error, blank lines
    at a file's end are not. Blanks around a name go.
    """
    if os.path.isfile(spec):
        return [name for _, name in numbered_lines(spec)]
    if "," not in spec:
        raise UserError(f"{spec!r} is neither a file that exists nor names with commas between them")
    names = [name.strip() for name in spec.split(",")]
    if "" in names:
        raise UserError(f"name {names.index('') + 1} of {len(names)} is empty in {shortened(spec)!r}")
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
        raise UserError("expected at least one prompt template, such as 'a photo of a {}.', found none")
    for number, template in numbered:
        if "{}" not in template:
            raise UserError(f"{place} {number}: {template!r} has no {{}} for the class name, and is no file")
    return [template for _, template in numbered]


def numbered_lines(path: str) -> list[tuple[int, str]]:
    """A file's lines without surrounding blanks, numbered from 1; an empty one among them is an error."""
    with open(path, encoding="utf-8-sig") as file:
        lines = [line.strip() for line in file]
    while lines and not lines[-1]:
        lines.pop()
    if not lines:
        raise UserError(f"{path} is empty; expected one entry a line")
    if "" in lines:
        raise UserError(f"{path}, line {lines.index('') + 1} is empty: fill or remove it (lines are labels, in order)")
    return list(enumerate(lines, start=1))


def shortened(text: str, length: int = 80) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def resolve_templates(config) -> None:
    """Replaces the name of a file of prompt templates in a config by its templates, so that they travel with the run."""
    templates = config.eval.templates
    config.eval.templates = tuple(read_templates(templates[0] if len(templates) == 1 else templates))
