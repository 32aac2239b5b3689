"""Checks what the folder of a model says before it is used: it may have been downloaded from anywhere.

The checks come before anything is allocated for the model, and their messages name the file and the field.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from zslflax.config import default_config, is_classifier
from zslflax.config_checks import INTERPOLATIONS
from zslflax.config_names import field_names, get_field
from zslflax.data.sources.shapes import shards_exist
from zslflax.errors import UserError
from zslflax.models.build import described_tower, example_inputs, text_config
from zslflax.models.two_tower import TwoTower

# The smallest and largest value of fields that decide how much memory and time a prediction takes. The bounds are far
# beyond every published model.
RANGES: dict[str, tuple[float, float]] = {
    "model.embed_dim": (1, 1 << 16),
    "model.image.size": (1, 4096),
    "model.text.max_tokens": (1, 1 << 16),
    "model.text.dropout": (0.0, 1.0),
    "model.text.scratch.layers": (1, 128),
    "model.text.scratch.width": (1, 1 << 16),
    "model.text.scratch.heads": (1, 1 << 10),
    "model.text.scratch.vocab_size": (1, 1 << 24),
    "eval.batch_size": (1, 1 << 20),
    "eval.resize_factor": (1.0, 16.0),
}
MAX_CLASSES, MAX_CHARACTERS = 1 << 20, 1_000  # of a classifier, and of a class name
MAX_TEMPLATES, MAX_TEMPLATE_CHARACTERS = 10_000, 1_000  # published prompt sets have up to 80 templates for a class
MAX_ENCODER_SIZE, MAX_ENCODER_LAYERS = 1 << 24, 128  # of any number in a text encoder's config.json
COMPUTE_DTYPES = ("bfloat16", "float32")
SHOWN = 5  # arrays in a message


def check_saved_config(config: ConfigDict, path: Path) -> None:
    """Refuses a config that describes no model, or one of absurd size, or a classifier without classes.

    Args:
        config: as `read_config` read it.
        path: of its file, for messages.

    Raises:
        UserError: a field has the wrong type, is not finite, or is out of its range.
    """
    defaults = default_config()
    known = set(field_names(defaults))
    for field in field_names(config):
        value = get_field(config, field)
        kind = type(get_field(defaults, field)) if field in known else str  # of the fields of test sets
        check_value(value, kind, f"{path} has {field} {shorten(value)}")
    for field, (low, high) in RANGES.items():
        value = get_field(config, field)
        if not low <= value <= high and (field, value) != ("eval.resize_factor", 0):
            raise UserError(f"{path} has {field} {value!r}, expected {low:,} to {high:,}")
    if config.compute_dtype not in COMPUTE_DTYPES:
        raise UserError(
            f"{path} has compute_dtype {shorten(config.compute_dtype)}, expected {' or '.join(COMPUTE_DTYPES)}"
        )
    if config.eval.interpolation not in INTERPOLATIONS:
        raise UserError(
            f"{path} has eval.interpolation {shorten(config.eval.interpolation)}, expected {', '.join(INTERPOLATIONS)}"
        )
    check_class_names(config, path)
    check_image_fields(config, path)
    check_templates(config.eval.templates, path)


def check_class_names(config: ConfigDict, path: Path) -> None:
    """Refuses a classifier without names of its classes, two towers with such names, and absurd names."""
    names = config.model.class_names
    if is_classifier(config) != bool(names):
        raise UserError(
            f"{path} has objective.name {shorten(config.objective.name)} and {len(names)} model.class_names; "
            "a classifier has names of its classes, and two towers have none"
        )
    if len(names) > MAX_CLASSES or not all(isinstance(name, str) and len(name) <= MAX_CHARACTERS for name in names):
        raise UserError(
            f"{path} has {len(names):,} model.class_names, expected at most {MAX_CLASSES:,} texts of at most "
            f"{MAX_CHARACTERS:,} characters"
        )


def check_value(value: Any, kind: type, found: str) -> None:
    """Refuses a value of another type than `kind`, or a number that is not finite, also within tuples."""
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UserError(f"{found}, expected a value of type {kind.__name__}")
    for number in numbers_in(value):
        if not math.isfinite(number):
            raise UserError(f"{found}, expected finite numbers")


def numbers_in(value: Any) -> Iterator[float]:
    """Yields the floating-point numbers in nested tuples."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, tuple):
        for entry in value:
            yield from numbers_in(entry)


def check_image_fields(config: ConfigDict, path: Path) -> None:
    """Refuses statistics of pixels that are not three numbers, deviations of zero, and enormous resized images."""
    image = config.model.image
    for field, lowest in (("mean", -1e6), ("std", 1e-6)):
        values = image[field]
        if len(values) != 3 or not all(type(x) in (int, float) and lowest <= x <= 1e6 for x in values):
            kind = "numbers above 0" if field == "std" else "numbers"
            raise UserError(f"{path} has model.image.{field} {shorten(values)}, expected three {kind}")
    if image.size * config.eval.resize_factor > 2 * RANGES["model.image.size"][1]:
        raise UserError(
            f"{path} has model.image.size {image.size} and eval.resize_factor {config.eval.resize_factor}, which "
            "resize each image to more than 8,192 pixels"
        )


