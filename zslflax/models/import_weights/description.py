"""What the JSON files beside published weights say about their use: the statistics of the pixels and the pooling."""

from pathlib import Path
from typing import Any, NamedTuple

from zslflax.errors import UserError
from zslflax.files import read_json

Channels = tuple[float, ...]  # of red, green and blue


class PixelStatistics(NamedTuple):
    """The mean and the standard deviation of each channel, of pixels in [0, 1], and the file that has them."""

    path: Path
    mean: Channels
    std: Channels


def read_pixel_statistics(folder: Path) -> PixelStatistics | None:
    """Reads the statistics by which a published image tower normalises its input.

    They are in Hugging Face's preprocessor_config.json, or in the config.json of timm. None if neither has them.
    """
    path = folder / "preprocessor_config.json"
    if path.is_file() and "image_mean" in (found := read_json(path)):
        # The original computes (pixel · factor − mean) / std of pixels in [0, 1].
        factor = 255 * found.get("rescale_factor", 1 / 255) if found.get("do_rescale", True) else 255.0
        normalises = found.get("do_normalize", True)
        mean, std = (found["image_mean"], found["image_std"]) if normalises else (0.0, 1.0)
        return PixelStatistics(path, channels(mean, factor), channels(std, factor))
    path = folder / "config.json"
    if path.is_file():
        values = read_json(path)
        values = values.get("pretrained_cfg", values)
        if "mean" in values and "std" in values:
            return PixelStatistics(path, channels(values["mean"]), channels(values["std"]))
    return None


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
