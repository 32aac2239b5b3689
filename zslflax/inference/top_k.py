"""The zero-shot classifier: class names become embeddings, and each image finds its nearest ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

GROUP = 16  # neighbours of which first only the maximum counts; for 22,000 classes faster than 32 or 64


def top_k(
    image_emb, class_emb, k: int, class_block: int = 32768, image_block: int = 64, images: int = 16384
) -> tuple[np.ndarray, np.ndarray]:
    """Each image's k classes of highest inner product, exact, best first; of equals the lower id first.

    Never more than `image_block` × `class_block` scores exist, nor are more than `images` images and
    `class_block` classes on the device; a running top-k goes from one block of classes to the next. At most
    two shapes are compiled, of all blocks of classes and of a shorter last one.

    Args:
        image_emb: [n, d]; class_emb: [c, d]; both fp32.
        k: at most c.

    Returns scores fp32 [n, k] and ids int32 [n, k].
    """
    n, c = len(image_emb), len(class_emb)
    if not 1 <= k <= c:
        raise ValueError(f"expected k between 1 and the number of classes, {c}, found k = {k}")
    if n == 0:
        return np.zeros((0, k), np.float32), np.zeros((0, k), np.int32)
    class_block, images = min(class_block, c), -(-n // -(-n // images))  # parts as equal as can be
    scores, ids = np.empty((n, k), np.float32), np.empty((n, k), np.int32)
    for first in range(0, n, images):
        rows = slice(min(first, n - images), min(first + images, n))  # the last overlap: one shape
        some = jnp.asarray(image_emb[rows], jnp.float32)
        best = jnp.full((images, k), -jnp.inf, jnp.float32), jnp.zeros((images, k), jnp.int32)
        for start in range(0, c, class_block):
            block = jnp.asarray(class_emb[start : start + class_block], jnp.float32)
            best = merge_block(some, block, np.int32(start), best, min(image_block, images))
        scores[rows], ids[rows] = best
    return scores, ids


@functools.partial(jax.jit, static_argnames="image_block", donate_argnames="best")
def merge_block(image_emb, class_emb, start, best, image_block: int):
    """`best`, the running top-k (scores and ids, [n, k]), after the block of classes start, start + 1, …"""
    n, k = best[0].shape

    def images(first):
        rows = jax.lax.dynamic_slice_in_dim(image_emb, first, image_block)
        # Classes first: both the product and the maxima over groups of classes are faster on a CPU so.
        scores = jnp.einsum("cd,bd->cb", class_emb, rows, precision=jax.lax.Precision.HIGHEST)
        new_scores, new_ids = top_k_of_columns(scores, min(k, len(scores)))
        old_scores, old_ids = (jax.lax.dynamic_slice_in_dim(b, first, image_block) for b in best)
        # Old ids are lower than new ones, and lax.top_k puts the earlier of two equals first.
        scores, at = jax.lax.top_k(jnp.concatenate([old_scores, new_scores], axis=1), k)
        return scores, jnp.take_along_axis(jnp.concatenate([old_ids, new_ids + start], axis=1), at, axis=1)

    # The last block of images overlaps the one before, whose rows it computes again, alike.
    firsts = np.minimum(np.arange(0, n, image_block), n - image_block).astype(np.int32)
    blocks = jax.lax.map(images, jnp.asarray(firsts))
    rows = (firsts[:, None] + np.arange(image_block)).ravel()
    at = np.zeros(n, np.int32)
    at[rows] = np.arange(len(rows))
    return tuple(block.reshape(-1, k)[at] for block in blocks)


def top_k_of_columns(scores, k: int):
    """`lax.top_k` of every column, [c, b] → scores and ids [b, k]: the same order of equals, only faster.

    The top k lie in the k groups of neighbours with the highest maxima (of equals, the earlier groups), or
    in the rest that fills no group: were one elsewhere, each of these groups would hold a score before it.
    """
    c, b = scores.shape
    if c <= 2 * k * GROUP:
        return jax.lax.top_k(scores.T, k)
    grouped = c - c % GROUP
    maxima = jnp.max(scores[:grouped].reshape(-1, GROUP, b), axis=1)
    groups = jax.lax.top_k(maxima.T, k)[1]
    groups = jnp.sort(groups, axis=1)  # so that the candidates' ids ascend, which keeps the order of equals
    ids = (groups[:, :, None] * GROUP + jnp.arange(GROUP, dtype=jnp.int32)).reshape(b, k * GROUP)
    rest = jnp.broadcast_to(jnp.arange(grouped, c, dtype=jnp.int32), (b, c - grouped))
    ids = jnp.concatenate([ids, rest], axis=1)
    candidates = jnp.take_along_axis(scores, ids.T, axis=0).T
    best, at = jax.lax.top_k(candidates, k)
    return best, jnp.take_along_axis(ids, at, axis=1)
