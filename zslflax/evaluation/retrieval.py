"""Image-text retrieval, where an image may have several captions."""

import numpy as np

from zslflax.evaluation.bootstrap import bootstrap, bounds
from zslflax.inference.top_k import top_k


def retrieval_recall(
    image_emb, text_emb, text_image, ks=(1, 5, 10), *, resamples: int = 0, seed: int = 0
) -> dict[str, float]:
    """Recall@k of both directions: the share of queries with a true partner among their k nearest.

    An image's partners are all its captions, and one among the first k is enough (Karpathy and Fei-Fei, arXiv
    1412.2306); a caption has one image. Images without a caption are candidates, but no queries. Scores
    exist for one block at a time; of equal ones the lower index is nearer.

    Args:
        image_emb: fp32 [n, d]; text_emb: fp32 [m, d].
        text_image: int [m], the row of each caption's image.
        ks: beyond the number of candidates, k means all of them.
        resamples: above 0 adds 95% intervals, "…/low" and "…/high", of the percentile bootstrap over images,
            each with all its captions, which are no independent queries. 1,000 are usual.
        seed: of the resamples.

    Returns {"image_to_text@k": …, "text_to_image@k": …} for every k.
    """
    n, m = len(image_emb), len(text_emb)
    text_image = np.asarray(text_image)
    if text_image.shape != (m,) or m == 0:
        raise ValueError(f"expected the image of each of {m} captions (≥ 1), found shape {text_image.shape}")
    if text_image.min() < 0 or text_image.max() >= n:
        raise ValueError(f"expected captions of {n} images, found rows {text_image.min()} … {text_image.max()}")
    captioned = np.unique(text_image)
    _, texts = top_k(np.asarray(image_emb)[captioned], text_emb, min(max(ks), m))
    _, images = top_k(text_emb, image_emb, min(max(ks), n))
    found_text = text_image[texts] == captioned[:, None]
    found_image = images == text_image[:, None]
    captions = np.bincount(text_image, minlength=n)
    figures = {}
    for k in ks:
        hits = np.zeros(n)
        hits[captioned] = found_text[:, :k].any(axis=1)
        figures[f"image_to_text@{k}"] = hits, captions > 0
        figures[f"text_to_image@{k}"] = (
            np.bincount(text_image, found_image[:, :k].any(axis=1), minlength=n),
            captions,
        )
    means, draws = bootstrap(figures, resamples, seed)
    return means | bounds(draws)
