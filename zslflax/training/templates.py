"""Chooses prompt templates without labels, by what a zero-shot teacher says with each of them."""

import logging
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from zslflax import distributed
from zslflax.data.image_features import ImageFeatures
from zslflax.errors import UserError
from zslflax.inference.class_embeddings import l2_normalize
from zslflax.inference.predictor import Predictor

log = logging.getLogger("zslflax")
MAX_IMAGES = 2_000  # on which templates are compared


def score_templates(
    image_emb: np.ndarray, class_emb: np.ndarray, reference: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """How a teacher answers with each of t templates, on images without labels.

    >>> image_emb = np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> good, bad = np.eye(2), np.array([[0.6, 0.8], [0.8, 0.6]])
    >>> confidence, agreement = score_templates(image_emb, np.stack([good, bad]), reference=good, scale=5.0)
    >>> confidence.round(2).tolist(), agreement.tolist()
    ([0.99, 0.73], [1.0, 0.0])

    Args:
        image_emb: unit vectors [n, d].
        class_emb: of the c class names in each template, unit vectors [t, c, d].
        reference: of the class names, averaged over all templates, unit vectors [c, d].
        scale: s; probabilities are softmax(s · cosine similarity).

    Returns:
        The confidence, which is the mean over images of the highest probability; and the agreement, the share of the
        images whose best class is that of the reference: float64 [t] each.
    """
    best = (image_emb @ reference.T).argmax(axis=1)
    confidence, agreement = np.empty((2, len(class_emb)))
    for i, emb in enumerate(class_emb):  # one at a time, for the memory
        logits = scale * (image_emb @ emb.T).astype(np.float64)
        total = np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)  # the best class has exp(0)
        confidence[i], agreement[i] = np.mean(1.0 / total), np.mean(logits.argmax(axis=1) == best)
    return confidence, agreement


def choose_templates(config: ConfigDict, teacher: Predictor, features: Sequence[ImageFeatures]) -> tuple[str, ...]:
    """The templates of the config, or the `objective.choose_templates` best of them by confidence × agreement.

    With a good template, the teacher is sure and agrees with what it says with all of them. The scores are logged
    beside those of the average of all and of the chosen. All processes must call this function.

    Args:
        config: the whole config.
        teacher: a zero-shot model.
        features: of each source's training images, by the teacher's image tower.

    Raises:
        UserError: there are not more templates than are to be chosen.
    """
    templates, count = tuple(config.eval.templates), config.objective.choose_templates
    if not count:
        return templates
    if count >= len(templates):
        raise UserError(
            f"objective.choose_templates is {count}, but eval.templates has {len(templates)}; give more candidates, or "
            "set it to 0 to use them all"
        )
    class_names, scale = config.model.class_names, config.objective.teacher_scale
    class_emb = np.stack([teacher.class_embeddings(class_names, (template,)) for template in templates])

    def choose() -> list[int]:
        image_emb, reference = embed_some(teacher, features), average(class_emb)
        confidence, agreement = score_templates(image_emb, class_emb, reference, scale)
        best = np.sort(np.argsort(-confidence * agreement, kind="stable")[:count]).tolist()
        averages = score_templates(image_emb, np.stack([reference, average(class_emb[best])]), reference, scale)
        names = [f"{'*' if i in best else ' '} {template}" for i, template in enumerate(templates)]
        rows = [*zip(confidence, agreement, names), *zip(*averages, ("= average of all", "= average of the chosen"))]
        log.info(
            "templates by the teacher's answers for %d images without labels; the chosen are marked\n%s\n%s",
            len(image_emb),
            "confidence agreement",
            "\n".join(f"{sure:10.3f} {agrees:9.3f}  {name}" for sure, agrees, name in rows),
        )
        return best

    return tuple(templates[i] for i in distributed.on_main(choose))


def average(class_emb: np.ndarray) -> np.ndarray:
    """The class embeddings of several templates together: unit vectors [t, c, d] → [c, d]."""
    return l2_normalize(class_emb.mean(axis=0))


def embed_some(teacher: Predictor, features: Sequence[ImageFeatures]) -> np.ndarray:
    """The teacher's embeddings of at most `MAX_IMAGES` training images, evenly spread over the sources: [n, d].

    Raises:
        UserError: none of them can be read.
    """
    total = sum(map(len, features))
    positions, first, found = np.arange(0, total, max(1, -(-total // MAX_IMAGES))), 0, []
    for source_features in features:
        index = positions[(positions >= first) & (positions < first + len(source_features))] - first
        values, readable = source_features(index)
        found.append(values[readable])
        first += len(source_features)
    image_features = np.concatenate(found)
    if not len(image_features):
        raise UserError(f"none of {len(positions)} training images can be read, on which templates would be compared")
    return teacher.project_image(image_features)
