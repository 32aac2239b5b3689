"""Zero-shot evaluation of a model on the config's test sets, by all devices of all processes."""

import functools
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from zslflax import distributed, figures
from zslflax.data import pipeline, preprocess
from zslflax.errors import UserError
from zslflax.evaluation.metrics import zero_shot_metrics
from zslflax.evaluation.retrieval import retrieval_recall
from zslflax.evaluation.test_sets import TestSet, open_sets
from zslflax.inference.class_embeddings import share_among_processes
from zslflax.inference.predictor import Predictor
from zslflax.inference.top_k import top_k

log = logging.getLogger("zslflax")
SHOWN, ANSWERS = 12, 5  # images in the picture, and names beside each


class Embedded(NamedTuple):
    """A test set's readable samples on the host, in the order of the source.

    Attributes:
        index: int64 [n], which samples they are.
        image: by predictor, fp32 [n, d].
        labels, captions: n tuples, of labels in the test set's label space and of texts.
        negatives: n tuples of the labels that an image is known not to have, or None.
        excluded: how many images or labels were left out, by reason.
    """

    index: np.ndarray
    image: dict[str, np.ndarray]
    labels: list[tuple[int, ...]]
    captions: list[tuple[str, ...]]
    negatives: list[tuple[int, ...]] | None
    excluded: dict[str, int]


def evaluate(
    predictors: dict[str, Predictor], test_sets: list[TestSet], config, workdir: Path, resamples: int = 0
) -> dict[str, float]:
    """Metrics of every test set, and a picture of the first predictor's answers in `workdir`/predictions.

    Args:
        predictors: by the part of the metrics' names that tells them apart: {"": teacher, "student/": student}.
        test_sets: from `open_sets`.
        config: the whole config.
        workdir: predictions/STEP.png is written there, or STEP-SET.png where there are several sets.
        resamples: of the bootstrap for 95% intervals; 0 for none.

    Returns:
        {"eval/SET/METRIC": …, "eval/SET/student/METRIC": …}, the same in every process.
    """
    metrics = {}
    for test in test_sets:
        embedded = embed(predictors, test, config)
        for who, predictor in predictors.items():
            results, answers = score(predictor, embedded.image[who], embedded, test, config, resamples)
            metrics |= {f"eval/{test.name}/{who}{metric}": value for metric, value in results.items()}
            if answers and who == next(iter(predictors)) and distributed.is_main():
                name = f"{predictor.step}" + (f"-{test.name}" if len(test_sets) > 1 else "")
                path = workdir / "predictions" / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                draw(test, embedded, answers).save(path)
    return metrics


def embed(predictors: dict[str, Predictor], test: TestSet, config) -> Embedded:
    """Every readable sample's embeddings by every predictor; each process reads and embeds its share."""
    size = next(iter(predictors.values())).config.model.image.size
    batches = pipeline.eval_batches(
        test.source,
        batch_size=config.eval.batch_size // jax.process_count(),
        image_size=size,
        resize=round(size * config.eval.resize_factor),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=config.data.threads,
    )
    image, index, described, errors = {who: [] for who in predictors}, [], [], []
    for batch in batches:
        for who, predictor in predictors.items():
            image[who].append(predictor.encode_image(batch["image"]))
        index.append(np.where(batch["valid"], batch["index"], -1))
        described += [
            (labels, [text for text in texts if text.strip()]) for labels, texts in zip(batch["label"], batch["text"])
        ]
        errors += batch["errors"]
    for name, message in errors[:5]:
        log.warning("%s: left out the unreadable sample %s: %s", test.name, name, message)

    index = distributed.gather_hosts(np.concatenate(index))
    image = {who: distributed.gather_hosts(np.concatenate(parts)) for who, parts in image.items()}
    described = [sample for host in distributed.gather_json(described) for sample in host]
    order = np.argsort(index, kind="stable")[np.count_nonzero(index < 0) :]
    if not len(order):
        raise UserError(f"eval.sets.{test.name}: none of the {len(test.source)} samples can be read; {errors[0]}")
    index, image = index[order], {who: x[order] for who, x in image.items()}
    labels, captions = map(list, zip(*(map(tuple, described[i]) for i in order)))
    classes, negatives = test.source.classes, test.source.negatives
    excluded = dict(test.source.excluded)
    if test.labels is not None and classes is not None:
        labels, excluded["labels_outside"] = test.labels.relabel(labels, classes)
        if negatives is not None:
            negatives, _ = test.labels.relabel([negatives[i] for i in index], classes)
    return Embedded(index, image, labels, captions, negatives, excluded)


