"""What the site needs beside its pages: working links to the repository, and doctests as code blocks."""

import re
from typing import Any

import griffe

REPOSITORY = "https://github.com/zslflax/zslflax/blob/main/"
DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)  # up to an empty line


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Points links to files of the repository, which are relative on GitHub, there from the site too."""
    return re.sub(r"\]\(\.\./", f"]({REPOSITORY}", markdown)


class Doctests(griffe.Extension):
    """Fences the examples in docstrings, which Markdown would take for quotations."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = DOCTEST.sub(lambda found: f"```pycon\n{found[0]}\n```", obj.docstring.value)
