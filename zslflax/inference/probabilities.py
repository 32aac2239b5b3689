"""Probabilities of class names, from cosine similarities and what the objective has learnt."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from zslflax.errors import UserError

IMAGE_CHUNK = 64  # images whose similarities to all classes are in memory at once


def class_probabilities(
    objective_params: Mapping[str, Any], image_emb: np.ndarray, class_emb: np.ndarray, scores: np.ndarray
) -> np.ndarray:
    """Returns the probability of each of the scores.

    A model that was trained with softmax gives the softmax over all classes of the similarities times the learnt logit
    scale: the class names exclude each other, and their probabilities sum to 1. A model that was trained with the
    sigmoid loss gives σ(scale · similarity + bias): each class name is judged by itself.

    >>> params = {"log_logit_scale": np.log(10.0)}
    >>> emb = np.eye(2, dtype=np.float32)
    >>> class_probabilities(params, emb[:1], emb, np.array([[1.0, 0.0]])).round(5).tolist()
    [[0.99995, 5e-05]]

    Args:
        objective_params: fp32 scalars, `log_logit_scale` and for the sigmoid loss `logit_bias`.
        image_emb: fp32 [n, d].
        class_emb: fp32 [c, d], of all classes.
        scores: cosine similarities [n, k] of each image to some of the classes.

    Returns:
        float64 [n, k].

    Raises:
        UserError: the model has no learnt scale.
    """
    if "log_logit_scale" not in objective_params:
        raise UserError("the model has no learnt logit scale, which probabilities need; use the cosine similarities")
    scale = np.exp(np.float64(objective_params["log_logit_scale"]))
    logits = scale * np.asarray(scores, np.float64)
    if "logit_bias" in objective_params:
        return 1.0 / (1.0 + np.exp(-(logits + np.float64(objective_params["logit_bias"]))))
    probabilities = np.empty_like(logits)
    for start in range(0, len(image_emb), IMAGE_CHUNK):
        rows = slice(start, start + IMAGE_CHUNK)
        all_logits = scale * (image_emb[rows] @ class_emb.T).astype(np.float64)
        highest = all_logits.max(axis=1, keepdims=True)
        total = np.exp(all_logits - highest).sum(axis=1, keepdims=True)
        probabilities[rows] = np.exp(logits[rows] - highest) / total
    return probabilities
