"""Class embeddings: one unit vector per class name, averaged over prompt templates."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from tqdm import tqdm

from zslflax import distributed
from zslflax.errors import UserError
from zslflax.inference.class_cache import ClassCache

EncodeText = Callable[[list[str]], np.ndarray]  # b texts → [b, d]


def cached_class_embeddings(
    cache: ClassCache, encode_text: EncodeText, class_names: Sequence[str], templates: Sequence[str]
) -> np.ndarray:
    """Returns class embeddings, fp32 [c, d], from the cache, or else computes them and writes them to the cache.

    With several processes all of them must call this function with the same class names and templates. The main process
    reads and writes the cache; each process encodes a part of the prompts.

    Args:
        cache: of the model that `encode_text` belongs to; only the main process uses it.
        encode_text, class_names, templates: as in `embed_class_names`.
    """
    if not distributed.is_main():
        cache = ClassCache()
    class_emb = distributed.broadcast_from_main(cache.read(class_names, templates))
    if class_emb is None:
        class_emb = embed_class_names(share_among_processes(encode_text), class_names, templates)
        cache.write(class_names, templates, class_emb)
    return class_emb


def embed_class_names(
    encode_text: EncodeText, class_names: Sequence[str], templates: Sequence[str], batch_size: int = 1 << 13
) -> np.ndarray:
    """Computes one unit embedding per class name: the normalised mean of the unit embeddings of its prompts.

    >>> axes = {"a cat": [2.0, 0.0], "one cat": [0.0, 3.0], "a dog": [0.0, 1.0], "one dog": [0.0, 1.0]}
    >>> encode_text = lambda texts: np.array([axes[text] for text in texts])
    >>> embed_class_names(encode_text, ["cat", "dog"], ["a {}", "one {}"]).round(3).tolist()
    [[0.7070000171661377, 0.7070000171661377], [0.0, 1.0]]

    Args:
        encode_text: maps at most `batch_size` texts to [b, d], of any length. A large batch lets it group prompts of
            equal length (`zslflax.data.text_features`).
        class_names: c names; repeated ones are separate classes.
        templates: prompts with `{}` in place of the class name, such as "a photo of a {}."; all have equal weight.
        batch_size: prompts that are in memory at a time.

    Returns:
        fp32 [c, d].

    Raises:
        UserError: there are no class names or no templates, a class name is blank, or a template has no `{}`.
    """
    check_prompts(class_names, templates)
    total = len(class_names) * len(templates)
    sums: np.ndarray | None = None
    for start in tqdm(range(0, total, batch_size), "embedding class names", delay=2, disable=None, leave=False):
        number = np.arange(start, min(start + batch_size, total))  # prompt i is of class i // len(templates)
        prompts = [templates[i % len(templates)].replace("{}", class_names[i // len(templates)]) for i in number]
        embeddings = l2_normalize(np.asarray(encode_text(prompts), np.float32))
        if sums is None:
            sums = np.zeros((len(class_names), embeddings.shape[1]), np.float32)
        np.add.at(sums, number // len(templates), embeddings)
    assert sums is not None  # there is at least one prompt
    return l2_normalize(sums)


def check_prompts(class_names: Sequence[str], templates: Sequence[str]) -> None:
    """Refuses class names and templates that do not make a prompt for every class."""
    if not len(class_names) or not len(templates):
        raise UserError(f"expected some of both, found {len(class_names)} class names and {len(templates)} templates")
    if empty := [number for number, name in enumerate(class_names, start=1) if not name.strip()]:
        raise UserError(f"every class needs a name; empty: class name {empty[0]} of {len(class_names)}")
    if unfilled := [template for template in templates if "{}" not in template]:
        raise UserError(f"every template needs {{}} where the class name goes; these have none: {unfilled}")


def share_among_processes(encode_text: EncodeText) -> EncodeText:
    """Returns a function that encodes the same texts: each process encodes a part, and all processes get all of them.

    All processes must call it with the same texts.
    """

    def encode(texts: Sequence[str]) -> np.ndarray:
        per_process = -(-len(texts) // jax.process_count())
        own = list(texts[jax.process_index() * per_process :][:per_process])
        padded = own + [""] * (per_process - len(own))
        return distributed.gather_hosts(encode_text(padded))[: len(texts)]

    return encode


def l2_normalize(x: np.ndarray) -> np.ndarray:
    """Scales the rows of [b, d] to length 1; a row of zeros stays zero.

    >>> l2_normalize(np.array([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6, 0.8], [0.0, 0.0]]
    """
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
