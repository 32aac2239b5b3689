"""Zero-shot classification metrics for images that may have several true labels or none.

Images without a true label are excluded and counted. They never count as wrong.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from zslflax.evaluation.average_precision import rank_classes
from zslflax.evaluation.bootstrap import bootstrap
from zslflax.evaluation.hierarchy import Hierarchy, hierarchical_precision
from zslflax.evaluation.labels import Labels, check_ranking, is_labelled, label_pairs
from zslflax.evaluation.results import Metric, Results, with_intervals

KS = (1, 2, 5, 10, 20)


def hit_at_k(ids: ArrayLike, labels: Labels, ks: Sequence[int] = KS) -> np.ndarray:
    """Computes each image's flat hit@k: 1 if any true label is among the first k ids, or else 0.

    >>> hit_at_k([[4, 2], [0, 1], [2, 0]], [(2,), (5,), ()], ks=(1, 2))
    array([[ 0.,  1.],
           [ 0.,  0.],
           [nan, nan]])

    Args:
        ids: int [n, K], each image's classes, best first, as from `top_k`.
        labels: n tuples of class ids.
        ks: each at most K.

    Returns:
        fp64 [n, len(ks)]; NaN for an image without a true label.

    Raises:
        ValueError: a k is below 1 or above K, or no image has a true label.
    """
    ids, labelled = check_ranking(ids, labels, ks), is_labelled(labels)
    image, label = label_pairs(labels)
    rank = np.full(len(labels), ids.shape[1])  # of the first true label
    row, column = np.nonzero(ids[image] == label[:, None])
    np.minimum.at(rank, image[row], column)
    return np.where(labelled[:, None], rank[:, None] < np.asarray(ks), np.nan)


def harmonic_mean(seen: ArrayLike, unseen: ArrayLike) -> np.ndarray:
    """2 a b / (a + b), the usual summary of generalised zero-shot recognition; 0 if either is 0.

    >>> float(harmonic_mean(0.6, 0.3))
    0.4
    """
    a, b = np.asarray(seen, np.float64), np.asarray(unseen, np.float64)
    return 2 * a * b / np.maximum(a + b, np.finfo(np.float64).tiny)


def split_seen(labels: Labels, unseen: ArrayLike) -> dict[str, np.ndarray]:
    """Finds the images whose labels are all of seen classes, and those whose labels are all of unseen classes.

    Images with labels of both kinds are in neither group: a hit on such an image belongs to neither kind alone.

    Args:
        labels: n tuples of class ids.
        unseen: bool [c], whether the class never occurs in training.

    Returns:
        {"seen": bool [n], "unseen": bool [n]}.
    """
    unseen = np.asarray(unseen, bool)
    image, label = label_pairs(labels)
    has_unseen = np.bincount(image, weights=unseen[label], minlength=len(labels)) > 0
    has_seen = np.bincount(image, weights=~unseen[label], minlength=len(labels)) > 0
    return {"seen": has_seen & ~has_unseen, "unseen": has_unseen & ~has_seen}


def zero_shot_metrics(
    image_emb: np.ndarray,
    class_emb: np.ndarray,
    labels: Labels,
    unseen: ArrayLike | None = None,
    ks: Sequence[int] = KS,
    *,
    hierarchy: Hierarchy | None = None,
    negatives: Labels | None = None,
    resamples: int = 0,
    seed: int = 0,
) -> Results:
    """Measures classification among c classes: flat hit@k and mean average precision, also of seen and unseen classes.

    All c classes are candidates in every metric. With `unseen` there are also the groups "seen" and "unseen", whose
    hits are over the images of `split_seen` and whose mAP is over the classes of that kind on all images; and the group
    "harmonic" of hit@k. A group without images or classes is left out, and so are k above c.

    >>> results = zero_shot_metrics(np.eye(3), np.eye(3), [(0,), (1,), ()], ks=(1,))
    >>> {metric.name: value for metric, value in results.items()}
    {'hit@1': 1.0, 'mAP': 1.0, 'labelled': 2, 'unlabelled': 1}

    Args:
        image_emb: fp32 [n, d].
        class_emb: fp32 [c, d].
        labels: n tuples of class ids.
        unseen: bool [c], whether the class never occurs in training.
        ks: the k of hit@k and of hierarchical precision.
        hierarchy: adds hierarchical@k, of `hierarchical_precision`.
        negatives: as in `AveragePrecision`.
        resamples: of the bootstrap that adds 95% intervals; 0 for none, and 1,000 are usual. Resampled are the images,
            but for the mAP the classes.
        seed: of the resamples.
    """
    c = len(class_emb)
    if unseen is not None and np.shape(unseen) != (c,):
        raise ValueError(f"expected `unseen` for each of {c} classes, found shape {np.shape(unseen)}")
    ks = [k for k in ks if k <= c] or [c]
    ids, precisions = rank_classes(image_emb, class_emb, labels, max(ks), negatives=negatives)
    images, classes = {"": is_labelled(labels)}, {"": ~np.isnan(precisions)}
    if unseen is not None:
        is_unseen = np.asarray(unseen, bool)
        images |= {group: chosen for group, chosen in split_seen(labels, is_unseen).items() if chosen.any()}
        classes |= {"seen": classes[""] & ~is_unseen, "unseen": classes[""] & is_unseen}
    per_image = metrics_per_image(ids, labels, ks, hierarchy)
    over_images = {
        metric._replace(group=g): (values, images[g]) for g in images for metric, values in per_image.items()
    }
    over_classes = {Metric("mAP", group=g): (precisions, chosen) for g, chosen in classes.items() if chosen.any()}
    means, draws = bootstrap(over_images, resamples, seed)
    if over_classes:
        class_means, class_draws = bootstrap(over_classes, resamples, seed)
        means, draws = means | class_means, draws | class_draws
    if {"seen", "unseen"} <= images.keys():
        add_harmonic_means(means, draws, ks)
    counts = {Metric("labelled", group=g): int(chosen.sum()) for g, chosen in images.items()}
    unlabelled = int((~images[""]).sum())
    return with_intervals(means, draws) | counts | {Metric("unlabelled"): unlabelled}


def add_harmonic_means(means: dict[Metric, float], draws: dict[Metric, np.ndarray], ks: Sequence[int]) -> None:
    """Adds the harmonic mean of seen and unseen hit@k, and its value in every resample."""
    for k in ks:
        seen, unseen, harmonic = (Metric("hit", k, group=group) for group in ("seen", "unseen", "harmonic"))
        means[harmonic] = float(harmonic_mean(means[seen], means[unseen]))
        draws[harmonic] = harmonic_mean(draws[seen], draws[unseen])


def metrics_per_image(
    ids: np.ndarray, labels: Labels, ks: Sequence[int], hierarchy: Hierarchy | None
) -> dict[Metric, np.ndarray]:
    """The metrics that are means over images, each fp64 [n]; NaN for an image without a true label."""
    metrics = {"hit": hit_at_k(ids, labels, ks)}
    if hierarchy is not None:
        metrics["hierarchical"] = hierarchical_precision(ids, labels, hierarchy, ks)
    return {Metric(measure, k): values[:, i] for measure, values in metrics.items() for i, k in enumerate(ks)}
