"""Loads published weights into the variables of a tower."""

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from zslflax.errors import UserError
from zslflax.models.convnext import CONVNEXTS
from zslflax.models.fastvit import FASTVITS
from zslflax.models.import_weights.architecture import read_architecture, tower_values
from zslflax.models.import_weights.checking import BUFFERS, check_config, check_names, check_shapes, detect_layout
from zslflax.models.import_weights.image_architecture import (
    clip_resnet_architecture,
    vit_architecture,
)
from zslflax.models.import_weights.layouts import (
    HF_CONVNEXT,
    HF_RESNET,
    TIMM_CONVNEXT,
    TIMM_FASTVIT,
    TIMM_RESNET_D,
    TORCHVISION_RESNET,
    Layout,
    mobilenet_layouts,
    published_names,
)
from zslflax.models.import_weights.open_clip import OPEN_CLIP_CONFIG
from zslflax.models.import_weights.positions import pair_halves, resize_positions
from zslflax.models.import_weights.reading import find_tensors, read_tensors
from zslflax.models.import_weights.transformer_layouts import (
    HF_BERT,
    HF_CLIP_IMAGE,
    HF_DINOV2,
    HF_VIT,
    OPEN_CLIP_IMAGE,
    OPEN_CLIP_RESNET,
    TEXT_LAYOUTS,
    TIMM_EVA02,
    TIMM_VIT,
    dinov3_layouts,
)
from zslflax.models.mobilenet import MOBILENETS
from zslflax.models.resnet import RESNET_DS, RESNETS
from zslflax.models.vit import DINOV2, DINOV3, DINOV3_ROTARY, REGISTERS, VITS

log = logging.getLogger("zslflax")


