"""Measures of zero-shot recognition where an image may have several true labels, or none at all.

An image without a true label is excluded and counted; it is never counted as wrong.
"""

import jax
import jax.numpy as jnp
import numpy as np

from zslflax.zeroshot.classifier import top_k


def hit_at_k(ids, labels, ks=(1, 2, 5, 10)) -> dict[str, float]:
    """Flat hit@k: the share of images for which any true label is among the first k ids.

    Args:
        ids: int [n, K], each image's classes, best first, as from `top_k`.
        labels: n tuples of class ids; images with an empty one are excluded.
        ks: each at most K.

    Returns {"hit@1": …, …, "labelled": number of images measured, "unlabelled": number excluded}.
    """
    ids = np.asarray(ids)
    if len(ids) != len(labels):
        raise ValueError(f"expected as many rows of ids as labels, found {len(ids)} and {len(labels)}")
    if max(ks) > ids.shape[1] or min(ks) < 1:
        raise ValueError(f"expected 1 ≤ k ≤ {ids.shape[1]}, the number of ids per image, found {tuple(ks)}")
    image, label = label_pairs(labels)
    labelled = np.unique(image)
    if not len(labelled):
        raise ValueError(f"none of {len(labels)} images has a true label: there is nothing to measure")
    ranks = np.full(len(labels), ids.shape[1])  # the place of the first true label, or beyond the last
    row, column = np.nonzero(ids[image] == label[:, None])
    np.minimum.at(ranks, image[row], column)
    hits = {f"hit@{k}": float(np.mean(ranks[labelled] < k)) for k in ks}
    return hits | {"labelled": len(labelled), "unlabelled": len(labels) - len(labelled)}


def label_pairs(labels) -> tuple[np.ndarray, np.ndarray]:
    """Every (image, true label) once, in the order of images: n tuples of class ids → int64 [p] and [p]."""
    labels = [sorted({int(label) for label in of_image}) for of_image in labels]
    image = np.repeat(np.arange(len(labels)), [len(of_image) for of_image in labels])
    return image, np.array([label for of_image in labels for label in of_image], np.int64)


def average_precisions(image_emb, class_emb, labels, class_block: int = 256) -> np.ndarray:
    """Each class's average precision over the labelled images: fp64 [c], NaN where a class has no image.

        AP_c = mean over the images i of class c of  |{j of c: s_jc ≥ s_ic}| / |{j: s_jc ≥ s_ic}|

    which is scikit-learn's Σ (R_m − R_m−1) P_m over the distinct scores, equal scores being one threshold.
    Scores exist for `class_block` classes at a time, and only for classes that have an image.

    Args:
        image_emb: fp32 [n, d]; class_emb: fp32 [c, d].
        labels: n tuples of class ids; images with an empty one are excluded, also as negatives.
    """
    if len(image_emb) != len(labels):
        raise ValueError(
            f"expected an embedding for each image, found {len(image_emb)} for {len(labels)} images' labels"
        )
    image, label = label_pairs(labels)
    if not len(label):
        raise ValueError(f"none of {len(labels)} images has a true label: there is nothing to measure")
    if label.min() < 0 or label.max() >= len(class_emb):
        raise ValueError(
            f"expected labels below {len(class_emb)}, the number of classes, "
            f"found {label.min()} … {label.max()}"
        )
    labelled, image = np.unique(image, return_inverse=True)  # `image` now counts among the labelled
    image_emb = jnp.asarray(np.asarray(image_emb, np.float32)[labelled])
    order = np.argsort(label, kind="stable")
    classes, firsts = np.unique(label[order], return_index=True)
    members = np.split(image[order], firsts[1:])  # the images of each class that has any

    result = np.full(len(class_emb), np.nan)
    size = min(class_block, len(classes))
    for start in range(0, len(classes), size):
        start = min(start, len(classes) - size)  # the last block overlaps, so that every block has one shape
        of_block = classes[start : start + size]
        scores = np.array(score_block(jnp.asarray(np.asarray(class_emb[of_block], np.float32)), image_emb))
        positives = [np.sort(row[own]) for row, own in zip(scores, members[start : start + size])]
        scores.sort(axis=1)
        result[of_block] = [average_precision(own, row) for own, row in zip(positives, scores)]
    return result


