"""The antialiased crops of images in training and evaluation."""

import math

import cv2
import numpy as np
from PIL import Image

MAX_ASPECT_RATIO = 8  # longer side to shorter side; evaluation crops longer images to it before resizing
CROP_ATTEMPTS = 10  # torchvision's

cv2.setNumThreads(0)  # the pipeline has threads of its own


def resample(
    image: np.ndarray, height: int, width: int, interpolation: str = "area", out: np.ndarray | None = None
) -> np.ndarray:
    """Resizes with antialiasing.

    Args:
        image: uint8 [h, w, 3].
        height, width: of the result.
        interpolation: "area": averages areas of a side that shrinks, interpolates one that grows linearly; "bilinear",
            "bicubic": Pillow's, with which most towers are published, at several times the cost.
        out: where the result is written, uint8 [height, width, 3]; None: a new array, or `image` of this size.
    """
    size, shrunk = (height, width), (min(height, image.shape[0]), min(width, image.shape[1]))
    if interpolation != "area":
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling[interpolation.upper()]))
    elif shrunk != image.shape[:2]:
        image = cv2.resize(image, shrunk[::-1], dst=out if shrunk == size else None, interpolation=cv2.INTER_AREA)
    if image.shape[:2] != size:
        image = cv2.resize(image, size[::-1], dst=out, interpolation=cv2.INTER_LINEAR)
    if out is not None and image is not out:
        out[...] = image
    return image


def random_resized_crop(
    image: np.ndarray,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.0,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """A random part of an image, resized to a square; the distribution is torchvision's.

    >>> image = np.zeros((60, 80, 3), np.uint8)
    >>> random_resized_crop(image, 32, np.random.default_rng(0)).shape
    (32, 32, 3)

    Args:
        image: uint8 [height, width, 3].
        size: side of the result, pixels.
        rng: the source of randomness; its state advances.
        scale: bounds of the part's share of the image's area; the share is uniform.
        ratio: bounds of the part's width divided by its height; its logarithm is uniform.
        flip: probability of mirroring the part left to right.
        out: where the result is written, uint8 [size, size, 3]; None: a new array.

    Returns:
        uint8 [size, size, 3], `out` where it is given.
    """
    out = np.empty((size, size, 3), np.uint8) if out is None else out
    top, left, height, width = sample_crop_box(image.shape[0], image.shape[1], rng, scale, ratio)
    part = image[top : top + height, left : left + width]
    if flip and rng.random() < flip:
        cv2.flip(resample(part, size, size), 1, dst=out)  # NumPy would take a tenth of the time of decoding
    else:
        resample(part, size, size, out=out)
    return out


def min_side_for_crops(size: int, scale: tuple[float, float], ratio: tuple[float, float] = (3 / 4, 4 / 3)) -> int:
    """The shorter side, in pixels, from which on every `random_resized_crop` has at least `size` pixels on each side.

    >>> min_side_for_crops(224, (0.2, 1.0))
    579
    """
    return math.ceil(size / math.sqrt(scale[0] * min(ratio[0], 1 / ratio[1])))


def sample_crop_box(
    height: int, width: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draws a random (top, left, height, width) within an image.

    If none of `CROP_ATTEMPTS` draws fits, the result is the largest centred box of the nearest allowed ratio.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(CROP_ATTEMPTS):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(low + (high - low) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.random() * (height - h + 1)), int(rng.random() * (width - w + 1))
            return top, left, h, w
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    return (height - h) // 2, (width - w) // 2, h, w


def resize_center_crop(image: np.ndarray, size: int, resize: int, interpolation: str = "area") -> np.ndarray:
    """Resizes the shorter side of an image, then takes the centre; with torchvision's rounding.

    An image of an aspect ratio beyond `MAX_ASPECT_RATIO` is first cropped to that ratio.

    >>> resize_center_crop(np.zeros((60, 80, 3), np.uint8), size=32, resize=36).shape
    (32, 32, 3)

    Args:
        image: uint8 [height, width, 3].
        size: side of the result, pixels.
        resize: shorter side after resizing, pixels; at least `size`. 0: the whole image becomes the square.
        interpolation: as in `resample`.

    Returns:
        uint8 [size, size, 3].

    Raises:
        ValueError: the crop is larger than the resized image.
    """
    if not resize:
        return resample(image, size, size, interpolation)
    if resize < size:
        raise ValueError(f"the shorter side becomes {resize} pixels, expected at least the crop's {size}")
    h, w = image.shape[:2]
    longest = MAX_ASPECT_RATIO * min(h, w)
    if max(h, w) > longest:  # otherwise its longer side would become enormous
        image = center_crop(image, min(h, longest), min(w, longest))
        h, w = image.shape[:2]
    height, width = (int(resize * h / w), resize) if w < h else (resize, int(resize * w / h))
    return center_crop(resample(image, height, width, interpolation), size, size)


def center_crop(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The centre of an image, of the given size in pixels."""
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]