def load_image_tower(folder: Path, name: str, variables: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Loads a published image tower.

    Args:
        folder: holds safetensors in one of the tower's layouts (`layouts.py`), with any prefix.
        name: of the tower, one of `RESNETS`, `RESNET_DS`, `CONVNEXTS`, `MOBILENETS`, `FASTVITS`, `VITS`, `DINOV2` or
            `DINOV3`; "" for the one that config.json describes.
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
    if name in FASTVITS:
        return load_variables(folder, variables, (TIMM_FASTVIT,))
    if name in VITS:
        resize = lambda table, layout: resize_positions(table, image_size // VITS[name][0])
        return load_variables(folder, variables, (TIMM_VIT, HF_VIT), {("position",): resize})
    dinov2 = name.removesuffix("_reg")
    if dinov2 in DINOV2:
        # Hugging Face's DINOv2 without registers interpolates without antialiasing, as the original does.
        smooth = lambda layout: layout is TIMM_VIT or name != dinov2
        resize = lambda table, layout: resize_positions(table, image_size // DINOV2[dinov2][0], smooth(layout))
        return load_variables(folder, variables, (TIMM_VIT, HF_DINOV2), {("position",): resize})
    if name in DINOV3:
        return load_variables(folder, variables, dinov3_layouts(gated=name.endswith("plus")))
    names = [*RESNETS, *RESNET_DS, *CONVNEXTS, *MOBILENETS, *FASTVITS, *VITS, *DINOV2, *DINOV3]
    raise UserError(f"no image tower is called {name!r}; expected one of {', '.join(names)}")


def load_described_tower(folder: Path, variables: dict[str, Any], image_size: int) -> dict[str, Any]:
    """Loads the image tower that the folder's config.json describes: that of CLIP, SigLIP or an open_clip model."""
    values = read_architecture(folder)
    if clip_resnet_architecture(values):
        resize = lambda table, layout: resize_positions(table[None], image_size // 32, antialias=False)
        return load_variables(folder, variables, (OPEN_CLIP_RESNET,), {("pool", "position"): resize})
    kind = tower_values(values, "vision")["model_type"]
    if convolutional := {"timm_convnext": TIMM_CONVNEXT, "timm_fastvit": TIMM_FASTVIT}.get(kind):
        return load_variables(folder, variables, (convolutional,))
    vit = vit_architecture(values)
    assert vit is not None  # or the tower could not have been built
    tokens, side = int(vit.get("class_token", True)), image_size // vit["patch"]
    transforms: dict[tuple[str, ...], Any] = {
        ("position",): lambda table, layout: resize_positions(
            table.reshape(1, *table.shape[-2:]), side, antialias=layout in (TIMM_VIT, TIMM_EVA02), tokens=tokens
        ),
        ("cls_token",): lambda token, layout: token.reshape(1, 1, -1),
        ("pool", "query"): lambda queries, layout: queries[:1],  # the others are for CoCa's captions
    }
    if vit.get("rotary"):
        transforms |= rotary_transforms(vit["depth"], vit["heads"], columns_first=kind == "timm_pe")
    timm = TIMM_EVA02 if kind == "timm_eva02" else TIMM_VIT
    return load_variables(folder, variables, (HF_CLIP_IMAGE, OPEN_CLIP_IMAGE, timm), transforms)


def rotary_transforms(depth: int, heads: int, columns_first: bool) -> dict[tuple[str, ...], Any]:
    """Returns the `transforms` of `load_variables` that reorder rotary channels with `pair_halves`."""

    def pair_qkv(value: np.ndarray, layout: Layout) -> np.ndarray:
        q, k, v = np.split(value, 3, axis=-1)
        return np.concatenate([*(pair_halves(x, heads, columns_first) for x in (q, k)), v], axis=-1)

    pair_q = lambda value, layout: pair_halves(value, heads, columns_first)
    leaves = {("qkv", "kernel"): pair_qkv, ("qkv", "bias"): pair_qkv, ("q_bias",): pair_q}
    return {(f"block_{i}", "attention", *leaf): turn for i in range(depth) for leaf, turn in leaves.items()}


def towers_by_architecture() -> dict[str, str]:
    """Returns the name of the image tower that computes what a value of "architecture" in config.json stands for."""
    towers = (*RESNETS, *RESNET_DS, *CONVNEXTS, *MOBILENETS, *FASTVITS)
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
    if name in FASTVITS:
        return {"architecture": (name,), "global_pool": ("avg",)}
    options: dict[str, tuple[Any, ...]] = {"hidden_act": ("gelu",), "qkv_bias": (True,), "global_pool": ("token", "")}
    if name in VITS:
        return options | {"num_attention_heads": (VITS[name][3],), "layer_norm_eps": (1e-6, 1e-12)}  # see `ViT.eps`
    if name.removesuffix("_reg") in DINOV2:
        heads = DINOV2[name.removesuffix("_reg")][3]
        return options | {"num_attention_heads": (heads,), "layer_norm_eps": (1e-6,), "use_swiglu_ffn": (False,)}
    if name in DINOV3:
        return dinov3_options(name)
    return {}


def dinov3_options(name: str) -> dict[str, tuple[Any, ...]]:
    """Returns `expected_options` of a DINOv3."""
    size, gated = name.removeprefix("dinov3_"), name.endswith("plus")
    timm_name = {"s": "small", "b": "base", "l": "large", "h": "huge"}[size[0]] + "_plus" * gated
    timm = tuple(f"vit_{timm_name}_patch16_dinov3{suffix}" for suffix in ("", "_qkvb"))
    return {
        "architecture": timm,
        "global_pool": ("avg", "token", ""),  # whichever timm's classifier takes, the weights are the same
        "num_attention_heads": (DINOV3[name][3],),
        "num_register_tokens": (REGISTERS,),
        "layer_norm_eps": (1e-5,),
        "rope_theta": (DINOV3_ROTARY.base,),
        "use_gated_mlp": (gated,),
        "hidden_act": ("silu" if gated else "gelu",),
        "key_bias": (False,),
    }


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
    needed = {name for value_names in names.values() for name in value_names}
    zeros = {
        path for path, value_names in names.items() if re.fullmatch(layout.zeros, value_names[0].removeprefix(prefix))
    }
    if not any(name in locations for path in zeros for name in names[path]):
        needed -= {name for path in zeros for name in names.pop(path)}
    check_names(folder, needed, set(locations), prefix, layout.others)

    tensors = read_tensors(locations, needed)
    published = {path: {name: tensors[name] for name in value_names} for path, value_names in names.items()}
    values = {path: to_linen(path[-1], list(parts.values())) for path, parts in published.items()}
    for path, value in values.items():
        if transforms and path[1:] in transforms:
            values[path] = transforms[path[1:]](value, layout)
    check_shapes(folder, targets, values, published)
    values |= {path: np.zeros(targets[path].shape, np.float32) for path in targets.keys() - names.keys()}
    log_unused(folder, needed, locations, layout.others)
    return {**variables, **unflatten_dict(values)}


def to_linen(leaf: str, parts: list[np.ndarray]) -> np.ndarray:
    """Converts a PyTorch weight, given in parts along its outputs, to linen's axes.

    Args:
        leaf: name of the linen variable. A "kernel" is transposed: OIHW → HWIO, [out, in] → [in, out]. The "scale" of
            a layer of channels may be [c, 1, 1].
        parts: arrays to concatenate along the first axis.
    """
    value = np.concatenate(parts) if len(parts) > 1 else parts[0]
    if leaf == "kernel":
        value = value.transpose((2, 3, 1, 0) if value.ndim == 4 else None)
    if leaf == "scale" and value.shape[1:] == (1, 1):
        value = value[:, 0, 0]
    return np.ascontiguousarray(value)


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
        "%s: read %d tensors; left out as no part of the tower: %s and %d constant buffers%s",
        folder,
        len(needed),
        ", ".join(heads) or "no head",
        len(unused) - len(heads) - len(other_tower),
        f"; {len(other_tower)} tensors are of the other tower" if other_tower else "",
    )
