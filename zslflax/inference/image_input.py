"""Reads images in all forms that users have them: files, PIL images and arrays."""

from pathlib import Path

import numpy as np
from PIL import Image

from zslflax.data import images
from zslflax.errors import MissingFileError, UserError

ImageInput = str | Path | Image.Image | np.ndarray  # one image, as `read_image` takes it


def read_image(image: ImageInput) -> np.ndarray:
    """Converts an image to uint8 [h, w, 3] (RGB). Transparent pixels become white.

    >>> read_image(np.zeros((20, 30), np.uint8)).shape
    (20, 30, 3)

    Args:
        image: a path, a PIL image of any mode, or an array uint8 [h, w], [h, w, 3] or [h, w, 4].

    Raises:
        MissingFileError: there is no such file.
        BadSample: the file is not an image, or is damaged.
        UserError: the array has another shape or type.
    """
    if isinstance(image, (str, Path)):
        return read_image_file(Path(image).expanduser())
    if isinstance(image, Image.Image):
        return np.array(images.to_rgb(image))
    array = np.asarray(image)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise UserError(
            f"expected an image as uint8 [h, w], [h, w, 3] or [h, w, 4], found {array.dtype} {list(array.shape)}"
        )
    return array if array.shape[2:] == (3,) else np.array(images.to_rgb(Image.fromarray(array)))


def read_image_file(path: Path) -> np.ndarray:
    """Decodes an image file to uint8 [h, w, 3] (RGB); errors name the file."""
    try:
        return images.decode(path.read_bytes())
    except FileNotFoundError:
        raise MissingFileError(f"there is no file {path}") from None
    except images.BadSample as error:
        raise images.BadSample(f"{path}: {error}") from error
