"""Caches class embeddings on disk, so that a model embeds a long list of class names once."""

import contextlib
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from zslflax.errors import UserError
from zslflax.files import local_path, open_tensors
from zslflax.saving import write_atomically

log = logging.getLogger("zslflax")
MIN_PROMPTS = 1_000  # fewer prompts are embedded about as fast as the weights are hashed
MAX_BYTES = 1 << 30  # of all files in the folder; the embeddings of 22,000 classes in 768 dimensions take 68 MB


class ClassCache:
    """The class embeddings of one model, in a folder that several models and processes may share.

    The name of a file is the SHA-256 of everything that its embeddings depend on, so that no file is ever out of date.
    Files are written atomically. A damaged file is ignored, and so is a folder that cannot be written to; both are
    logged. When the folder exceeds `MAX_BYTES`, the files that were used longest ago are removed.

    Args:
        folder: created when it is first needed; "" disables the cache.
        identify: returns what the embedding of a text depends on besides the text, as a JSON value; called at most
            once.
    """

    def __init__(self, folder: str | Path = "", identify: Callable[[], Any] = dict):
        self.folder: Path | None = None
        self.identify = identify
        if folder:
            try:
                self.folder = local_path(folder, "the folder of class embeddings")
            except UserError as error:  # no home folder: the cache saves time, and nothing depends on it
                log.warning("class embeddings are not kept: %s", error)

    @functools.cached_property
    def model_identity(self) -> Any:
        """What the embedding of a text depends on besides the text."""
        return self.identify()

    def read(self, class_names: Sequence[str], templates: Sequence[str]) -> np.ndarray | None:
        """Reads the embeddings of these class names in these prompts, fp32 [c, d]; None if they are not cached."""
        path = self.path(class_names, templates)
        if path is None or not path.exists():
            return None
        try:
            with open_tensors(path) as file:
                metadata, class_emb = file.metadata(), file.get_tensor("class_emb")
            if metadata != file_metadata(path, class_emb):
                raise UserError("its contents have changed since it was written")
            os.utime(path)
        except (OSError, ValueError) as error:
            log.warning("%s cannot be used, and the class embeddings are computed again: %s", path, error)
            return None
        log.info("read the embeddings of %d classes from %s", len(class_names), path)
        return class_emb

    def write(self, class_names: Sequence[str], templates: Sequence[str], class_emb: np.ndarray) -> None:
        """Writes embeddings fp32 [c, d] for later calls of `read`."""
        path = self.path(class_names, templates)
        if path is None:
            return
        metadata = file_metadata(path, class_emb)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda partial: save_file({"class_emb": class_emb}, partial, metadata))
            remove_oldest(path.parent)
        except (OSError, SafetensorError) as error:
            log.warning("the class embeddings cannot be kept in %s: %s", path.parent, error)

    def path(self, class_names: Sequence[str], templates: Sequence[str]) -> Path | None:
        """Returns the file of these class names and prompts; None if there is no folder or there are few prompts."""
        if self.folder is None or len(class_names) * len(templates) < MIN_PROMPTS:
            return None
        key = json.dumps([self.model_identity, list(templates), list(class_names)])
        return self.folder / f"classes-{hashlib.sha256(key.encode()).hexdigest()}"


def file_metadata(path: Path, class_emb: np.ndarray) -> dict[str, str]:
    """Returns the metadata of a cache file: its own name, and a digest of the array's type, shape and contents."""
    digest = hashlib.sha256(f"{class_emb.dtype} {class_emb.shape} ".encode() + class_emb.tobytes())
    return {"name": path.name, "sha256": digest.hexdigest()}


def remove_oldest(folder: Path) -> None:
    """Removes the files that were used longest ago until `MAX_BYTES` are left; the newest one always stays."""
    found = []
    for pattern in ("classes-*", ".classes-*"):  # the latter are unfinished files of a process that was killed
        for path in folder.glob(pattern):
            with contextlib.suppress(FileNotFoundError):  # another process has just renamed or removed it
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_size, path))
    total = 0
    for i, (_, size, path) in enumerate(sorted(found, reverse=True)):
        total += size
        if i > 0 and total > MAX_BYTES:
            path.unlink(missing_ok=True)
