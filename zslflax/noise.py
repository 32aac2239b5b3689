"""How noisy a dataset's pairing of images and captions is, as a trained model sees it.

    python -m zslflax.noise --workdir=runs/demo --data=shapes
    python -m zslflax.main --config=… --config.data.exclude=runs/demo/noise/noise.csv

With the embeddings v, t of a batch of n pairs and the model's learnt scale s, P_ij = softmax_j(s · v_i·t_j).
The more the captions fit their own images alone, the higher is the mean of P's diagonal, and the lower the
mean of the highest value that each row has beside it. Pairs are ranked by v_i·t_i.
"""

import argparse
import collections
import csv
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from zslflax import figures
from zslflax.cli import exit_on_error, start_logging
from zslflax.data import preprocess
from zslflax.data.sources.opening import open_source
from zslflax.errors import UserError
from zslflax.evaluation import zero_shot
from zslflax.evaluation.test_sets import TestSet
from zslflax.inference.predictor import Predictor
from zslflax.inference.top_k import top_k

log = logging.getLogger("zslflax")
SIZES = (512, 1024, 2048)  # n
SHOWN, BETTER = 12, 3  # pairs in the picture, and captions beside each that the model likes better
TEXTS = 1 << 14  # captions that are tokenised at once


class Pairs(NamedTuple):
    """A source's readable pairs; of several captions the first that is not blank.

    Attributes:
        number: int64 [n], of the records in the source.
        image_emb, text_emb: unit vectors fp32 [n, d].
        captions: n texts.
    """

    number: np.ndarray
    image_emb: np.ndarray
    text_emb: np.ndarray
    captions: list[str]


def embed(predictor: Predictor, source: Sequence, name: str) -> Pairs:
    """Every pair's embeddings; what is unreadable or has no caption is left out, and logged."""
    found = zero_shot.embed({"": predictor}, TestSet(name, source, None), predictor.config)
    first = [next((text for text in texts if text.strip()), None) for texts in found.captions]
    kept = np.flatnonzero([caption is not None for caption in first])
    if not len(kept):
        raise UserError(f"{name} has no captions")
    log.info("%d of %d samples are readable and have a caption", len(kept), len(source))
    captions = [first[i] for i in kept]
    parts = [predictor.encode_text(captions[i : i + TEXTS]) for i in range(0, len(captions), TEXTS)]
    return Pairs(found.index[kept], found.image[""][kept], np.concatenate(parts), captions)


def agreement(image_emb: np.ndarray, text_emb: np.ndarray, scale: float, size: int, seed: int = 0) -> dict[str, float]:
    """The softmaxed similarities of shuffled batches, images → captions.

    Args:
        image_emb, text_emb: unit vectors fp32 [n, d] of pairs.
        scale: s, of the similarities in the softmax.
        size: pairs in each batch; the rest that fills no batch is left out.
        seed: of the order.

    Returns:
        `on_diagonal_mean`: mean of P_ii, and `off_diagonal_max`: mean of max_{j≠i} P_ij, over all rows.
    """
    order = np.random.default_rng(seed).permutation(len(image_emb))
    own, other = [], []
    for start in range(0, len(order) - size + 1, size):
        rows = order[start : start + size]
        logits = scale * image_emb[rows] @ text_emb[rows].T
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        own.append(p.diagonal().copy())
        np.fill_diagonal(p, 0.0)
        other.append(p.max(axis=1))
    return {"on_diagonal_mean": float(np.mean(own)), "off_diagonal_max": float(np.mean(other))}


def analyse(found: Pairs, scale: float) -> dict:
    """All figures of the pairs, in JSON's types; one batch of all where they are fewer than the smallest."""
    n = len(found.captions)
    sizes = [size for size in SIZES if size <= n] or [n]
    counts = collections.Counter(found.captions)
    repeated = {caption: count for caption, count in counts.most_common() if count > 1}
    return {
        "pairs": n,
        "scale": scale,
        "batches": {size: agreement(found.image_emb, found.text_emb, scale, size) for size in sizes},
        "duplicate_captions": sum(repeated.values()) / n,
        "most_frequent_captions": dict(list(repeated.items())[:10]),
    }


def scores_of(found: Pairs) -> np.ndarray:
    """v_i·t_i of every pair, fp32 [n]: the lower, the less the caption fits its image."""
    return np.einsum("nd,nd->n", found.image_emb, found.text_emb)


def write_csv(file: Path, found: Pairs, worst: np.ndarray, source: Sequence) -> None:
    """The worst pairs, worst first, as `data.exclude` takes them: name, score, caption."""
    names = dict(enumerate(source.names()))
    scores = scores_of(found)
    with open(file, "w", newline="", encoding="utf-8") as lines:
        table = csv.writer(lines)
        table.writerow(("name", "score", "caption"))
        table.writerows((names[int(found.number[i])], f"{scores[i]:.4f}", found.captions[i]) for i in worst)


def draw(found: Pairs, worst: np.ndarray, source: Sequence):
    """The worst pairs: each image with its caption (green), and those of other images that fit better."""
    scores, captions = scores_of(found), sorted(set(found.captions))
    first = {caption: i for i, caption in reversed(list(enumerate(found.captions)))}
    text_emb = found.text_emb[[first[caption] for caption in captions]]
    best, ids = top_k(found.image_emb[worst], text_emb, min(BETTER, len(captions)))
    rows = []
    for i, *others in zip(worst, best, ids):
        own = (found.captions[i], float(scores[i]), True)
        rows.append([own] + [(captions[c], float(s), False) for s, c in zip(*others) if captions[c] != own[0]])
    shown = [preprocess.record_image(source[int(found.number[i])]) for i in worst]
    return figures.prediction_grid(shown, rows, [(found.captions[i],) for i in worst])


def main() -> None:
    parser = argparse.ArgumentParser("python -m zslflax.noise", description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", required=True, help="of a training run; or an exported folder, or a Hub id")
    parser.add_argument("--data", required=True, help="a source of pairs, as the config's data.train has them")
    parser.add_argument("--worst", type=float, default=0.1, help="share of the pairs in noise.csv (default 0.1)")
    parser.add_argument("--to", help="folder of noise.json, noise.csv and noise.png; default: WORKDIR/noise")
    args = parser.parse_args()
    if not 0.0 < args.worst < 1.0:
        parser.error(f"--worst is {args.worst}, expected a share between 0 and 1")
    start_logging()
    predictor = Predictor.restore(args.workdir)
    source = open_source(args.data, predictor.config.data, "train")
    found = embed(predictor, source, args.data)
    log_scale = predictor.variables["params"]["objective"]["log_logit_scale"]
    figures = analyse(found, float(np.exp(log_scale)))
    folder = Path(args.to or Path(args.workdir) / "noise").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "noise.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False), encoding="utf-8")
    order = np.argsort(scores_of(found), kind="stable")
    write_csv(folder / "noise.csv", found, order[: max(1, round(args.worst * len(order)))], source)
    draw(found, order[:SHOWN], source).save(folder / "noise.png")
    log.info("noise.json, noise.csv and noise.png are in %s", folder)
    print(json.dumps(figures, ensure_ascii=False))


if __name__ == "__main__":
    with exit_on_error():
        main()
