"""Compares a published checkpoint with a tower by layout, names, shapes and config.json."""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from zslflax.errors import UserError
from zslflax.files import read_json
from zslflax.models.import_weights.layouts import Layout

# Weights and buffers that are published with an encoder but do not affect its output. Any other weight that the tower
# does not have means another architecture.
HEADS = re.compile(
    r"(_?fc|head|head_dist|pre_logits|(pre_)?classifier|pooler|cls|lm_head|qa_outputs|"
    r"vocab_transform|vocab_layer_norm|vocab_projector)\..+"
)
HARMLESS_MODEL_ARGS = {"img_size", "num_classes", "dynamic_img_size"}
BUFFERS = re.compile(r"(.+\.)?(num_batches_tracked|position_ids|token_type_ids|mask_token)")


def check_config(
    folder: Path, tower: str, expected: Mapping[str, Collection[Any]], towers: Mapping[str, str] | None = None
) -> None:
    """Refuses a config.json whose options make another computation of the same weights.

    Args:
        folder: of the checkpoint. Without a config.json there is nothing to check.
        tower: name of the tower, for the message.
        expected: the values of each option with which the tower computes; an option that config.json lacks has its
            default, which is one of these values.
        towers: names of other towers, by the value of "architecture" with which they compute.
    """
    path = folder / "config.json"
    found = read_json(path) if path.is_file() else {}
    for option, values in expected.items():
        if option in found and found[option] not in values:
            here = " or ".join(map(repr, values))
            other = (towers or {}).get(str(found[option])) if option == "architecture" else None
            instead = f"; set model.image.name={other} for it" if other else ""
            raise UserError(f"{path} has {option} {found[option]!r}, but {tower} here computes with {here}{instead}")
    unknown = sorted(set(found.get("model_args") or {}) - HARMLESS_MODEL_ARGS)  # of timm
    if unknown:
        raise UserError(f"{path} has model_args that {tower} here does not implement: {', '.join(unknown)}")


def detect_layout(folder: Path, names: Collection[str], layouts: Sequence[Layout]) -> tuple[Layout, str]:
    """Returns which of the layouts the names of a checkpoint have, and the prefix of all its names."""
    found = [
        (layout, name.removesuffix(layout.anchor))
        for layout in layouts
        for name in sorted(names)
        if (name == layout.anchor or name.endswith("." + layout.anchor)) and not re.fullmatch(layout.others, name)
    ]
    if len(found) == 1:
        return found[0]
    expected = " or ".join(layout.anchor for layout in layouts)
    if found:
        prefixes = ", ".join(repr(prefix) for _, prefix in found)
        raise UserError(f"{folder} holds several encoders, after the prefixes {prefixes}; expected one {expected}")
    some = ", ".join(sorted(names)[:12])
    raise UserError(f"{folder}: expected a weight named {expected} (after any prefix), found {some} …")


def check_names(folder: Path, needed: set[str], found: set[str], prefix: str, others: str = "") -> None:
    """Refuses a checkpoint that lacks weights of the tower, or has weights that are unknown to it; lists them all.

    Args:
        folder: of the checkpoint.
        needed, found: names of weights.
        prefix: of the tower's names.
        others: a regular expression of names that are of another tower.
    """
    missing = sorted(needed - found)
    unknown = sorted(name for name in found - needed if not is_unused(name, prefix) and not re.fullmatch(others, name))
    if missing or unknown:
        raise UserError(
            f"{folder} has another architecture than the tower; change one of them.\n"
            f"  Needed by the tower and not there ({len(missing)}): {', '.join(missing) or 'none'}\n"
            f"  There and unknown to the tower ({len(unknown)}): {', '.join(unknown) or 'none'}"
        )


def is_unused(name: str, prefix: str) -> bool:
    """Whether a weight does not affect the output of the encoder: a head on the encoder, or a buffer.

    >>> is_unused("bert.pooler.dense.bias", "bert."), is_unused("bert.encoder.layer.9.output.bias", "bert.")
    (True, False)
    """
    parts = prefix.split(".")
    # The prefix "model.bert." has heads after "", after "model." and after "model.bert.".
    starts = [".".join(parts[:i]) + "." if i else "" for i in range(len(parts))]
    heads = any(name.startswith(start) and HEADS.fullmatch(name.removeprefix(start)) for start in starts)
    return heads or bool(BUFFERS.fullmatch(name))


def check_shapes(
    folder: Path,
    variables: Mapping[tuple[str, ...], Any],
    values: Mapping[tuple[str, ...], np.ndarray],
    published: Mapping[tuple[str, ...], Mapping[str, np.ndarray]],
) -> None:
    """Refuses values whose shapes differ from those of the tower's variables; lists them all.

    Args:
        folder: of the checkpoint.
        variables: arrays, or their shapes, by (collection, module, …, leaf).
        values: the arrays that would replace them.
        published: the tensors of the checkpoint, by name, from which each value was made.
    """
    wrong = []
    for path, value in values.items():
        if value.shape != tuple(variables[path].shape):
            found = ", ".join(f"{name} {tensor.shape}" for name, tensor in published[path].items())
            expected = tuple(variables[path].shape)
            wrong.append(f"{'/'.join(path[1:])}: expected {expected}, found {value.shape} from {found}")
    if wrong:
        raise UserError(f"{folder} has other shapes than the tower:\n  " + "\n  ".join(wrong))
