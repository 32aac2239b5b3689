"""Images: from encoded bytes to uint8 RGB, and the crops of training and evaluation, antialiased."""

import contextlib
import functools
import io
import math
import threading
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from zslflax.errors import UserError

MAX_PIXELS = 1 << 26  # 8192 × 8192: 200 MB once decoded
MAX_SCANS = 100  # of a progressive JPEG, where each costs the time of a whole image; the usual ones have 10
LARGE = 1 << 28  # bytes; images that need more to be decoded wait for each other
FORMATS = "JPEG PNG WEBP GIF BMP TIFF AVIF".split()  # Pillow knows others, some of which run programs
IMAGE_EXTENSIONS = tuple("jpg jpeg jpe jfif png webp gif bmp tif tiff avif".split())  # of FORMATS, in order of preference
MAX_ELONGATION = 8  # of the longer side to the shorter, beyond which evaluation looks at the middle only
CROP_ATTEMPTS = 10  # torchvision's

cv2.setNumThreads(0)  # the pipeline has threads of its own
_large = threading.Lock()


class BadSample(UserError):
    """A sample that cannot be read; the pipeline masks and reports it. May carry the sample's `name`."""


def has_image_extension(path: str | Path) -> bool:
    """Whether a file is named like an image of one of the `FORMATS`, in upper or lower case.

    >>> has_image_extension("photos/cat.JPG"), has_image_extension("photos/cat.txt")
    (True, False)
    """
    return str(path).lower().endswith(tuple(f".{extension}" for extension in IMAGE_EXTENSIONS))


def decode(data: bytes) -> np.ndarray:
    """Decodes an image of any usual format, whatever its file is called.

    Greyscale, palettes, CMYK and 16 bits become 8-bit RGB; what is transparent becomes white; of an animation
    the first frame is taken. EXIF orientation is not applied, as in torchvision and TensorFlow.

    Returns:
        uint8 [height, width, 3].

    Raises:
        BadSample: no image of `FORMATS`, truncated, or more than `MAX_PIXELS` or `MAX_SCANS`, which is found
            out before decoding.
    """
    if data[:2] == b"\xff\xd8":
        if scans(data) > MAX_SCANS:
            raise BadSample(f"the image has more than {MAX_SCANS} scans")
        try:
            with admitted(*simplejpeg.decode_jpeg_header(data)[:2], cost=6):
                return simplejpeg.decode_jpeg(data)
        except BadSample:
            raise
        except ValueError:
            pass  # strict about harmless damage, such as stray bytes between markers: Pillow decides
    return decode_any(data)


def scans(data: bytes) -> int:
    """How often a JPEG has the marker that begins a scan, which is never in the compressed data.

    Only with a header that decoders take: 6 + 2 n bytes for n components. Two bytes alone occur by chance in what
    phones append to their pictures.
    """
    array = np.frombuffer(data, np.uint8)
    after = np.flatnonzero(array[:-4] == 0xFF) + 1
    at = after[array[after] == 0xDA]  # a third of the time of bytes.count
    high, low, components = array[at + 1], array[at + 2], array[at + 3]
    return np.count_nonzero((high == 0) & (components >= 1) & (components <= 4) & (low == 6 + 2 * components))


def decode_any(data: bytes) -> np.ndarray:
    """Decodes with Pillow."""
    try:
        with Image.open(io.BytesIO(data), formats=formats()) as image:
            with admitted(image.height, image.width, cost=20):
                return np.array(to_rgb(image))
    except BadSample:
        raise
    except UnidentifiedImageError:
        raise BadSample(f"it is no image: it starts with {data[:8]!r}" if data else "the image is empty") from None
    except Exception as error:  # Pillow's decoders raise many kinds on damaged files
        raise BadSample(f"the image cannot be decoded: {error or type(error).__name__}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any of Pillow's modes but floating point, on white."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if image.mode.startswith("I"):  # 16 bits, which convert() clips instead of scaling
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def admitted(height: int, width: int, cost: int) -> contextlib.AbstractContextManager:
    """Where an image that takes `cost` bytes per pixel may be decoded: large ones come one at a time.

    Raises:
        BadSample: there are no pixels or too many.
    """
    if not height * width:
        raise BadSample("the image has no pixels")
    if height * width > MAX_PIXELS:
        raise BadSample(f"the image has {width} × {height} pixels, more than the {MAX_PIXELS:,} allowed")
    return _large if height * width * cost > LARGE else contextlib.nullcontext()


@functools.cache
def formats() -> tuple[str, ...]:
    """`FORMATS` as far as this Pillow has them."""
    Image.init()
    return tuple(format for format in FORMATS if format in Image.OPEN)


def resample(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes antialiased: a side that shrinks averages areas, one that grows interpolates linearly."""
    shrunk = min(height, image.shape[0]), min(width, image.shape[1])
    if shrunk != image.shape[:2]:
        image = cv2.resize(image, shrunk[::-1], interpolation=cv2.INTER_AREA)
    if shrunk != (height, width):
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image


def random_resized_crop(
    image: np.ndarray,
    size: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.2, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> np.ndarray:
    """A random part of an image, resized to a square; the distribution is torchvision's.

    Args:
        image: uint8 [height, width, 3].
        size: pixels, of the result's sides.
        rng: is consumed.
        scale: of the part's area in the image's, from and to; uniform.
        ratio: of the part's width to its height, from and to; uniform in its logarithm.

    Returns:
        uint8 [size, size, 3].
    """
    top, left, height, width = crop_box(*image.shape[:2], rng, scale, ratio)
    return resample(image[top : top + height, left : left + width], size, size)


def crop_box(
    height: int, width: int, rng: np.random.Generator, scale: tuple[float, float], ratio: tuple[float, float]
) -> tuple[int, int, int, int]:
    """Draws (top, left, height, width); the middle of the image, of the nearest ratio, where no draw fits."""
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


def flip(image: np.ndarray) -> np.ndarray:
    """Mirrors left to right."""
    return cv2.flip(image, 1)  # numpy would take a tenth of the time of decoding


def resize_center_crop(image: np.ndarray, size: int, resize: int) -> np.ndarray:
    """The middle of an image whose shorter side was resized, with torchvision's rounding.

    Args:
        image: uint8 [height, width, 3].
        size: pixels, of the result's sides.
        resize: pixels, of the image's shorter side before the crop; at least `size`.

    Returns:
        uint8 [size, size, 3].

    Raises:
        ValueError: the crop is larger than the resized image.
    """
    if resize < size:
        raise ValueError(f"the shorter side becomes {resize} pixels, expected at least the crop's {size}")
    h, w = image.shape[:2]
    longest = MAX_ELONGATION * min(h, w)
    if max(h, w) > longest:  # a sliver would become enormous
        image = middle(image, min(h, longest), min(w, longest))
        h, w = image.shape[:2]
    height, width = (int(resize * h / w), resize) if w < h else (resize, int(resize * w / h))
    return middle(resample(image, height, width), size, size)


def middle(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = round((image.shape[0] - height) / 2), round((image.shape[1] - width) / 2)
    return image[top : top + height, left : left + width]
