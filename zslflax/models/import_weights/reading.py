"""Reads tensors from the safetensors files of a folder."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zslflax.errors import MissingFileError
from zslflax.files import open_tensors, read_json
from zslflax.models.import_weights.open_clip import OPEN_CLIP_WEIGHTS, is_open_clip

PYTORCH_FILES = ("*.bin", "*.pth", "*.pt", "*.pth.tar", "*.ckpt")
CONVERT = (
    "import sys, torch, zipfile; from safetensors.torch import save_file; path = sys.argv[1]; "
    # TorchScript, in which OpenAI published CLIP, has constants beside its data.
    "script = zipfile.is_zipfile(path) and any('constants.pkl' in n for n in zipfile.ZipFile(path).namelist()); "
    "weights = torch.jit.load(path, map_location='cpu').state_dict() if script else "
    "torch.load(path, map_location='cpu', weights_only=True); "
    # Training scripts, Lightning and others put the weights beside the optimiser's state.
    "weights = next((weights[key] for key in ('state_dict', 'model_state_dict', 'model') if key in weights), weights); "
    "save_file({name.removeprefix('module.'): value.clone().contiguous() for name, value in weights.items() "
    "if torch.is_tensor(value)}, sys.argv[2])"
)


class TensorLocation(NamedTuple):
    """The file that holds a tensor, and the tensor's name in that file."""

    path: Path
    name: str


def find_tensors(folder: Path) -> dict[str, TensorLocation]:
    """Returns the location of every tensor of a folder by name.

    Old checkpoints say LayerNorm.gamma and .beta where newer ones say weight and bias; the keys are the new names.

    Raises:
        MissingFileError: the folder has no safetensors, several without an index, or lacks one that its index names.
            The message says how to convert files in PyTorch's own format.
    """
    tensors = {}
    for path in weight_files(folder):
        with open_tensors(path) as file:
            names = file.keys()
        for name in names:
            new_name = re.sub(r"Norm\.gamma$", "Norm.weight", re.sub(r"Norm\.beta$", "Norm.bias", name))
            tensors[new_name] = TensorLocation(path, name)
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors of a folder: open_clip's, those of its index, model.safetensors, or the only one."""
    if (folder / OPEN_CLIP_WEIGHTS).is_file() and is_open_clip(folder):  # beside it, timm's copy of the image tower
        return [folder / OPEN_CLIP_WEIGHTS]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        paths = sorted({folder / file for file in read_json(index)["weight_map"].values()})
        if absent := [path.name for path in paths if not path.is_file()]:
            raise MissingFileError(f"{index} names files that are not there: {', '.join(absent)}; copy them as well")
        return paths
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    paths = sorted(folder.glob("*.safetensors"))
    if len(paths) != 1:
        raise MissingFileError(several_files_message(folder, paths) if paths else no_files_message(folder))
    return paths


def several_files_message(folder: Path, paths: list[Path]) -> str:
    """Returns the error message for a folder with several safetensors files and no index."""
    names = ", ".join(path.name for path in paths)
    return f"{folder} has several safetensors ({names}) and no index; name the one that is meant model.safetensors"


def no_files_message(folder: Path) -> str:
    """Returns the error message for a folder without safetensors, with a command that converts PyTorch's files."""
    others = [path for pattern in PYTORCH_FILES for path in sorted(folder.glob(pattern))]
    if others:
        found = f"{folder} has weights in PyTorch's own format only ({others[0].name})"
    else:
        files = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        found = (
            f"{folder} has no model.safetensors (found {files}). If the model is published in PyTorch's own "
            "format only (the Hub's pytorch_model.bin), download that file there"
        )
    source = others[0] if others else folder / "pytorch_model.bin"
    paths = shlex.join([str(source), str(folder / "model.safetensors")])
    return f'{found}; convert it once, where PyTorch is installed:\n  python -c "{CONVERT}" {paths}'


def read_tensors(locations: dict[str, TensorLocation], names: Iterable[str]) -> dict[str, np.ndarray]:
    """Reads the named tensors as fp32; half precision (also bfloat16, a NumPy type through JAX) is widened."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(locations[name].path, []).append(name)
    tensors = {}
    for path, names_in_file in by_file.items():
        with open_tensors(path) as file:
            for name in names_in_file:
                tensors[name] = file.get_tensor(locations[name].name).astype(np.float32)
    return tensors
