"""What the JSON files beside published weights say about their use: how images are prepared, and the pooling."""

from pathlib import Path
from typing import Any, NamedTuple

from zslflax.errors import UserError
from zslflax.files import read_json
from zslflax.models.import_weights.open_clip import OPEN_CLIP_CONFIG

Channels = tuple[float, ...]  # of red, green and blue


class PixelStatistics(NamedTuple):
    """The mean and the standard deviation of each channel, of pixels in [0, 1], and the file that has them."""

    path: Path
    mean: Channels
    std: Channels


def read_pixel_statistics(folder: Path) -> PixelStatistics | None:
    """Reads the statistics by which a published image tower normalises its input.

    They are in Hugging Face's preprocessor_config.json, in the config.json of timm, or in open_clip_config.json; None
    where none of them has them.
    """
    path, found = read_processor(folder)
    if "image_mean" in found:
        # The original computes (pixel · factor − mean) / std of pixels in [0, 1].
        factor = 255 * found.get("rescale_factor", 1 / 255) if found.get("do_rescale", True) else 255.0
        normalises = found.get("do_normalize", True)
        mean, std = (found["image_mean"], found["image_std"]) if normalises else (0.0, 1.0)
        return PixelStatistics(path, channels(mean, factor), channels(std, factor))
    for file, section in (("config.json", "pretrained_cfg"), (OPEN_CLIP_CONFIG, "preprocess_cfg")):
        path = folder / file
        values = read_json(path) if path.is_file() else {}
        values = values.get(section, values)
        if "mean" in values and "std" in values:
            return PixelStatistics(path, channels(values["mean"]), channels(values["std"]))
    return None


def read_processor(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Reads how Hugging Face's image processor prepares images: the file, and its fields, {} if there is no file."""
    path = folder / "preprocessor_config.json"
    if path.is_file() or not (folder / "processor_config.json").is_file():
        return path, read_json(path) if path.is_file() else {}
    path = folder / "processor_config.json"  # transformers 5 writes the image processor into it
    return path, read_json(path).get("image_processor") or {}


class Resizing(NamedTuple):
    """How images become the input of a published image tower.

    Attributes:
        size: side of the square input, pixels.
        shorter_side: to which images are resized before the centre crop, pixels; 0: the whole image becomes the square.
        interpolation: "bilinear" or "bicubic".
    """

    size: int
    shorter_side: int
    interpolation: str


def read_resizing(folder: Path, default: Resizing) -> Resizing:
    """Reads how the images of CLIP or SigLIP are resized, from Hugging Face's or open_clip's files.

    Args:
        folder: of the model.
        default: what the original does, for fields that the files lack.

    Raises:
        UserError: the files describe a preparation of images that is not implemented.
    """
    path, found = read_processor(folder)
    if not found and (path := folder / OPEN_CLIP_CONFIG).is_file():
        values = read_json(path).get("preprocess_cfg") or {}
        mode, interpolation = values.get("resize_mode") or "shortest", values.get("interpolation") or "bicubic"
        if mode not in ("shortest", "squash") or interpolation not in ("bicubic", "bilinear"):
            raise UserError(f"{path} has resize_mode {mode!r} and interpolation {interpolation!r}, not implemented")
        return Resizing(default.size, default.size if mode == "shortest" else 0, interpolation)
    resample = found.get("resample", {"bilinear": 2, "bicubic": 3}[default.interpolation])
    if resample not in (2, 3) or not found.get("do_resize", True):
        raise UserError(f"{path} has do_resize False or resample {resample}; only resizing by 2 or 3 is implemented")
    interpolation = {2: "bilinear", 3: "bicubic"}[resample]
    size = found.get("size", {"shortest_edge": default.shorter_side} if default.shorter_side else default.size)
    cropped = found.get("do_center_crop", bool(default.shorter_side))
    crop = only_side(path, found.get("crop_size", default.size))
    shorter = size.get("shortest_edge", 0) if isinstance(size, dict) else size if default.shorter_side else 0
    if not shorter:
        side = only_side(path, size)
        if cropped and crop != side:
            raise UserError(f"{path} has a crop of {crop} pixels from squares of {side}, which is not implemented")
        return Resizing(side, 0, interpolation)
    if not cropped:
        raise UserError(f"{path} has do_center_crop False, and images that are no squares are not implemented")
    return Resizing(crop, shorter, interpolation)


def only_side(path: Path, size: Any) -> int:
    """Returns the side of a square that is given as a number or as {"height": …, "width": …}."""
    sides = set(size.values()) if isinstance(size, dict) else {size}
    if len(sides) != 1:
        raise UserError(f"{path} has images of {size}; only squares are implemented")
    return sides.pop()


def channels(value: Any, factor: float = 1.0) -> Channels:
    """Returns a number or three of them, divided by `factor`, as three numbers.

    >>> channels(0.5), channels([0.4, 0.5, 0.6])
    ((0.5, 0.5, 0.5), (0.4, 0.5, 0.6))
    """
    values = value if isinstance(value, (list, tuple)) else [value] * 3
    return tuple(round(x / factor, 8) for x in values)


def read_text_pooling(folder: Path) -> str:
    """Reads how a published text encoder turns the vectors of its tokens into one: "mean" or "cls".

    Sentence-transformers' modules.json and the pooling's config.json say so; without them it is "mean". A module that
    only scales the vector to unit length is accepted, because embeddings are scaled to unit length in any case.

    Raises:
        UserError: the encoder has another pooling, or a module after it that is not implemented.
    """
    instead = 'set model.text.pool to "mean" or "cls" to use the encoder with that pooling and without such a module'
    path, pooling = folder / "modules.json", "1_Pooling"
    for module in read_json(path, list) if path.is_file() else []:
        kind = module["type"].rpartition(".")[2]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise UserError(f"{path} has a module {module['type']}, which is not implemented; {instead}")
        if kind == "Pooling":
            pooling = module["path"]
    path = folder / pooling / "config.json"
    values = read_json(path) if path.is_file() else {"pooling_mode": "mean"}
    modes = values.get("pooling_mode") or [
        name.removeprefix("pooling_mode_").removesuffix("_token").removesuffix("_tokens")
        for name, on in values.items()
        if name.startswith("pooling_mode_") and on
    ]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if modes not in (["mean"], ["cls"]):
        raise UserError(f"{path} has the pooling {' and '.join(modes) or 'none'}, which is not implemented; {instead}")
    return modes[0]
