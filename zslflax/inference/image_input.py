"""Reads images in all forms that users have them: files, bytes, PIL images and arrays."""

import io
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from PIL import Image, ImageOps

from zslflax.data import images
from zslflax.data.addresses import is_http, without_credentials
from zslflax.errors import UserError
from zslflax.files import local_path, read_bytes
from zslflax.inference.image_urls import fetch_image

# One image, as `read_image` takes it. A PyTorch tensor is accepted too, and is not named because it isn't imported.
ImageInput = str | Path | bytes | BinaryIO | Image.Image | np.ndarray | jax.Array
CHANNELS = (1, 3, 4)
CHUNK = 1_024  # preprocessed images that are in memory at once


def read_image(image: ImageInput, allow_urls: bool = False) -> np.ndarray:
    """Converts an image to uint8 [h, w, 3] (RGB). Transparent pixels become white; EXIF orientation is applied.

    >>> read_image(np.zeros((20, 30), np.uint8)).shape
    (20, 30, 3)

    Args:
        image: a path, the bytes of a file, an open binary file, a PIL image of any mode, or an array [h, w], [h, w, 1],
            [h, w, 3] or [h, w, 4] of NumPy, jax or PyTorch: uint8, or floating-point numbers in [0, 1].
        allow_urls: whether a string may be an http(s) address, whose image is then fetched.

    Raises:
        MissingFileError: there is no such file.
        BadSample: the file is not an image, or is damaged.
        UserError: the array has another shape, type or range, or an address is not allowed.
        StorageError: an address cannot be read.
    """
    if isinstance(image, str) and is_http(image):
        return decode_image_url(image, allow_urls)
    if isinstance(image, (str, Path)):
        return decode_image_file(local_path(image, "the image"))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return images.decode(bytes(image), apply_orientation=True)
    if isinstance(image, Image.Image):
        if not image.width * image.height:
            raise UserError(f"expected an image, found one of {image.width} × {image.height} pixels")
        return np.array(images.to_rgb(ImageOps.exif_transpose(image)))
    if isinstance(image, io.IOBase) or hasattr(image, "read"):
        return images.decode(image.read(images.MAX_FILE_BYTES), apply_orientation=True)
    array = to_uint8(to_numpy(image))
    check_shape(array)
    if array.shape[2:] == (1,):
        array = array[:, :, 0]
    return array if array.shape[2:] == (3,) else np.array(images.to_rgb(Image.fromarray(array)))


def decode_image_file(path: Path) -> np.ndarray:
    """Decodes an image file to uint8 [h, w, 3] (RGB); errors name the file."""
    try:
        return images.decode(read_bytes(path, images.MAX_FILE_BYTES), apply_orientation=True)
    except images.BadSample as error:
        raise images.BadSample(f"{path}: {error}") from error


def decode_image_url(url: str, allow_urls: bool) -> np.ndarray:
    """Fetches and decodes the image at an http(s) address; errors name the address."""
    if not allow_urls:
        raise UserError(
            f"the image is an address, {without_credentials(url)}, and this program fetches nothing unless it is "
            "allowed: Predictor.restore(…, allow_urls=True), or --allow-urls"
        )
    data = fetch_image(url, images.MAX_FILE_BYTES)
    try:
        return images.decode(data, apply_orientation=True)
    except images.BadSample as error:
        raise images.BadSample(f"{without_credentials(url)}: {error}") from error


def to_numpy(image: Any) -> np.ndarray:
    """Converts an array of NumPy, jax or PyTorch to NumPy."""
    if not hasattr(image, "__array__"):
        raise UserError(
            f"expected an image as a path, bytes, a PIL image or an array, found a value of type {type(image).__name__}"
        )
    try:
        return np.asarray(image)
    except (TypeError, RuntimeError) as error:  # PyTorch's, of a tensor on a GPU or with a gradient
        raise UserError(f"the tensor cannot be read: {error}; pass tensor.detach().cpu()") from error


def to_uint8(array: np.ndarray) -> np.ndarray:
    """Converts pixels to uint8: floating-point numbers in [0, 1] are multiplied by 255 and rounded."""
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating) and array.dtype.name not in ("bfloat16", "float16"):
        raise UserError(
            f"expected an image as uint8, or as floating-point numbers in [0, 1], found {describe_array(array)}"
        )
    array = array.astype(np.float32)
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if not 0.0 <= low <= high <= 1.0:  # also where one is NaN
        raise UserError(
            f"expected floating-point pixels in [0, 1], found values from {low:g} to {high:g}; pass values up to 255 "
            "as uint8, and normalise nothing: the model does"
        )
    return np.rint(array * 255.0).astype(np.uint8)


