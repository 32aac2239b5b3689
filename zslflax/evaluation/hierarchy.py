"""Hierarchical precision@k, which also counts answers near the truth in a hypernym graph (Frome et al. 2013)."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from zslflax.evaluation.labels import Labels, check_ranking


class Hierarchy:
    """The classes of a label space in a graph, where a hop is a step to a hypernym or to a hyponym.

    Args:
        ids: of the c classes; a label is an index into them.
        hypernyms: id → ids of its hypernyms, for the classes and all nodes that connect them, such as
            `WordNet.hypernyms`.

    Raises:
        ValueError: a class is not in the graph, or two classes have the same id.
    """

    def __init__(self, ids: Sequence[str], hypernyms: Mapping[str, Sequence[str]]):
        if unknown := [i for i in ids if i not in hypernyms]:
            raise ValueError(
                f"{len(unknown)} of {len(ids)} classes are not in the hierarchy, the first is {unknown[0]!r}"
            )
        self.ids = list(ids)
        self.label = {i: label for label, i in enumerate(self.ids)}
        if len(self.label) != len(self.ids):
            raise ValueError(f"{len(self.ids)} classes have only {len(self.label)} different ids")
        self.neighbours = {node: set(above) for node, above in hypernyms.items()}
        for node, above in hypernyms.items():
            for other in above:
                self.neighbours.setdefault(other, set()).add(node)

    def num_nearer(self, label: int, k: int) -> dict[int, int]:
        """Finds the classes around one, nearest first, each with the number of classes that are nearer than it.

        Only classes with fewer than k nearer ones are returned. They are Frome's hCorrectSet of all sizes up to k at
        once: the set grows hop by hop, by all classes at that distance, until it holds k classes. So a class is in
        hCorrectSet(k) if and only if fewer than k classes are nearer.

        Raises:
            ValueError: fewer than k classes are connected with this one, or there is no such label.
        """
        if not 0 <= label < len(self.ids):
            raise ValueError(f"expected labels below {len(self.ids)}, the number of classes, found {label}")
        found: dict[int, int] = {}
        visited, frontier = {self.ids[label]}, {self.ids[label]}
        while frontier and len(found) < k:
            number = len(found)
            found |= {self.label[node]: number for node in frontier if node in self.label}
            frontier = {n for node in frontier for n in self.neighbours[node] if n not in visited}
            visited |= frontier
        if len(found) < k:
            raise ValueError(f"only {len(found)} classes are connected with {self.ids[label]!r}, too few for k = {k}")
        return found


def hierarchical_precision(
    ids: ArrayLike, labels: Labels, hierarchy: Hierarchy, ks: Sequence[int] = (1, 2, 5, 10, 20)
) -> np.ndarray:
    """Computes each image's hierarchical precision@k.

        P@k = |first k ids ∩ hCorrectSet(k)| / k

    hCorrectSet(k) of a true label is the set of the classes nearest to it in the hierarchy: all classes within the
    smallest number of hops that gives at least k (DeViSE, appendix). Hops may pass through nodes that are not classes.
    Frome et al. have one label per image; of several true labels the union of their sets counts, so that P@1 is hit@1.

    >>> hypernyms = {"animal": (), "dog": ("animal",), "cat": ("animal",), "pug": ("dog",)}
    >>> hierarchy = Hierarchy(["cat", "dog", "pug"], hypernyms)
    >>> hierarchical_precision([[1, 2, 0]], [(2,)], hierarchy, ks=(1, 2))  # dog before pug, where pug is true
    array([[0., 1.]])

    Args:
        ids: int [n, K], each image's classes, best first, as from `top_k`.
        labels: n tuples of class ids.
        hierarchy: of the classes.
        ks: each at most K.

    Returns:
        fp64 [n, len(ks)]; NaN for an image without a true label.

    Raises:
        ValueError: a k is below 1 or above K, or fewer than k classes are connected with a true label.
    """
    ids = check_ranking(ids, labels, ks)
    largest = max(ks)
    nearer = {label: hierarchy.num_nearer(label, largest) for label in set[int]().union(*labels)}
    result = np.full((len(ids), len(ks)), np.nan)
    for i, image_labels in enumerate(labels):
        if image_labels:
            first = ids[i, :largest].tolist()
            # A class outside all the sets counts as if `largest` classes were nearer.
            num_nearer = np.array([min(nearer[label].get(c, largest) for label in image_labels) for c in first])
            result[i] = [np.mean(num_nearer[:k] < k) for k in ks]
    return result
