"""The fields of a config by name: which there are, and what those of earlier versions are called now."""

import re
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from zslflax.errors import UserError, nearest_names

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


def field_names(values: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the fields of a `ConfigDict` or nested dict, without those of sections.

    >>> list(field_names({"steps": 10, "data": {"flip": True}}))
    ['steps', 'data.flip']
    """
    for key, value in values.items():
        if isinstance(value, (ConfigDict, dict)):
            yield from field_names(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def get_field(config: ConfigDict, field: str) -> Any:
    """The value of a field by its dotted name."""
    value = config
    for part in field.split("."):
        value = value[part]
    return value


def current_name(field: str) -> str | None:
    """What a field of an earlier version is called now; None where that is not known."""
    test_set = re.fullmatch(r"eval\.sets\.(.+)\.(\w+)", field)
    if not test_set:
        return RENAMED.get(field)
    now = RENAMED.get(f"eval.sets.{test_set[2]}")
    return now and now.replace("sets.", f"sets.{test_set[1]}.")


def check_field(config: ConfigDict, name: str) -> None:
    """Raises a UserError if there is no field of this name, and names the nearest."""
    known = list(field_names(config))
    if name not in known:
        now = current_name(name)
        hint = f"it is called {now} now" if now else f"nearest: {nearest_names(name, known, 3)}"
        raise UserError(f"--config.{name}: there is no such field; {hint}")


def check_overrides(config: ConfigDict, arguments: list[str]) -> None:
    """Raises a UserError for `--config.FIELD=VALUE` with a field that does not exist, and names the nearest."""
    for argument in arguments:
        if argument.startswith(("--config.", "-config.")):
            check_field(config, argument.partition("config.")[2].partition("=")[0].partition("[")[0])


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
