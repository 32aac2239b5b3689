"""Loads published weights into the variables of a tower."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from zslflax.errors import UserError
from zslflax.models.import_weights.checking import BUFFERS, check_config, check_names, check_shapes, detect_layout
from zslflax.models.import_weights.layouts import (
    HF_BERT,
    HF_RESNET,
    HF_VIT,
    TIMM_VIT,
    TORCHVISION_RESNET,
    Layout,
    mobilenet_layouts,
    published_names,
)
from zslflax.models.import_weights.reading import find_tensors, read_tensors
from zslflax.models.mobilenet import MOBILENETS
from zslflax.models.resnet import RESNETS
from zslflax.models.vit import VITS

log = logging.getLogger("zslflax")


def load_image_tower(folder: Path, name: str, variables: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Loads a published image tower.

    Args:
        folder: holds safetensors in one of the tower's layouts (`layouts.py`), with any prefix.
        name: of the tower, one of `RESNETS`, `MOBILENETS` or `VITS`.
        variables: the tower's {"params", "batch_stats"}, as arrays or their shapes.
        image_size: pixels. The position embeddings of a ViT are resized to it.

    Returns:
        `variables` with the published values, NumPy fp32.

    Raises:
        MissingFileError: the folder has no safetensors; the message says how to convert other files.
        UserError: the checkpoint has another architecture. The message lists all names that only one side has, or all
            shapes that differ.
    """
    if name in RESNETS:
        check_config(folder, name, {"downsample_in_bottleneck": False, "hidden_act": "relu"})
        return load_variables(folder, variables, (TORCHVISION_RESNET, HF_RESNET))
    if name in MOBILENETS:
        return load_variables(folder, variables, mobilenet_layouts([s.blocks for s in MOBILENETS[name].stages]))
    if name in VITS:
        patch, _, _, heads = VITS[name]
        check_config(folder, name, {"num_attention_heads": heads, "hidden_act": "gelu", "qkv_bias": True})
        resize = lambda table: resize_positions(table, image_size // patch)
        return load_variables(folder, variables, (TIMM_VIT, HF_VIT), {("position",): resize})
    raise UserError(f"no image tower is called {name!r}; expected one of {', '.join([*RESNETS, *MOBILENETS, *VITS])}")


def load_text_tower(folder: Path, variables: dict[str, Any]) -> dict[str, Any]:
    """Loads a published BERT or RoBERTa in the names of Hugging Face, with any prefix.

    Arguments, result and errors are those of `load_image_tower`.
    """
    return load_variables(folder, variables, (HF_BERT,))


def load_variables(
    folder: Path,
    variables: dict[str, Any],
    layouts: Sequence[Layout],
    transforms: Mapping[tuple[str, ...], Callable[[np.ndarray], np.ndarray]] | None = None,
) -> dict[str, Any]:
    """Returns `variables` with the values of the checkpoint in `folder`.

    Args:
        folder: holds safetensors.
        variables: {collection: {module: … {leaf: array or its shape}}}.
        layouts: those that the checkpoint may have.
        transforms: functions to apply to some values, by their path without the collection.

    Raises:
        MissingFileError, UserError: as `load_image_tower`.
    """
    targets = flatten_dict(variables)  # (collection, module, …, leaf) → array
    locations = find_tensors(folder)
    layout, prefix = detect_layout(folder, locations, layouts)
    names = {path: [prefix + name for name in published_names(layout, path[1:])] for path in targets}
    needed = {name for of_value in names.values() for name in of_value}
    check_names(folder, needed, set(locations), prefix)

    tensors = read_tensors(locations, needed)
    published = {path: {name: tensors[name] for name in of_value} for path, of_value in names.items()}
    values = {path: to_linen(path[-1], list(of_value.values())) for path, of_value in published.items()}
    for path, value in values.items():
        if transforms and path[1:] in transforms:
            values[path] = transforms[path[1:]](value)
    check_shapes(folder, targets, values, published)
    log_unused(folder, needed, locations)
    return {**variables, **unflatten_dict(values)}


def to_linen(leaf: str, parts: list[np.ndarray]) -> np.ndarray:
    """Converts a PyTorch weight, given in parts along its outputs, to linen's axes.

    Args:
        leaf: name of the linen variable. A "kernel" is transposed: OIHW → HWIO, [out, in] → [in, out].
        parts: arrays to concatenate along the first axis.
    """
    value = np.concatenate(parts) if len(parts) > 1 else parts[0]
    if leaf == "kernel":
        value = value.transpose((2, 3, 1, 0) if value.ndim == 4 else None)
    return np.ascontiguousarray(value)


def resize_positions(table: np.ndarray, side: int) -> np.ndarray:
    """Resizes the position embeddings of a ViT, [1, 1 + s², w], to `side`² patches: [1, 1 + side², w].

    The class token keeps its embedding; the grid is resized by antialiased bicubic interpolation, as in timm.
    """
    old = round((table.shape[1] - 1) ** 0.5)
    if old**2 != table.shape[1] - 1:
        raise UserError(f"position embeddings {table.shape}: expected one for the class token and those of a square")
    if old == side:
        return table
    grid = table[:, 1:].reshape(1, old, old, -1)
    grid = np.asarray(jax.image.resize(jnp.asarray(grid), (1, side, side, grid.shape[-1]), "cubic", antialias=True))
    return np.concatenate([table[:, :1], grid.reshape(1, side**2, -1)], axis=1)


def log_unused(folder: Path, needed: set[str], found: Collection[str]) -> None:
    """Logs how many tensors were read and which ones were not."""
    unused = sorted(set(found) - needed)
    heads = [name for name in unused if not BUFFERS.fullmatch(name)]
    log.info(
        "%s: read %d tensors; no part of the tower: %s and %d constant buffers",
        folder,
        len(needed),
        ", ".join(heads) or "no head",
        len(unused) - len(heads),
    )
