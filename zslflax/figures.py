"""A picture of what a model recognises: test images, each with its best names as bars."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 160  # pixels of an image in the grid; 5 times that of a 32-pixel image
BAR_WIDTH, ROW_HEIGHTS, GAP, MARGIN = 236, (20, 32), 14, 20
FONT_SIZE = 13
PAPER, INK, FAINT, FRAME = "#ffffff", "#1f2328", "#656d76", "#d0d7de"
TRUE_BAR, OTHER_BAR, TRACK, TRUE_INK = "#9fd8ae", "#dde3ea", "#f6f8fa", "#116329"
NO_BREAK = "\u00a0"  # where a line must not end; drawn as a blank, for not every font has it


def prediction_grid(images, rows, true_names, columns: int = 3) -> Image.Image:
    """Images with the best names beside them, as bars of their scores' lengths; true ones are green.

    Args:
        images: uint8 [h, w, 3] arrays of any sizes.
        rows: for each image, (name, score, whether it is true), best first. Bars compare the scores of the
            whole picture, see `bar_lengths`.
        true_names: for each image its true names, written below it; an empty one says so.
        columns: images side by side.

    Returns an RGB picture.
    """
    if not len(images) == len(rows) == len(true_names) or not len(images):
        raise ValueError(
            f"expected rows and true names for each image, found {len(images)} images, "
            f"{len(rows)} rows, {len(true_names)} true names"
        )
    font = ImageFont.load_default(FONT_SIZE)
    lengths = iter(bar_lengths([score for of_image in rows for _, score, _ in of_image]))
    columns = min(columns, len(images))
    captions = [wrapped(unbroken(names) or "no true name", font, SIDE, lines=2) for names in true_names]
    most = max(1, max(map(len, rows)))
    row = min(max(SIDE // most, ROW_HEIGHTS[0]), ROW_HEIGHTS[1])
    cell = SIDE + GAP + BAR_WIDTH, max(SIDE + 6 + 2 * (FONT_SIZE + 4), row * most) + GAP
    lines = -(-len(images) // columns)
    size = (
        2 * MARGIN + columns * cell[0] + (columns - 1) * 2 * GAP,
        2 * MARGIN + lines * cell[1] + (lines - 1) * GAP,
    )
    picture = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(picture)
    for i, (image, of_image, caption, names) in enumerate(zip(images, rows, captions, true_names)):
        x = MARGIN + i % columns * (cell[0] + 2 * GAP)
        y = MARGIN + i // columns * (cell[1] + GAP)
        draw.rectangle((x - 1, y - 1, x + SIDE, y + SIDE), outline=FRAME)
        shown = fitted(image, SIDE)
        picture.paste(shown, (x + (SIDE - shown.width) // 2, y + (SIDE - shown.height) // 2))
        for line, text in enumerate(caption):
            below = y + SIDE + 6 + line * (FONT_SIZE + 4)
            draw.text((x, below), text, fill=INK if names else FAINT, font=font)
        for place, (name, score, is_true) in enumerate(of_image):
            left, top = x + SIDE + GAP, y + place * row
            draw_bar(draw, (left, top, left + BAR_WIDTH, top + row - 3), name, score, next(lengths), is_true, font)
    return picture


def bar_lengths(scores) -> list[float]:
    """Of each score's bar, 0 … 1: bars start at 0, or at the lowest score below it, and the highest fills the width.

    A score that is not finite has no bar.
    """
    scores = np.asarray(scores, np.float64)
    finite = np.isfinite(scores)
    low, high = scores.min(initial=0.0, where=finite), scores.max(initial=1e-9, where=finite)
    return np.where(finite, (scores - low) / (high - low), 0.0).tolist()


def draw_bar(draw, box, name: str, score: float, length: float, is_true: bool, font) -> None:
    """One name on its bar, which has `length` (0 … 1) of the box, with its score and, if true, a tick."""
    left, top, right, bottom = box
    draw.rectangle((left, top, right - 1, bottom - 1), fill=TRACK)
    if (end := round(length * (right - left))) > 0:
        draw.rectangle((left, top, left + end - 1, bottom - 1), fill=TRUE_BAR if is_true else OTHER_BAR)
    ink = TRUE_INK if is_true else INK
    middle = (top + bottom) // 2
    number = f"{score:.2f}"
    draw.text((right - 6, middle), number, fill=ink, font=font, anchor="rm")
    if is_true:  # drawn, because not every font has a tick
        tick = (left + 6, middle, left + 9, middle + 4, left + 16, middle - 5)
        draw.line(tick, fill=ink, width=2, joint="curve")
    room = right - left - 22 - 6 - font.getlength(number) - 8
    draw.text((left + 22, middle), wrapped(name, font, room, lines=1)[0], fill=ink, font=font, anchor="lm")


def unbroken(names) -> str:
    """The names, with commas, so that a line ends between names rather than within one."""
    return ", ".join(name.replace(" ", NO_BREAK) for name in names)


def fitted(image: np.ndarray, side: int) -> Image.Image:
    """The image within side × side: pixels enlarged by a whole number, or antialiased reduction."""
    shown = Image.fromarray(np.asarray(image, np.uint8))
    factor = side / max(shown.size)
    if factor >= 2:
        return shown.resize((shown.width * int(factor), shown.height * int(factor)), Image.Resampling.NEAREST)
    size = max(1, round(shown.width * factor)), max(1, round(shown.height * factor))
    return shown.resize(size, Image.Resampling.LANCZOS)


def wrapped(text: str, font, width: float, lines: int) -> list[str]:
    """The text in at most so many lines of that width in pixels; what doesn't fit ends in an ellipsis."""

    def fitting(text: str, end: str = "") -> int:
        length = len(text)
        while length > 1 and font.getlength(text[:length].replace(NO_BREAK, " ").rstrip() + end) > width:
            length -= 1
        return length

    done = []
    while len(done) < lines - 1 and fitting(text) < len(text):
        length = fitting(text)
        blanks = text.rfind(" ", 0, length + 1), text.rfind(NO_BREAK, 0, length + 1)
        length = next((blank for blank in blanks if blank > 0), length)
        done.append(text[:length].rstrip())
        text = text[length:].lstrip()
    if fitting(text) < len(text):
        text = text[: fitting(text, "…")].rstrip() + "…"
    return [line.replace(NO_BREAK, " ") for line in [*done, text]]
