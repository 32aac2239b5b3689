"""Finds the classes whose embeddings have the highest inner products with each image's embedding."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

GROUP = 16  # neighbouring classes of which only the maximum counts at first; for 22,000 classes faster than 32 or 64


def top_k(
    image_emb: np.ndarray,
    class_emb: np.ndarray,
    k: int,
    class_chunk: int = 32768,
    image_chunk: int | None = None,
    max_images: int = 16384,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the k classes of highest inner product for each image, best first; exact, equal scores by ascending id.

    >>> image_emb, class_emb = np.eye(2, dtype=np.float32), np.array([[0, 1], [1, 0], [0.5, 0.5]], np.float32)
    >>> scores, ids = top_k(image_emb, class_emb, k=2)
    >>> ids.tolist(), scores.tolist()
    ([[1, 2], [0, 2]], [[1.0, 0.5], [1.0, 0.5]])

    At most `image_chunk` × `class_chunk` scores exist at a time, because a running top-k goes over the chunks of
    classes. At most two shapes are compiled: that of a chunk of classes and that of a shorter last chunk.

    Args:
        image_emb: fp32 [n, d].
        class_emb: fp32 [c, d].
        k: at most c.
        class_chunk: classes on the device at a time.
        image_chunk: images whose scores are computed at a time; None for `images_at_a_time`.
        max_images: images on the device at a time.

    Returns:
        Scores fp32 [n, k] and ids int32 [n, k].

    Raises:
        ValueError: `k` is not between 1 and c.
    """
    n, c = len(image_emb), len(class_emb)
    if not 1 <= k <= c:
        raise ValueError(f"expected k between 1 and the number of classes, {c}, found k = {k}")
    if n == 0:
        return np.zeros((0, k), np.float32), np.zeros((0, k), np.int32)
    class_chunk = min(class_chunk, c)
    num_images = -(-n // -(-n // max_images))  # as few parts as possible, of nearly equal size
    image_chunk = min(image_chunk, num_images) if image_chunk else images_at_a_time(num_images)
    scores, ids = np.empty((n, k), np.float32), np.empty((n, k), np.int32)
    for first in range(0, n, num_images):
        rows = slice(min(first, n - num_images), min(first + num_images, n))  # the last part overlaps: one shape
        images = jnp.asarray(image_emb[rows], jnp.float32)
        best = jnp.full((num_images, k), -jnp.inf, jnp.float32), jnp.zeros((num_images, k), jnp.int32)
        for start in range(0, c, class_chunk):
            classes = jnp.asarray(class_emb[start : start + class_chunk], jnp.float32)
            best = merge_chunk(images, classes, np.int32(start), best, image_chunk)
        scores[rows], ids[rows] = best
    return scores, ids


def images_at_a_time(n: int) -> int:
    """Of n images, those whose scores are computed at a time: few enough for a CPU's caches, or enough for a GPU.

    For 50,000 images and 22,000 classes, a GPU would start 16,000 kernels for 64 images at a time, and 1,000 for 1,024.
    """
    return min(n, 64 if jax.default_backend() == "cpu" else 1024)


def top_k_or_all(image_emb: np.ndarray, class_emb: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns `top_k`, or all classes where there are fewer than k."""
    return top_k(image_emb, class_emb, min(k, len(class_emb)))


@functools.partial(jax.jit, static_argnames="image_chunk", donate_argnames="best")
def merge_chunk(
    image_emb: jax.Array, class_emb: jax.Array, start: np.int32, best: tuple[jax.Array, jax.Array], image_chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Merges a chunk of classes into the running top-k.

    Args:
        image_emb: fp32 [n, d].
        class_emb: fp32 [c, d], of the classes start, start + 1, ….
        start: id of the first class of the chunk.
        best: scores fp32 [n, k] and ids int32 [n, k] of the chunks before.
        image_chunk: images whose scores are computed at a time, at most n.
    """

    def score_images(first: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(image_emb, first, image_chunk)
        # With classes first, both the product and the maxima over groups of classes are faster on a CPU.
        return jnp.einsum("cd,bd->cb", class_emb, rows, precision=jax.lax.Precision.HIGHEST)

    return merge_scores(score_images, start, best, image_chunk)


def merge_scores(
    score_images: Callable[[jax.Array], jax.Array],
    start: jax.Array | np.int32,
    best: tuple[jax.Array, jax.Array],
    image_chunk: int,
) -> tuple[jax.Array, jax.Array]:
    """Merges the scores of a chunk of classes into the running top-k, one chunk of images at a time.

    Args:
        score_images: index of the first image → scores fp32 [c, image_chunk] of the chunk of classes with that image
            and the following ones.
        start, best, image_chunk: as in `merge_chunk`.
    """
    n, k = best[0].shape

    def merge_images(first: jax.Array) -> tuple[jax.Array, jax.Array]:
        scores = score_images(first)
        new_scores, new_ids = top_k_of_columns(scores, min(k, len(scores)))
        old_scores, old_ids = (jax.lax.dynamic_slice_in_dim(x, first, image_chunk) for x in best)
        # Old ids are lower than new ones, and lax.top_k puts the earlier of two equal scores first.
        scores, at = jax.lax.top_k(jnp.concatenate([old_scores, new_scores], axis=1), k)
        return scores, jnp.take_along_axis(jnp.concatenate([old_ids, new_ids + start], axis=1), at, axis=1)

    # The last chunk of images overlaps the one before, and computes the same values for the shared rows.
    firsts = np.minimum(np.arange(0, n, image_chunk), n - image_chunk).astype(np.int32)
    scores, ids = jax.lax.map(merge_images, jnp.asarray(firsts))
    rows = (firsts[:, None] + np.arange(image_chunk)).ravel()
    at = np.zeros(n, np.int32)
    at[rows] = np.arange(len(rows))
    return scores.reshape(-1, k)[at], ids.reshape(-1, k)[at]


def top_k_of_columns(scores: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Applies `lax.top_k` to every column, [c, b] → scores and ids [b, k], with the same order of equal scores, faster.

    The top k are in the k groups of neighbours with the highest maxima (of equal ones, the earlier groups), or in the
    rest that fills no group: if one were elsewhere, each of these k groups would have a score that precedes it.
    """
    c, b = scores.shape
    if c <= 2 * k * GROUP:
        return jax.lax.top_k(scores.T, k)
    grouped = c - c % GROUP
    maxima = jnp.max(scores[:grouped].reshape(-1, GROUP, b), axis=1)
    groups = jax.lax.top_k(maxima.T, k)[1]
    groups = jnp.sort(groups, axis=1)  # ascending ids of the candidates keep the order of equal scores
    ids = (groups[:, :, None] * GROUP + jnp.arange(GROUP, dtype=jnp.int32)).reshape(b, k * GROUP)
    rest = jnp.broadcast_to(jnp.arange(grouped, c, dtype=jnp.int32), (b, c - grouped))
    ids = jnp.concatenate([ids, rest], axis=1)
    candidates = jnp.take_along_axis(scores, ids.T, axis=0).T
    best, at = jax.lax.top_k(candidates, k)
    return best, jnp.take_along_axis(ids, at, axis=1)