def check_templates(templates: tuple[Any, ...], path: Path) -> None:
    """Refuses prompts that would take minutes or gigabytes: too many, too long, or with several places for the name."""
    if not 1 <= len(templates) <= MAX_TEMPLATES:
        raise UserError(f"{path} has {len(templates):,} eval.templates, expected 1 to {MAX_TEMPLATES:,}")
    for template in templates:
        if not isinstance(template, str) or len(template) > MAX_TEMPLATE_CHARACTERS or "{}" not in template:
            raise UserError(
                f"{path} has {shorten(template)} among eval.templates, expected prompts of at most "
                f"{MAX_TEMPLATE_CHARACTERS:,} characters with {{}} for the class name"
            )


def check_text_encoder(config: ConfigDict, path: Path) -> None:
    """Refuses sizes of a text encoder's config.json that are no whole numbers, or absurd ones.

    Args:
        config: the whole config.
        path: of the encoder's config.json, for messages.

    Raises:
        UserError: a size cannot be used; or the file describes an encoder that is not implemented.
    """
    check_sizes(lambda: text_config(config.model.text), path)


def check_image_encoder(config: ConfigDict, path: Path) -> None:
    """Refuses sizes of the config.json that describes an image tower without a name, as `check_text_encoder` does."""
    if not config.model.image.name:
        check_sizes(lambda: described_tower(config.model.image, np.float32), path)


def check_sizes(describe: Callable[[], Any], path: Path) -> None:
    """Refuses numbers in the fields of a dataclass that cannot be sizes.

    Args:
        describe: returns the dataclass, from the file at `path`.
        path: for messages.
    """
    with wrong_types(path):
        described = describe()
    for field in dataclasses.fields(described):
        name, value = field.name, getattr(described, field.name)
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        limit = MAX_ENCODER_LAYERS if name in ("layers", "depth") else MAX_ENCODER_SIZE
        if field.type in (int, "int") and not (type(value) is int and 0 <= value <= limit):
            raise UserError(f"{path} gives {name} {shorten(value)}, expected a whole number up to {limit:,}")
        if field.type in (float, "float") and not (number and math.isfinite(value) and value >= 0):
            raise UserError(f"{path} gives {name} {shorten(value)}, expected a number of at least 0")


@contextlib.contextmanager
def wrong_types(path: Path) -> Iterator[None]:
    """Turns the errors of code that reads a damaged JSON file into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} has a field of the wrong type: {error}") from error


def abstract_variables(model: TwoTower, config: ConfigDict, path: Path) -> Any:
    """The variables of a model as shapes and types; allocates none of them.

    Raises:
        UserError: the model cannot be built; the message names its config file.
    """
    try:
        return jax.eval_shape(model.init, jax.random.key(0), *example_inputs(model, config.model))
    except Exception as error:  # flax and jax raise many types
        raise UserError(f"{path} describes a model that cannot be built: {error}") from error


def variable_shapes(model: TwoTower, config: ConfigDict, path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's variables, by names such as params/image/projection/kernel; errors as above."""
    variables = abstract_variables(model, config, path)
    return {name: tuple(x.shape) for name, x in flatten_dict(variables, sep="/").items()}


def check_shapes(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """Refuses arrays that are not those of the model. Parameters of the objective may be there too.

    Args:
        expected: from `variable_shapes`.
        found: the shapes in the file.
        path: of the file or folder, for messages.
    """
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(name for name in found.keys() - expected.keys() if not name.startswith("params/objective/"))
    other = [
        f"{name} {list(found[name])} instead of {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    kinds = {"missing": missing, "unknown": unknown, "of other shapes": other}
    described = [
        f"{kind}: {', '.join(names[:SHOWN])}" + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
        for kind, names in kinds.items()
        if names
    ]
    if described:
        raise UserError(f"{path} has other arrays than the model of its config.json; {'; '.join(described)}")


def check_finite(arrays: Mapping[str, np.ndarray], path: Path) -> None:
    """Refuses weights that are not finite: they would score every class as `nan`."""
    wrong = [name for name, array in arrays.items() if not np.all(np.isfinite(np.asarray(array, np.float32)))]
    if wrong:
        names = ", ".join(wrong[:SHOWN])
        raise UserError(f"{path} has weights that are not finite in {len(wrong)} arrays, such as {names}")


def use_own_places(config: ConfigDict) -> None:
    """Replaces the places that a model's config names by those of this machine: a model never says where to write.

    A cache that is switched off stays so. Shapes that the run has written are read where they are.
    """
    defaults = default_config()
    for field in ("compilation_cache", "eval.class_cache"):
        if get_field(config, field):
            config.update_from_flattened_dict({field: get_field(defaults, field)})
    if not shards_exist(**config.data.shapes.to_dict()):
        config.data.shapes.root = defaults.data.shapes.root


def shorten(value: Any) -> str:
    """A value for a message, of limited length."""
    text = repr(value)
    return text if len(text) <= 80 else text[:79] + "…"
