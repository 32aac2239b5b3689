"""Probabilities of class names, against scipy's softmax and logistic function on all similarities."""

import numpy as np
import pytest
from scipy.special import expit, softmax

from zslflax.errors import UserError
from zslflax.inference.predictor import Predictor
from zslflax.inference.probabilities import class_probabilities
from zslflax.inference.top_k import top_k

CLASS_NAMES = ["red circle", "blue square", "a cat"]


@pytest.fixture
def embeddings():
    rng = np.random.default_rng(0)
    image_emb, class_emb = rng.normal(size=(150, 8)), rng.normal(size=(30, 8))
    return [(x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32) for x in (image_emb, class_emb)]


@pytest.mark.parametrize("log_scale", [0.0, 2.6, 4.6])
def test_softmax_runs_over_all_classes_and_not_over_the_best(embeddings, log_scale):
    image_emb, class_emb = embeddings
    scores, ids = top_k(image_emb, class_emb, k=4)
    found = class_probabilities({"log_logit_scale": np.float32(log_scale)}, image_emb, class_emb, scores)
    expected = softmax(np.exp(np.float64(np.float32(log_scale))) * (image_emb @ class_emb.T), axis=1)
    np.testing.assert_allclose(found, np.take_along_axis(expected, ids, axis=1), rtol=1e-4)


def test_the_sigmoid_judges_each_class_by_itself(embeddings):
    image_emb, class_emb = embeddings
    scores, _ = top_k(image_emb, class_emb, k=4)
    params = {"log_logit_scale": np.float32(2.3), "logit_bias": np.float32(-3.0)}
    found = class_probabilities(params, image_emb, class_emb, scores)
    np.testing.assert_allclose(found, expit(np.exp(2.3) * scores - 3.0), rtol=1e-5)


def test_a_model_without_a_learnt_scale_is_refused(embeddings):
    with pytest.raises(UserError, match="no learnt logit scale"):
        class_probabilities({}, *embeddings, np.zeros((150, 1)))


def test_the_predictor_gives_them_beside_the_cosines(tiny_config, finished_workdir, images):
    predictor = Predictor.restore(finished_workdir)
    plain = predictor.classify(images, CLASS_NAMES)
    both = predictor.classify(images, CLASS_NAMES, probabilities=True)
    assert [[(name, score) for name, score, _ in answer] for answer in both] == plain
    np.testing.assert_allclose([sum(p for *_, p in answer) for answer in both], 1.0, rtol=1e-5)
