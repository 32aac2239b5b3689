"""Average precision against scikit-learn, and the best classes of the same pass against `top_k`."""

import numpy as np
import pytest

from tests.testing.scores import random_case
from zslflax.evaluation.average_precision import average_precisions, mean_average_precision, rank_classes
from zslflax.inference.top_k import top_k


@pytest.mark.parametrize("class_chunk", [1, 4, 100])
def test_average_precision_equals_scikit_learn(require, class_chunk):
    sklearn = require("sklearn.metrics")
    for seed, n in [*((seed, 17) for seed in range(15)), (15, 300)]:  # 300: many images per class
        image_emb, class_emb, labels, _ = random_case(seed, n)
        found = average_precisions(image_emb, class_emb, labels, class_chunk)
        scores = image_emb @ class_emb.T
        rows = [i for i, of_image in enumerate(labels) if of_image]
        expected = np.full(len(class_emb), np.nan)
        for c in range(len(class_emb)):
            true = [c in labels[i] for i in rows]
            if any(true):
                expected[c] = sklearn.average_precision_score(true, scores[rows, c])
        assert np.isnan(expected).any() and not np.isnan(expected).all()
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        mean = mean_average_precision(image_emb, class_emb, labels, class_chunk)
        assert mean == pytest.approx(np.nanmean(expected), rel=1e-12)


def test_average_precision_of_a_case_computed_by_hand():
    # Ranked 1: true, 2 and 3: equal, one of them true, 4: false. Precision 1 at the first, 2/3 at the tie.
    image_emb = np.array([[4], [2], [2], [1], [9]], np.float32)  # the last has no label: not even a negative
    assert mean_average_precision(image_emb, np.ones((1, 1), np.float32), [(0,), (0,), (), (), ()]) == 1.0
    found = average_precisions(image_emb, np.array([[1], [-1]], np.float32), [(0,), (0,), (1,), (1,), ()])
    np.testing.assert_allclose(found, [(1 + 2 / 3) / 2, (1 + 2 / 3) / 2])


def test_average_precision_of_a_perfect_and_of_a_constant_classifier():
    eye = np.eye(6, dtype=np.float32)
    labels = [(i,) for i in range(6)]
    assert mean_average_precision(eye, eye, labels) == 1.0
    assert mean_average_precision(np.ones_like(eye), eye, labels) == pytest.approx(1 / 6)  # all images tie


@pytest.mark.parametrize("class_chunk", [2, 100])
def test_average_precision_over_judged_images_equals_scikit_learn(require, class_chunk):
    sklearn, without_negative = require("sklearn.metrics"), 0
    for seed in range(15):
        image_emb, class_emb, labels, _ = random_case(seed)
        rng = np.random.default_rng(1000 + seed)
        negatives = [
            tuple({int(c) for c in rng.integers(0, len(class_emb), rng.integers(2))} - set(of_image))
            for of_image in labels
        ]
        found = average_precisions(image_emb, class_emb, labels, class_chunk, negatives)
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


def test_invalid_labels_and_negatives_are_refused():
    eye = np.eye(2, dtype=np.float32)
    with pytest.raises(ValueError, match="none of 2 images has a true label"):
        mean_average_precision(eye, eye, [(), ()])
    with pytest.raises(ValueError, match="below 2, the number of classes, found 0 … 2"):
        mean_average_precision(eye, eye, [(0,), (2,)])
    with pytest.raises(ValueError, match="class 1 is a label and a negative of image 0"):
        average_precisions(eye, eye, [(0, 1), (1,)], negatives=[(1,), ()])
    with pytest.raises(ValueError, match="2 images' labels and 1 images' negatives"):
        average_precisions(eye, eye, [(0,), (1,)], negatives=[(1,)])
    with pytest.raises(ValueError, match="below 2, the number of classes, found 1 … 2"):
        average_precisions(eye, eye, [(0,), (1,)], negatives=[(1,), (2,)])


@pytest.mark.parametrize("class_chunk, image_chunk", [(1, 64), (4, 3), (7, 64), (100, 5)])
def test_the_best_classes_equal_top_k_for_every_chunk_size(monkeypatch, class_chunk, image_chunk):
    name = "zslflax.evaluation.average_precision.images_at_a_time"
    monkeypatch.setattr(name, lambda n: min(n, image_chunk))
    for seed in range(3):
        image_emb, class_emb, labels, _ = random_case(seed)
        for k in (1, 5, 11):
            ids, precisions = rank_classes(image_emb, class_emb, labels, k, class_chunk=class_chunk)
            np.testing.assert_array_equal(ids, top_k(image_emb, class_emb, k)[1])  # of equal scores too
            np.testing.assert_array_equal(precisions, average_precisions(image_emb, class_emb, labels))


def test_the_best_of_many_classes_equal_top_k():
    rng = np.random.default_rng(0)
    image_emb, class_emb = (rng.integers(-4, 5, (rows, 16)).astype(np.float32) for rows in (70, 3000))  # exact scores
    ids, _ = rank_classes(image_emb, class_emb, [(0,)] * 70, 20)
    np.testing.assert_array_equal(ids, top_k(image_emb, class_emb, 20)[1])
