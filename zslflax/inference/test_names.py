"""The class names of a run's test sets, which its workdir and its exports keep to be shown as an example."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from zslflax.files import read_json
from zslflax.saving import write_json

NAMES_FILE = "class_names.json"  # class names by test set
MAX_NAMES = 1_000  # of a test set; the names of longer lists are not kept


def write_test_names(folder: Path, class_names: Mapping[str, Sequence[str]]) -> None:
    """Writes class_names.json, where a test set has class names, and at most `MAX_NAMES`.

    Raises:
        StorageError: the file cannot be written.
    """
    kept = {test_set: list(names) for test_set, names in class_names.items() if 0 < len(names) <= MAX_NAMES}
    if kept:
        write_json(folder / NAMES_FILE, kept)


def read_test_names(folder: Path) -> list[str]:
    """The class names of the first test set in a workdir or an exported folder; [] where it has none."""
    path = folder / NAMES_FILE
    if not path.is_file():
        return []
    content = read_json(path)
    names: Any = next(iter(content.values()), []) if isinstance(content, dict) else []
    return [str(name) for name in names][:MAX_NAMES] if isinstance(names, list) else []
