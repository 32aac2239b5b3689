"""Measures of zero-shot recognition where an image may have several true labels, or none at all.

An image without a true label is excluded and counted; it is never counted as wrong.
"""

import jax
import jax.numpy as jnp
import numpy as np

from zslflax.evaluation.bootstrap import bootstrap, bounds
from zslflax.evaluation.hierarchy import Hierarchy, hierarchical_precision
from zslflax.inference.top_k import top_k


def hit_at_k(ids, labels, ks=(1, 2, 5, 10, 20)) -> dict[str, float]:
    """Flat hit@k: the share of images for which any true label is among the first k ids.

    Args:
        ids: int [n, K], each image's classes, best first, as from `top_k`.
        labels: n tuples of class ids; images with an empty one are excluded.
        ks: each at most K.

    Returns {"hit@1": …, …, "labelled": number of images measured, "unlabelled": number excluded}.
    """
    ids = np.asarray(ids)
    if max(ks) > ids.shape[1] or min(ks) < 1:
        raise ValueError(f"expected 1 ≤ k ≤ {ids.shape[1]}, the number of ids per image, found {tuple(ks)}")
    places, labelled = first_hits(ids, labels), has_label(labels)
    hits = {f"hit@{k}": float(np.mean(places[labelled] < k)) for k in ks}
    return hits | {"labelled": int(labelled.sum()), "unlabelled": int((~labelled).sum())}


def first_hits(ids, labels) -> np.ndarray:
    """The place of the first true label among each image's ids, int64 [n]; K where none of the K is true."""
    ids = np.asarray(ids)
    if len(ids) != len(labels):
        raise ValueError(f"expected as many rows of ids as labels, found {len(ids)} and {len(labels)}")
    image, label = label_pairs(labels)
    places = np.full(len(labels), ids.shape[1])
    row, column = np.nonzero(ids[image] == label[:, None])
    np.minimum.at(places, image[row], column)
    return places


def has_label(labels) -> np.ndarray:
    """Which images have a true label, bool [n]; an error if none has."""
    labelled = np.array([len(of_image) > 0 for of_image in labels], bool)
    if not labelled.any():
        raise ValueError(f"none of {len(labels)} images has a true label: there is nothing to measure")
    return labelled


def label_pairs(labels) -> tuple[np.ndarray, np.ndarray]:
    """Every (image, true label) once, in the order of images: n tuples of class ids → int64 [p] and [p]."""
    labels = [sorted({int(label) for label in of_image}) for of_image in labels]
    image = np.repeat(np.arange(len(labels)), [len(of_image) for of_image in labels])
    return image, np.array([label for of_image in labels for label in of_image], np.int64)


def average_precisions(image_emb, class_emb, labels, class_block: int = 256, negatives=None) -> np.ndarray:
    """Each class's average precision over the labelled images: fp64 [c], NaN where a class has no image.

        AP_c = mean over the images i of class c of  |{j of c: s_jc ≥ s_ic}| / |{j: s_jc ≥ s_ic}|

    which is scikit-learn's Σ (R_m − R_m−1) P_m over the distinct scores, equal scores being one threshold.
    Scores exist for `class_block` classes at a time, and only for classes that have an image.

    Args:
        image_emb: fp32 [n, d]; class_emb: fp32 [c, d].
        labels: n tuples of class ids; images with an empty one are excluded, also as negatives.
        negatives: n tuples of the classes that somebody looked for on the image and did not find, as in Open
            Images: j then runs over the images alone that class c was judged on, labelled or not, and a class
            without a negative is NaN as well. None: what is no label is a negative.
    """
    if len(image_emb) != len(labels) or len(labels) != len(labels if negatives is None else negatives):
        raise ValueError(
            f"expected an embedding for each image, found {len(image_emb)} for {len(labels)} images' labels"
            + ("" if negatives is None else f" and {len(negatives)} images' negatives")
        )
    judged = np.flatnonzero(has_label(labels))
    image, label = check_range(*label_pairs(labels), len(class_emb))
    if negatives is not None:
        other_image, other = check_range(*label_pairs(negatives), len(class_emb))
        check_disjoint(image, label, other_image, other, len(class_emb))
        judged = np.union1d(judged, other_image)
        against = by_class(np.searchsorted(judged, other_image), other)
    members = by_class(np.searchsorted(judged, image), label)  # images now count among the judged
    if negatives is not None:
        members = {c: own for c, own in members.items() if c in against}
    image_emb = jnp.asarray(np.asarray(image_emb, np.float32)[judged])

    result, classes = np.full(len(class_emb), np.nan), np.array(list(members), np.int64)
    size = min(class_block, len(classes))
    for start in range(0, len(classes), max(size, 1)):
        start = min(start, len(classes) - size)  # the last block overlaps, so that every block has one shape
        of_block = classes[start : start + size]
        scores = np.array(score_block(jnp.asarray(np.asarray(class_emb[of_block], np.float32)), image_emb))
        for c, row in zip(of_block.tolist(), scores):
            positives = np.sort(row[members[c]])
            every = row if negatives is None else np.concatenate([positives, row[against[c]]])
            result[c] = average_precision(positives, np.sort(every))
    return result