def check_shape(array: np.ndarray) -> None:
    """Refuses an array that is no image [h, w] or [h, w, channels], and says how to transpose channels that are first.

    Raises:
        UserError: it has another number of axes or channels, channels first, or no pixels.
    """
    found = describe_array(array)
    if array.ndim == 3 and array.shape[2] not in CHANNELS and array.shape[0] in CHANNELS:
        raise UserError(
            f"expected an image [h, w, 3], found {found}, with the channels first; pass image.transpose(1, 2, 0), or "
            "image.permute(1, 2, 0) of a PyTorch tensor"
        )
    if not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in CHANNELS)):
        raise UserError(f"expected an image as uint8 [h, w], [h, w, 3] or [h, w, 4], found {found}")
    if not array.size:
        raise UserError(f"expected an image, found {found}, which has no pixels")


def describe_array(array: np.ndarray) -> str:
    """The type and shape of an array, such as "uint8 [40, 50, 3]"."""
    return f"{array.dtype} {list(array.shape)}"


def is_array(value: Any) -> bool:
    """Whether a value is an array of NumPy, jax or PyTorch, and no PIL image."""
    return hasattr(value, "__array__") and hasattr(value, "shape")


def is_one_image(value: Any) -> bool:
    """Whether a value is a single image, and not several of them."""
    if is_array(value):
        return len(value.shape) <= 3
    return isinstance(value, (str, Path, bytes, bytearray, memoryview, Image.Image)) or hasattr(value, "read")


def find_images(folder: Path) -> Iterator[Path]:
    """Yields the images below a folder, in the order of their names.

    Left out are hidden files and folders and `images.CLUTTER`, files without an image's extension, and links that lead
    out of the folder.
    """
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        hidden = any(images.is_clutter(part) for part in path.relative_to(folder).parts)
        if images.has_image_extension(path) and not hidden and path.resolve().is_relative_to(root):
            if not path.is_dir():
                yield path


def expand_folders(paths: Iterable[str | Path]) -> Iterator[str | Path]:
    """Yields paths of images; a folder stands for the images below it. An http(s) address stays as it is.

    Raises:
        UserError: a folder has no image.
    """
    for given in paths:
        if isinstance(given, str) and is_http(given):
            yield given
            continue
        path = local_path(given, "the image")
        if not os.path.isdir(path):  # unlike Path.is_dir, it is False for names that are too long
            yield path
            continue
        found = False
        for found_path in find_images(path):
            found = True
            yield found_path
        if not found:
            raise UserError(f"{path} has no image ({', '.join(images.IMAGE_EXTENSIONS)})")


def with_folders_expanded(given: Iterable[Any]) -> Iterator[Any]:
    """Yields images as `read_image` takes them; the path of a folder stands for the images below it."""
    for image in given:
        if isinstance(image, (str, Path)):
            yield from expand_folders([image])
        else:
            yield image


def preprocess_images(given: Any, size: int, preprocess: Callable[[ImageInput], np.ndarray]) -> Iterator[np.ndarray]:
    """Yields images, given as `Predictor.encode_image` takes them, as uint8 [b, s, s, 3], `CHUNK` at a time.

    Args:
        given: one image, several, or an array of preprocessed images, which is yielded as it is.
        size: s, of preprocessed images.
        preprocess: resizes and crops an image to uint8 [s, s, 3].

    Raises:
        UserError: an array of several images has another shape or type.
    """
    if is_array(given) and len(given.shape) > 3:
        array = to_numpy(given)
        if array.dtype != np.uint8 or array.shape[1:] != (size, size, 3):
            raise UserError(
                f"expected preprocessed images uint8 [b, {size}, {size}, 3], found {describe_array(array)}; "
                "pass images of other sizes or types as a list"
            )
        yield array
        return
    if is_one_image(given) or not hasattr(given, "__iter__"):
        given = [given]
    remaining = iter(with_folders_expanded(given))
    while chunk := list(itertools.islice(remaining, CHUNK)):
        yield np.stack([preprocess(image) for image in chunk])
