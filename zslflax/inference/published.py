"""CLIP and SigLIP as Hugging Face and open_clip publish them: their config and their variables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from zslflax.config import default_config
from zslflax.errors import UserError
from zslflax.files import read_json
from zslflax.inference.model_checks import abstract_variables
from zslflax.models.import_weights.architecture import (
    CLIP_TEXT_DEFAULTS,
    SIGLIP_TEXT_DEFAULTS,
    TWO_TOWERS,
    Values,
    read_architecture,
    text_architecture,
    tower_values,
)
from zslflax.models.import_weights.description import Resizing, read_pixel_statistics, read_resizing
from zslflax.models.import_weights.image_architecture import CLIP_IMAGE_DEFAULTS, SIGLIP_IMAGE_DEFAULTS
from zslflax.models.import_weights.load import load_image_tower, load_text_tower
from zslflax.models.import_weights.locate import model_name
from zslflax.models.import_weights.open_clip import OPEN_CLIP_CONFIG, is_open_clip
from zslflax.models.import_weights.reading import find_tensors, read_tensors
from zslflax.models.two_tower import TwoTower

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP
# By the name of a tensor in Hugging Face's or open_clip's files: the parameter, and whether its axes are exchanged.
PARAMETERS = {
    "visual_projection.weight": ("image/projection/kernel", True),
    "visual.proj": ("image/projection/kernel", False),
    "visual.attnpool.c_proj.weight": ("image/projection/kernel", True),
    "visual.attnpool.c_proj.bias": ("image/projection/bias", False),
    "visual.head.proj.weight": ("image/projection/kernel", True),
    "visual.head.proj.bias": ("image/projection/bias", False),
    "visual.trunk.head.weight": ("image/projection/kernel", True),
    "visual.trunk.head.bias": ("image/projection/bias", False),
    "visual.trunk.head.fc.weight": ("image/projection/kernel", True),
    "visual.trunk.head.fc.bias": ("image/projection/bias", False),
    "visual.head.mlp.fc1.weight": ("image/projection/fc1/kernel", True),
    "visual.head.mlp.fc1.bias": ("image/projection/fc1/bias", False),
    "visual.head.mlp.fc2.weight": ("image/projection/fc2/kernel", True),
    "visual.head.mlp.fc2.bias": ("image/projection/fc2/bias", False),
    "text_projection.weight": ("text/projection/kernel", True),
    "text_projection.bias": ("text/projection/bias", False),
    "text_projection": ("text/projection/kernel", False),
    "text.text_projection.weight": ("text/projection/kernel", True),
    "text.text_projection.bias": ("text/projection/bias", False),
    "text.text_projection": ("text/projection/kernel", False),
    "text.proj.weight": ("text/projection/kernel", True),
    "text.proj.0.weight": ("text/projection/fc1/kernel", True),
    "text.proj.2.weight": ("text/projection/fc2/kernel", True),
    "text_model.head.weight": ("text/projection/kernel", True),
    "text_model.head.bias": ("text/projection/bias", False),
    "logit_scale": ("objective/log_logit_scale", False),
    "logit_bias": ("objective/logit_bias", False),
}


def is_published(folder: Path) -> bool:
    """Whether a folder holds a two-tower model of Hugging Face or open_clip, or another model that they publish."""
    path = folder / "config.json"
    return (folder / OPEN_CLIP_CONFIG).is_file() or (path.is_file() and "model_type" in read_json(path))


def config_path(folder: Path) -> Path:
    """Returns the file that describes a published model."""
    return folder / (OPEN_CLIP_CONFIG if is_open_clip(folder) else "config.json")


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
    config, siglip = default_config(), kind == "siglip"
    image, text = tower_values(values, "vision"), tower_values(values, "text")
    if kind != "open_clip":  # whose values are complete
        image = (SIGLIP_IMAGE_DEFAULTS if siglip else CLIP_IMAGE_DEFAULTS) | image
        text = (SIGLIP_TEXT_DEFAULTS if siglip else CLIP_TEXT_DEFAULTS) | text
    size: Any = image["image_size"]
    resizing = read_resizing(folder, Resizing(size, 0 if siglip else size, "bicubic"))
    statistics = read_pixel_statistics(folder)
    config.name, config.compute_dtype = model_name(folder), "float32"
    own = ((0.5,) * 3, (0.5,) * 3) if siglip else (CLIP_MEAN, CLIP_STD)
    mean, std = (statistics.mean, statistics.std) if statistics else own
    config.model.image.update(name="", pretrained=str(folder), size=resizing.size, mean=mean, std=std)
    tokens = text.get("context_length", text["max_position_embeddings"])
    config.model.text.update(pretrained=str(folder), max_tokens=tokens, pool=text_architecture(values).pool)
    if siglip:
        config.model.embed_dim = text.get("projection_size") or text["hidden_size"]
        kinds = "none", "linear"
    else:
        config.model.embed_dim = values.get("projection_dim", 512)
        kinds = tuple(values.get(f"{modality}_projection", "linear_no_bias") for modality in ("image", "text"))
    config.model.image.projection, config.model.text.projection = kinds
    if "mlp" in kinds:
        config.model.projection.update(hidden=values["projection_hidden"], dropout=0.0)
    config.objective.name = "sigmoid" if siglip or values.get("logit_bias") else "info_nce"
    config.teacher.kind = "none"
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
    variables = abstract_variables(model, config, config_path(folder))
    shapes = variables["params"]
    tower = {kind: collection["image"]["tower"] for kind, collection in variables.items()}
    image = load_image_tower(folder, "", tower, size)
    text = load_text_tower(folder, {"params": shapes["text"]["tower"]})["params"]
    expected = {
        f"{modality}/projection/{name}": tuple(x.shape)
        for modality in ("image", "text")
        for name, x in flatten_dict(shapes[modality].get("projection", {}), sep="/").items()
    }
    scalars = ["objective/log_logit_scale", "objective/logit_bias"][: 2 if config.objective.name == "sigmoid" else 1]
    found = read_parameters(folder, expected | dict.fromkeys(scalars, ()))
    params: Values = {"image": {}, "text": {}} | unflatten_dict(found, sep="/")
    params["image"]["tower"], params["text"]["tower"] = image["params"], text
    batch_stats = {"image": {"tower": image["batch_stats"]}} if "batch_stats" in image else {}
    return {"params": params, "batch_stats": batch_stats}


def read_parameters(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Reads the parameters of `PARAMETERS` that a model has, fp32.

    Args:
        folder: of the model.
        expected: the shapes of the parameters by their paths. A scalar may be published as an array of one element;
            a bias inside a projection of two layers may be missing, and is 0.

    Raises:
        UserError: a parameter is missing or has another shape.
    """
    locations = find_tensors(folder)
    names = {path: name for name, (path, _) in PARAMETERS.items() if name in locations and path in expected}
    optional = [path for path in expected if path.endswith(("fc1/bias", "fc2/bias"))]
    if missing := expected.keys() - names.keys() - set(optional):
        wanted = ", ".join(name for name, (path, _) in PARAMETERS.items() if path in missing)
        raise UserError(f"{folder} has none of the weights {wanted}: it is one tower, not the whole model")
    tensors = read_tensors(locations, names.values())
    found = {path: np.zeros(expected[path], np.float32) for path in optional}
    for path, name in names.items():
        value = tensors[name].T if PARAMETERS[name][1] else tensors[name]
        value = value.reshape(()) if expected[path] == () and value.size == 1 else value
        if value.shape != expected[path]:
            raise UserError(
                f"{folder} has {name} of shape {tensors[name].shape}; expected {expected[path]} of its config.json"
            )
        found[path] = np.ascontiguousarray(value).reshape(value.shape)
    return found
