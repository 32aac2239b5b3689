"""Figures of predictions: images with their best names as bars, drawn or as text."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from zslflax.errors import MissingFileError, UserError
from zslflax.files import local_path
from zslflax.saving import storage_errors, write_atomically

Prediction = tuple[str, float, bool]  # name, score, whether the name is true
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

SIDE = 160  # pixels of an image in the grid; 5 times that of a 32-pixel image
BAR_WIDTH, BAR_HEIGHTS, GAP, MARGIN = 236, (20, 32), 14, 20  # pixels; the smallest and largest height with spacing
FONT_SIZE, LINE_HEIGHT = 13, 17
BACKGROUND, TEXT, FAINT_TEXT, FRAME = "#ffffff", "#1f2328", "#656d76", "#d0d7de"
TRUE_BAR, OTHER_BAR, TRACK, TRUE_TEXT = "#9fd8ae", "#dde3ea", "#f6f8fa", "#116329"
NO_BREAK = "\u00a0"  # a space at which a line must not end; drawn as a plain space, because some fonts lack it


def figure_path(path: str | Path, name: str) -> Path:
    """The path of a figure that the user named, checked before the work that comes first.

    Args:
        path: what the user gave.
        name: of the option, for the message.

    Raises:
        MissingFileError: its folder does not exist.
        UserError: it is an address, a folder, or its name does not end in .png. Other formats limit the size.
    """
    local = local_path(path, name)
    if local.suffix.lower() != ".png" or local.is_dir():
        raise UserError(f"{name} is {path}, expected a file whose name ends in .png")
    if not local.parent.is_dir():
        raise MissingFileError(f"{name} is {path}, but there is no folder {local.parent}; make it, or name another")
    return local


def write_figure(figure: Image.Image, path: Path) -> None:
    """Writes a figure as a PNG file, atomically.

    Raises:
        StorageError: the file cannot be written.
    """
    with storage_errors(path):
        write_atomically(path, lambda partial: figure.save(partial, "PNG"))


def prediction_grid(
    images: Sequence[np.ndarray],
    predictions: Sequence[Sequence[Prediction]],
    true_names: Sequence[Sequence[str]],
    columns: int = 3,
) -> Image.Image:
    """Draws images with their best names beside them, as bars with the lengths of their scores; true names are green.

    >>> image = np.zeros((32, 32, 3), np.uint8)
    >>> grid = prediction_grid([image], [[("cat", 0.3, True), ("dog", 0.2, False)]], [["cat"]])
    >>> grid.mode, grid.size
    ('RGB', (450, 254))

    Args:
        images: uint8 [h, w, 3] arrays of any sizes.
        predictions: for each image, the best names, best first. All scores share one scale, see `bar_lengths`.
        true_names: for each image, its true names, written below it; "no true name" is written if there are none.
        columns: images side by side.

    Returns:
        An RGB image.

    Raises:
        ValueError: the arguments have different lengths, or there is no image.
    """
    if not len(images) == len(predictions) == len(true_names) or not len(images):
        raise ValueError(
            f"expected predictions and true names for each image, found {len(images)} images, "
            f"{len(predictions)} lists of predictions, {len(true_names)} lists of true names"
        )
    font = ImageFont.load_default(FONT_SIZE)
    lengths = iter(bar_lengths([score for image_predictions in predictions for _, score, _ in image_predictions]))
    most = max(1, max(map(len, predictions)))
    bar_height = min(max(SIDE // most, BAR_HEIGHTS[0]), BAR_HEIGHTS[1])
    columns, rows = min(columns, len(images)), -(-len(images) // min(columns, len(images)))
    cell_width = SIDE + GAP + BAR_WIDTH + 2 * GAP
    cell_height = max(SIDE + 6 + 2 * LINE_HEIGHT, bar_height * most) + 2 * GAP
    size = 2 * MARGIN + columns * cell_width - 2 * GAP, 2 * MARGIN + rows * cell_height - GAP
    grid = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for i, (image, image_predictions, names) in enumerate(zip(images, predictions, true_names)):
        x, y = MARGIN + i % columns * cell_width, MARGIN + i // columns * cell_height
        draw.rectangle((x - 1, y - 1, x + SIDE, y + SIDE), outline=FRAME)
        fitted = fit_image(image, SIDE)
        grid.paste(fitted, (x + (SIDE - fitted.width) // 2, y + (SIDE - fitted.height) // 2))
        caption = wrap_text(join_names(names) or "no true name", font, SIDE, lines=2)
        for line, text in enumerate(caption):
            below = y + SIDE + 6 + line * LINE_HEIGHT
            draw.text((x, below), text, fill=TEXT if names else FAINT_TEXT, font=font)
        for place, (name, score, is_true) in enumerate(image_predictions):
            left, top = x + SIDE + GAP, y + place * bar_height
            box = left, top, left + BAR_WIDTH, top + bar_height - 3
            draw_bar(draw, box, name, score, next(lengths), is_true, font)
    return grid


def caption_grid(images: Sequence[np.ndarray], captions: Sequence[str], columns: int = 2) -> Image.Image:
    """Draws images with their captions beside them.

    >>> caption_grid([np.zeros((32, 32, 3), np.uint8)], ["a black square"]).size
    (450, 228)

    Args:
        images: uint8 [h, w, 3] arrays of any sizes, at least one.
        captions: of each image; what does not fit is cut off.
        columns: images side by side.
    """
    font = ImageFont.load_default(FONT_SIZE)
    columns, rows = min(columns, len(images)), -(-len(images) // min(columns, len(images)))
    cell_width, cell_height = SIDE + GAP + BAR_WIDTH + 2 * GAP, SIDE + 2 * GAP
    size = 2 * MARGIN + columns * cell_width - 2 * GAP, 2 * MARGIN + rows * cell_height
    grid = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        x, y = MARGIN + i % columns * cell_width, MARGIN + i // columns * cell_height
        draw.rectangle((x - 1, y - 1, x + SIDE, y + SIDE), outline=FRAME)
        fitted = fit_image(image, SIDE)
        grid.paste(fitted, (x + (SIDE - fitted.width) // 2, y + (SIDE - fitted.height) // 2))
        for line, text in enumerate(wrap_text(caption, font, BAR_WIDTH, lines=SIDE // LINE_HEIGHT)):
            draw.text((x + SIDE + GAP, y + line * LINE_HEIGHT), text, fill=TEXT, font=font)
    return grid


def text_bars(predictions: Sequence[tuple[str, float]], width: int = 30) -> list[str]:
    """Returns one line of text per prediction: its name, a bar of its score's length, and the score.

    >>> text_bars([("a cat", 0.3), ("a dog", 0.15)], width=8)
    ['  a cat  ████████  0.300', '  a dog  ████      0.150']

    Args:
        predictions: (name, score).
        width: characters of the longest bar.
    """
    room = max(len(name) for name, _ in predictions)
    lengths = [round(8 * width * length) for length in bar_lengths([score for _, score in predictions])]
    bars = ["█" * (length // 8) + " ▏▎▍▌▋▊▉"[length % 8].strip() for length in lengths]
    return [f"  {name:<{room}}  {bar:<{width}}  {score:.3f}" for (name, score), bar in zip(predictions, bars)]


def bar_lengths(scores: Sequence[float]) -> list[float]:
    """Returns the length of each score's bar, from 0 to 1.

    Bars start at 0, or at the lowest score if that is negative, and the highest score has length 1. A score that is not
    finite has length 0.

    >>> bar_lengths([0.5, 0.25, float("nan")])
    [1.0, 0.5, 0.0]
    """
    values = np.asarray(scores, np.float64)
    finite = np.isfinite(values)
    low, high = values.min(initial=0.0, where=finite), values.max(initial=1e-9, where=finite)
    return np.where(finite, (values - low) / (high - low), 0.0).tolist()


def draw_bar(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    name: str,
    score: float,
    length: float,
    is_true: bool,
    font: Font,
) -> None:
    """Draws a name on its bar, with its score at the right and, if it is true, a tick at the left.

    Args:
        draw: of the image to draw on.
        box: left, top, right and bottom, in pixels.
        name, score: text of the bar.
        length: of the bar, as a fraction of the box.
        is_true: whether the name is true.
        font: of the text.
    """
    left, top, right, bottom = box
    draw.rectangle((left, top, right - 1, bottom - 1), fill=TRACK)
    if (end := round(length * (right - left))) > 0:
        draw.rectangle((left, top, left + end - 1, bottom - 1), fill=TRUE_BAR if is_true else OTHER_BAR)
    colour = TRUE_TEXT if is_true else TEXT
    middle = (top + bottom) // 2
    number = f"{score:.2f}"
    draw.text((right - 6, middle), number, fill=colour, font=font, anchor="rm")
    if is_true:  # a line, because some fonts have no tick
        tick = (left + 6, middle, left + 9, middle + 4, left + 16, middle - 5)
        draw.line(tick, fill=colour, width=2, joint="curve")
    room = right - left - 22 - 6 - font.getlength(number) - 8
    draw.text((left + 22, middle), wrap_text(name, font, room, lines=1)[0], fill=colour, font=font, anchor="lm")


def join_names(names: Sequence[str]) -> str:
    """Joins names with commas; their inner spaces become `NO_BREAK`, so that lines end between names."""
    return ", ".join(name.replace(" ", NO_BREAK) for name in names)


def fit_image(image: np.ndarray, side: int) -> Image.Image:
    """Resizes an image uint8 [h, w, 3] to fit into a square.

    A small image is enlarged by a whole factor without interpolation; a large one is reduced with antialiasing.

    Args:
        image: uint8 [h, w, 3].
        side: of the square, in pixels.
    """
    result = Image.fromarray(np.asarray(image, np.uint8))
    factor = side / max(result.size)
    if factor >= 2:
        return result.resize((result.width * int(factor), result.height * int(factor)), Image.Resampling.NEAREST)
    size = max(1, round(result.width * factor)), max(1, round(result.height * factor))
    return result.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)  # a tenth of the time for large images


def wrap_text(text: str, font: Font, width: float, lines: int) -> list[str]:
    """Breaks a text into lines; what does not fit is replaced by an ellipsis.

    Lines end at spaces, or at `NO_BREAK` where a line has no space, or within a word where it has neither.

    Args:
        text: may be empty.
        font: of the text.
        width: of a line, in pixels.
        lines: at most.
    """

    def fitting(text: str, end: str = "") -> int:
        """The number of characters of the text that fit on a line before `end`."""
        length = min(len(text), int(width))  # a character is a pixel wide or more
        while length > 1 and font.getlength(text[:length].replace(NO_BREAK, " ").rstrip() + end) > width:
            length -= 1
        return length

    done: list[str] = []
    while len(done) < lines - 1 and fitting(text) < len(text):
        length = fitting(text)
        spaces = text.rfind(" ", 0, length + 1), text.rfind(NO_BREAK, 0, length + 1)
        length = next((space for space in spaces if space > 0), length)
        done.append(text[:length].rstrip())
        text = text[length:].lstrip()
    if fitting(text) < len(text):
        text = text[: fitting(text, "…")].rstrip() + "…"
    return [line.replace(NO_BREAK, " ") for line in [*done, text]]
