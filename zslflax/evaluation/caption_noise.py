"""Caption noise: how well the captions of a dataset fit their own images, as a trained model sees it.

With the embeddings v, t of a batch of n pairs and the model's learnt logit scale s, P_ij = softmax_j(s · v_i·t_j). If
captions fit their own image only, the mean of P's diagonal is high, and the mean of the highest other value per row is
low. Pairs are ranked by v_i·t_i.
"""

import collections
import csv
import dataclasses
import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from zslflax import figures
from zslflax.data import preprocess
from zslflax.data.image_features import ImageFeatures
from zslflax.data.sources.base import Source
from zslflax.data.sources.opening import open_source
from zslflax.errors import UserError
from zslflax.evaluation.embedding import embed_images
from zslflax.inference.predictor import Predictor
from zslflax.inference.top_k import top_k_or_all
from zslflax.saving import storage_errors, write_text

log = logging.getLogger("zslflax")
BATCH_SIZES = (512, 1024, 2048)  # n
DRAWN_PAIRS, DRAWN_CAPTIONS = 12, 3  # in the figure, and captions beside each pair that the model prefers
TEXT_BATCH = 1 << 14  # captions that are tokenised at once


@dataclasses.dataclass(frozen=True)
class EmbeddedPairs:
    """The readable pairs of a source; of several captions the first that is not blank.

    Attributes:
        sample: int64 [n], the index of each pair in the source.
        image_emb: unit vectors fp32 [n, d].
        text_emb: unit vectors fp32 [n, d].
        captions: n texts.
    """

    sample: np.ndarray
    image_emb: np.ndarray
    text_emb: np.ndarray
    captions: list[str]


def analyse_source(
    predictor: Predictor,
    spec: str,
    worst: float,
    folder: Path,
    features_of: Callable[[Source], ImageFeatures | None] = lambda source: None,
) -> dict[str, Any]:
    """Analyses the pairs of a source, and writes noise.json, noise.csv and noise.png.

    Args:
        predictor: with the config that says how `spec` is opened.
        spec: a source of pairs, as in `config.data.train`.
        worst: share of the pairs that noise.csv lists, between 0 and 1.
        folder: where the files are written; it is made if needed.
        features_of: opens the features of the source's images by the predictor's image tower; where it returns None,
            images are read.

    Returns:
        The contents of noise.json, from `summarise_noise`.

    Raises:
        UserError: the source has no captions or cannot be read, or a file cannot be written.
    """
    source = open_source(spec, predictor.config.data, "train")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    pairs = embed_pairs(predictor, source, spec, features_of(source))
    log_scale = predictor.variables["params"]["objective"]["log_logit_scale"]
    summary = summarise_noise(pairs, float(np.exp(log_scale)))
    order = np.argsort(pair_scores(pairs), kind="stable")
    write_text(folder / "noise.json", json.dumps(summary, indent=1, ensure_ascii=False))
    write_text(folder / "noise.csv", format_pairs(pairs, order[: max(1, round(worst * len(order)))], source))
    figure = draw_pairs(pairs, order[:DRAWN_PAIRS], source)
    figures.write_figure(figure, folder / "noise.png")
    log.info("noise.json, noise.csv and noise.png are in %s", folder)
    return summary


def embed_pairs(
    predictor: Predictor, source: Source, name: str, features: ImageFeatures | None = None
) -> EmbeddedPairs:
    """Embeds every pair of a source, without those that are unreadable or have no caption, which are logged.

    Args:
        predictor: embeds images and captions.
        source: of pairs.
        name: of the source in messages.
        features: of the source's images; None: images are read.

    Raises:
        UserError: no sample has a caption.
    """
    images = embed_images({"": predictor}, source, name, predictor.config, features)
    kept = np.array([i for i, captions in enumerate(images.captions) if captions], np.int64)
    if not len(kept):
        raise UserError(f"{name} has no captions")
    log.info("%d of %d samples are readable and have a caption", len(kept), len(source))
    captions = [images.captions[i][0] for i in kept]
    starts = range(0, len(captions), TEXT_BATCH)
    text_emb = np.concatenate([predictor.encode_text(captions[start : start + TEXT_BATCH]) for start in starts])
    return EmbeddedPairs(images.sample[kept], images.image_emb[""][kept], text_emb, captions)


