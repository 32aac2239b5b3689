"""Decoding against Pillow."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.testing.images import area_average, smooth_image
from zslflax.data import images
from zslflax.data.images import BadSample


def encode(image, format, **options) -> bytes:
    file = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(file, format, **options)
    return file.getvalue()


def decode_with_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


JPEGS = {
    "baseline": encode(smooth_image(), "JPEG", quality=90),
    "progressive": encode(smooth_image(), "JPEG", quality=90, progressive=True),
    "4:4:4": encode(smooth_image(), "JPEG", quality=90, subsampling=0),
    "grey": encode(Image.fromarray(smooth_image()).convert("L"), "JPEG"),
    "cmyk": encode(Image.fromarray(smooth_image()).convert("CMYK"), "JPEG", quality=95),
    "exif": encode(smooth_image(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"),
    "bytes after the end": encode(smooth_image(), "JPEG") + b"junk",
}


@pytest.mark.parametrize("kind", JPEGS)
def test_jpegs_decode_like_pillow(kind):
    decoded = images.decode(JPEGS[kind])
    assert decoded.shape == (37, 50, 3) and decoded.dtype == np.uint8 and decoded.flags.c_contiguous
    np.testing.assert_allclose(decoded.astype(int), decode_with_pillow(JPEGS[kind]), atol=2)


@pytest.mark.parametrize(
    ("min_side", "eighths"), [(0, 8), (61, 8), (60, 4), (46, 4), (45, 3), (31, 3), (30, 2), (16, 2), (15, 1), (5, 1)]
)
@pytest.mark.parametrize("shape", [(120, 184), (184, 120)])
def test_a_large_jpeg_is_decoded_at_the_smallest_size_that_keeps_the_shorter_side(shape, min_side, eighths):
    smooth = np.array(Image.fromarray(smooth_image(8, 12)).resize(shape[::-1], Image.Resampling.BICUBIC))
    data = encode(smooth, "JPEG", quality=90)
    decoded = images.decode(data, min_side=min_side)
    assert decoded.shape[:2] == tuple(-(-side * eighths // 8) for side in shape)
    np.testing.assert_allclose(decoded, area_average(decode_with_pillow(data), *decoded.shape[:2]), atol=5)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_decode_exactly(format):
    options = {"lossless": True} if format == "WEBP" else {}
    np.testing.assert_array_equal(images.decode(encode(smooth_image(), format, **options)), smooth_image())


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "I;16", "CMYK"])
def test_every_mode_is_converted_to_rgb(mode):
    if mode == "I;16":
        grey = np.linspace(0, 65535, 37 * 50).reshape(37, 50).astype(np.uint16)
        data, expected = encode(grey, "PNG"), np.repeat((grey >> 8)[..., None], 3, axis=2)
    else:
        converted = Image.fromarray(smooth_image()).convert(mode)
        data = encode(converted, "TIFF" if mode == "CMYK" else "PNG")
        expected = np.asarray(converted.convert("RGB"))
    np.testing.assert_array_equal(images.decode(data), expected)


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_transparent_pixels_become_white(format):
    alpha = np.zeros((37, 50, 4), np.uint8)
    alpha[:, :25] = (10, 20, 30, 255)
    alpha[:, 40:] = (0, 0, 0, 128)
    decoded = images.decode(encode(alpha, format, lossless=True))
    assert (decoded[:, :25] == (10, 20, 30)).all() and (decoded[:, 25:40] == 255).all()
    np.testing.assert_allclose(decoded[:, 40:].astype(int), 127, atol=1)


def test_transparent_palettes_become_white_and_animations_give_their_first_frame():
    frames = [Image.new("P", (6, 5), color) for color in (0, 1)]
    for frame in frames:
        frame.putpalette([200, 0, 0, 0, 200, 0])
    animated = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (images.decode(animated) == (200, 0, 0)).all()
    assert (images.decode(encode(frames[0], "PNG", transparency=0)) == 255).all()
    assert (images.decode(encode(frames[0], "PNG", transparency=b"\x00\xff")) == 255).all()


def test_stray_bytes_in_a_jpeg_are_ignored():
    data = JPEGS["baseline"]
    at = data.index(b"\xff\xda")
    np.testing.assert_array_equal(images.decode(data[:at] + b"\x00\x01" + data[at:]), decode_with_pillow(data))


def test_data_that_a_phone_appends_to_a_jpeg_is_ignored():
    film = np.random.default_rng(0).bytes(10_000_000)
    assert film.count(b"\xff\xda") > 100
    np.testing.assert_array_equal(images.decode(JPEGS["baseline"] + film), decode_with_pillow(JPEGS["baseline"]))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9])
def test_truncated_images_raise_bad_sample(format, kept):
    data = encode(smooth_image(120, 160), format)
    with pytest.raises(BadSample, match="cannot be decoded" if kept else "the image is empty"):
        images.decode(data[: int(kept * len(data))])


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xe0", b"<html>not</html>", bytes(5000)])
def test_data_that_is_not_an_image_raises_bad_sample(data):
    messages = set()
    for _ in range(2):
        with pytest.raises(BadSample, match="not an image: it starts with" if data else "is empty") as caught:
            images.decode(data)
        messages.add(str(caught.value))
    assert len(messages) == 1  # the pipeline counts errors by their message


def png_claiming(width: int, height: int) -> bytes:
    """A PNG without pixels whose header claims a size."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_decompression_bombs_are_refused_by_their_header():
    jpeg = bytearray(JPEGS["baseline"])
    at = jpeg.index(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 60_000, 50_000)
    for data in (bytes(jpeg), png_claiming(8200, 8200)):
        with pytest.raises(BadSample, match="more than the 67,108,864 allowed"):
            images.decode(data)
    with pytest.raises(BadSample, match="pixels"):
        images.decode(png_claiming(100_000, 100_000))


def test_the_image_extensions_are_those_of_the_formats_that_are_decoded():
    format_of_extension = Image.registered_extensions()
    assert {format_of_extension[f".{extension}"] for extension in images.IMAGE_EXTENSIONS} == set(images.FORMATS)
