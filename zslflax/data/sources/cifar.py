"""CIFAR-10's and CIFAR-100's test images, in their archives for Python or for C."""

import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zslflax.data.sources.base import Annotations, Record, content_digest, hash_values
from zslflax.errors import UserError
from zslflax.files import read_bytes, read_text

IMAGE_BYTES = 3 * 32 * 32
MAX_FILE = 1 << 28  # bytes
# What NumPy's arrays in these pickles need; everything else is refused, because a pickle can run any program.
ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class CifarImages:
    """The test images of CIFAR-10 or CIFAR-100, a `Source` of pixels.

    Args:
        root: has test_batch and batches.meta, or test and meta, or the same with .bin and .txt.
        fine: whether it is CIFAR-100, with its fine labels.

    Raises:
        UserError: a file is missing, damaged, or a pickle of something else.
    """

    negatives: list[tuple[int, ...]] | None = None
    excluded: dict[str, int] = {}

    def __init__(self, root: Path, *, fine: bool):
        names = ("fine_label_names.txt", "meta") if fine else ("batches.meta.txt", "batches.meta")
        stem = "test" if fine else "test_batch"
        if (root / names[0]).is_file():
            self.file = root / f"{stem}.bin"
            rows = np.frombuffer(read_bytes(self.file, MAX_FILE), np.uint8)
            rows = rows[: len(rows) // (IMAGE_BYTES + 1 + fine) * (IMAGE_BYTES + 1 + fine)].reshape(
                -1, IMAGE_BYTES + 1 + fine
            )
            self.labels, pixels = rows[:, int(fine)].tolist(), rows[:, 1 + fine :]
            classes = read_text(root / names[0]).split()
        else:
            self.file = root / stem
            batch, meta = read_pickle(self.file), read_pickle(root / names[1])
            pixels, self.labels = batch["data"], list(batch["fine_labels" if fine else "labels"])
            classes = meta["fine_label_names" if fine else "label_names"]
        self.classes: list[str] | None = [name.replace("_", " ") for name in classes]
        if len(pixels) != len(self.labels) or pixels.shape[1:] != (IMAGE_BYTES,) or pixels.dtype != np.uint8:
            raise UserError(f"{self.file} is damaged: {len(self.labels)} labels, images {pixels.dtype} {pixels.shape}")
        self.pixels = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        return Record(image=np.ascontiguousarray(self.pixels[index]), **self.read_annotations(index))

    def read_annotations(self, index: int) -> Annotations:
        """The label of an image."""
        return Annotations(text=(), label=(int(self.labels[index]),), name=f"{self.file}:{index}")

    def fingerprint(self) -> str:
        """Of the contents of the file."""
        return hash_values("cifar", content_digest(self.file))

    def names(self) -> Iterator[str]:
        """Yields FILE:NUMBER of all images."""
        return (f"{self.file}:{index}" for index in range(len(self)))


class ArrayUnpickler(pickle.Unpickler):
    """Reads Python's containers and NumPy's arrays, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it has {module}.{name}")
        return super().find_class(module, name)


def read_pickle(path: Path) -> dict[str, Any]:
    """The dict in a pickle of Python 2.

    Raises:
        UserError: the file is missing, damaged, or has anything but containers, numbers, texts and arrays.
    """
    data = read_bytes(path, MAX_FILE)
    try:
        content = ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()
    except Exception as error:  # a damaged pickle raises many types
        raise UserError(f"{path} is no pickle of CIFAR: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, expected a dict")
    return content
