"""Images: which files hold them, and decoding to uint8 RGB."""

import contextlib
import functools
import io
import threading
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, UnidentifiedImageError

from zslflax.errors import UserError

FORMATS = "JPEG PNG WEBP GIF BMP TIFF AVIF".split()  # Pillow knows others, some of which run programs
IMAGE_EXTENSIONS = tuple("jpg jpeg jpe jfif png webp gif bmp tif tiff avif".split())  # in order of preference
CLUTTER = {  # folders and files
    *("@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"),
    *("Thumbs.db", "desktop.ini"),
}
MAX_PIXELS = 1 << 26  # 8192 × 8192: 200 MB once decoded
MAX_FILE_BYTES = 1 << 30  # of an image file: one of MAX_PIXELS, 16 bits and 4 channels takes half of it uncompressed
MAX_SCANS = 100  # of a progressive JPEG: each costs the time of a whole image, and usual files have 10
LARGE_DECODE = 1 << 28  # bytes; images that need more memory to decode are decoded one at a time

_large_decode_lock = threading.Lock()


class BadSample(UserError):
    """A sample cannot be read. The pipeline masks the sample and reports it.

    Attributes:
        name: the sample's name, or None where the code that raises does not know it.
    """

    def __init__(self, message: str, *, name: str | None = None):
        super().__init__(message)
        self.name = name


def has_image_extension(path: str | Path) -> bool:
    """Whether a file is named like an image of one of the `FORMATS`, in upper or lower case.

    >>> has_image_extension("photos/cat.JPG"), has_image_extension("photos/cat.txt")
    (True, False)
    """
    return str(path).lower().endswith(tuple(f".{extension}" for extension in IMAGE_EXTENSIONS))


def is_clutter(name: str) -> bool:
    """Whether a file or folder is one that programs hide beside images: previews, metadata, waste.

    >>> is_clutter(".ipynb_checkpoints"), is_clutter("@eaDir"), is_clutter("cat")
    (True, True, False)
    """
    return name.startswith(".") or name in CLUTTER


def decode(data: bytes, apply_orientation: bool = False, min_side: int = 0) -> np.ndarray:
    """Decodes an image in one of the `FORMATS`, which its content tells, not its file name.

    Greyscale, palette, CMYK and 16-bit images become 8-bit RGB. Transparent pixels become white. An animation
    gives its first frame.

    Args:
        data: the contents of the file.
        apply_orientation: turn the image as its EXIF orientation says, as viewers show it. Training and evaluation
            ignore it, as torchvision and TensorFlow do.
        min_side: pixels. A JPEG is decoded at 1/2, 3/8, 1/4 or 1/8 of its size where its shorter side keeps so many,
            which takes half of the time for a photograph of a phone; 0: at its size.

    Returns:
        uint8 [height, width, 3].

    Raises:
        BadSample: the data is not an image, is truncated, or has more than `MAX_PIXELS` pixels or `MAX_SCANS`
            scans; the last two are checked before decoding.
    """
    pixels = decode_pixels(data, min_side)
    return orient(pixels, exif_orientation(data)) if apply_orientation else pixels


def decode_pixels(data: bytes, min_side: int = 0) -> np.ndarray:
    """Decodes an image as its file stores it; `min_side` and errors are those of `decode`."""
    if data[:2] == b"\xff\xd8":
        if count_scans(data) > MAX_SCANS:
            raise BadSample(f"the image has more than {MAX_SCANS} scans")
        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            with decoding_slot(height, width, bytes_per_pixel=6):
                return simplejpeg.decode_jpeg(data, min_height=min_side, min_width=min_side, min_factor=2)
        except BadSample:
            raise
        except ValueError:
            pass  # simplejpeg also refuses harmless damage, such as stray bytes between markers: Pillow decides
    return decode_with_pillow(data)


def exif_orientation(data: bytes) -> int:
    """The EXIF orientation of an image, 1 to 8; 1, upright, where there is none or it cannot be read."""
    try:
        with Image.open(io.BytesIO(data), formats=available_formats()) as image:
            return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF data makes Pillow raise many types of errors, and the pixels are good
        return 1


def orient(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turns an image [h, w, 3] upright that was stored with an EXIF orientation; others than 2 to 8 leave it as it is.

    >>> orient(np.arange(6).reshape(2, 3, 1), 6)[..., 0].tolist()
    [[3, 0], [4, 1], [5, 2]]
    """
    if orientation not in range(2, 9):
        return image
    if orientation >= 5:  # rows and columns are exchanged
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def count_scans(data: bytes) -> int:
    """The number of scans of a JPEG: of start-of-scan markers, which never occur within the compressed data.

    A marker counts only with a header that decoders accept: 6 + 2n bytes for n components. The two bytes of the
    marker alone occur by chance in the data that phones append to their photos.
    """
    array = np.frombuffer(data, np.uint8)
    after_ff = np.flatnonzero(array[:-4] == 0xFF) + 1
    at = after_ff[array[after_ff] == 0xDA]  # a third of the time of bytes.count
    high, low, components = array[at + 1], array[at + 2], array[at + 3]
    return int(np.count_nonzero((high == 0) & (components >= 1) & (components <= 4) & (low == 6 + 2 * components)))


def decode_with_pillow(data: bytes) -> np.ndarray:
    """Decodes an image of any of the `FORMATS`, as `decode` does, with Pillow."""
    try:
        with Image.open(io.BytesIO(data), formats=available_formats()) as image:
            with decoding_slot(image.height, image.width, bytes_per_pixel=20):
                return np.array(to_rgb(image))
    except BadSample:
        raise
    except UnidentifiedImageError:
        message = f"the data is not an image: it starts with {data[:8]!r}" if data else "the image is empty"
        raise BadSample(message) from None
    except Exception as error:  # Pillow's decoders raise many types of errors on damaged files
        raise BadSample(f"the image cannot be decoded: {error or type(error).__name__}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts an image of any Pillow mode to RGB; transparent pixels become white.

    Raises:
        ValueError: the pixels are floating-point numbers (mode "F").
    """
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers")
    if image.mode.startswith("I"):  # 16 bits, which convert() clips instead of scaling
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def decoding_slot(height: int, width: int, bytes_per_pixel: int) -> contextlib.AbstractContextManager:
    """The context in which an image of this size may be decoded; large images wait for each other.

    Args:
        height, width: pixels.
        bytes_per_pixel: memory that decoding takes.

    Raises:
        BadSample: the image has no pixels, or more than `MAX_PIXELS`.
    """
    if not height * width:
        raise BadSample("the image has no pixels")
    if height * width > MAX_PIXELS:
        raise BadSample(f"the image has {width} × {height} pixels, more than the {MAX_PIXELS:,} allowed")
    return _large_decode_lock if height * width * bytes_per_pixel > LARGE_DECODE else contextlib.nullcontext()


@functools.cache
def available_formats() -> tuple[str, ...]:
    """The `FORMATS` that the installed Pillow can read."""
    Image.init()
    return tuple(format for format in FORMATS if format in Image.OPEN)