def score(predictor: Predictor, image_emb: np.ndarray, embedded: Embedded, test: TestSet, config, resamples: int):
    """One predictor's metrics on one test set, and its answers: for each shown image [(name, score, true), …]."""
    encode_text = share_among_processes(predictor.encode_text)
    metrics, candidates = {}, None
    captions = [caption for of_image in embedded.captions for caption in of_image]
    if captions:
        owner = np.repeat(np.arange(len(image_emb)), [len(of_image) for of_image in embedded.captions])
        text_emb = encode_text(captions)
        recalls = retrieval_recall(image_emb, text_emb, owner, resamples=resamples)
        metrics |= {f"retrieval/{name}": value for name, value in recalls.items()}
        truth = [set(np.flatnonzero(owner == i)) for i in shown(len(image_emb))]
        candidates = text_emb, captions, truth
    if test.labels is not None and any(embedded.labels):
        space = test.labels
        check_labels(test, embedded)
        class_emb = predictor.class_embeddings(space.names, config.eval.templates)
        unseen = space.unseen if space.unseen.any() else None
        measure = lambda class_emb: zero_shot_metrics(
            image_emb,
            class_emb,
            embedded.labels,
            unseen,
            hierarchy=test.hierarchy,
            negatives=embedded.negatives,
            resamples=resamples,
        )
        metrics |= measure(class_emb) | embedded.excluded
        if space.synonyms is not None:
            results = measure(predictor.class_embeddings(space.synonyms, config.eval.templates))
            metrics |= {f"synonyms/{name}": value for name, value in results.items()}
        truth = [set(embedded.labels[i]) for i in shown(len(image_emb))]
        candidates = class_emb, space.names, truth
    elif test.labels is not None:
        log.warning("%s: no image has a label among the %d classes; %s", test.name, len(test.labels), embedded.excluded)
    return metrics, best_names(image_emb, *candidates) if candidates else []


def check_labels(test: TestSet, embedded: Embedded) -> None:
    """Refuses labels that are no index of the names."""
    for index, labels in zip(embedded.index, embedded.labels):
        if labels and not 0 <= min(labels) <= max(labels) < len(test.labels):
            raise UserError(
                f"eval.sets.{test.name}: sample {test.source[int(index)]['name']} has the label {max(labels)}, but "
                f"there are {len(test.labels)} names, 0 … {len(test.labels) - 1}; labels count from 0 in their order"
            )


def shown(n: int) -> np.ndarray:
    """Which of n images are in the picture: spread evenly, the same at every evaluation."""
    return np.unique(np.linspace(0, n - 1, min(n, SHOWN)).astype(int))


def best_names(image_emb, text_emb, names: Sequence[str], truth: list[set[int]]) -> list[list[tuple[str, float, bool]]]:
    """For each shown image its best names: (name, score, whether it is true)."""
    scores, ids = top_k(image_emb[shown(len(image_emb))], text_emb, min(ANSWERS, len(names)))
    return [[(names[i], float(s), int(i) in true) for s, i in zip(*row)] for *row, true in zip(scores, ids, truth)]


def draw(test: TestSet, embedded: Embedded, answers):
    """The picture of the shown images, their answers and their true names or captions."""
    rows, named = shown(len(embedded.index)), test.labels is not None and any(embedded.labels)
    pixels = [preprocess.record_image(test.source[int(embedded.index[i])]) for i in rows]
    true_names = [[test.labels.names[c] for c in embedded.labels[i]] if named else embedded.captions[i] for i in rows]
    return figures.prediction_grid(pixels, answers, true_names)


def table(metrics: dict[str, float]) -> str:
    """The hits and recalls in per cent: a row for each measure of each set; of the student only the whole set's."""
    rows = {}
    for name, value in metrics.items():
        group, _, metric = name.removeprefix("eval/").rpartition("/")
        measure, _, k = metric.partition("@")
        test, *part = group.split("/")
        if (k or metric == "mAP") and "harmonic" not in part and not ("student" in part and len(part) > 1):
            row = " ".join([test, *part, f"{measure if k else 'hit'}@k"])
            rows.setdefault(row, {})[f"@{k}" if k else metric] = value
    columns = [c for c in ("@1", "@2", "@5", "@10", "@20", "mAP") if any(c in values for values in rows.values())]
    width = max(map(len, rows), default=0)
    lines = [" " * width + "".join(f"{column:>7}" for column in columns)]
    for row in sorted(rows, key=lambda row: " retrieval " in row):
        cells = (f"{100 * rows[row][column]:7.1f}" if column in rows[row] else " " * 7 for column in columns)
        lines.append(f"{row:<{width}}" + "".join(cells))
    return "\n".join(lines)


def evaluate_run(config, workdir: Path, step: int | None = None) -> dict[str, float]:
    """Evaluates a checkpoint of `workdir` (default: the newest) without training; prints and returns the metrics.

    The model is what the workdir's own config.json says; the test sets are those of `config`.
    """
    test_sets = open_sets(config)
    restore = functools.partial(Predictor.restore, workdir, step=step, cache=config.eval.class_cache)
    predictors = {"": restore()}
    if predictors[""].config.teacher.kind == "ema":
        predictors["student/"] = restore(step=predictors[""].step, use="student")
    metrics = evaluate(predictors, test_sets, config, workdir, config.eval.bootstrap_resamples)
    if not metrics:
        raise UserError(
            "nothing could be measured: none of eval.sets has images with captions, or with labels among its classes"
            if test_sets
            else "there is nothing to measure: give the data of a test set, such as eval.sets.test.data"
        )
    step = predictors[""].step
    log.info("step %d of %s\n%s", step, workdir, table(metrics))
    if distributed.is_main():
        print(json.dumps({"step": step, **metrics}))
    return metrics
