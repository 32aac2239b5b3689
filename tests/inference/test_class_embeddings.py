"""Class embeddings: the mean over prompts, and the use of the cache."""

import numpy as np
import pytest

from zslflax.inference import class_cache
from zslflax.inference.class_cache import ClassCache
from zslflax.inference.class_embeddings import cached_class_embeddings, embed_class_names

NAMES = ["red circle", "blue {square}", "red circle", "green bar", "teal ring"]
TEMPLATES = ["a photo of a {}.", "{}", "two {}, or {}"]


def encode(prompts):
    """Embeddings that depend only on the characters, and are not of unit length."""
    letters = np.array([np.bincount(np.frombuffer(p.encode(), np.uint8), minlength=128) for p in prompts])
    return (letters @ np.random.default_rng(0).standard_normal((128, 6))).astype(np.float32)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 7, 15, 64])
def test_a_class_embedding_is_the_normalised_mean_of_its_prompts(batch_size):
    sizes = []

    def recorded(prompts):
        sizes.append(len(prompts))
        return encode(prompts)

    found = embed_class_names(recorded, NAMES, TEMPLATES, batch_size)
    expected = []
    for name in NAMES:
        prompts = encode([f"a photo of a {name}.", name, f"two {name}, or {name}"]).astype(np.float64)
        mean = np.mean(prompts / np.linalg.norm(prompts, axis=1, keepdims=True), axis=0)
        expected.append(mean / np.linalg.norm(mean))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32
    assert max(sizes) <= batch_size and sum(sizes) == 15 and len(sizes) == -(-15 // batch_size)


def test_names_and_templates_that_make_no_prompt_are_refused():
    with pytest.raises(ValueError, match="class name goes; these have none.*no place"):
        embed_class_names(encode, ["cat"], ["a {}", "no place"])
    with pytest.raises(ValueError, match="found 0 class names and 1 templates"):
        embed_class_names(encode, [], ["{}"])
    with pytest.raises(ValueError, match="empty: class name 2 of 3"):
        embed_class_names(encode, ["cat", " ", "dog"], ["{}"])


def test_cached_class_embeddings_are_computed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(class_cache, "MIN_PROMPTS", len(NAMES) * len(TEMPLATES))
    computed = []

    def recorded(prompts):
        computed.extend(prompts)
        return encode(prompts)

    expected = embed_class_names(encode, NAMES, TEMPLATES)
    for _ in range(2):
        found = cached_class_embeddings(ClassCache(tmp_path), recorded, NAMES, TEMPLATES)
        np.testing.assert_array_equal(found, expected)
    assert len(computed) == 15
    np.testing.assert_array_equal(cached_class_embeddings(ClassCache(), recorded, NAMES, TEMPLATES), expected)
    assert len(computed) == 30
