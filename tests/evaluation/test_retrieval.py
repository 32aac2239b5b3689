"""Recall@k against a loop over sorted candidates, with equal scores and several captions per image."""

import numpy as np
import pytest

from zslflax.evaluation.results import flat_names
from zslflax.evaluation.retrieval import retrieval_recall


def nearest(query, candidates):
    scores = [sum(a * b for a, b in zip(query, candidate)) for candidate in candidates]
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


@pytest.mark.parametrize("seed", range(20))
def test_recall_equals_brute_force(seed):
    rng = np.random.default_rng(seed)
    n, m = 13, 29
    image_emb, text_emb = ((rng.integers(-2, 3, (rows, 3)) / 4).astype(np.float32) for rows in (n, m))
    text_image = rng.integers(0, n - 2, m)  # in no order; the last two images have no caption
    found = flat_names(retrieval_recall(image_emb, text_emb, text_image, ks=(1, 5, 10, 50)))
    images, texts = image_emb.tolist(), text_emb.tolist()
    for k in (1, 5, 10, 50):
        of_images = [{text_image[j] for j in nearest(images[i], texts)[:k]} for i in range(n)]
        hits = [i in of_images[i] for i in range(n) if i in text_image]
        assert found[f"image_to_text@{k}"] == pytest.approx(sum(hits) / len(hits), abs=1e-12)
        hits = [text_image[j] in nearest(texts[j], images)[:k] for j in range(m)]
        assert found[f"text_to_image@{k}"] == pytest.approx(sum(hits) / m, abs=1e-12)
    assert found["image_to_text@50"] == found["text_to_image@50"] == 1.0


def test_one_of_several_captions_is_enough():
    image_emb = np.eye(2, 4, dtype=np.float32)
    text_emb = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0.5, 0.4, 0, 0]], np.float32)
    found = flat_names(retrieval_recall(image_emb, text_emb, [0, 0, 1, 1], ks=(1, 2)))
    # Image 0 finds its second caption; image 1 finds caption 3, its own, although that prefers image 0.
    # Captions 0 and 2 score 0 with both images, and the tie goes to image 0.
    assert found["image_to_text@1"] == found["image_to_text@2"] == 1.0
    assert found["text_to_image@1"] == 0.5 and found["text_to_image@2"] == 1.0


def test_a_constant_embedding_has_the_recall_of_chance():
    same = np.ones((8, 2), np.float32)
    found = flat_names(retrieval_recall(same, same, np.arange(8), ks=(1, 4)))
    assert found["image_to_text@1"] == found["text_to_image@1"] == 1 / 8
    assert found["image_to_text@4"] == found["text_to_image@4"] == 1 / 2


def test_captions_without_an_image_are_refused():
    one = np.ones((2, 2), np.float32)
    with pytest.raises(ValueError, match="each of 2 captions"):
        retrieval_recall(one, one, [0])
    with pytest.raises(ValueError, match="captions of 2 images, found rows 0 … 2"):
        retrieval_recall(one, one, [0, 2])


def test_intervals_resample_images_with_all_their_captions():
    rng = np.random.default_rng(0)
    n, captions = 60, 5
    image_emb = rng.standard_normal((n, 4)).astype(np.float32)
    text_emb = np.repeat(image_emb + rng.standard_normal((n, 4)), captions, axis=0).astype(np.float32)
    text_image = np.repeat(np.arange(n), captions)  # an image's captions are the same: hit or missed together
    found = flat_names(retrieval_recall(image_emb, text_emb, text_image, (1,), resamples=4000))
    p = found["text_to_image@1"]
    width = found["text_to_image@1/high"] - found["text_to_image@1/low"]
    assert width == pytest.approx(2 * 1.96 * np.sqrt(p * (1 - p) / n), rel=0.1)  # n images, not 5 n captions
    assert found["image_to_text@1/low"] < found["image_to_text@1"] < found["image_to_text@1/high"]
