"""Decoding against Pillow, resampling against Pillow and plain averages, and crops by their invariants."""

import functools
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from zslflax.data import images
from zslflax.data.images import BadSample


def smooth_image(height=37, width=50, seed=0) -> np.ndarray:
    """Smooth colours, which JPEG hardly changes: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


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


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.05, 0.5), (1.0, 1.0)])
def test_no_crop_of_a_reduced_image_is_enlarged(scale):
    rng, side = np.random.default_rng(0), images.min_side_for_crops(64, scale)
    for shape in ((side, side), (side, 3 * side), (5 * side, side)):
        boxes = [images.sample_crop_box(*shape, rng, scale, (3 / 4, 4 / 3)) for _ in range(500)]
        assert min(min(height, width) for _, _, height, width in boxes) >= 64


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


def area_average(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each pixel is the average of the area that it covers, fractions of pixels included."""

    def overlaps(inputs, outputs):
        edges = np.arange(outputs + 1)[:, None] * inputs / outputs
        pixel = np.arange(inputs)
        return (np.minimum(edges[1:], pixel + 1) - np.maximum(edges[:-1], pixel)).clip(0) * outputs / inputs

    rows, columns = overlaps(image.shape[0], height), overlaps(image.shape[1], width)
    return np.einsum("yh,hwc,xw->yxc", rows, image, columns, optimize=True)


@pytest.mark.parametrize("shape", [(7, 10), (37, 10), (7, 50), (36, 49), (37, 50), (1, 1)])
def test_shrinking_averages_areas(shape):
    np.testing.assert_allclose(images.resample(smooth_image(), *shape), area_average(smooth_image(), *shape), atol=1)


@pytest.mark.parametrize("shape", [(74, 100), (37, 90), (60, 50), (224, 224)])
def test_growing_interpolates(shape):
    expected = Image.fromarray(smooth_image()).resize(shape[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_allclose(images.resample(smooth_image(), *shape).astype(int), np.asarray(expected), atol=1)


def test_one_side_may_grow_while_the_other_shrinks():
    stripes = np.zeros((64, 8, 3), np.uint8)
    stripes[::2] = 255
    resampled = images.resample(stripes, 16, 20)
    assert resampled.shape == (16, 20, 3)
    np.testing.assert_allclose(resampled.astype(int), 128, atol=1)  # no aliasing to 0 or 255


def sample_boxes(height, width, scale, ratio=(3 / 4, 4 / 3), number=4000):
    """Top, left, height and width of random crops, int [4, number]."""
    rng = np.random.default_rng(0)
    return np.array([images.sample_crop_box(height, width, rng, scale, ratio) for _ in range(number)]).T


def test_crops_have_the_requested_areas_and_ratios_and_uniform_positions():
    top, left, h, w = sample_boxes(300, 400, (0.1, 0.3))
    area, log_ratio = h * w / 120_000, np.log(w / h)
    assert 0.098 < area.min() < 0.105 and 0.295 < area.max() < 0.302
    assert abs(area.mean() - 0.2) < 0.004
    assert np.log(0.74) < log_ratio.min() < np.log(0.77) and np.log(1.3) < log_ratio.max() < np.log(1.35)
    assert abs(log_ratio.mean()) < 0.01
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 300).all() and (left + w <= 400).all()
    for start, room in ((top, 300 - h), (left, 400 - w)):
        np.testing.assert_allclose(np.histogram(start / room, 4, (0, 1))[0], 1000, atol=120)  # uniform
        assert (start == 0).any() and (start == room).any()


@pytest.mark.parametrize(("shape", "box"), [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10))])
def test_a_centre_crop_is_taken_where_no_random_crop_fits(shape, box):
    assert (sample_boxes(*shape, (1.0, 1.0), number=5).T == box).all()


def test_a_square_image_is_kept_whole_at_scale_one_and_ratio_one():
    rng = np.random.default_rng(0)
    whole = images.random_resized_crop(smooth_image(40, 40), 40, rng, (1.0, 1.0), (1.0, 1.0))
    np.testing.assert_array_equal(whole, smooth_image(40, 40))


def test_a_crop_shows_its_box():
    """Each pixel's value is its position, from which the box of the crop can be recovered."""
    rows, columns = np.mgrid[:200, :240]
    image = np.stack([rows, columns, 0 * rows], axis=2).astype(np.uint8)
    crop = images.random_resized_crop(image, 32, np.random.default_rng(5), (0.3, 0.5))
    top, left, h, w = images.sample_crop_box(200, 240, np.random.default_rng(5), (0.3, 0.5), (3 / 4, 4 / 3))
    center = (np.arange(32) + 0.5) / 32
    np.testing.assert_allclose(crop[..., 0].mean(1), top + center * h - 0.5, atol=1)
    np.testing.assert_allclose(crop[..., 1].mean(0), left + center * w - 0.5, atol=1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 2)])
def test_images_of_one_pixel_are_cropped(shape):
    image = np.full((*shape, 3), 77, np.uint8)
    crop = images.random_resized_crop(image, 16, np.random.default_rng(0))
    for result in (crop, images.resize_center_crop(image, 16, 18)):
        assert result.shape == (16, 16, 3) and (result == 77).all()


@pytest.mark.parametrize("size", [16, 40, 64])  # smaller than the image, as large, and larger
def test_a_crop_is_mirrored_with_the_given_probability_and_written_where_it_is_asked_for(size):
    crop = functools.partial(images.random_resized_crop, smooth_image(40, 40), size, scale=(1.0, 1.0), ratio=(1.0, 1.0))
    upright, batch = crop(np.random.default_rng(0)), np.zeros((2, size, size, 3), np.uint8)
    mirrored = crop(np.random.default_rng(0), flip=1.0, out=batch[1])
    assert np.shares_memory(mirrored, batch) and not batch[0].any()
    np.testing.assert_array_equal(batch[1], upright[:, ::-1])
    crop(np.random.default_rng(0), out=batch[0])
    np.testing.assert_array_equal(batch[0], upright)
    draws = [bool((crop(np.random.default_rng(i), flip=0.5) == upright).all()) for i in range(200)]
    assert 70 < sum(draws) < 130


@pytest.mark.parametrize("shape", [(75, 100), (100, 75), (64, 64), (41, 97)])
def test_evaluation_resizes_the_shorter_side_and_takes_the_centre(shape):
    h, w = shape
    size, to = 24, 32
    height, width = (to * h // w, to) if w < h else (to, to * w // h)
    top, left = round((height - size) / 2), round((width - size) / 2)
    expected = area_average(smooth_image(*shape), height, width)[top : top + size, left : left + size]
    np.testing.assert_allclose(images.resize_center_crop(smooth_image(*shape), size, to), expected, atol=1)


def test_a_very_long_image_stays_small_and_keeps_its_centre():
    image = np.zeros((2, 2_000_000, 3), np.uint8)
    image[:, 999_990:1_000_010] = 200
    assert (images.resize_center_crop(image, 224, 256) == 200).all()


def test_a_crop_larger_than_the_resized_image_is_refused():
    with pytest.raises(ValueError, match="becomes 20 pixels, expected at least the crop's 24"):
        images.resize_center_crop(smooth_image(), 24, 20)


def test_the_image_extensions_are_those_of_the_formats_that_are_decoded():
    format_of_extension = Image.registered_extensions()
    assert {format_of_extension[f".{extension}"] for extension in images.IMAGE_EXTENSIONS} == set(images.FORMATS)