def batch_agreement(
    image_emb: np.ndarray, text_emb: np.ndarray, scale: float, batch_size: int, seed: int = 0
) -> dict[str, float]:
    """Computes how much of each image's softmax over the captions of a batch is on its own caption.

    >>> eye = np.eye(4, dtype=np.float32)
    >>> batch_agreement(eye, eye, scale=1000.0, batch_size=2)
    {'on_diagonal_mean': 1.0, 'off_diagonal_max': 0.0}

    Args:
        image_emb: unit vectors fp32 [n, d].
        text_emb: unit vectors fp32 [n, d].
        scale: s, of the similarities in the softmax.
        batch_size: pairs in each batch. Pairs are shuffled, and those that do not fill a batch are left out.
        seed: of the order.

    Returns:
        `on_diagonal_mean`: the mean of P_ii, and `off_diagonal_max`: the mean of max_{j≠i} P_ij, both over all rows.
    """
    order = np.random.default_rng(seed).permutation(len(image_emb))
    own, other = [], []
    for start in range(0, len(order) - batch_size + 1, batch_size):
        rows = order[start : start + batch_size]
        logits = scale * image_emb[rows] @ text_emb[rows].T
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        own.append(p.diagonal().copy())
        np.fill_diagonal(p, 0.0)
        other.append(p.max(axis=1))
    return {"on_diagonal_mean": float(np.mean(own)), "off_diagonal_max": float(np.mean(other))}


def summarise_noise(pairs: EmbeddedPairs, scale: float) -> dict[str, Any]:
    """Summarises pairs in JSON's types: `batch_agreement` at several batch sizes, and duplicate captions.

    Pairs that are fewer than the smallest batch size make one batch.
    """
    n = len(pairs.captions)
    batch_sizes = [size for size in BATCH_SIZES if size <= n] or [n]
    counts = collections.Counter(pairs.captions)
    repeated = {caption: count for caption, count in counts.most_common() if count > 1}
    return {
        "pairs": n,
        "scale": scale,
        "batches": {size: batch_agreement(pairs.image_emb, pairs.text_emb, scale, size) for size in batch_sizes},
        "duplicate_captions": sum(repeated.values()) / n,
        "most_frequent_captions": dict(list(repeated.items())[:10]),
    }


def pair_scores(pairs: EmbeddedPairs) -> np.ndarray:
    """v_i·t_i of every pair, fp32 [n]. A low score means that the caption does not fit its image."""
    return np.einsum("nd,nd->n", pairs.image_emb, pairs.text_emb)


def format_pairs(pairs: EmbeddedPairs, chosen: np.ndarray, source: Source) -> str:
    """Formats pairs as CSV, which `config.data.exclude` takes: name, score, caption."""
    names, scores = list(source.names()), pair_scores(pairs)
    lines = io.StringIO()
    writer = csv.writer(lines)
    writer.writerow(("name", "score", "caption"))
    writer.writerows((names[pairs.sample[i]], f"{scores[i]:.4f}", pairs.captions[i]) for i in chosen)
    return lines.getvalue()


def draw_pairs(pairs: EmbeddedPairs, chosen: np.ndarray, source: Source) -> Image.Image:
    """Draws pairs: each image with its caption (green) and the captions of other images that fit it better."""
    scores, captions = pair_scores(pairs), sorted(set(pairs.captions))
    first = {caption: i for i, caption in reversed(list(enumerate(pairs.captions)))}
    text_emb = pairs.text_emb[[first[caption] for caption in captions]]
    best_scores, best = top_k_or_all(pairs.image_emb[chosen], text_emb, DRAWN_CAPTIONS)
    rows = []
    for i, ids, id_scores in zip(chosen, best, best_scores):
        own = pairs.captions[i]
        others = [(captions[c], float(score), False) for c, score in zip(ids, id_scores) if captions[c] != own]
        rows.append([(own, float(scores[i]), True), *others])
    pixels = [preprocess.record_image(source[int(pairs.sample[i])]) for i in chosen]
    return figures.prediction_grid(pixels, rows, [(pairs.captions[i],) for i in chosen])
