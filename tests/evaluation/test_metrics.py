"""Classification metrics against brute force, with equal scores and several labels per image."""

import math

import numpy as np
import pytest

from tests.testing.scores import random_case
from zslflax.evaluation.average_precision import average_precisions
from zslflax.evaluation.hierarchy import Hierarchy, hierarchical_precision
from zslflax.evaluation.metrics import harmonic_mean, hit_at_k, split_seen, zero_shot_metrics
from zslflax.evaluation.results import flat_names
from zslflax.inference.top_k import top_k


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
    for column, k in enumerate((1, 2, 5, 10)):
        expected = hits_by_loop(image_emb, class_emb, labels, k)
        assert np.nanmean(found[:, column]) == pytest.approx(expected, abs=1e-12)
        assert np.isnan(found[:, column]).tolist() == [not true for true in labels]


def test_unlabelled_images_change_only_the_counts():
    ids = np.array([[4, 2], [0, 1], [1, 0]])
    np.testing.assert_array_equal(hit_at_k(ids[:2], [(2,), (5,)], (1, 2)), [[0, 1], [0, 0]])
    np.testing.assert_array_equal(hit_at_k(ids, [(2,), (5,), ()], (1, 2)), [[0, 1], [0, 0], [np.nan, np.nan]])
    image_emb = np.array([[0, 2, 1], [2, 1, 0], [1, 2, 0]], np.float32)
    without = flat_names(zero_shot_metrics(image_emb[:2], np.eye(3), [(2,), (2,)], ks=(1, 2)))
    assert without["hit@1"] == 0.0 and without["hit@2"] == 0.5
    assert (without["labelled"], without["unlabelled"]) == (2, 0)
    assert flat_names(zero_shot_metrics(image_emb, np.eye(3), [(2,), (2,), ()], ks=(1, 2))) == without | {
        "unlabelled": 1
    }


@pytest.mark.parametrize("seed", range(10))
def test_zero_shot_metrics_equal_the_separate_metrics_over_all_classes(seed):
    image_emb, class_emb, labels, unseen = random_case(seed, n=60)
    found = flat_names(zero_shot_metrics(image_emb, class_emb, labels, unseen, ks=(1, 5, 100)))
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


def test_metrics_of_a_group_without_images_are_left_out():
    eye = np.eye(3, dtype=np.float32)
    unseen = np.array([False, False, True])
    found = flat_names(zero_shot_metrics(eye, eye, [(0,), (1,), (0, 2)], unseen, ks=(1, 2)))
    assert found["seen/hit@1"] == 1.0 and found["unseen/mAP"] == 1.0
    assert not any(name.startswith(("unseen/hit", "harmonic")) for name in found)
    assert all(math.isfinite(value) for value in found.values())


def test_images_with_seen_and_unseen_labels_or_none_are_in_neither_group():
    split = split_seen([(0,), (1,), (0, 1), (), (1, 2)], np.array([False, True, True]))
    np.testing.assert_array_equal(split["seen"], [True, False, False, False, False])
    np.testing.assert_array_equal(split["unseen"], [False, True, False, False, True])


def test_harmonic_mean():
    assert harmonic_mean(0.5, 0.25) == pytest.approx(1 / 3)
    assert harmonic_mean(0.5, 0.0) == harmonic_mean(0.0, 0.0) == 0.0


def test_arguments_that_cannot_be_measured_are_refused():
    ids, eye = np.zeros((2, 3), int), np.eye(2, dtype=np.float32)
    with pytest.raises(ValueError, match="2 and 1"):
        hit_at_k(ids, [(0,)], (1,))
    with pytest.raises(ValueError, match="1 ≤ k ≤ 3"):
        hit_at_k(ids, [(0,), (1,)], (1, 4))
    with pytest.raises(ValueError, match="none of 2 images has a true label"):
        hit_at_k(ids, [(), ()], (1,))
    with pytest.raises(ValueError, match="each of 2 classes"):
        zero_shot_metrics(eye, eye, [(0,), (1,)], unseen=[True], ks=(1,))


def test_hierarchical_precision_is_also_reported_for_seen_and_unseen_classes():
    image_emb, class_emb, labels, unseen = random_case(3, n=60)
    c = len(class_emb)
    above = {str(i): (str((i - 1) // 2),) if i else () for i in range(c)}
    hierarchy = Hierarchy(list(above), above)
    found = flat_names(zero_shot_metrics(image_emb, class_emb, labels, unseen, (1, 2, 5, 20), hierarchy=hierarchy))
    _, ids = top_k(image_emb, class_emb, 5)
    expected = hierarchical_precision(ids, labels, hierarchy, (1, 2, 5))
    only_unseen = [bool(true) and all(unseen[label] for label in true) for true in labels]
    for column, k in enumerate((1, 2, 5)):
        assert found[f"hierarchical@{k}"] == pytest.approx(np.nanmean(expected[:, column]))
        assert found[f"unseen/hierarchical@{k}"] == pytest.approx(np.mean(expected[only_unseen, column]))
    assert found["hierarchical@1"] == pytest.approx(found["hit@1"]) and "hierarchical@20" not in found


def test_every_metric_has_an_interval():
    image_emb, class_emb, labels, unseen = random_case(5, n=300)
    plain = flat_names(zero_shot_metrics(image_emb, class_emb, labels, unseen, (1, 2)))
    found = flat_names(zero_shot_metrics(image_emb, class_emb, labels, unseen, (1, 2), resamples=3000))
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
