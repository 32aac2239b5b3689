"""True labels of images: n tuples of class ids, where an image may have several labels or none."""

from collections.abc import Collection, Sequence

import numpy as np
from numpy.typing import ArrayLike

Labels = Sequence[Collection[int]]


def is_labelled(labels: Labels) -> np.ndarray:
    """Which images have a true label, bool [n].

    Raises:
        ValueError: no image has one.
    """
    labelled = np.array([len(image_labels) > 0 for image_labels in labels], bool)
    if not labelled.any():
        raise ValueError(f"none of {len(labels)} images has a true label: there is nothing to measure")
    return labelled


def label_pairs(labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Lists every pair of an image and a true label once, in the order of the images.

    >>> image, label = label_pairs([(3, 1, 3), (), (1,)])
    >>> image.tolist(), label.tolist()
    ([0, 0, 2], [1, 3, 1])

    Returns:
        The images and the labels, both int64 [p].
    """
    distinct = [sorted({int(label) for label in image_labels}) for image_labels in labels]
    image = np.repeat(np.arange(len(distinct)), [len(image_labels) for image_labels in distinct])
    return image, np.array([label for image_labels in distinct for label in image_labels], np.int64)


def check_ranking(ids: ArrayLike, labels: Labels, ks: Sequence[int]) -> np.ndarray:
    """Checks the arguments of a metric at k, and returns the ids as an array.

    Raises:
        ValueError: the ids have another number of rows than there are labels, or a k is below 1 or above K.
    """
    ids = np.asarray(ids)
    if len(ids) != len(labels):
        raise ValueError(f"expected as many rows of ids as labels, found {len(ids)} and {len(labels)}")
    if max(ks) > ids.shape[1] or min(ks) < 1:
        raise ValueError(f"expected 1 ≤ k ≤ {ids.shape[1]}, the number of ids per image, found {tuple(ks)}")
    return ids
