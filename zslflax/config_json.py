"""Configs as JSON: writes, reads and compares them, and explains files that an older version wrote."""

import functools
import json
import re
from collections.abc import Iterator
from operator import getitem
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from zslflax.config import default_config, eval_set, field_names
from zslflax.errors import UserError
from zslflax.files import read_json

# Fields of earlier versions, and what they are called now. Fields of test sets stand here without the set's name.
RENAMED = {
    "report_every": "log_every",
    "model.text.pack": "model.text.pack_length",
    "model.text.keep_features": "model.text.cached_captions",
    "objective.log_scale": "objective.log_logit_scale",
    "objective.ramp_steps": "objective.soft_ramp_steps",
    "objective.image_image": "objective.image_image_weight",
    "objective.text_text": "objective.text_text_weight",
    "objective.bias": "objective.logit_bias",
    "objective.block": "objective.max_similarities",
    "teacher.decay": "teacher.ema_decay",
    "optimizer.rate_factors": "optimizer.lr_multipliers",
    "optimizer.max_bad_steps": "optimizer.max_nonfinite_steps",
    "data.max_bad": "data.max_bad_fraction",
    **{f"data.scenes.{name}": f"data.shapes.{name}" for name in ("root", "train", "test", "size", "noise", "seed")},
    "eval.resize": "eval.resize_factor",
    "eval.resamples": "eval.bootstrap_resamples",
    "eval.best": "eval.best_metric",
    "eval.cache": "eval.class_cache",
    "eval.sets.names": "eval.sets.class_names",
}


def current_name(field: str) -> str | None:
    """What a field of an earlier version is called now; None where that is not known."""
    test_set = re.fullmatch(r"eval\.sets\.(.+)\.(\w+)", field)
    if not test_set:
        return RENAMED.get(field)
    now = RENAMED.get(f"eval.sets.{test_set[2]}")
    return now and now.replace("sets.", f"sets.{test_set[1]}.")


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


def check_field_names(config: ConfigDict, values: dict[str, Any], source: str) -> None:
    """Raises a UserError where `values` have fields that do not exist, with the names that they have now."""
    known, found = set(field_names(config)), sorted(field_names(values))
    unknown = [name for name in found if name not in known]
    if not unknown:
        return
    if len(unknown) == len(found):
        raise UserError(f"{source} is not a config of zslflax; found the fields {', '.join(found[:10])}")
    described = [f"{name} (now {now})" if (now := current_name(name)) else name for name in unknown]
    raise UserError(
        f"{source} was written by an older version of zslflax, with fields that this version does not have: "
        f"{', '.join(described)}. Start a new run in another workdir, or use the version that wrote this one"
    )


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
