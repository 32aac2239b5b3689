"""Image files of one grey value, and labelled images that are easy to tell apart."""

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
