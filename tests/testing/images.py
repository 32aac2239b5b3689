"""Writes image files of one grey value."""

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