def check_range(image: np.ndarray, label: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs as they are; an error where a label is none of the classes."""
    if len(label) and (label.min() < 0 or label.max() >= classes):
        raise ValueError(f"expected labels below {classes}, the number of classes, found {label.min()} … {label.max()}")
    return image, label


def check_disjoint(image, label, other_image, other, classes: int) -> None:
    if len(both := np.intersect1d(image * classes + label, other_image * classes + other)):
        raise ValueError(f"class {both[0] % classes} is a label and a negative of image {both[0] // classes}")


def by_class(image: np.ndarray, label: np.ndarray) -> dict[int, np.ndarray]:
    """The images of each class that has any."""
    order = np.argsort(label, kind="stable")
    classes, firsts = np.unique(label[order], return_index=True)
    return dict(zip(classes.tolist(), np.split(image[order], firsts[1:])))


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


def harmonic_mean(seen, unseen):
    """2 a b / (a + b), the usual summary of generalised zero-shot recognition; 0 if either is 0."""
    return 2 * seen * unseen / np.maximum(seen + unseen, np.finfo(np.float64).tiny)


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


def zero_shot_metrics(
    image_emb,
    class_emb,
    labels,
    unseen=None,
    ks=(1, 2, 5, 10, 20),
    *,
    hierarchy: Hierarchy | None = None,
    negatives=None,
    resamples: int = 0,
    seed: int = 0,
) -> dict[str, float]:
    """What is reported of one label space: flat hit@k and mean average precision, seen and unseen apart.

    Candidates are always all c classes. With `unseen` (bool [c]) there are also "seen/…" and "unseen/…":
    figures of the images of `split_seen`, "…/mAP" over the classes of that kind on all images; and
    "harmonic/hit@k". Measures of a kind that has no image, and of k for k > c, are left out.

    Args:
        hierarchy: adds "hierarchical@k", of `hierarchical_precision`.
        negatives: see `average_precisions`.
        resamples: above 0 adds 95% intervals, "…/low" and "…/high", of the percentile bootstrap: over images,
            but those of the mAP over its classes. 1,000 are usual.
        seed: of the resamples.
    """
    c = len(class_emb)
    if unseen is not None and np.shape(unseen) != (c,):
        raise ValueError(f"expected `unseen` for each of {c} classes, found shape {np.shape(unseen)}")
    ks = [k for k in ks if k <= c] or [c]
    precisions = average_precisions(image_emb, class_emb, labels, negatives=negatives)
    _, ids = top_k(image_emb, class_emb, max(ks))
    labelled, every = has_label(labels), np.ones(c, bool)
    images, classes = {"": labelled}, {"": every}
    if unseen is not None:
        unseen = np.asarray(unseen, bool)
        images |= {f"{kind}/": chosen for kind, chosen in split_seen(labels, unseen).items() if chosen.any()}
        classes |= {"seen/": ~unseen, "unseen/": unseen}

    places = first_hits(ids, labels)
    values = {f"hit@{k}": places < k for k in ks}
    if hierarchy is not None:
        of_k = hierarchical_precision(ids, labels, hierarchy, ks).T
        values |= {f"hierarchical@{k}": precision for k, precision in zip(ks, of_k)}
    measured = ~np.isnan(precisions)
    over_images = {kind + name: (v, chosen) for kind, chosen in images.items() for name, v in values.items()}
    over_classes = {
        f"{kind}mAP": (precisions, measured & own) for kind, own in classes.items() if (measured & own).any()
    }
    means, draws = {}, {}
    for figures in filter(None, (over_images, over_classes)):
        for collected, new in zip((means, draws), bootstrap(figures, resamples, seed)):
            collected |= new
    for k in ks:
        if {f"seen/hit@{k}", f"unseen/hit@{k}"} <= means.keys():
            for of in (means, draws):
                of[f"harmonic/hit@{k}"] = harmonic_mean(of[f"seen/hit@{k}"], of[f"unseen/hit@{k}"])
    counts = {f"{kind}labelled": int(chosen.sum()) for kind, chosen in images.items()}
    return means | bounds(draws) | counts | {"unlabelled": int((~labelled).sum())}
