"""Image-text retrieval, where an image may have several captions."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from zslflax.evaluation.bootstrap import bootstrap
from zslflax.evaluation.results import Metric, Results, with_intervals
from zslflax.inference.top_k import top_k_or_all


def retrieval_recall(
    image_emb: np.ndarray,
    text_emb: np.ndarray,
    text_image: ArrayLike,
    ks: Sequence[int] = (1, 5, 10),
    *,
    resamples: int = 0,
    seed: int = 0,
) -> Results:
    """Computes recall@k in both directions: the share of queries with a true partner among their k nearest candidates.

    The partners of an image are all its captions, and one among the first k is enough (Karpathy and Fei-Fei, arXiv
    1412.2306). A caption has one image. Images without a caption are candidates but not queries. Of equal scores the
    lower index is nearer.

    >>> images, texts = np.array([[1, 0], [0, 1]]), np.array([[1, 0], [1, 0], [0, 1]])
    >>> results = retrieval_recall(images, texts, [0, 1, 1], ks=(1,))  # the second caption looks like the first
    >>> {metric.name: round(value, 3) for metric, value in results.items()}
    {'image_to_text@1': 1.0, 'text_to_image@1': 0.667}

    Args:
        image_emb: fp32 [n, d].
        text_emb: fp32 [m, d].
        text_image: int [m], the row of each caption's image.
        ks: a k above the number of candidates means all of them.
        resamples: of the bootstrap that adds 95% intervals; 0 for none, and 1,000 are usual. Images are resampled, each
            with all its captions, because captions of one image are not independent queries.
        seed: of the resamples.

    Returns:
        image_to_text@k and text_to_image@k for every k.

    Raises:
        ValueError: there is not one image per caption, or no caption.
    """
    n, m = len(image_emb), len(text_emb)
    text_image = np.asarray(text_image)
    if text_image.shape != (m,) or m == 0:
        raise ValueError(f"expected the image of each of {m} captions (≥ 1), found shape {text_image.shape}")
    if text_image.min() < 0 or text_image.max() >= n:
        raise ValueError(f"expected captions of {n} images, found rows {text_image.min()} … {text_image.max()}")
    captioned = np.unique(text_image)
    _, texts = top_k_or_all(np.asarray(image_emb)[captioned], text_emb, max(ks))
    _, images = top_k_or_all(text_emb, image_emb, max(ks))
    is_own_text = text_image[texts] == captioned[:, None]
    is_own_image = images == text_image[:, None]
    num_captions = np.bincount(text_image, minlength=n)
    metrics: dict[Metric, tuple[np.ndarray, np.ndarray]] = {}
    for k in ks:
        image_hits = np.zeros(n)
        image_hits[captioned] = is_own_text[:, :k].any(axis=1)
        text_hits = np.bincount(text_image, is_own_image[:, :k].any(axis=1), minlength=n)
        metrics[Metric("image_to_text", k)] = image_hits, num_captions > 0
        metrics[Metric("text_to_image", k)] = text_hits, num_captions
    return with_intervals(*bootstrap(metrics, resamples, seed))
