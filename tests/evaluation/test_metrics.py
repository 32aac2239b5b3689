"""Hit@k and average precision against loops and scikit-learn, with ties and several labels."""

import math

import numpy as np
import pytest

from zslflax.evaluation.hierarchy import Hierarchy, hierarchical_precision
from zslflax.evaluation.metrics import (
    average_precisions,
    harmonic_mean,
    hit_at_k,
    mean_average_precision,
    split_seen,
    zero_shot_metrics,
)
from zslflax.inference.top_k import top_k


def random_case(seed, n=17, c=11, d=3):
    """Embeddings whose inner products are exact and often equal; 0–3 labels an image, never class 0."""
    rng = np.random.default_rng(seed)
    image_emb, class_emb = ((rng.integers(-2, 3, (rows, d)) / 4).astype(np.float32) for rows in (n, c))
    labels = [tuple(rng.integers(1, c, rng.integers(0, 4)).tolist()) for _ in range(n)]
    labels[0] = (3, 3, 5)  # a label given twice is one label
    return image_emb, class_emb, labels, rng.random(c) < 0.4


def hits_by_loop(image_emb, class_emb, labels, k, chosen=lambda of_image: True):
    found = []
    for v, of_image in zip(image_emb.tolist(), labels):
        if of_image and chosen(of_image):
            scores = [sum(a * b for a, b in zip(v, t)) for t in class_emb.tolist()]
            best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
            found.append(any(label in best for label in of_image))
    return sum(found) / len(found)


@pytest.mark.parametrize("seed", range(25))
def test_hit_at_k_is_brute_force(seed):
    image_emb, class_emb, labels, _ = random_case(seed)
    _, ids = top_k(image_emb, class_emb, 10)
    found = hit_at_k(ids, labels, (1, 2, 5, 10))
    for k in (1, 2, 5, 10):
        assert found[f"hit@{k}"] == pytest.approx(hits_by_loop(image_emb, class_emb, labels, k), abs=1e-12)
    assert found["labelled"] == sum(map(bool, labels)) and found["unlabelled"] == sum(not true for true in labels)


def test_unlabelled_images_change_the_counts_alone():
    ids = np.array([[4, 2], [0, 1], [1, 0]])
    hits = {"hit@1": 0.0, "hit@2": 0.5, "labelled": 2}
    assert hit_at_k(ids[:2], [(2,), (5,)], (1, 2)) == hits | {"unlabelled": 0}
    assert hit_at_k(ids, [(2,), (5,), ()], (1, 2)) == hits | {"unlabelled": 1}


@pytest.mark.parametrize("class_block", [1, 4, 100])
def test_average_precision_is_scikit_learns(require, class_block):
    sklearn = require("sklearn.metrics")
    for seed in range(15):
        image_emb, class_emb, labels, _ = random_case(seed)
        found = average_precisions(image_emb, class_emb, labels, class_block)
        scores = image_emb @ class_emb.T
        rows = [i for i, of_image in enumerate(labels) if of_image]
        expected = np.full(len(class_emb), np.nan)
        for c in range(len(class_emb)):
            true = [c in labels[i] for i in rows]
            if any(true):
                expected[c] = sklearn.average_precision_score(true, scores[rows, c])
        assert np.isnan(expected).any() and not np.isnan(expected).all()
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        mean = mean_average_precision(image_emb, class_emb, labels, class_block)
        assert mean == pytest.approx(np.nanmean(expected), rel=1e-12)


def test_average_precision_by_hand():
    # Ranked 1: true, 2 and 3: equal, one of them true, 4: false. Precision 1 at the first, 2/3 at the tie.
    image_emb = np.array([[4], [2], [2], [1], [9]], np.float32)  # the last has no label: not even a negative
    assert mean_average_precision(image_emb, np.ones((1, 1), np.float32), [(0,), (0,), (), (), ()]) == 1.0
    found = average_precisions(image_emb, np.array([[1], [-1]], np.float32), [(0,), (0,), (1,), (1,), ()])
    np.testing.assert_allclose(found, [(1 + 2 / 3) / 2, (1 + 2 / 3) / 2])


