"""Hierarchical precision@k: answers near the truth in a hypernym graph count too (Frome et al. 2013)."""

from collections.abc import Mapping, Sequence

import numpy as np


class Hierarchy:
    """The classes of a label space in a graph, where a hop is a step to a hypernym or to a hyponym.

    Args:
        ids: of the c classes; a label is an index into them.
        hypernyms: id → ids of what it is a kind of, for these classes and all that connects them, such as
            `WordNet.hypernyms`.

    Raises:
        ValueError: a class that is not in the graph, or one id for two classes.
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

    def nearer(self, label: int, k: int) -> dict[int, int]:
        """The classes around one, nearest first, each with how many classes are nearer than it is, below k.

        This is Frome's hCorrectSet of all sizes at once: the set grows hop by hop, by all classes at that
        distance, until it holds k, so that a class is in hCorrectSet(k) if and only if fewer than k are nearer.

        Raises:
            ValueError: fewer than k classes are connected with this one, or there is no such label.
        """
        if not 0 <= label < len(self.ids):
            raise ValueError(f"expected labels below {len(self.ids)}, the number of classes, found {label}")
        found, seen, frontier = {}, {self.ids[label]}, {self.ids[label]}
        while frontier and len(found) < k:
            number = len(found)
            found |= {self.label[node]: number for node in frontier if node in self.label}
            frontier = {n for node in frontier for n in self.neighbours[node] if n not in seen}
            seen |= frontier
        if len(found) < k:
            raise ValueError(f"only {len(found)} classes are connected with {self.ids[label]!r}, too few for k = {k}")
        return found


def hierarchical_precision(ids, labels, hierarchy: Hierarchy, ks=(1, 2, 5, 10, 20)) -> np.ndarray:
    """Each image's hierarchical precision@k, fp64 [n, len(ks)]; NaN for an image without a true label.

        P@k = |first k ids ∩ hCorrectSet(k)| / k

    where hCorrectSet(k) of a true label are the classes nearest to it in the hierarchy, at least k: all
    within the smallest number of hops that suffices (DeViSE, appendix; hops pass through what is no class as
    well). Of several true labels, as Frome has not, the union of their sets counts, so that P@1 is hit@1.

    Args:
        ids: int [n, K], each image's classes, best first, as from `top_k`.
        labels: n tuples of class ids.
        ks: each at most K.

    Raises:
        ValueError: a k below 1 or above K, or fewer than k classes connected with a true label.
    """
    ids = np.asarray(ids)
    if len(ids) != len(labels):
        raise ValueError(f"expected as many rows of ids as labels, found {len(ids)} and {len(labels)}")
    if max(ks) > ids.shape[1] or min(ks) < 1:
        raise ValueError(f"expected 1 ≤ k ≤ {ids.shape[1]}, the number of ids per image, found {tuple(ks)}")
    largest = max(ks)
    sets = {label: hierarchy.nearer(label, largest) for label in set().union(*labels)}
    result = np.full((len(ids), len(ks)), np.nan)
    for i, of_image in enumerate(labels):
        if of_image:
            first = ids[i, :largest].tolist()
            nearer = np.array([min(sets[label].get(c, largest) for label in of_image) for c in first])
            result[i] = [np.mean(nearer[:k] < k) for k in ks]
    return result
