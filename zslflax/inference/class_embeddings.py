"""Class embeddings on disk, so that a model embeds a long list of names once."""

import contextlib
import functools
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm

from zslflax.errors import UserError

log = logging.getLogger("zslflax")
ENOUGH = 1_000  # prompts; fewer are embedded about as soon as the weights are hashed
LIMIT = 1 << 30  # bytes in the folder, beyond which the files used longest ago go; 22,000 × 768 are 68 MB


class ClassCache:
    """The class embeddings of one model, in a folder that any models and processes share.

    A file is called by the SHA-256 of all that its embeddings depend on, so that none is ever out of date, and
    appears whole or not at all. One that is damaged is not used; a folder that cannot be written to is not
    either. The log says so, and nothing else comes of it.

    Args:
        folder: made when it is first needed; "" keeps nothing.
        identify: returns what the embedding of a text depends on, in JSON's types; called once, if at all.
    """

    def __init__(self, folder: str | Path = "", identify: Callable[[], dict] = dict):
        self.folder, self.identify = folder and Path(folder).expanduser(), identify

    def read(self, names: Sequence[str], templates: Sequence[str]) -> np.ndarray | None:
        """The embeddings of these names in these prompts, fp32 [c, d]; None where they are not there."""
        path = self.path(names, templates)
        if path is None or not path.exists():
            return None
        try:
            with safe_open(path, "numpy") as file:
                about, class_emb = file.metadata(), file.get_tensor("class_emb")
            if about != describe(path, class_emb):
                raise UserError("its contents are not those that it was written with")
            os.utime(path)
        except (OSError, SafetensorError, ValueError) as error:
            log.warning("%s cannot be used, and the class embeddings are computed again: %s", path, error)
            return None
        log.info("the embeddings of %d classes are from %s", len(names), path)
        return class_emb

    def write(self, names: Sequence[str], templates: Sequence[str], class_emb: np.ndarray) -> None:
        """Keeps embeddings for `read`."""
        path = self.path(names, templates)
        if path is None:
            return
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"class_emb": class_emb}, partial, describe(path, class_emb))
            partial.replace(path)
            remove_oldest(path.parent)
        except (OSError, SafetensorError) as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            log.warning("the class embeddings cannot be kept in %s: %s", path.parent, error)

    def path(self, names: Sequence[str], templates: Sequence[str]) -> Path | None:
        """The file of these names and prompts; None for too few, or where there is no folder."""
        if not self.folder or len(names) * len(templates) < ENOUGH:
            return None
        about = json.dumps([self.model, list(templates), list(names)])
        return self.folder / f"classes-{hashlib.sha256(about.encode()).hexdigest()}"

    @functools.cached_property
    def model(self) -> dict:
        return self.identify()


def describe(path: Path, class_emb: np.ndarray) -> dict[str, str]:
    """What is in the file besides the array: which file it is, and a digest of shape and numbers."""
    digest = hashlib.sha256(f"{class_emb.dtype} {class_emb.shape} ".encode() + class_emb.tobytes())
    return {"name": path.name, "sha256": digest.hexdigest()}


def remove_oldest(folder: Path) -> None:
    """Removes the files used longest ago, down to `LIMIT`; the newest stays."""
    found = []
    for path in folder.glob("classes-*"):
        with contextlib.suppress(FileNotFoundError):  # another process has renamed or removed it just now
            status = path.stat()
            found.append((status.st_mtime_ns, status.st_size, path))
    total = 0
    for i, (_, size, path) in enumerate(sorted(found, reverse=True)):
        total += size
        if i > 0 and total > LIMIT:
            path.unlink(missing_ok=True)


def class_embeddings(encode_text, names, templates, batch_size: int = 1 << 13) -> np.ndarray:
    """One unit embedding per name: its prompts' unit embeddings, averaged and normalised again.

    Args:
        encode_text: list[str] → [b, d], at most `batch_size` at once: many, so that it can put prompts of
            equal length together (`zslflax.features`).
        names: c class names; repeated ones are separate classes.
        templates: prompts with `{}` where the name goes, e.g. "a photo of a {}."; all have equal weight.

    Returns fp32 [c, d]. Beside it only one batch of prompts is ever in memory.
    """
    if not len(names) or not len(templates):
        raise UserError(f"expected some of both, found {len(names)} names and {len(templates)} templates")
    if empty := [place for place, name in enumerate(names, start=1) if not name.strip()]:
        raise UserError(f"every class needs a name; empty: name {empty[0]} of {len(names)}")
    if unfilled := [template for template in templates if "{}" not in template]:
        raise UserError(f"every template needs {{}} where the class name goes; these have none: {unfilled}")
    total, sums = len(names) * len(templates), 0.0
    starts = tqdm(range(0, total, batch_size), "embedding names", delay=2, disable=None, leave=False)
    for start in starts:
        number = np.arange(start, min(start + batch_size, total))  # prompt i is of name i // templates
        prompts = [templates[i % len(templates)].replace("{}", names[i // len(templates)]) for i in number]
        embeddings = unit(np.asarray(encode_text(prompts), np.float32))
        if start == 0:
            sums = np.zeros((len(names), embeddings.shape[1]), np.float32)
        np.add.at(sums, number // len(templates), embeddings)
    return unit(sums)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of length 1: [b, d] → [b, d]; a row of zeros stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
