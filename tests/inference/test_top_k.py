"""The top-k search compared with brute force: all scores, sorted stably."""

import jax
import numpy as np
import pytest

from zslflax.inference.top_k import GROUP, merge_chunk, top_k, top_k_of_columns, top_k_or_all


def brute_force(image_emb, class_emb, k):
    scores = image_emb.astype(np.float64) @ class_emb.T.astype(np.float64)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, ids, axis=1), ids


def coarse(rng, *shape):
    """Small multiples of 1/4, whose inner products are exact in fp32 and often equal."""
    return (rng.integers(-2, 3, shape) / 4).astype(np.float32)


@pytest.mark.parametrize(
    "n, c, k, class_chunk, image_chunk, max_images",
    [
        (1, 1, 1, 8, 8, 8),
        (7, 5, 5, 2, 3, 100),  # k > class_chunk, both last chunks are shorter
        (9, 40, 3, 16, 4, 9),
        (8, 40, 40, 40, 8, 4),
        (5, 12, 2, 100, 100, 3),  # fewer images than a chunk
        (11, 40, 3, 16, 3, 4),  # every last chunk is shorter
        (6, 1000, 3, 1000, 4, 6),  # wide enough for groups, not a multiple of their size
        (6, 1000, 3, 450, 6, 5),  # groups within chunks
    ],
)
def test_top_k_equals_brute_force_with_ties(n, c, k, class_chunk, image_chunk, max_images):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        image_emb, class_emb = coarse(rng, n, 3), coarse(rng, c, 3)
        scores, ids = top_k(image_emb, class_emb, k, class_chunk, image_chunk, max_images)
        expected_scores, expected_ids = brute_force(image_emb, class_emb, k)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_array_equal(scores, expected_scores)
        assert scores.dtype == np.float32 and ids.dtype == np.int32


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_every_backend_takes_as_many_images_at_a_time_as_suit_it(monkeypatch, backend):
    rng = np.random.default_rng(0)
    image_emb, class_emb = coarse(rng, 1500, 3), coarse(rng, 700, 3)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    scores, ids = top_k(image_emb, class_emb, 5)
    expected_scores, expected_ids = brute_force(image_emb, class_emb, 5)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)


def test_equal_scores_are_ordered_by_id():
    _, ids = top_k(np.ones((3, 2), np.float32), np.ones((2000, 2), np.float32), 4, class_chunk=700)
    np.testing.assert_array_equal(ids, np.tile(np.arange(4), (3, 1)))


@pytest.mark.parametrize("c", [2 * 2 * GROUP, 2 * 2 * GROUP + 1, 1003])
def test_top_k_of_columns_equals_a_stable_sort(c):
    for seed in range(20):
        scores = np.random.default_rng(seed).standard_normal((c, 4)).astype(np.float32)
        scores[::3] = np.round(scores[::3])  # ties within groups and between them
        best, ids = map(np.asarray, top_k_of_columns(scores, 2))
        expected = np.argsort(-scores, axis=0, kind="stable")[:2].T
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_array_equal(best.T, np.take_along_axis(scores, expected.T, axis=0))


def test_all_chunks_compile_at_most_two_shapes():
    before = merge_chunk._cache_size()
    top_k(
        np.eye(11, 4, dtype=np.float32), np.eye(29, 4, dtype=np.float32), 2, class_chunk=6, image_chunk=3, max_images=4
    )
    assert merge_chunk._cache_size() == before + 2


def test_no_images_give_empty_arrays_and_a_wrong_k_is_refused():
    scores, ids = top_k(np.zeros((0, 2), np.float32), np.zeros((3, 2), np.float32), 2)
    assert scores.shape == ids.shape == (0, 2)
    for k in (0, 4):
        with pytest.raises(ValueError, match=rf"number of classes, 3, found k = {k}"):
            top_k(np.zeros((2, 2), np.float32), np.zeros((3, 2), np.float32), k)


def test_top_k_or_all_returns_all_classes_where_there_are_fewer():
    scores, ids = top_k_or_all(np.eye(2, dtype=np.float32), np.eye(2, dtype=np.float32), 5)
    assert ids.tolist() == [[0, 1], [1, 0]] and scores.tolist() == [[1.0, 0.0], [1.0, 0.0]]
