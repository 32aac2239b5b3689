"""Configs as JSON: writes, reads and compares them."""

import functools
import json
from collections.abc import Iterator
from operator import getitem
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from zslflax.config import default_config, eval_set
from zslflax.config_names import check_field_names
from zslflax.errors import UserError
from zslflax.files import read_json


def to_json(config: ConfigDict) -> str:
    """A config as JSON, which `from_json` reads."""
    return json.dumps(config.to_dict(), indent=1, sort_keys=True)


def from_json(text: str) -> ConfigDict:
    """The config that `to_json` wrote. Fields that are missing take their defaults; lists become tuples.

    >>> from_json('{"steps": 20, "data": {"crop_scale": [0.5, 1.0]}}').data.crop_scale
    (0.5, 1.0)

    Raises:
        UserError: a field does not exist, or its value has another type.
    """
    return from_dict(json.loads(text), "the config")


def read_config(path: Path) -> ConfigDict:
    """The config in the config.json of a workdir or of an exported model, as `from_json` reads it.

    Raises:
        MissingFileError: there is no such file.
        UserError: it is not JSON, or not a config of this version; the message names the file.
    """
    return from_dict(read_json(path), str(path))


def from_dict(values: dict[str, Any], source: str) -> ConfigDict:
    """A config with these values, and with defaults elsewhere; errors name the source."""
    config, evaluation = default_config(), values.get("eval")
    sets = evaluation.get("sets") if isinstance(evaluation, dict) else None
    if isinstance(sets, dict):
        with config.unlocked():
            config.eval.sets = ConfigDict({name: eval_set() for name in sets})
    check_field_names(config, values, source)
    for name, value in leaves(lists_to_tuples(values)):
        *sections, field = name
        try:
            functools.reduce(getitem, sections, config)[field] = value
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{source} has {'.'.join(name)} {str(value)[:80]!r}, whose type is wrong: {error}"
            ) from error
    return config


def leaves(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields the path and the value of every field that is no section."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def lists_to_tuples(value: Any) -> Any:
    """The same value with tuples for lists, at all depths: JSON has no tuples."""
    if isinstance(value, dict):
        return {key: lists_to_tuples(entry) for key, entry in value.items()}
    return tuple(map(lists_to_tuples, value)) if isinstance(value, list) else value


def compare(a: ConfigDict, b: ConfigDict) -> list[tuple[str, Any, Any]]:
    """The fields whose values differ, with both values; None stands for a field that one of them lacks.

    >>> compare(ConfigDict({"steps": 5, "data": {"flip": True}}), ConfigDict({"steps": 6, "data": {"flip": True}}))
    [('steps', 5, 6)]
    """

    def differences(x: Any, y: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
        if isinstance(x, dict) and isinstance(y, dict):
            for key in sorted({*x, *y}):
                yield from differences(x.get(key), y.get(key), f"{prefix}.{key}" if prefix else key)
        elif x != y:
            yield prefix, x, y

    return list(differences(a.to_dict(), b.to_dict(), ""))
