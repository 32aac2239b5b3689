"""Figures of predictions: what is drawn where, tested by the colours of pixels, and bars in text."""

import numpy as np
import pytest
from PIL import Image, ImageFont

from tests.testing.faults import small_disk
from zslflax import figures
from zslflax.errors import StorageError, UserError
from zslflax.figures import (
    figure_path,
    fit_image,
    join_names,
    prediction_grid,
    text_bars,
    wrap_text,
    write_figure,
)


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def count_pixels(grid, colour, box=None):
    return int(np.sum(np.all(np.asarray(grid.crop(box) if box else grid) == rgb(colour), axis=-1)))


def solid(colour, height=32, width=32):
    return np.full((height, width, 3), colour, np.uint8)


def test_images_of_all_sizes_fill_their_cells():
    colours = [(250, 10, 20), (20, 240, 30), (15, 25, 235), (200, 10, 220)]
    images = [solid(c, *size) for c, size in zip(colours, [(32, 32), (224, 224), (100, 50), (3, 500)])]
    grid = prediction_grid(images, [[("a", 0.5, False)]] * 4, [("a",)] * 4, columns=3)
    pixels = np.asarray(grid)
    expected = [160 * 160, 160 * 160, 160 * 80, 160 * 1]
    for place, (colour, area) in enumerate(zip(colours, expected)):
        where = np.argwhere(np.all(pixels == colour, axis=-1))
        assert len(where) == area
        middle = where.mean(axis=0)  # three in the first row, one in the second
        assert (middle[0] > grid.height / 2) == (place == 3)
        assert int(middle[1] // (grid.width / 3)) == place % 3


def test_bars_have_the_lengths_of_their_scores_and_true_ones_are_green():
    predictions = [
        [("one", 0.8, False), ("two", 0.4, True), ("three", 0.0, False)],
        [("four", 0.2, True), ("five", -0.2, False)],
    ]
    grid = prediction_grid([solid(128)] * 2, predictions, [("two",), ("four",)], columns=1)
    left = figures.MARGIN + figures.SIDE + figures.GAP
    lengths = {}
    # The rows of pixels above and below the text show the whole length of a bar.
    pixels = np.asarray(grid)[:, left : left + figures.BAR_WIDTH]
    for kind, colour in (("true", figures.TRUE_BAR), ("other", figures.OTHER_BAR)):
        per_line = np.all(pixels == rgb(colour), axis=-1).sum(axis=1)
        lengths[kind] = sorted(set(per_line.tolist()))
    # Scores go from −0.2 to 0.8: 0.8 has length 1, 0.4 has 0.6, 0.2 has 0.4, 0.0 has 0.2 and −0.2 has 0.
    width = figures.BAR_WIDTH
    assert max(lengths["other"]) == width and max(lengths["true"]) == round(0.6 * width)
    assert round(0.2 * width) in lengths["other"] and round(0.4 * width) in lengths["true"]


def test_only_true_names_have_a_tick():
    def tick_pixels(is_true):
        grid = prediction_grid([solid(128)], [[("x", 1.0, is_true)]], [("x",)])
        left, top = figures.MARGIN + figures.SIDE + figures.GAP, figures.MARGIN
        return count_pixels(grid, figures.TRUE_TEXT, (left, top, left + 20, top + figures.BAR_HEIGHTS[1]))

    assert tick_pixels(True) > 15 and tick_pixels(False) == 0


def test_small_images_are_enlarged_without_interpolation():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(fit_image(image, 160))[2::5, 2::5], image)


def test_text_is_wrapped_and_shortened_to_its_width():
    font = ImageFont.load_default(13)
    long = "a very long class name, such as WordNet's synsets have " * 3
    for lines in (1, 2, 3):
        found = wrap_text(long, font, 150, lines)
        assert len(found) == lines and found[-1].endswith("…")
        assert all(font.getlength(line) <= 150 for line in found)
        assert " ".join(found)[:-1].rstrip() == long[: len(" ".join(found)) - 1].rstrip()
    assert wrap_text("short", font, 150, 2) == ["short"] and wrap_text("", font, 150, 2) == [""]
    names = join_names(["red circle", "blue square", "green bar"])
    room = font.getlength("red circle, blue")
    assert wrap_text(names, font, room, 3) == ["red circle,", "blue square,", "green bar"]
    assert wrap_text("Donaudampfschifffahrtsgesellschaft" * 2, font, 60, 1)[0].endswith("…")


def test_scores_that_are_not_finite_and_empty_predictions_are_drawn():
    grid = prediction_grid([solid(1), solid(2)], [[("a", float("nan"), True)], []], [(), ("b",)])
    assert count_pixels(grid, figures.TRUE_BAR) == 0 and count_pixels(grid, figures.TRUE_TEXT) > 0


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="found 2 images, 1 lists of predictions, 2 lists of true names"):
        prediction_grid([solid(1)] * 2, [[]], [(), ()])
    with pytest.raises(ValueError, match="found 0 images"):
        prediction_grid([], [], [])


def test_a_name_longer_than_a_line_is_broken_between_its_words():
    font = ImageFont.load_default(13)
    caption = join_names(["there is an orange crescent"])
    assert wrap_text(caption, font, font.getlength("there is an orange cre"), 2) == ["there is an orange", "crescent"]


def test_text_bars_have_the_lengths_of_their_scores():
    lines = text_bars([("cat", 0.5), ("a dog", 0.25), ("x", -0.5)], width=16)
    assert lines[0] == "  cat    " + "█" * 16 + "  0.500"
    assert lines[1] == "  a dog  " + "█" * 12 + " " * 4 + "  0.250"
    assert lines[2] == "  x      " + " " * 16 + "  -0.500"
    assert "█▌ " in text_bars([("a", 1.0), ("b", 0.15)], width=10)[1]


def test_a_text_of_a_million_characters_is_cut_off_at_once():
    font = ImageFont.load_default(13)
    assert wrap_text("w" * 1_000_000, font, 60, lines=2) == wrap_text("w" * 100, font, 60, lines=2)


def test_a_figure_is_written_whole_or_not_at_all(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8))
    with small_disk(tmp_path / "disk", "64k") as disk:
        path = disk / "answer.png"
        write_figure(Image.new("RGB", (8, 8), "red"), path)
        before = path.read_bytes()
        with pytest.raises(StorageError, match=f"{path} cannot be written: No space left"):
            write_figure(noise, path)
        assert list(disk.iterdir()) == [path] and path.read_bytes() == before


@pytest.mark.parametrize("name", ["answer.jpg", "answer", ".", "folder.png", "nowhere/answer.png"])
def test_a_place_where_no_figure_can_be_is_refused_before_it_is_drawn(name, tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(
        UserError, match="--png is .*, (expected a file whose name ends in .png|but there is no folder)"
    ):
        figure_path(tmp_path / name, "--png")
    assert figure_path(tmp_path / "answer.PNG", "--png") == tmp_path / "answer.PNG"
