"""Caption noise: the agreement of images and captions, and duplicate captions, on pairs with known values."""

import numpy as np
import pytest
from scipy.special import softmax

from zslflax.evaluation.caption_noise import EmbeddedPairs, batch_agreement, summarise_noise


def units(rng, n, d=6):
    x = rng.standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("n, size, scale", [(40, 40, 5.0), (50, 16, 30.0), (7, 2, 100.0)])
def test_agreement_equals_brute_force(n, size, scale):
    rng = np.random.default_rng(n)
    image_emb, text_emb = units(rng, n), units(rng, n)
    order = np.random.default_rng(3).permutation(n)
    own, other = [], []
    for batch in range(n // size):
        members = order[batch * size : (batch + 1) * size]
        for i in members:
            p = softmax([scale * np.dot(image_emb[i].astype(np.float64), text_emb[j]) for j in members])
            own.append(p[members == i].item())
            other.append(p[members != i].max())
    found = batch_agreement(image_emb, text_emb, scale, size, seed=3)
    assert found["on_diagonal_mean"] == pytest.approx(np.mean(own), rel=1e-4)
    assert found["off_diagonal_max"] == pytest.approx(np.mean(other), rel=1e-4)


def test_summary_of_clean_and_of_shuffled_pairs():
    """Pairs of orthogonal vectors, of which every softmax is known."""
    n, captions = 600, ["the same", "twice", "twice", *(f"caption {i}" for i in range(596)), "the same"]
    image_emb = np.eye(n, dtype=np.float32)
    clean = summarise_noise(EmbeddedPairs(np.arange(n), image_emb, image_emb, captions), scale=8.0)
    assert clean["pairs"] == 600 and list(clean["batches"]) == [512]
    others = np.exp(8.0) + 511
    assert clean["batches"][512]["on_diagonal_mean"] == pytest.approx(np.exp(8.0) / others, rel=1e-5)
    assert clean["batches"][512]["off_diagonal_max"] == pytest.approx(1 / others, rel=1e-5)
    assert clean["duplicate_captions"] == pytest.approx(4 / 600)
    assert clean["most_frequent_captions"] == {"the same": 2, "twice": 2}
    few = summarise_noise(EmbeddedPairs(np.arange(3), image_emb[:3], image_emb[[1, 2, 0]], captions[:3]), scale=8.0)
    assert list(few["batches"]) == [3]  # one batch of all pairs, which are fewer than the smallest batch size
    assert few["batches"][3]["on_diagonal_mean"] == pytest.approx(1 / (np.exp(8.0) + 2), rel=1e-5)
    assert few["batches"][3]["off_diagonal_max"] == pytest.approx(np.exp(8.0) / (np.exp(8.0) + 2), rel=1e-5)
