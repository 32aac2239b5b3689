"""Means over images, and how far they would move had other images been drawn: bootstrap intervals."""

from collections.abc import Mapping

import numpy as np

CHUNK = 1 << 24  # numbers that a chunk of resamples may hold: 128 MB


def bootstrap(
    figures: Mapping[str, tuple[np.ndarray, np.ndarray]], resamples: int, seed: int = 0
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The means of several figures of the same n images, and their values in resamples of these images.

        mean = Σ_i w_i s_i / Σ_i w_i n_i,   w = 1, or (w_1, …, w_n) ~ Multinomial(n; 1/n, …, 1/n)

    An image counts as often in one figure of a resample as in all others, so figures may be combined
    resample by resample. Images with equal rows are drawn together: hits at some k take no longer for a
    million images than for a hundred.

    Args:
        figures: by name, the sums s and the counts n, both [n]: for a plain mean over some of the images, the
            values and whether they are among them. What an image with count 0 has as its sum is ignored.
        resamples: 0 for none.
        seed: of the resamples.

    Returns means by name, and resampled means fp64 [resamples] by name; NaN where all counts are 0.
    """
    counts = np.stack([np.asarray(n, np.float64) for _, n in figures.values()], axis=1)
    sums = np.stack([np.asarray(s, np.float64) for s, _ in figures.values()], axis=1)
    sums = np.where(counts > 0, sums, 0.0)
    means = ratio(sums.sum(axis=0), counts.sum(axis=0))
    rows, multiplicity = np.unique(np.concatenate([sums, counts], axis=1), axis=0, return_counts=True)
    rng, size, total = np.random.default_rng(seed), max(1, CHUNK // len(rows)), len(sums)
    drawn = [np.zeros((0, rows.shape[1]))]
    for start in range(0, resamples, size):
        weights = rng.multinomial(total, multiplicity / total, min(size, resamples - start))
        drawn.append(weights @ rows)
    drawn = np.concatenate(drawn)
    draws = ratio(drawn[:, : len(figures)], drawn[:, len(figures) :])
    return dict(zip(figures, means.tolist())), dict(zip(figures, draws.T))


def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.divide(a, b, out=np.full(a.shape, np.nan), where=b > 0)


def bounds(draws: Mapping[str, np.ndarray]) -> dict[str, float]:
    """The percentile bootstrap's 95% intervals, "NAME/low" and "NAME/high"; nothing without resamples."""
    metrics = {}
    for name, values in draws.items():
        if len(values) and not np.isnan(values).all():
            low, high = np.nanpercentile(values, (2.5, 97.5))
            metrics |= {f"{name}/low": float(low), f"{name}/high": float(high)}
    return metrics
