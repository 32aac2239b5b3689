"""CLIP and SigLIP as Hugging Face and open_clip publish them: their config and their variables."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from zslflax.config import default_config
from zslflax.errors import UserError
from zslflax.files import read_json
from zslflax.models.build import example_inputs
from zslflax.models.import_weights.architecture import (
    CLIP_IMAGE_DEFAULTS,
    CLIP_TEXT_DEFAULTS,
    SIGLIP_IMAGE_DEFAULTS,
    SIGLIP_TEXT_DEFAULTS,
    TWO_TOWERS,
    Values,
    read_architecture,
    tower_values,
)
from zslflax.models.import_weights.description import Resizing, read_pixel_statistics, read_resizing
from zslflax.models.import_weights.load import load_image_tower, load_text_tower
from zslflax.models.import_weights.locate import model_name
from zslflax.models.import_weights.open_clip import OPEN_CLIP_CONFIG
from zslflax.models.import_weights.reading import find_tensors, read_tensors
from zslflax.models.two_tower import TwoTower

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP
# By the path of a parameter: the names of its tensors, and whether their two axes are exchanged.
HF_CLIP = {
    ("image", "projection", "kernel"): ("visual_projection.weight", True),
    ("text", "projection", "kernel"): ("text_projection.weight", True),
    ("objective", "log_logit_scale"): ("logit_scale", False),
}
OPEN_CLIP = {
    ("image", "projection", "kernel"): ("visual.proj", False),
    ("text", "projection", "kernel"): ("text_projection", False),
    ("objective", "log_logit_scale"): ("logit_scale", False),
}
OPEN_CLIP_RESNET = OPEN_CLIP | {
    ("image", "projection", "kernel"): ("visual.attnpool.c_proj.weight", True),
    ("image", "projection", "bias"): ("visual.attnpool.c_proj.bias", False),
}
HF_SIGLIP = {
    ("text", "projection", "kernel"): ("text_model.head.weight", True),
    ("text", "projection", "bias"): ("text_model.head.bias", False),
    ("objective", "log_logit_scale"): ("logit_scale", False),
    ("objective", "logit_bias"): ("logit_bias", False),
}


def is_published(folder: Path) -> bool:
    """Whether a folder holds a two-tower model of Hugging Face or open_clip, or another model that they publish."""
    path = folder / "config.json"
    return (folder / OPEN_CLIP_CONFIG).is_file() or (path.is_file() and "model_type" in read_json(path))


def published_config(folder: Path) -> ConfigDict:
    """Returns the config of a published model: its towers, and how it prepares images.

    Raises:
        UserError: the model is not a CLIP or SigLIP, or has an option that is not implemented.
    """
    values = read_architecture(folder)
    kind = values.get("model_type")
    if kind not in TWO_TOWERS:
        raise UserError(
            f"{folder} has model_type {kind!r}; expected a model with an image and a text tower, "
            f"{' or '.join(TWO_TOWERS)}; a single encoder is model.image.pretrained or model.text.pretrained of a run"
        )
    config, clip = default_config(), kind == "clip"
    image = (CLIP_IMAGE_DEFAULTS if clip else SIGLIP_IMAGE_DEFAULTS) | tower_values(values, "vision")
    text = (CLIP_TEXT_DEFAULTS if clip else SIGLIP_TEXT_DEFAULTS) | tower_values(values, "text")
    size: Any = image["image_size"]
    resizing = read_resizing(folder, Resizing(size, size if clip else 0, "bicubic"))
    statistics = read_pixel_statistics(folder)
    config.name, config.compute_dtype = model_name(folder), "float32"
    own = (CLIP_MEAN, CLIP_STD) if clip else ((0.5,) * 3, (0.5,) * 3)
    mean, std = (statistics.mean, statistics.std) if statistics else own
    config.model.image.update(name="", pretrained=str(folder), size=resizing.size, mean=mean, std=std)
    config.model.text.update(pretrained=str(folder), max_tokens=text["max_position_embeddings"], pool="last")
    if clip:
        config.model.embed_dim = values.get("projection_dim", 512)
        config.model.image.projection = "linear" if "resnet_layers" in image else "linear_no_bias"
        config.model.text.projection = "linear_no_bias"
    else:
        config.model.embed_dim = text.get("projection_size") or text["hidden_size"]
        config.model.image.projection, config.model.text.projection = "none", "linear"
    config.objective.name, config.teacher.kind = "info_nce" if clip else "sigmoid", "none"
    config.eval.resize_factor, config.eval.interpolation = resizing.shorter_side / resizing.size, resizing.interpolation
    return config


def load_published(folder: Path, config: ConfigDict, model: TwoTower) -> Values:
    """Loads the variables of a published model, NumPy fp32, with the learnt logit scale and bias in "objective".

    Args:
        folder: of the model.
        config: from `published_config`.
        model: the `TwoTower` that it describes.

    Raises:
        MissingFileError: there are no weights; the message says how to convert files in PyTorch's own format.
        UserError: the weights are not those of the model.
    """
    size = config.model.image.size
    variables: Any = jax.eval_shape(model.init, jax.random.key(0), *example_inputs(model, config.model))
    shapes = variables["params"]
    tower = {kind: of_kind["image"]["tower"] for kind, of_kind in variables.items()}
    image = load_image_tower(folder, "", tower, size)
    text = load_text_tower(folder, {"params": shapes["text"]["tower"]})["params"]
    params: Values = {"image": {"tower": image["params"]}, "text": {"tower": text}, "objective": {}}
    locations = find_tensors(folder)
    names = HF_SIGLIP if config.objective.name == "sigmoid" else clip_names(locations)
    if missing := sorted({name for name, _ in names.values()} - locations.keys()):
        raise UserError(f"{folder} lacks the weights {', '.join(missing)}: it is one tower, not the whole model")
    tensors = read_tensors(locations, [name for name, _ in names.values()])
    for (modality, *path), (name, transposed) in names.items():
        value = tensors[name].T if transposed else tensors[name]
        if modality == "objective":
            params["objective"][path[0]] = value.reshape(())
            continue
        module, leaf = path
        expected = shapes[modality][module][leaf].shape
        if value.shape != expected:
            raise UserError(
                f"{folder} has {name} of shape {tensors[name].shape}; expected {expected} of its config.json"
            )
        params[modality].setdefault(module, {})[leaf] = np.ascontiguousarray(value)
    batch_stats = {"image": {"tower": image["batch_stats"]}} if "batch_stats" in image else {}
    return {"params": params, "batch_stats": batch_stats}


def clip_names(found: Collection[str]) -> dict[tuple[str, ...], tuple[str, bool]]:
    """Returns the names of CLIP's projections and of its scale, of those in which the tensors are."""
    if "visual.attnpool.positional_embedding" in found:
        return OPEN_CLIP_RESNET
    return OPEN_CLIP if "visual.proj" in found else HF_CLIP