@jax.jit
def score_block(class_emb, image_emb):
    """Inner products, [c, d] × [n, d] → fp32 [c, n]."""
    return jnp.einsum("cd,nd->cn", class_emb, image_emb, precision=jax.lax.Precision.HIGHEST)


def average_precision(positives: np.ndarray, scores: np.ndarray) -> float:
    """Average precision from the positives' scores and all scores (these among them), both ascending."""
    true = len(positives) - np.searchsorted(positives, positives)  # how many positives score at least as much
    retrieved = len(scores) - np.searchsorted(scores, positives)
    return float(np.mean(true / retrieved))


def mean_average_precision(image_emb, class_emb, labels, class_block: int = 256) -> float:
    """The mean of `average_precisions` over the classes that have an image."""
    return float(np.nanmean(average_precisions(image_emb, class_emb, labels, class_block)))


def harmonic_mean(seen: float, unseen: float) -> float:
    """2 a b / (a + b), the usual summary of generalised zero-shot recognition; 0 if either is 0."""
    return 2 * seen * unseen / (seen + unseen) if seen > 0 and unseen > 0 else 0.0


def split_seen(labels, unseen) -> dict[str, np.ndarray]:
    """Which images have labels, and only labels, of seen and of unseen classes.

    Images with labels of both kinds are in neither: a hit on them says nothing of either kind alone.

    Args:
        labels: n tuples of class ids; unseen: bool [c], whether training never had the class.

    Returns {"seen": bool [n], "unseen": bool [n]}.
    """
    unseen = np.asarray(unseen, bool)
    image, label = label_pairs(labels)
    has_unseen = np.bincount(image, weights=unseen[label], minlength=len(labels)) > 0
    has_seen = np.bincount(image, weights=~unseen[label], minlength=len(labels)) > 0
    return {"seen": has_seen & ~has_unseen, "unseen": has_unseen & ~has_seen}


def zero_shot_metrics(image_emb, class_emb, labels, unseen=None, ks=(1, 2, 5, 10)) -> dict[str, float]:
    """What is reported of one label space: flat hit@k and mean average precision, seen and unseen apart.

    Candidates are always all c classes. With `unseen` (bool [c]) there are also "seen/…" and "unseen/…":
    hits on the images of `split_seen`, "…/mAP" over the classes of that kind on all images; and
    "harmonic/hit@k". Measures of a kind that has no image, and hit@k for k > c, are left out.
    """
    c = len(class_emb)
    ks = [k for k in ks if k <= c] or [c]
    _, ids = top_k(image_emb, class_emb, max(ks))
    precisions = average_precisions(image_emb, class_emb, labels)
    metrics = hit_at_k(ids, labels, ks) | {"mAP": float(np.nanmean(precisions))}
    if unseen is None:
        return metrics
    unseen = np.asarray(unseen, bool)
    if unseen.shape != (c,):
        raise ValueError(f"expected `unseen` for each of {c} classes, found shape {unseen.shape}")
    classes = {"seen": ~unseen, "unseen": unseen}
    for kind, images in split_seen(labels, unseen).items():
        if images.any():
            hits = hit_at_k(ids[images], [labels[i] for i in np.flatnonzero(images)], ks)
            del hits["unlabelled"]
            metrics |= {f"{kind}/{name}": value for name, value in hits.items()}
        if not np.all(np.isnan(precisions[classes[kind]])):
            metrics[f"{kind}/mAP"] = float(np.nanmean(precisions[classes[kind]]))
    for k in ks:
        if f"seen/hit@{k}" in metrics and f"unseen/hit@{k}" in metrics:
            metrics[f"harmonic/hit@{k}"] = harmonic_mean(metrics[f"seen/hit@{k}"], metrics[f"unseen/hit@{k}"])
    return metrics
