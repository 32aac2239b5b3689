"""Average precision per class and the best classes per image, from one pass over the image × class scores."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from zslflax.evaluation.labels import Labels, is_labelled, label_pairs
from zslflax.inference.top_k import images_at_a_time, merge_scores

CLASS_CHUNK = 1 << 10  # classes whose scores exist at a time
COMPARED = 16  # positives of a class, up to which comparing all scores with each is faster than sorting them


class AveragePrecision:
    """Accumulates the average precision of every class while the scores stream by in chunks of classes.

        AP_c = mean over the images i of class c of  |{j of c: s_jc ≥ s_ic}| / |{j: s_jc ≥ s_ic}|

    This is Σ (R_m − R_m−1) P_m over the distinct scores, as in scikit-learn: equal scores are one threshold.

    Args:
        labels: n tuples of class ids. Images without a label are excluded, also as negatives.
        num_classes: c.
        negatives: n tuples of the classes that annotators looked for in an image and did not find, as in Open Images.
            j then runs over the images that class c was judged on, labelled or not. None: each class that is not a
            label is a negative.

    Attributes:
        per_class: fp64 [c], NaN for a class that has no image, or that has negatives given but none of its own.

    Raises:
        ValueError: no image has a label, an id is not below c, or a class is both a label and a negative of an image.
    """

    def __init__(self, labels: Labels, num_classes: int, negatives: Labels | None = None):
        self.per_class = np.full(num_classes, np.nan)
        image, label = label_pairs(labels)
        check_range(label, num_classes)
        judged = np.flatnonzero(is_labelled(labels))
        self.negatives: dict[int, np.ndarray] | None = None
        self.positives = images_by_class(image, label)
        if negatives is not None:
            other_image, other = label_pairs(negatives)
            check_range(other, num_classes)
            check_disjoint(image, label, other_image, other, num_classes)
            self.negatives = images_by_class(other_image, other)
            self.positives = {c: images for c, images in self.positives.items() if c in self.negatives}
        self.judged = None if len(judged) == len(labels) else judged

    def add(self, first_class: int, scores: np.ndarray) -> None:
        """Adds the scores [b, n] of the classes first_class, first_class + 1, … with all images."""
        for c, class_scores in enumerate(scores, start=first_class):
            if (images := self.positives.get(c)) is None:
                continue
            positives = class_scores[images]
            if self.negatives is not None:
                candidates = np.concatenate([positives, class_scores[self.negatives[c]]])
            else:
                candidates = class_scores if self.judged is None else class_scores[self.judged]
            self.per_class[c] = average_precision(positives, candidates)


def average_precision(positives: np.ndarray, scores: np.ndarray) -> float:
    """The average precision of one class, from the scores of its images and those of all images, these included.

    >>> average_precision(np.array([0.9, 0.3]), np.array([0.9, 0.5, 0.3, 0.1]))  # precision 1 and 2/3
    0.8333333333333333
    """
    positives = np.sort(positives)
    true = len(positives) - np.searchsorted(positives, positives)  # how many positives score at least as much
    if len(positives) <= COMPARED:
        below = np.count_nonzero(scores < positives[:, None], axis=1)
    else:
        below = np.searchsorted(np.sort(scores), positives)
    return float(np.mean(true / (len(scores) - below)))


def rank_classes(
    image_emb: np.ndarray,
    class_emb: np.ndarray,
    labels: Labels,
    k: int,
    *,
    negatives: Labels | None = None,
    class_chunk: int = CLASS_CHUNK,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds each image's k best classes and each class's average precision, computing every score once.

    The scores of one chunk of classes with all images exist at a time, [b, n].

    Args:
        image_emb: fp32 [n, d].
        class_emb: fp32 [c, d].
        labels: n tuples of class ids.
        k: at most c.
        negatives: as in `AveragePrecision`.
        class_chunk: b, at most.

    Returns:
        The ids of the k classes with the highest inner products, int32 [n, k], as `top_k` finds them; and the average
        precisions of the classes, fp64 [c].

    Raises:
        ValueError: embeddings, labels and negatives are not of the same number of images; or as `AveragePrecision`.
    """
    n, c = len(image_emb), len(class_emb)
    if not n == len(labels) == len(labels if negatives is None else negatives):
        raise ValueError(
            f"expected an embedding for each image, found {n} for {len(labels)} images' labels"
            + ("" if negatives is None else f" and {len(negatives)} images' negatives")
        )
    precision = AveragePrecision(labels, c, negatives)
    images = jnp.asarray(image_emb, jnp.float32)
    best = jnp.full((n, k), -jnp.inf, jnp.float32), jnp.zeros((n, k), jnp.int32)
    class_chunk = -(-c // -(-c // class_chunk))  # chunks as equal as can be
    for start in range(0, c, class_chunk):
        first = min(start, c - class_chunk)  # the last chunk overlaps the one before: one shape is compiled
        classes = jnp.asarray(class_emb[first : first + class_chunk], jnp.float32)
        seen = start - first
        scores, best = score_chunk(images, classes, np.int32(first), np.int32(seen), best, images_at_a_time(n))
        precision.add(start, np.asarray(scores)[seen:])
        del scores  # before the next chunk's exist
    return np.asarray(best[1]), precision.per_class


@functools.partial(jax.jit, static_argnames="image_chunk", donate_argnames="best")
def score_chunk(
    image_emb: jax.Array,
    class_emb: jax.Array,
    first_class: jax.Array,
    seen: jax.Array,
    best: tuple[jax.Array, jax.Array],
    image_chunk: int,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Scores one chunk of classes with all images, and merges the scores into the running top k.

    Args:
        image_emb: fp32 [n, d].
        class_emb: fp32 [b, d], of the classes first_class, first_class + 1, ….
        first_class: id of the first class of the chunk.
        seen: how many of the chunk's first classes were in the chunk before.
        best: scores [n, k] and ids [n, k] so far.
        image_chunk: images that are merged at a time, at most n.

    Returns:
        Inner products fp32 [b, n], and the new `best`.
    """
    scores = jnp.einsum("bd,nd->bn", class_emb, image_emb, precision=jax.lax.Precision.HIGHEST)
    is_new = jnp.arange(len(scores))[:, None] >= seen

    def score_images(first: jax.Array) -> jax.Array:
        return jnp.where(is_new, jax.lax.dynamic_slice_in_dim(scores, first, image_chunk, axis=1), -jnp.inf)

    return scores, merge_scores(score_images, first_class, best, image_chunk)


def average_precisions(
    image_emb: np.ndarray,
    class_emb: np.ndarray,
    labels: Labels,
    class_chunk: int = CLASS_CHUNK,
    negatives: Labels | None = None,
) -> np.ndarray:
    """Each class's average precision, fp64 [c]; arguments as in `rank_classes`."""
    return rank_classes(image_emb, class_emb, labels, 1, negatives=negatives, class_chunk=class_chunk)[1]


def mean_average_precision(
    image_emb: np.ndarray, class_emb: np.ndarray, labels: Labels, class_chunk: int = CLASS_CHUNK
) -> float:
    """The mean of `average_precisions` over the classes that have an image.

    >>> mean_average_precision(np.eye(3), np.eye(3), [(0,), (1,), (2,)])
    1.0
    """
    return float(np.nanmean(average_precisions(image_emb, class_emb, labels, class_chunk)))


def check_range(label: np.ndarray, num_classes: int) -> None:
    """Refuses labels that are not the index of a class."""
    if len(label) and (label.min() < 0 or label.max() >= num_classes):
        raise ValueError(
            f"expected labels below {num_classes}, the number of classes, found {label.min()} … {label.max()}"
        )


def check_disjoint(
    image: np.ndarray, label: np.ndarray, other_image: np.ndarray, other: np.ndarray, num_classes: int
) -> None:
    """Refuses a class that is both a label and a negative of an image."""
    if len(both := np.intersect1d(image * num_classes + label, other_image * num_classes + other)):
        raise ValueError(f"class {both[0] % num_classes} is a label and a negative of image {both[0] // num_classes}")


def images_by_class(image: np.ndarray, label: np.ndarray) -> dict[int, np.ndarray]:
    """Groups pairs of an image and a label by label: the images of each class that has one."""
    order = np.argsort(label, kind="stable")
    classes, firsts = np.unique(label[order], return_index=True)
    return dict(zip(classes.tolist(), np.split(image[order], firsts[1:])))
