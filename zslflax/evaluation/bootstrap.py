"""Bootstrap intervals: how far the mean over the images of a test set varies with the choice of images."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

CHUNK = 1 << 24  # numbers that a chunk of resamples may hold: 128 MB
Key = TypeVar("Key", bound=Hashable)


def bootstrap(
    metrics: Mapping[Key, tuple[ArrayLike, ArrayLike]], resamples: int, seed: int = 0
) -> tuple[dict[Key, float], dict[Key, np.ndarray]]:
    """Computes the means of several metrics over the same n images, and their values in resamples of these images.

        mean = Σ_i w_i s_i / Σ_i w_i n_i,   w = 1, or (w_1, …, w_n) ~ Multinomial(n; 1/n, …, 1/n)

    An image counts equally often in all metrics of a resample, so metrics may be combined resample by resample.
    Images with equal rows are drawn together: hits at a few k take as long for a million images as for a hundred.

    >>> hits = np.array([1, 0, 1, 1])
    >>> means, draws = bootstrap({"hit@1": (hits, np.ones(4))}, resamples=1000)
    >>> means, draws["hit@1"].shape
    ({'hit@1': 0.75}, (1000,))

    Args:
        metrics: by key, the sums s and the counts n of the images, both [n]. For a mean over some of the images these
            are the values and whether an image is among them. The sum of an image with count 0 is ignored.
        resamples: their number; 0 for none.
        seed: of the resamples.

    Returns:
        The means by key, and the resampled means fp64 [resamples] by key; NaN where all counts are 0.
    """
    counts = np.stack([np.asarray(n, np.float64) for _, n in metrics.values()], axis=1)
    sums = np.stack([np.asarray(s, np.float64) for s, _ in metrics.values()], axis=1)
    sums = np.where(counts > 0, sums, 0.0)
    means = ratio(sums.sum(axis=0), counts.sum(axis=0))
    rows, multiplicity = np.unique(np.concatenate([sums, counts], axis=1), axis=0, return_counts=True)
    rng, size, total = np.random.default_rng(seed), max(1, CHUNK // len(rows)), len(sums)
    resampled_sums = [np.zeros((0, rows.shape[1]))]
    for start in range(0, resamples, size):
        weights = rng.multinomial(total, multiplicity / total, min(size, resamples - start))
        resampled_sums.append(weights @ rows)
    resampled = np.concatenate(resampled_sums)
    draws = ratio(resampled[:, : len(metrics)], resampled[:, len(metrics) :])
    return dict(zip(metrics, means.tolist())), dict(zip(metrics, draws.T))


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b; NaN where b is 0."""
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)


def intervals(draws: Mapping[Key, np.ndarray]) -> dict[Key, tuple[float, float]]:
    """The 95% intervals of the percentile bootstrap, (low, high) by key.

    A metric without resamples, or with a NaN in all of them, is left out.

    >>> intervals({"hit@1": np.arange(101.0)})
    {'hit@1': (2.5, 97.5)}
    """
    found = {}
    for key, values in draws.items():
        if len(values) and not np.isnan(values).all():
            low, high = np.nanpercentile(values, (2.5, 97.5))
            found[key] = float(low), float(high)
    return found
