"""The grid of predictions: what is drawn where, by the colours found there."""

import numpy as np
import pytest
from PIL import ImageFont

from zslflax import figures
from zslflax.figures import fitted, prediction_grid, wrapped


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def count(picture, colour, box=None):
    return int(np.sum(np.all(np.asarray(picture.crop(box) if box else picture) == rgb(colour), axis=-1)))


def solid(colour, height=32, width=32):
    return np.full((height, width, 3), colour, np.uint8)


def test_every_image_is_shown_large_whatever_its_size():
    colours = [(250, 10, 20), (20, 240, 30), (15, 25, 235), (200, 10, 220)]
    images = [solid(c, *size) for c, size in zip(colours, [(32, 32), (224, 224), (100, 50), (3, 500)])]
    picture = prediction_grid(images, [[("a", 0.5, False)]] * 4, [("a",)] * 4, columns=3)
    pixels = np.asarray(picture)
    expected = [160 * 160, 160 * 160, 160 * 80, 160 * 1]
    for place, (colour, area) in enumerate(zip(colours, expected)):
        where = np.argwhere(np.all(pixels == colour, axis=-1))
        assert len(where) == area
        middle = where.mean(axis=0)  # in reading order: three in the first line, one below
        assert (middle[0] > picture.height / 2) == (place == 3)
        assert int(middle[1] // (picture.width / 3)) == place % 3


def test_bars_have_their_scores_lengths_and_true_ones_their_colour():
    rows = [
        [("one", 0.8, False), ("two", 0.4, True), ("three", 0.0, False)],
        [("four", 0.2, True), ("five", -0.2, False)],
    ]
    picture = prediction_grid([solid(128)] * 2, rows, [("two",), ("four",)], columns=1)
    left = figures.MARGIN + figures.SIDE + figures.GAP
    lengths = {}
    # Lines of pixels above and below the text show a bar's whole length.
    pixels = np.asarray(picture)[:, left : left + figures.BAR_WIDTH]
    for kind, colour in (("true", figures.TRUE_BAR), ("other", figures.OTHER_BAR)):
        per_line = np.all(pixels == rgb(colour), axis=-1).sum(axis=1)
        lengths[kind] = sorted(set(per_line.tolist()))
    # From −0.2 to 0.8: 0.8 fills the width, 0.4 is 0.6 of it, 0.2 is 0.4, 0.0 is 0.2, −0.2 nothing.
    width = figures.BAR_WIDTH
    assert max(lengths["other"]) == width and max(lengths["true"]) == round(0.6 * width)
    assert round(0.2 * width) in lengths["other"] and round(0.4 * width) in lengths["true"]


def test_a_tick_stands_by_true_names_only():
    def ink_at_tick(is_true):
        picture = prediction_grid([solid(128)], [[("x", 1.0, is_true)]], [("x",)])
        left, top = figures.MARGIN + figures.SIDE + figures.GAP, figures.MARGIN
        return count(picture, figures.TRUE_INK, (left, top, left + 20, top + figures.ROW_HEIGHTS[1]))

    assert ink_at_tick(True) > 15 and ink_at_tick(False) == 0


def test_small_images_keep_their_pixels():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(fitted(image, 160))[2::5, 2::5], image)


def test_text_is_cut_to_its_room():
    font = ImageFont.load_default(13)
    long = "a very long class name, such as WordNet's synsets have " * 3
    for lines in (1, 2, 3):
        found = wrapped(long, font, 150, lines)
        assert len(found) == lines and found[-1].endswith("…")
        assert all(font.getlength(line) <= 150 for line in found)
        assert " ".join(found)[:-1].rstrip() == long[: len(" ".join(found)) - 1].rstrip()
    assert wrapped("short", font, 150, 2) == ["short"] and wrapped("", font, 150, 2) == [""]
    names = figures.unbroken(["red circle", "blue square", "green bar"])
    room = font.getlength("red circle, blue")
    assert wrapped(names, font, room, 3) == ["red circle,", "blue square,", "green bar"]
    assert wrapped("Donaudampfschifffahrtsgesellschaft" * 2, font, 60, 1)[0].endswith("…")


def test_scores_that_are_not_finite_or_rows_that_are_empty_still_make_a_picture():
    picture = prediction_grid([solid(1), solid(2)], [[("a", float("nan"), True)], []], [(), ("b",)])
    assert count(picture, figures.TRUE_BAR) == 0 and count(picture, figures.TRUE_INK) > 0


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="found 2 images, 1 rows, 2 true names"):
        prediction_grid([solid(1)] * 2, [[]], [(), ()])
    with pytest.raises(ValueError, match="found 0 images"):
        prediction_grid([], [], [])


def test_a_line_ends_within_a_name_only_where_it_is_longer_than_the_line_and_between_its_words():
    font = ImageFont.load_default(13)
    caption = figures.unbroken(["there is an orange crescent"])
    assert wrapped(caption, font, font.getlength("there is an orange cre"), 2) == ["there is an orange", "crescent"]
