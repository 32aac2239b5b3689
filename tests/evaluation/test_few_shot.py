"""Few-shot episodes, nearest neighbours and linear probe against scikit-learn's classifiers on the same images."""

import jax
import numpy as np
import pytest
from scipy import stats

from zslflax.evaluation import few_shot
from zslflax.inference.class_embeddings import l2_normalize


def clusters(n, classes=6, d=8, noise=0.8, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    centres = np.random.default_rng(9).standard_normal((classes, d))
    return (centres[labels] + noise * rng.standard_normal((n, d))).astype(np.float32), labels


def test_episodes_are_disjoint_and_uniform_and_depend_on_the_seed():
    labels = np.repeat([0, 4, 5, 7, 9], [8, 5, 9, 7, 3])
    support, query = few_shot.draw_episodes(labels, 3, 2, 4, 4000, seed=1)
    assert support.shape == (4000, 3, 2) and query.shape == (4000, 3, 4)
    images = np.concatenate([support, query], axis=2)
    of = labels[images]
    assert (of == of[:, :, :1]).all()  # a row is of one class, and all its images differ
    assert all(len(set(row)) == 6 for row in images.reshape(-1, 6).tolist())
    assert all(len(set(row)) == 3 for row in of[:, :, 0].tolist())
    # Classes 4 and 9 have fewer than 6 images; of the other three all are in each episode.
    assert set(of.ravel().tolist()) == {0, 5, 7}
    shares = np.bincount(images[of == 5], minlength=len(labels))[labels == 5] / 4000
    np.testing.assert_allclose(shares, 6 / 9, atol=0.03)
    np.testing.assert_array_equal(few_shot.draw_episodes(labels, 3, 2, 4, 4000, seed=1)[0], support)
    assert not np.array_equal(few_shot.draw_episodes(labels, 3, 2, 4, 4000, seed=2)[0], support)


def test_logistic_regression_equals_scikit_learn(require):
    linear_model = require("sklearn.linear_model")
    x, y = clusters(90)
    x = l2_normalize(x)
    for C in (0.1, 1.0, 100.0):
        expected = linear_model.LogisticRegression(C=C, tol=1e-8, max_iter=10_000)
        expected.fit(x.astype(np.float64), y)
        weights, bias = few_shot.fit(x, y.astype(np.int32), 6, C)
        np.testing.assert_allclose(weights.T, expected.coef_, atol=1e-3 * np.abs(expected.coef_).max())
        found = jax.nn.softmax(few_shot.matmul(x, weights) + bias)
        np.testing.assert_allclose(found, expected.predict_proba(x), atol=1e-3)


@pytest.mark.parametrize("shots", [1, 5])
def test_few_shot_equals_scikit_learn_episode_by_episode(require, shots):
    linear_model, neighbors = require("sklearn.linear_model"), require("sklearn.neighbors")
    nearest = neighbors.NearestCentroid() if shots > 1 else neighbors.KNeighborsClassifier(1)
    x, y = clusters(200)
    num_episodes, queries = 30, 6
    found = few_shot.few_shot(x, y, ways=4, shots=shots, queries=queries, num_episodes=num_episodes, C=2.0, seed=3)
    support, query = few_shot.draw_episodes(y, 4, shots, queries, num_episodes, seed=3)
    x = l2_normalize(x)
    scores = {"centroid": [], "logistic": []}
    for shot_images, query_images in zip(support, query):
        true = np.repeat(np.arange(4), queries)
        fitted, target = x[shot_images.ravel()], np.repeat(np.arange(4), shots)
        for name, model in (
            ("centroid", nearest),
            ("logistic", linear_model.LogisticRegression(C=2.0, tol=1e-8, max_iter=10_000)),
        ):
            scores[name].append(np.mean(model.fit(fitted, target).predict(x[query_images.ravel()]) == true))
    assert len(set(scores["centroid"])) > 3
    for name, values in scores.items():
        # One query of 720 may be so near a decision border that rounding in fp32 changes its class.
        assert found[name] == pytest.approx(np.mean(values), abs=1.5 / 720)
        interval = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
        half = (interval[1] - interval[0]) / 2
        assert found[f"{name}/high"] - found[name] == pytest.approx(half, rel=0.02)
        assert found[name] - found[f"{name}/low"] == pytest.approx(half, rel=0.02)


def test_augmented_views_of_the_shots_are_what_the_classifiers_learn_from(require):
    linear_model, neighbors = require("sklearn.linear_model"), require("sklearn.neighbors")
    x, y = clusters(120)
    views = x[:, None] + 0.5 * np.random.default_rng(3).standard_normal((120, 5, x.shape[1])).astype(np.float32)
    found = few_shot.few_shot(x, y, support_views=views, ways=3, shots=2, queries=5, num_episodes=20, seed=1)
    support, query = few_shot.draw_episodes(y, 3, 2, 5, 20, seed=1)
    x, views, scores = l2_normalize(x), l2_normalize(views), {"centroid": [], "logistic": []}
    for shot_images, query_images in zip(support, query):
        fitted, target = views[shot_images.ravel()].reshape(-1, x.shape[1]), np.repeat(np.arange(3), 2 * 5)
        for name, model in (
            ("centroid", neighbors.NearestCentroid()),
            ("logistic", linear_model.LogisticRegression(tol=1e-8, max_iter=10_000)),
        ):
            answers = model.fit(fitted, target).predict(x[query_images.ravel()])
            scores[name].append(np.mean(answers == np.repeat(np.arange(3), 5)))
    for name, values in scores.items():
        assert found[name] == pytest.approx(np.mean(values), abs=1.5 / 300)
    # One view that is the image itself changes nothing.
    arguments = dict(ways=3, shots=2, queries=5, num_episodes=20)
    assert few_shot.few_shot(x, y, support_views=x[:, None], **arguments) == few_shot.few_shot(x, y, **arguments)
    with pytest.raises(ValueError, match="expected views of"):
        few_shot.few_shot(x, y, support_views=views[:10])


@pytest.mark.parametrize("k", [1, 7, 60])
def test_nearest_neighbours_equal_scikit_learn(require, k):
    neighbors = require("sklearn.neighbors")
    (x, y), (test_x, test_y) = clusters(60), clusters(80, seed=1)
    y, test_y = 3 * y, 3 * test_y
    found = few_shot.nearest_neighbours(x, y, test_x, test_y, k=k, resamples=500)
    expected = neighbors.KNeighborsClassifier(k).fit(l2_normalize(x), y).score(l2_normalize(test_x), test_y)
    assert found["accuracy"] == pytest.approx(expected, abs=1e-12)
    assert found["accuracy/low"] < expected < found["accuracy/high"]


def test_linear_probe_chooses_its_penalty_without_the_test_images(require):
    linear_model = require("sklearn.linear_model")
    (x, y), (test_x, test_y) = clusters(150, noise=1.5), clusters(200, noise=1.5, seed=1)
    y, test_y = 3 * y, 3 * test_y
    found = few_shot.linear_probe(x, y, test_x, test_y, Cs=(1e-3, 1.0, 1e3), seed=4, resamples=500)
    order = np.random.default_rng(4).permutation(150)
    held, rest = order[:30], order[30:]
    fit = lambda C, rows: linear_model.LogisticRegression(C=C, max_iter=10_000).fit(l2_normalize(x)[rows], y[rows])
    scores = {C: fit(C, rest).score(l2_normalize(x)[held], y[held]) for C in (1e-3, 1.0, 1e3)}
    assert found["C"] == max(scores, key=scores.get) and len(set(scores.values())) > 1
    expected = fit(found["C"], order).score(l2_normalize(test_x), test_y)
    assert found["accuracy"] == pytest.approx(expected, abs=1.5 / 200)
    assert found["accuracy/low"] < found["accuracy"] < found["accuracy/high"]
    # Other answers on the test images change nothing about the choice.
    other = few_shot.linear_probe(x, y, test_x, np.roll(test_y, 1), Cs=(1e-3, 1.0, 1e3), seed=4)
    assert other["C"] == found["C"] and other["accuracy"] < found["accuracy"]


def test_arguments_that_cannot_be_measured_are_refused():
    x, y = clusters(40, classes=3)
    with pytest.raises(ValueError, match=r"only 0 of 3 classes have 40 \+ 15 images, but an episode has 5"):
        few_shot.few_shot(x, y, shots=40)
    with pytest.raises(ValueError, match="at least one of each, found ways=3, shots=0"):
        few_shot.few_shot(x, y, ways=3, shots=0)
    with pytest.raises(ValueError, match=r"found labels of shape \(39,\)"):
        few_shot.few_shot(x, y[:-1])
    with pytest.raises(ValueError, match="type object; leave out images with several labels or none"):
        few_shot.few_shot(x, np.array([(0, 1)] + [(0,)] * 39, object))
    with pytest.raises(ValueError, match="from 0 on, found -1"):
        few_shot.nearest_neighbours(x, y - 1, x, y)
    with pytest.raises(ValueError, match="between 1 and the 40 training images, found k = 41"):
        few_shot.nearest_neighbours(x, y, x, y, k=41)
    with pytest.raises(ValueError, match="1 classes have test images and no training image; the first is 7"):
        few_shot.linear_probe(x, y, x[:2], [0, 7])
    with pytest.raises(ValueError, match="at least two training images"):
        few_shot.linear_probe(x[:1], y[:1], x[:1], y[:1])
