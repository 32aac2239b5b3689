"""Hierarchical precision against the algorithm of its paper, step by step, on scipy's shortest paths."""

import numpy as np
import pytest
from scipy.sparse.csgraph import shortest_path

from zslflax.evaluation.hierarchy import Hierarchy, hierarchical_precision


def random_graph(seed, nodes=40, classes=17):
    """A connected graph in which a node may have two hypernyms, and the classes among the nodes."""
    rng = np.random.default_rng(seed)
    above = {0: ()} | {i: tuple({int(rng.integers(i)), int(rng.integers(i))}) for i in range(1, nodes)}
    ids = [f"n{i}" for i in rng.permutation(nodes)[:classes]]
    return ids, {f"n{i}": tuple(f"n{j}" for j in of) for i, of in above.items()}


def correct_sets(ids, hypernyms, label, k):
    """Frome et al.'s hCorrectSet: all classes within a radius that grows until there are k of them."""
    nodes = list(hypernyms)
    edges = np.zeros((len(nodes), len(nodes)))
    for node, above in hypernyms.items():
        for other in above:
            edges[nodes.index(node), nodes.index(other)] = 1
    hops = shortest_path(edges, directed=False, unweighted=True, indices=nodes.index(ids[label]))
    radius, found = 0, set()
    while len(found) < k:
        found |= {c for c, i in enumerate(ids) if hops[nodes.index(i)] == radius}
        radius += 1
    return found


@pytest.mark.parametrize("seed", range(12))
def test_precision_equals_the_papers_algorithm(seed):
    ids, hypernyms = random_graph(seed)
    rng = np.random.default_rng(100 + seed)
    best = np.array([rng.permutation(len(ids))[:10] for _ in range(15)])
    labels = [tuple(rng.integers(0, len(ids), rng.integers(0, 3)).tolist()) for _ in best]
    labels[0], labels[1] = (), (4,)
    ks = (1, 2, 5, 10)
    found = hierarchical_precision(best, labels, Hierarchy(ids, hypernyms), ks)
    assert found.shape == (15, 4) and np.isnan(found[0]).all()
    for i, of_image in enumerate(labels):
        for column, k in enumerate(ks if of_image else ()):
            correct = set().union(*(correct_sets(ids, hypernyms, label, k) for label in of_image))
            assert found[i, column] == pytest.approx(len(correct & set(best[i, :k])) / k, abs=1e-12)


def test_precision_of_a_case_computed_by_hand():
    #           animal
    #      dog         cat*        * classes: animal, cat, pug, husky; dog is not a class
    #   pug* husky*
    hypernyms = {"animal": (), "dog": ("animal",), "cat": ("animal",), "pug": ("dog",), "husky": ("dog",)}
    hierarchy = Hierarchy(["animal", "cat", "pug", "husky"], hypernyms)
    assert hierarchy.num_nearer(2, 2) == {2: 0, 0: 1, 3: 1}  # two hops to husky and to animal alike
    assert hierarchy.num_nearer(2, 4) == {2: 0, 0: 1, 3: 1, 1: 3}
    precision = hierarchical_precision([[3, 1, 2, 0]] * 2, [(2,), (1, 2)], hierarchy, (1, 2, 3, 4))
    np.testing.assert_allclose(precision, [[0, 1 / 2, 2 / 3, 1], [0, 1, 1, 1]])


def test_arguments_without_a_precision_are_refused():
    hypernyms = {"a": (), "b": ("a",), "c": ()}
    with pytest.raises(ValueError, match="1 of 2 classes are not in the hierarchy, the first is 'x'"):
        Hierarchy(["a", "x"], hypernyms)
    with pytest.raises(ValueError, match="2 classes have only 1 different ids"):
        Hierarchy(["a", "a"], hypernyms)
    hierarchy = Hierarchy(["a", "b", "c"], hypernyms)
    with pytest.raises(ValueError, match="only 2 classes are connected with 'b', too few for k = 3"):
        hierarchical_precision([[0, 1, 2]], [(1,)], hierarchy, (1, 3))
    for label in (-1, 3):
        with pytest.raises(ValueError, match=f"below 3, the number of classes, found {label}"):
            hierarchical_precision([[0, 1, 2]], [(label,)], hierarchy, (1,))
    with pytest.raises(ValueError, match="1 ≤ k ≤ 3"):
        hierarchical_precision([[0, 1, 2]], [(1,)], hierarchy, (4,))
    with pytest.raises(ValueError, match="found 1 and 2"):
        hierarchical_precision([[0, 1, 2]], [(1,), (2,)], hierarchy, (1,))
