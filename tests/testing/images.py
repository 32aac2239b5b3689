"""Images for tests: files of one grey value, colours that are easy to tell apart, smooth pixels and their averages."""

import io
from pathlib import Path

import numpy as np
from PIL import Image


def jpeg(value: int) -> bytes:
    """A JPEG file of 9 × 8 pixels of a grey value."""
    file = io.BytesIO()
    Image.fromarray(np.full((8, 9, 3), value, np.uint8)).save(file, "JPEG")
    return file.getvalue()


def write(path: Path, data: bytes | str) -> Path:
    """Writes a file into a folder that may not exist yet; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


COLOURS = {"blue": (20, 20, 230), "green": (20, 200, 20), "red": (230, 20, 20), "yellow": (220, 220, 20)}
PER_COLOUR = 6  # images


def write_colours(folder: Path) -> Path:
    """Writes images of noisy rectangles into a folder with a subfolder for each colour; returns the folder."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        for i in range(PER_COLOUR):
            image = np.full((20, 24, 3), 120) + rng.normal(0, 30, (20, 24, 3))
            image[5:15, 6:18] = np.array(colour) + rng.normal(0, 60, (10, 12, 3))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def smooth_image(height=37, width=50, seed=0) -> np.ndarray:
    """Smooth colours, which JPEG hardly changes: uint8 [height, width, 3]."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (4, 5, 3), np.uint8))
    return np.array(small.resize((width, height), Image.Resampling.BICUBIC))


def area_average(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Each pixel is the average of the area that it covers, fractions of pixels included."""

    def overlaps(inputs, outputs):
        edges = np.arange(outputs + 1)[:, None] * inputs / outputs
        pixel = np.arange(inputs)
        return (np.minimum(edges[1:], pixel + 1) - np.maximum(edges[:-1], pixel)).clip(0) * outputs / inputs

    rows, columns = overlaps(image.shape[0], height), overlaps(image.shape[1], width)
    return np.einsum("yh,hwc,xw->yxc", rows, image, columns, optimize=True)
