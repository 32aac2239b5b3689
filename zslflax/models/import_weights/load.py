"""Loads published weights into the variables of a tower."""

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from zslflax.errors import UserError
from zslflax.models.convnext import CONVNEXTS
from zslflax.models.import_weights.architecture import read_architecture, tower_values
from zslflax.models.import_weights.checking import BUFFERS, check_config, check_names, check_shapes, detect_layout
from zslflax.models.import_weights.image_architecture import (
    clip_resnet_architecture,
    convnext_architecture,
    vit_architecture,
)
from zslflax.models.import_weights.layouts import (
    HF_CONVNEXT,
    HF_RESNET,
    TIMM_CONVNEXT,
    TIMM_RESNET_D,
    TORCHVISION_RESNET,
    Layout,
    mobilenet_layouts,
    published_names,
)
from zslflax.models.import_weights.open_clip import OPEN_CLIP_CONFIG
from zslflax.models.import_weights.reading import find_tensors, read_tensors
from zslflax.models.import_weights.transformer_layouts import (
    HF_BERT,
    HF_CLIP_IMAGE,
    HF_DINOV2,
    HF_VIT,
    OPEN_CLIP_IMAGE,
    OPEN_CLIP_RESNET,
    TEXT_LAYOUTS,
    TIMM_VIT,
)
from zslflax.models.mobilenet import MOBILENETS
from zslflax.models.resnet import RESNET_DS, RESNETS
from zslflax.models.vit import DINOV2, VITS, interpolate_positions

log = logging.getLogger("zslflax")