def test_a_perfect_and_a_constant_classifier():
    eye = np.eye(6, dtype=np.float32)
    labels = [(i,) for i in range(6)]
    assert mean_average_precision(eye, eye, labels) == 1.0
    assert mean_average_precision(np.ones_like(eye), eye, labels) == pytest.approx(1 / 6)  # all images tie


@pytest.mark.parametrize("seed", range(10))
def test_zero_shot_metrics_are_the_parts_over_all_names(seed):
    image_emb, class_emb, labels, unseen = random_case(seed, n=60)
    found = zero_shot_metrics(image_emb, class_emb, labels, unseen, ks=(1, 5, 100))
    assert "hit@100" not in found and "seen/hit@100" not in found
    kinds = {
        "": lambda of_image: True,
        "seen/": lambda of_image: not any(unseen[label] for label in of_image),
        "unseen/": lambda of_image: all(unseen[label] for label in of_image),
    }
    for kind, chosen in kinds.items():
        for k in (1, 5):
            expected = hits_by_loop(image_emb, class_emb, labels, k, chosen)
            assert found[f"{kind}hit@{k}"] == pytest.approx(expected, abs=1e-12)
        assert found[f"{kind}labelled"] == sum(bool(true) and chosen(true) for true in labels)
    precisions = average_precisions(image_emb, class_emb, labels)
    assert found["mAP"] == pytest.approx(np.nanmean(precisions))
    assert found["seen/mAP"] == pytest.approx(np.nanmean(precisions[~unseen]))
    assert found["unseen/mAP"] == pytest.approx(np.nanmean(precisions[unseen]))
    a, b = found["seen/hit@5"], found["unseen/hit@5"]
    assert found["harmonic/hit@5"] == pytest.approx(2 / (1 / a + 1 / b) if a and b else 0.0)


def test_measures_of_a_kind_without_images_are_left_out():
    eye = np.eye(3, dtype=np.float32)
    unseen = np.array([False, False, True])
    found = zero_shot_metrics(eye, eye, [(0,), (1,), (0, 2)], unseen, ks=(1, 2))
    assert found["seen/hit@1"] == 1.0 and found["unseen/mAP"] == 1.0
    assert not any(name.startswith(("unseen/hit", "harmonic")) for name in found)
    assert all(math.isfinite(value) for value in found.values())


def test_split_seen_puts_mixed_and_unlabelled_images_in_neither():
    split = split_seen([(0,), (1,), (0, 1), (), (1, 2)], np.array([False, True, True]))
    np.testing.assert_array_equal(split["seen"], [True, False, False, False, False])
    np.testing.assert_array_equal(split["unseen"], [False, True, False, False, True])


def test_harmonic_mean():
    assert harmonic_mean(0.5, 0.25) == pytest.approx(1 / 3)
    assert harmonic_mean(0.5, 0.0) == harmonic_mean(0.0, 0.0) == 0.0


def test_what_cannot_be_measured_is_refused():
    ids, eye = np.zeros((2, 3), int), np.eye(2, dtype=np.float32)
    with pytest.raises(ValueError, match="2 and 1"):
        hit_at_k(ids, [(0,)], (1,))
    with pytest.raises(ValueError, match="1 ≤ k ≤ 3"):
        hit_at_k(ids, [(0,), (1,)], (1, 4))
    with pytest.raises(ValueError, match="none of 2 images has a true label"):
        hit_at_k(ids, [(), ()], (1,))
    with pytest.raises(ValueError, match="none of 2 images has a true label"):
        mean_average_precision(eye, eye, [(), ()])
    with pytest.raises(ValueError, match="below 2, the number of classes, found 0 … 2"):
        mean_average_precision(eye, eye, [(0,), (2,)])
    with pytest.raises(ValueError, match="each of 2 classes"):
        zero_shot_metrics(eye, eye, [(0,), (1,)], unseen=[True], ks=(1,))


