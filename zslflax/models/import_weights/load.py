"""Weights of public PyTorch checkpoints (safetensors) as the towers' own variables, without PyTorch."""

import json
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open

from zslflax.errors import MissingFileError, UserError
from zslflax.models.import_weights.layouts import (
    HF_BERT,
    HF_RESNET,
    HF_VIT,
    TIMM_VIT,
    TORCHVISION_RESNET,
    Layout,
    source_names,
)
from zslflax.models.resnet import RESNETS
from zslflax.models.vit import VITS

log = logging.getLogger("zslflax")

# What is published with an encoder and has no part in its output; anything else left over is an architecture
# that the tower does not have.
HEADS = re.compile(r"(fc|head|head_dist|pre_logits|classifier|pooler|cls|lm_head|qa_outputs)\..+")
BUFFERS = re.compile(r"(.+\.)?(num_batches_tracked|position_ids|token_type_ids)")
CONVERT = (
    "import sys, torch; from safetensors.torch import save_file; "
    "weights = torch.load(sys.argv[1], map_location='cpu', weights_only=True); "
    "save_file({name: value.clone().contiguous() for name, value in weights.items()}, sys.argv[2])"
)


def load_image(location: Path, name: str, variables: dict, image_size: int) -> dict:
    """A published ResNet or ViT as an image tower's variables.

    Args:
        location: a folder with safetensors, in torchvision's, timm's or Hugging Face's names (any prefix).
        name: of the tower, one of `RESNETS` or `VITS`.
        variables: the tower's {"params", "batch_stats"}, of arrays or of their shapes.
        image_size: pixels. A ViT's position embeddings are resized to it.

    Returns:
        `variables` with the published values, NumPy fp32.

    Raises:
        FileNotFoundError: no safetensors there; the message says how to convert other files.
        ValueError: another architecture: names that only one side has, or other shapes; all are listed.
    """
    if name in RESNETS:
        check_config(location, name, {"downsample_in_bottleneck": False, "hidden_act": "relu"})
        return fill(location, variables, (TORCHVISION_RESNET, HF_RESNET))
    if name in VITS:
        patch, _, _, heads = VITS[name]
        check_config(location, name, {"num_attention_heads": heads, "hidden_act": "gelu", "qkv_bias": True})
        resize = lambda table: resize_positions(table, image_size // patch)
        return fill(location, variables, (TIMM_VIT, HF_VIT), {("position",): resize})
    raise UserError(f"no image tower is called {name!r}; expected one of {', '.join([*RESNETS, *VITS])}")


def load_text(location: Path, variables: dict) -> dict:
    """A published BERT or RoBERTa, its names after any prefix, as a text tower's variables.

    Arguments, returns and errors are `load_image`'s.
    """
    return fill(location, variables, (HF_BERT,))


def resize_positions(table: np.ndarray, side: int) -> np.ndarray:
    """A ViT's position embeddings [1, 1 + s², w] for `side`² patches: [1, 1 + side², w].

    The class token's stays, the grid is resized by antialiased bicubic interpolation, as timm does.
    """
    old = round((table.shape[1] - 1) ** 0.5)
    if old**2 != table.shape[1] - 1:
        raise UserError(f"position embeddings {table.shape}: expected one for the class token and those of a square")
    if old == side:
        return table
    grid = table[:, 1:].reshape(1, old, old, -1)
    grid = np.asarray(jax.image.resize(jnp.asarray(grid), (1, side, side, grid.shape[-1]), "cubic", antialias=True))
    return np.concatenate([table[:, :1], grid.reshape(1, side**2, -1)], axis=1)


def check_config(location: Path, tower: str, wanted: dict[str, Any]) -> None:
    """Refuses what config.json tells and names and shapes do not: the same weights in another computation."""
    path = Path(location) / "config.json"
    found = json.loads(path.read_text()) if path.is_file() else {}
    for field, value in wanted.items():
        if found.get(field, value) != value:
            raise UserError(f"{path} has {field} {found[field]!r}, but {tower} here computes with {value!r}")


def fill(location: Path, variables: dict, layouts: tuple[Layout, ...], special: dict | None = None) -> dict:
    """`variables` with the values of the checkpoint at `location`, which has one of the `layouts`.

    `special` has functions, by path, for values that need more than `to_flax`.
    """
    targets = flatten_dict(variables)  # (collection, module, …, leaf) → array
    files = tensor_files(Path(location))
    layout, prefix = detect(location, files, layouts)
    sources = {path: tuple(prefix + name for name in source_names(layout, path[1:])) for path in targets}
    wanted = {name for names in sources.values() for name in names}
    missing, extra = sorted(wanted - files.keys()), sorted(files.keys() - wanted)
    unknown = [name for name in extra if not is_unused(name, prefix)]
    if missing or unknown:
        raise UserError(
            f"{location} has another architecture than the tower; change one of them.\n"
            f"  Needed by the tower and not there ({len(missing)}): {', '.join(missing) or 'none'}\n"
            f"  There and unknown to the tower ({len(unknown)}): {', '.join(unknown) or 'none'}"
        )
    tensors = read(files, wanted)
    filled, wrong = {}, []
    for path, target in targets.items():
        value = to_flax(path[-1], [tensors[name] for name in sources[path]])
        if special and path[1:] in special:
            value = special[path[1:]](value)
        if value.shape != tuple(target.shape):
            found = ", ".join(f"{name} {tensors[name].shape}" for name in sources[path])
            target_name = "/".join(path[1:])
            wrong.append(f"{target_name}: expected {tuple(target.shape)}, found {value.shape} from {found}")
        filled[path] = value
    if wrong:
        raise UserError(f"{location} has other shapes than the tower:\n  " + "\n  ".join(wrong))
    heads = [name for name in extra if not BUFFERS.fullmatch(name)]
    log.info(
        "%s: %d tensors read; no part of the tower: %s and %d constant buffers",
        *(location, len(wanted), ", ".join(heads) or "no head", len(extra) - len(heads)),
    )
    return {**variables, **unflatten_dict(filled)}


def to_flax(leaf: str, parts: list[np.ndarray]) -> np.ndarray:
    """PyTorch's weight, in parts of its output, as linen has it: OIHW → HWIO, [out, in] → [in, out]."""
    value = np.concatenate(parts) if len(parts) > 1 else parts[0]
    if leaf == "kernel":
        value = value.transpose((2, 3, 1, 0) if value.ndim == 4 else None)
    return np.ascontiguousarray(value)


def detect(location: Path, names, layouts: tuple[Layout, ...]) -> tuple[Layout, str]:
    """Which of the layouts a checkpoint's names have, and what stands before each of them."""
    found = [
        (layout, name.removesuffix(layout.anchor))
        for layout in layouts
        for name in sorted(names)
        if name == layout.anchor or name.endswith("." + layout.anchor)
    ]
    if len(found) == 1:
        return found[0]
    expected = " or ".join(layout.anchor for layout in layouts)
    if found:
        prefixes = ", ".join(repr(prefix) for _, prefix in found)
        raise UserError(f"{location} holds several encoders, after the prefixes {prefixes}; expected one {expected}")
    some = ", ".join(sorted(names)[:12])
    raise UserError(f"{location}: expected a weight named {expected} (after any prefix), found {some} …")


def is_unused(name: str, prefix: str) -> bool:
    """Whether a weight has no part in an encoder's output: a head on the encoder, or a buffer."""
    parts = prefix.split(".")
    # Of the prefix "model.bert.": "", "model.", "model.bert."
    starts = [".".join(parts[:i]) + "." if i else "" for i in range(len(parts))]
    heads = any(name.startswith(start) and HEADS.fullmatch(name.removeprefix(start)) for start in starts)
    return heads or bool(BUFFERS.fullmatch(name))


def tensor_files(folder: Path) -> dict[str, tuple[Path, str]]:
    """The file of each tensor, and its name there: old checkpoints say gamma, beta for weight, bias."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        paths = sorted({folder / file for file in json.loads(index.read_text())["weight_map"].values()})
        absent = [path.name for path in paths if not path.is_file()]
        if absent:
            raise MissingFileError(f"{index} names files that are not there: {', '.join(absent)}; copy them as well")
    elif (folder / "model.safetensors").is_file():
        paths = [folder / "model.safetensors"]
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if len(paths) != 1 and not index.is_file():
        raise MissingFileError(no_weights(folder, paths))
    files = {}
    for path in paths:
        with safe_open(path, "numpy") as file:
            names = file.keys()
        for name in names:
            files[re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))] = (path, name)
    return files


def no_weights(folder: Path, several: list[Path]) -> str:
    """What to say of a folder without model.safetensors."""
    if several:
        names = ", ".join(path.name for path in several)
        return f"{folder} has several safetensors ({names}) and no index; name the one that is meant model.safetensors"
    others = [path for kind in ("*.bin", "*.pth", "*.pt") for path in sorted(folder.glob(kind))]
    source = others[0] if others else folder / "pytorch_model.bin"
    start = f"{folder} has weights in PyTorch's own format only ({source.name})"
    if not others:
        files = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        start = (
            f"{folder} has no model.safetensors (found {files}). If the model is published in PyTorch's own "
            "format only (the Hub's pytorch_model.bin), download that file there"
        )
    paths = shlex.join([str(source), str(folder / "model.safetensors")])
    return f'{start}; convert it once, where PyTorch is installed:\n  python -c "{CONVERT}" {paths}'


def read(files: dict[str, tuple[Path, str]], names) -> dict[str, np.ndarray]:
    """The named tensors in fp32; half precision (also bfloat16, a NumPy type through JAX) is widened."""
    tensors = {}
    for path in sorted({files[name][0] for name in names}):
        with safe_open(path, "numpy") as file:
            for name in names:
                if files[name][0] == path:
                    tensors[name] = file.get_tensor(files[name][1]).astype(np.float32)
    return tensors