def load_image_tower(folder: Path, name: str, variables: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Loads a published image tower.

    Args:
        folder: holds safetensors in one of the tower's layouts (`layouts.py`), with any prefix.
        name: of the tower, one of `RESNETS`, `RESNET_DS`, `CONVNEXTS`, `MOBILENETS`, `VITS` or `DINOV2`; "" for the one
            that config.json describes.
        variables: the tower's {"params", "batch_stats"}, as arrays or their shapes.
        image_size: pixels. The position embeddings of a ViT are resized to it.

    Returns:
        `variables` with the published values, NumPy fp32.

    Raises:
        MissingFileError: the folder has no safetensors; the message says how to convert other files.
        UserError: the checkpoint has another architecture. The message lists all names that only one side has, or all
            shapes that differ.
    """
    if not name:
        return load_described_tower(folder, variables, image_size)
    check_config(folder, name, expected_options(name), towers_by_architecture())
    if name in RESNETS:
        return load_variables(folder, variables, (TORCHVISION_RESNET, HF_RESNET))
    if name in RESNET_DS:
        return load_variables(folder, variables, (TIMM_RESNET_D,))
    if name in CONVNEXTS:
        return load_variables(folder, variables, (TIMM_CONVNEXT, HF_CONVNEXT))
    if name in MOBILENETS:
        return load_variables(folder, variables, mobilenet_layouts([s.blocks for s in MOBILENETS[name].stages]))
    if name in VITS:
        resize = lambda table, layout: resize_positions(table, image_size // VITS[name][0])
        return load_variables(folder, variables, (TIMM_VIT, HF_VIT), {("position",): resize})
    dinov2 = name.removesuffix("_reg")
    if dinov2 in DINOV2:
        # Hugging Face's DINOv2 without registers interpolates without antialiasing, as the original does.
        smooth = lambda layout: layout is TIMM_VIT or name != dinov2
        resize = lambda table, layout: resize_positions(table, image_size // DINOV2[dinov2][0], smooth(layout))
        return load_variables(folder, variables, (TIMM_VIT, HF_DINOV2), {("position",): resize})
    names = [*RESNETS, *RESNET_DS, *CONVNEXTS, *MOBILENETS, *VITS, *DINOV2]
    raise UserError(f"no image tower is called {name!r}; expected one of {', '.join(names)}")


def load_described_tower(folder: Path, variables: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Loads the image tower that the folder's config.json describes: that of CLIP, SigLIP or an open_clip model."""
    values = read_architecture(folder)
    if clip_resnet_architecture(values):
        resize = lambda table, layout: resize_positions(table[None], image_size // 32, antialias=False)
        return load_variables(folder, variables, (OPEN_CLIP_RESNET,), {("pool", "position"): resize})
    if convnext_architecture(values):
        return load_variables(folder, variables, (TIMM_CONVNEXT,))
    vit = vit_architecture(values)
    assert vit is not None  # or the tower could not have been built
    tokens, side = int(vit.get("class_token", True)), image_size // vit["patch"]
    transforms: dict[tuple[str, ...], Any] = {
        ("position",): lambda table, layout: resize_positions(
            table.reshape(1, *table.shape[-2:]), side, antialias=layout is TIMM_VIT, tokens=tokens
        ),
        ("cls_token",): lambda token, layout: token.reshape(1, 1, -1),
    }
    return load_variables(folder, variables, (HF_CLIP_IMAGE, OPEN_CLIP_IMAGE, TIMM_VIT), transforms)


def towers_by_architecture() -> dict[str, str]:
    """Returns the name of the image tower that computes what a value of "architecture" in config.json stands for."""
    towers = (*RESNETS, *RESNET_DS, *CONVNEXTS, *MOBILENETS)
    return {value: name for name in towers for value in expected_options(name)["architecture"]}


def expected_options(name: str) -> dict[str, tuple[Any, ...]]:
    """Returns the options of a config.json, of Hugging Face or timm, with which the image tower `name` computes."""
    if name in RESNETS:
        timm_names: tuple[str, ...] = (name, f"tv_{name}", f"ssl_{name}", f"swsl_{name}", f"gluon_{name}_v1b")
        hf = {"downsample_in_bottleneck": (False,), "downsample_in_first_stage": (False,), "hidden_act": ("relu",)}
        return {"architecture": timm_names, "global_pool": ("avg",), **hf}
    if name in RESNET_DS:
        return {"architecture": (name, f"gluon_{name.removesuffix('d')}_v1d"), "global_pool": ("avg",)}
    if name in CONVNEXTS:  # Hugging Face's last norm has an eps of 1e-12, which matters only for tiny variances
        timm_names = (name, f"{name}_in22k", f"{name}_in22ft1k", f"{name}_384_in22ft1k")
        hf = {"hidden_act": ("gelu",), "layer_scale_init_value": (1e-6,), "num_stages": (4,), "patch_size": (4,)}
        return {"architecture": timm_names, "global_pool": ("avg",), **hf}
    if name in MOBILENETS:  # timm's own "efficientnet_lite0" pads as PyTorch does
        tensorflow = (name.replace("_", "-"), f"tf_{name}")
        names = (name, "mobilenetv2_100") if name == "mobilenet_v2" else tensorflow
        return {"architecture": names, "global_pool": ("avg",)}
    options: dict[str, tuple[Any, ...]] = {"hidden_act": ("gelu",), "qkv_bias": (True,), "global_pool": ("token", "")}
    if name in VITS:
        return options | {"num_attention_heads": (VITS[name][3],), "layer_norm_eps": (1e-6, 1e-12)}  # see `ViT.eps`
    if name.removesuffix("_reg") in DINOV2:
        heads = DINOV2[name.removesuffix("_reg")][3]
        return options | {"num_attention_heads": (heads,), "layer_norm_eps": (1e-6,), "use_swiglu_ffn": (False,)}
    return {}


def load_text_tower(folder: Path, variables: dict[str, Any]) -> dict[str, Any]:
    """Loads a published text encoder in the names of Hugging Face, or CLIP's in those of open_clip, with any prefix.

    Arguments, result and errors are those of `load_image_tower`.
    """
    described = any((folder / file).is_file() for file in ("config.json", OPEN_CLIP_CONFIG))
    config = tower_values(read_architecture(folder), "text") if described else {}
    layouts = TEXT_LAYOUTS.get(config.get("model_type", ""), (HF_BERT,))
    return load_variables(folder, variables, layouts)


def load_variables(
    folder: Path,
    variables: dict[str, Any],
    layouts: Sequence[Layout],
    transforms: Mapping[tuple[str, ...], Callable[[np.ndarray, Layout], np.ndarray]] | None = None,
) -> dict[str, Any]:
    """Returns `variables` with the values of the checkpoint in `folder`.

    Args:
        folder: holds safetensors.
        variables: {collection: {module: … {leaf: array or its shape}}}.
        layouts: those that the checkpoint may have.
        transforms: functions of a value and the checkpoint's layout, by the path of the value without the collection.

    Raises:
        MissingFileError, UserError: as `load_image_tower`.
    """
    targets = flatten_dict(variables)  # (collection, module, …, leaf) → array
    locations = find_tensors(folder)
    layout, prefix = detect_layout(folder, locations, layouts)
    names = {path: [prefix + name for name in published_names(layout, path[1:])] for path in targets}
    needed = {name for of_value in names.values() for name in of_value}
    check_names(folder, needed, set(locations), prefix, layout.others)

    tensors = read_tensors(locations, needed)
    published = {path: {name: tensors[name] for name in of_value} for path, of_value in names.items()}
    values = {path: to_linen(path[-1], list(of_value.values())) for path, of_value in published.items()}
    for path, value in values.items():
        if transforms and path[1:] in transforms:
            values[path] = transforms[path[1:]](value, layout)
    check_shapes(folder, targets, values, published)
    log_unused(folder, needed, locations, layout.others)
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


def resize_positions(table: np.ndarray, side: int, antialias: bool = True, tokens: int = 1) -> np.ndarray:
    """Resizes the position embeddings of a ViT, [1, 1 + s², w] or [1, s², w], to those of `side`² patches.

    The class token keeps its embedding, or gets zeros where the table has none: timm adds it to the token itself in
    networks with registers.

    Args:
        table: as published.
        side: number of patches along a side of the image.
        antialias: antialiased bicubic interpolation as in timm; otherwise `interpolate_bicubic`.
        tokens: 1 with a class token, 0 without.

    Returns:
        [1, tokens + side², w].
    """
    side_of = lambda count: round(count**0.5) if round(count**0.5) ** 2 == count else 0
    if tokens and side_of(table.shape[1]) and table.shape[1] > 1:
        table = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
    old = side_of(table.shape[1] - tokens)
    if not old:
        raise UserError(
            f"position embeddings {table.shape}: expected those of a square, with or without one for the class token"
        )
    if old == side:
        return table
    if antialias:
        return np.array(interpolate_positions(jnp.asarray(table), (side, side), tokens))
    grid = interpolate_bicubic(table[:, tokens:].reshape(1, old, old, -1), side)
    return np.concatenate([table[:, :tokens], grid.reshape(1, side**2, -1)], axis=1)


def interpolate_bicubic(grid: np.ndarray, side: int) -> np.ndarray:
    """Resizes [b, s, s, w] → [b, side, side, w] as PyTorch's bicubic interpolation does without antialiasing.

    The kernel is that of Keys (1981) with a = −0.75; pixels beyond the border are those at the border.
    """
    old, a = grid.shape[1], -0.75
    x = (np.arange(side) + 0.5) * old / side - 0.5
    first = np.floor(x).astype(int) - 1
    weights = np.zeros((side, old))
    for tap in range(4):
        d = np.abs(x - first - tap)
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(weights, (np.arange(side), np.clip(first + tap, 0, old - 1)), np.where(d <= 1, near, far))
    return np.einsum("ih,jw,bhwc->bijc", weights, weights, grid).astype(grid.dtype)


def log_unused(folder: Path, needed: set[str], found: Collection[str], others: str) -> None:
    """Logs how many tensors were read and which ones were not.

    Args:
        folder: of the checkpoint.
        needed, found: names of tensors.
        others: a regular expression of names that are of another tower, which are counted alone.
    """
    unused = sorted(set(found) - needed)
    other_tower = {name for name in unused if re.fullmatch(others, name)}
    heads = [name for name in unused if name not in other_tower and not BUFFERS.fullmatch(name)]
    log.info(
        "%s: read %d tensors; no part of the tower: %s and %d constant buffers%s",
        folder,
        len(needed),
        ", ".join(heads) or "no head",
        len(unused) - len(heads) - len(other_tower),
        f"; {len(other_tower)} tensors are of the other tower" if other_tower else "",
    )
