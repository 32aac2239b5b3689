"""The zero-shot classifier against brute force: every score, sorted stably."""

import numpy as np
import pytest

from zslflax.inference import top_k
from zslflax.inference.class_embeddings import class_embeddings
from zslflax.inference.top_k import top_k


def brute_force(image_emb, class_emb, k):
    scores = image_emb.astype(np.float64) @ class_emb.T.astype(np.float64)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, ids, axis=1), ids


def coarse(rng, *shape):
    """Small multiples of 1/4: inner products are exact in fp32, and many are equal."""
    return (rng.integers(-2, 3, shape) / 4).astype(np.float32)


@pytest.mark.parametrize(
    "n, c, k, class_block, image_block, images",
    [
        (1, 1, 1, 8, 8, 8),
        (7, 5, 5, 2, 3, 100),  # k > class_block, both last blocks are shorter
        (9, 40, 3, 16, 4, 9),
        (8, 40, 40, 40, 8, 4),
        (5, 12, 2, 100, 100, 3),  # fewer images than a block
        (11, 40, 3, 16, 3, 4),  # everything's last is shorter
        (6, 1000, 3, 1000, 4, 6),  # wide enough for groups, not a multiple of their size
        (6, 1000, 3, 450, 6, 5),  # groups within blocks
    ],
)
def test_top_k_is_brute_force_with_ties(n, c, k, class_block, image_block, images):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        image_emb, class_emb = coarse(rng, n, 3), coarse(rng, c, 3)
        scores, ids = top_k(image_emb, class_emb, k, class_block, image_block, images)
        expected_scores, expected_ids = brute_force(image_emb, class_emb, k)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_array_equal(scores, expected_scores)
        assert scores.dtype == np.float32 and ids.dtype == np.int32


def test_top_k_of_equal_scores_counts_up():
    _, ids = top_k(np.ones((3, 2), np.float32), np.ones((2000, 2), np.float32), 4, class_block=700)
    np.testing.assert_array_equal(ids, np.tile(np.arange(4), (3, 1)))


@pytest.mark.parametrize("c", [2 * 2 * top_k.GROUP, 2 * 2 * top_k.GROUP + 1, 1003])
def test_grouped_top_k_of_columns_is_a_stable_sort(c):
    for seed in range(20):
        scores = np.random.default_rng(seed).standard_normal((c, 4)).astype(np.float32)
        scores[::3] = np.round(scores[::3])  # ties within groups and between them
        best, ids = map(np.asarray, top_k.top_k_of_columns(scores, 2))
        expected = np.argsort(-scores, axis=0, kind="stable")[:2].T
        np.testing.assert_array_equal(ids, expected)
        np.testing.assert_array_equal(best.T, np.take_along_axis(scores, expected.T, axis=0))


def test_top_k_compiles_twice_at_most_for_all_blocks():
    before = top_k.merge_block._cache_size()
    top_k(np.eye(11, 4, dtype=np.float32), np.eye(29, 4, dtype=np.float32), 2, class_block=6, image_block=3, images=4)
    assert top_k.merge_block._cache_size() == before + 2


def test_top_k_of_no_images_and_of_too_many_classes():
    scores, ids = top_k(np.zeros((0, 2), np.float32), np.zeros((3, 2), np.float32), 2)
    assert scores.shape == ids.shape == (0, 2)
    for k in (0, 4):
        with pytest.raises(ValueError, match=rf"number of classes, 3, found k = {k}"):
            top_k(np.zeros((2, 2), np.float32), np.zeros((3, 2), np.float32), k)


NAMES = ["red circle", "blue {square}", "red circle", "green bar", "teal ring"]
TEMPLATES = ["a photo of a {}.", "{}", "two {}, or {}"]


def encode(prompts):
    """Embeddings that depend on the characters alone; deliberately not of unit length."""
    letters = np.array([np.bincount(np.frombuffer(p.encode(), np.uint8), minlength=128) for p in prompts])
    return (letters @ np.random.default_rng(0).standard_normal((128, 6))).astype(np.float32)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 7, 15, 64])
def test_class_embeddings_average_the_prompts(batch_size):
    sizes = []

    def recorded(prompts):
        sizes.append(len(prompts))
        return encode(prompts)

    found = class_embeddings(recorded, NAMES, TEMPLATES, batch_size)
    expected = []
    for name in NAMES:
        prompts = encode([f"a photo of a {name}.", name, f"two {name}, or {name}"]).astype(np.float64)
        mean = np.mean(prompts / np.linalg.norm(prompts, axis=1, keepdims=True), axis=0)
        expected.append(mean / np.linalg.norm(mean))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32
    assert max(sizes) <= batch_size and sum(sizes) == 15 and len(sizes) == -(-15 // batch_size)


def test_class_embeddings_refuse_what_cannot_be_a_prompt():
    with pytest.raises(ValueError, match="class name goes; these have none.*no place"):
        class_embeddings(encode, ["cat"], ["a {}", "no place"])
    with pytest.raises(ValueError, match="found 0 names and 1 templates"):
        class_embeddings(encode, [], ["{}"])
    with pytest.raises(ValueError, match="empty: name 2 of 3"):
        class_embeddings(encode, ["cat", " ", "dog"], ["{}"])
