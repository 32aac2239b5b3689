"""Resampling against Pillow and plain averages, and crops by their invariants."""

import functools

import numpy as np
import pytest
from PIL import Image

from tests.testing.images import area_average, smooth_image
from zslflax.data import crops


@pytest.mark.parametrize("shape", [(7, 10), (37, 10), (7, 50), (36, 49), (37, 50), (1, 1)])
def test_shrinking_averages_areas(shape):
    np.testing.assert_allclose(crops.resample(smooth_image(), *shape), area_average(smooth_image(), *shape), atol=1)


@pytest.mark.parametrize("shape", [(74, 100), (37, 90), (60, 50), (224, 224)])
def test_growing_interpolates(shape):
    expected = Image.fromarray(smooth_image()).resize(shape[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_allclose(crops.resample(smooth_image(), *shape).astype(int), np.asarray(expected), atol=1)


def test_one_side_may_grow_while_the_other_shrinks():
    stripes = np.zeros((64, 8, 3), np.uint8)
    stripes[::2] = 255
    resampled = crops.resample(stripes, 16, 20)
    assert resampled.shape == (16, 20, 3)
    np.testing.assert_allclose(resampled.astype(int), 128, atol=1)  # no aliasing to 0 or 255


def sample_boxes(height, width, scale, ratio=(3 / 4, 4 / 3), number=4000):
    """Top, left, height and width of random crops, int [4, number]."""
    rng = np.random.default_rng(0)
    return np.array([crops.sample_crop_box(height, width, rng, scale, ratio) for _ in range(number)]).T


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
    whole = crops.random_resized_crop(smooth_image(40, 40), 40, rng, (1.0, 1.0), (1.0, 1.0))
    np.testing.assert_array_equal(whole, smooth_image(40, 40))


def test_a_crop_shows_its_box():
    """Each pixel's value is its position, from which the box of the crop can be recovered."""
    rows, columns = np.mgrid[:200, :240]
    image = np.stack([rows, columns, 0 * rows], axis=2).astype(np.uint8)
    crop = crops.random_resized_crop(image, 32, np.random.default_rng(5), (0.3, 0.5))
    top, left, h, w = crops.sample_crop_box(200, 240, np.random.default_rng(5), (0.3, 0.5), (3 / 4, 4 / 3))
    center = (np.arange(32) + 0.5) / 32
    np.testing.assert_allclose(crop[..., 0].mean(1), top + center * h - 0.5, atol=1)
    np.testing.assert_allclose(crop[..., 1].mean(0), left + center * w - 0.5, atol=1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (3, 2)])
def test_images_of_one_pixel_are_cropped(shape):
    image = np.full((*shape, 3), 77, np.uint8)
    crop = crops.random_resized_crop(image, 16, np.random.default_rng(0))
    for result in (crop, crops.resize_center_crop(image, 16, 18)):
        assert result.shape == (16, 16, 3) and (result == 77).all()


@pytest.mark.parametrize("size", [16, 40, 64])  # smaller than the image, as large, and larger
def test_a_crop_is_mirrored_with_the_given_probability_and_written_where_it_is_asked_for(size):
    crop = functools.partial(crops.random_resized_crop, smooth_image(40, 40), size, scale=(1.0, 1.0), ratio=(1.0, 1.0))
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
    np.testing.assert_allclose(crops.resize_center_crop(smooth_image(*shape), size, to), expected, atol=1)


def test_a_very_long_image_stays_small_and_keeps_its_centre():
    image = np.zeros((2, 2_000_000, 3), np.uint8)
    image[:, 999_990:1_000_010] = 200
    assert (crops.resize_center_crop(image, 224, 256) == 200).all()


def test_a_crop_larger_than_the_resized_image_is_refused():
    with pytest.raises(ValueError, match="becomes 20 pixels, expected at least the crop's 24"):
        crops.resize_center_crop(smooth_image(), 24, 20)


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.05, 0.5), (1.0, 1.0)])
def test_no_crop_of_a_reduced_image_is_enlarged(scale):
    rng, side = np.random.default_rng(0), crops.min_side_for_crops(64, scale)
    for shape in ((side, side), (side, 3 * side), (5 * side, side)):
        boxes = [crops.sample_crop_box(*shape, rng, scale, (3 / 4, 4 / 3)) for _ in range(500)]
        assert min(min(height, width) for _, _, height, width in boxes) >= 64
