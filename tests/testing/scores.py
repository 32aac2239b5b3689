"""Random embeddings and labels for tests of metrics."""

import numpy as np


def random_case(seed, n=17, c=11, d=3):
    """Embeddings whose inner products are exact and often equal; 0–3 labels an image, never class 0."""
    rng = np.random.default_rng(seed)
    image_emb, class_emb = ((rng.integers(-2, 3, (rows, d)) / 4).astype(np.float32) for rows in (n, c))
    labels = [tuple(rng.integers(1, c, rng.integers(0, 4)).tolist()) for _ in range(n)]
    labels[0] = (3, 3, 5)  # a label given twice is one label
    return image_emb, class_emb, labels, rng.random(c) < 0.4
