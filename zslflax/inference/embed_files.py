"""Embeds image files, and leaves out those that cannot be read."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import numpy as np

from zslflax.errors import UserError
from zslflax.inference.predictor import Predictor

PathOrAddress = TypeVar("PathOrAddress", Path, str | Path)
CHUNK = 1_024  # images that are in memory at once, in the size of the image tower's input


def embed_files(
    predictor: Predictor, paths: Iterable[PathOrAddress], report: Callable[[UserError], None]
) -> tuple[list[PathOrAddress], np.ndarray]:
    """Embeds the image files that can be read.

    Args:
        predictor: the model.
        paths: of image files.
        report: called with the error of each file that cannot be read.

    Returns:
        The paths of the files that can be read, and their embeddings fp32 [n, d].
    """
    remaining, readable = iter(paths), list[PathOrAddress]()
    image_emb = [predictor.encode_image([])]
    while chunk := list(itertools.islice(remaining, CHUNK)):
        prepared = []
        for path in chunk:
            try:
                prepared.append(predictor.preprocess(path))
            except UserError as error:
                report(error)
            else:
                readable.append(path)
        image_emb.append(predictor.encode_image(np.stack(prepared) if prepared else []))
    return readable, np.concatenate(image_emb)