@pytest.mark.parametrize("class_block", [2, 100])
def test_average_precision_over_judged_images_is_scikit_learns(require, class_block):
    sklearn, without_negative = require("sklearn.metrics"), 0
    for seed in range(15):
        image_emb, class_emb, labels, _ = random_case(seed)
        rng = np.random.default_rng(1000 + seed)
        negatives = [
            tuple({int(c) for c in rng.integers(0, len(class_emb), rng.integers(2))} - set(of_image))
            for of_image in labels
        ]
        found = average_precisions(image_emb, class_emb, labels, class_block, negatives)
        scores = image_emb @ class_emb.T
        expected = np.full(len(class_emb), np.nan)
        for c in range(len(class_emb)):
            judged = [i for i in range(len(labels)) if c in labels[i] or c in negatives[i]]
            true = [c in labels[i] for i in judged]
            without_negative += bool(true) and all(true)
            if any(true) and not all(true):
                expected[c] = sklearn.average_precision_score(true, scores[judged, c])
        assert not np.isnan(expected).all()
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert without_negative > 10


def test_contradicting_judgements_are_refused():
    eye = np.eye(2, dtype=np.float32)
    with pytest.raises(ValueError, match="class 1 is a label and a negative of image 0"):
        average_precisions(eye, eye, [(0, 1), (1,)], negatives=[(1,), ()])
    with pytest.raises(ValueError, match="2 images' labels and 1 images' negatives"):
        average_precisions(eye, eye, [(0,), (1,)], negatives=[(1,)])
    with pytest.raises(ValueError, match="below 2, the number of classes, found 1 … 2"):
        average_precisions(eye, eye, [(0,), (1,)], negatives=[(1,), (2,)])


def test_hierarchical_precision_is_reported_seen_and_unseen_apart():
    image_emb, class_emb, labels, unseen = random_case(3, n=60)
    c = len(class_emb)
    above = {str(i): (str((i - 1) // 2),) if i else () for i in range(c)}
    hierarchy = Hierarchy(list(above), above)
    found = zero_shot_metrics(image_emb, class_emb, labels, unseen, (1, 2, 5, 20), hierarchy=hierarchy)
    _, ids = top_k(image_emb, class_emb, 5)
    expected = hierarchical_precision(ids, labels, hierarchy, (1, 2, 5))
    only_unseen = [bool(true) and all(unseen[label] for label in true) for true in labels]
    for column, k in enumerate((1, 2, 5)):
        assert found[f"hierarchical@{k}"] == pytest.approx(np.nanmean(expected[:, column]))
        assert found[f"unseen/hierarchical@{k}"] == pytest.approx(np.mean(expected[only_unseen, column]))
    assert found["hierarchical@1"] == pytest.approx(found["hit@1"]) and "hierarchical@20" not in found


def test_intervals_of_all_figures():
    image_emb, class_emb, labels, unseen = random_case(5, n=300)
    plain = zero_shot_metrics(image_emb, class_emb, labels, unseen, (1, 2))
    found = zero_shot_metrics(image_emb, class_emb, labels, unseen, (1, 2), resamples=3000)
    assert {name: found[name] for name in plain} == plain
    figures = {name for name in plain if "@" in name or name.endswith("mAP")}
    assert set(found) == set(plain) | {f"{name}/{end}" for name in figures for end in ("low", "high")}
    assert all(found[f"{name}/low"] < found[name] < found[f"{name}/high"] for name in figures)

    # Harmonic means and average precisions by index, image by image and class by class.
    rng = np.random.default_rng(0)
    kinds = split_seen(labels, unseen)
    best = top_k(image_emb, class_emb, 1)[1][:, 0]
    hit = np.array([best_of in of_image for of_image, best_of in zip(labels, best)])
    labelled = np.flatnonzero([len(of_image) > 0 for of_image in labels])
    precisions = average_precisions(image_emb, class_emb, labels)
    precisions = precisions[~np.isnan(precisions)]
    harmonic, mean = [], []
    for _ in range(3000):
        drawn = rng.choice(labelled, len(labelled))
        a, b = (hit[drawn][kinds[kind][drawn]].mean() for kind in ("seen", "unseen"))
        harmonic.append(2 * a * b / (a + b))
        mean.append(rng.choice(precisions, len(precisions)).mean())
    for name, values in (("harmonic/hit@1", harmonic), ("mAP", mean)):
        low, high = np.percentile(values, (2.5, 97.5))
        assert found[f"{name}/low"] == pytest.approx(low, abs=0.12 * (high - low))
        assert found[f"{name}/high"] == pytest.approx(high, abs=0.12 * (high - low))
