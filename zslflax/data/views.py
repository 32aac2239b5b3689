"""Views: the square crops of an image that a model takes, and those that a config asks for."""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from zslflax.data import crops
from zslflax.data.streams import VIEW_STREAM

if TYPE_CHECKING:  # worker processes import this module, and see no config
    from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Views:
    """How an image becomes the inputs of the tower: one crop in the centre, or several random ones.

    Attributes:
        count: V. View v of an image is a function of (seed, index of the image, v).
        size: side of the square inputs, pixels.
        resize, interpolation: of one view, those of `crops.resize_center_crop`.
        scale, flip, seed: of several views: bounds of a crop's share of the area, whether half of the crops are
            mirrored, and the seed.
    """

    count: int
    size: int
    resize: int = 0
    scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    seed: int = 0
    interpolation: str = "area"

    def __call__(self, image: np.ndarray, index: int, view: int) -> np.ndarray:
        """A view of an image, uint8 [s, s, 3]."""
        if self.count == 1:
            return crops.resize_center_crop(image, self.size, self.resize, self.interpolation)
        rng = np.random.default_rng([VIEW_STREAM, self.seed, index, view])
        return crops.random_resized_crop(image, self.size, rng, self.scale, flip=0.5 * self.flip)


def evaluation_view(config: "ConfigDict") -> Views:
    """The centre crop of evaluation, by the whole config."""
    size = config.model.image.size
    resize, interpolation = round(size * config.eval.resize_factor), config.eval.interpolation
    return Views(1, size, resize, interpolation=interpolation)


def training_views(config: "ConfigDict") -> Views:
    """The views of a training image whose features are kept: the crop of evaluation, or several random crops."""
    if config.features.views == 1:
        return evaluation_view(config)
    low, high = config.data.crop_scale
    flip, seed = config.data.flip, config.features.seed
    return Views(config.features.views, config.model.image.size, scale=(float(low), float(high)), flip=flip, seed=seed)
