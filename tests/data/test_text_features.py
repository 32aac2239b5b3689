"""Cached text features: the tower computes each text once, with the same bits whatever else is in the batch."""

import concurrent.futures
import copy
import functools

import jax
import numpy as np
import pytest

from zslflax import distributed
from zslflax.config import default_config
from zslflax.data.text_features import TextFeatures
from zslflax.models.build import build_two_tower

TOKENS = 20


@pytest.fixture(scope="module")
def built():
    config = default_config().model
    config.image.name, config.image.size = "vit_nano4", 8
    config.text.max_tokens = TOKENS
    config.text.scratch = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 40}
    model = build_two_tower(config)
    image, text = np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, TOKENS), np.int32)
    return model, jax.jit(model.init)(jax.random.key(0), image, text, text == 0)


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(TOKENS) < rng.integers(1, TOKENS + 1, (n, 1))
    return np.where(mask, rng.integers(0, 40, (n, TOKENS)), 0).astype(np.int32), mask


@pytest.fixture
def counted(built):
    """Features, and the number of texts in each call of the tower."""
    model, variables = built
    features, calls = TextFeatures(model, distributed.replicate(variables), capacity=50, frozen=True), []
    mapped, features.apply_fn = features.apply_fn.mapped, copy.copy(features.apply_fn)

    def count(variables, inputs):
        calls.append(sum(len({row.tobytes() for row in rows}) for rows in inputs[0]))
        return mapped(variables, inputs)

    features.apply_fn.mapped = count
    return features, calls


def test_features_are_the_outputs_of_the_tower(built, counted):
    model, variables = built
    tokens, mask = texts(30)
    direct = jax.jit(functools.partial(model.apply, method="text_features"))(variables, tokens, mask)
    np.testing.assert_allclose(counted[0](tokens, mask), direct, atol=1e-5)


def test_the_tower_computes_each_text_once(counted):
    features, calls = counted
    tokens, mask = texts(30)
    first = features(tokens, mask)
    before = len(calls)
    again = features(tokens[::-1], mask[::-1])
    assert len(calls) == before
    np.testing.assert_array_equal(again[::-1], first)


def test_features_do_not_depend_on_the_other_texts_in_the_batch(built, counted):
    model, variables = built
    tokens, mask = texts(30)
    alone = TextFeatures(model, distributed.replicate(variables), capacity=0, frozen=True)
    together = counted[0](tokens, mask)
    for i in (0, 7, 29):
        np.testing.assert_array_equal(alone(tokens[i : i + 1], mask[i : i + 1])[0], together[i])


def test_the_cache_holds_no_more_than_its_capacity(counted):
    features, calls = counted
    tokens, mask = texts(80)
    first = features(tokens, mask)
    assert len(features.store.slots) == 50 and len(features.store.cache) == 50
    before = len(calls)
    np.testing.assert_array_equal(features(tokens, mask), first)
    assert len(calls) > before  # the other texts are computed again


def test_other_variables_start_an_empty_cache_unless_the_tower_is_frozen(built):
    model, variables = built
    tokens, mask = texts(4)
    features = TextFeatures(model, distributed.replicate(variables), capacity=50)
    before = features(tokens, mask)
    doubled = distributed.replicate(jax.tree.map(lambda x: 2 * x, variables))
    assert np.abs(features.with_variables(doubled)(tokens, mask) - before).max() > 1e-3
    np.testing.assert_array_equal(features(tokens, mask), before)
    frozen = TextFeatures(model, distributed.replicate(variables), capacity=50, frozen=True)
    assert frozen.with_variables(doubled) is frozen


def test_threads_share_a_cache(built):
    """As training and evaluation do."""
    model, variables = built
    make = lambda capacity: TextFeatures(model, distributed.replicate(variables), capacity=capacity, frozen=True)
    shared, alone = make(50), make(0)
    batches = [texts(30, seed) for seed in range(6)]  # more texts than the cache holds
    expected = [alone(*batch) for batch in batches]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for got, want in zip(pool.map(lambda batch: shared(*batch), batches * 3), expected * 3):
            np.testing.assert_array_equal(got, want)
