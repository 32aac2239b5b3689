"""Zero-shot evaluation of one or several models on the config's test sets, by all devices of all processes."""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from zslflax import distributed, figures
from zslflax.data import preprocess
from zslflax.data.image_features import ImageFeatures
from zslflax.data.sources.base import Source
from zslflax.errors import StorageError
from zslflax.evaluation.embedding import embed_images
from zslflax.evaluation.metrics import zero_shot_metrics
from zslflax.evaluation.results import Metric, Results
from zslflax.evaluation.retrieval import retrieval_recall
from zslflax.evaluation.test_sets import TestSet, TrueLabels, true_labels
from zslflax.inference.class_embeddings import share_among_processes
from zslflax.inference.predictor import Predictor
from zslflax.inference.top_k import top_k_or_all
from zslflax.saving import storage_errors

log = logging.getLogger("zslflax")
DRAWN_IMAGES, DRAWN_ANSWERS = 12, 5  # in the figure of predictions, and beside each image


class Candidates(NamedTuple):
    """The texts that the images of a test set are matched with: class names or captions.

    Attributes:
        text_emb: unit vectors fp32 [m, d].
        texts: m class names or captions.
        true: n tuples of the texts that are true of each image, as indices.
    """

    text_emb: np.ndarray
    texts: Sequence[str]
    true: Sequence[Sequence[int]]


def evaluate(
    predictors: Mapping[str, Predictor],
    test_sets: Sequence[TestSet],
    config: ConfigDict,
    folder: Path,
    resamples: int = 0,
    features_of: Callable[[Source], ImageFeatures | None] | None = None,
) -> Results:
    """Measures every model on every test set, and draws the first model's predictions into a folder.

    Args:
        predictors: by `Metric.model`: {"": the shipped model, "student": the student}.
        test_sets: from `open_test_sets`.
        config: the whole config.
        folder: STEP.png is written there, or STEP-SET.png where there are several sets.
        resamples: of the bootstrap for 95% intervals; 0 for none.
        features_of: opens the features of a test set's images, by the frozen image tower that all models share. Where
            it is or returns None, images are read and embedded.

    Returns:
        The same results in every process.
    """
    results: Results = {}
    shipped = next(iter(predictors))
    for test_set in test_sets:
        features = features_of(test_set.source) if features_of is not None else None
        images = embed_images(predictors, test_set.source, f"eval.sets.{test_set.name}", config, features)
        truth = true_labels(test_set, images.sample, images.labels)
        for model, predictor in predictors.items():
            image_emb = images.image_emb[model]
            measured, candidates = measure_model(
                predictor, image_emb, test_set, truth, images.captions, config.eval.templates, resamples
            )
            results |= {m._replace(model=model, test_set=test_set.name): value for m, value in measured.items()}
            if candidates is not None and model == shipped and distributed.is_main():
                suffix = f"-{test_set.name}" if len(test_sets) > 1 else ""
                path = folder / f"{predictor.step}{suffix}.png"
                write_predictions(draw_predictions(test_set.source, images.sample, image_emb, candidates), path)
    return results


def write_predictions(figure: Image.Image, path: Path) -> None:
    """Writes a PNG file, or warns that it cannot be written: what is measured does not depend on it."""
    try:
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            figures.write_figure(figure, path)
    except StorageError as error:
        log.warning("the predictions are not drawn: %s", error)


def measure_model(
    predictor: Predictor,
    image_emb: np.ndarray,
    test_set: TestSet,
    truth: TrueLabels,
    captions: Sequence[Sequence[str]],
    templates: Sequence[str],
    resamples: int,
) -> tuple[Results, Candidates | None]:
    """Measures one model on one test set: retrieval where there are captions, classification where there are labels.

    Args:
        predictor: the model.
        image_emb: its embeddings of the n images, fp32 [n, d].
        test_set: its label space and hierarchy.
        truth: of the n images.
        captions: n sequences of texts.
        templates: prompts of the class names.
        resamples: of the bootstrap.

    Returns:
        The results, and the classes or captions that the figure shows beside the images; None where nothing can be
        measured.
    """
    results: Results = {}
    candidates = None
    if any(captions):
        candidates = embed_captions(predictor, captions)
        owner = np.repeat(np.arange(len(captions)), [len(image_captions) for image_captions in captions])
        recalls = retrieval_recall(image_emb, candidates.text_emb, owner, resamples=resamples)
        results |= {metric._replace(task="retrieval"): value for metric, value in recalls.items()}
    if (space := test_set.label_space) is None:
        return results, candidates
    if not any(truth.labels):
        log.warning("%s: no image has a label among the %d classes; %s", test_set.name, len(space), truth.excluded)
        return results, candidates

    classify = functools.partial(
        zero_shot_metrics,
        image_emb,
        labels=truth.labels,
        unseen=space.unseen if space.unseen.any() else None,
        hierarchy=test_set.hierarchy,
        negatives=truth.negatives,
        resamples=resamples,
    )
    class_emb = predictor.class_embeddings(space.class_names, templates)
    results |= classify(class_emb) | {Metric(reason): count for reason, count in truth.excluded.items()}
    if space.synonyms is not None:
        measured = classify(predictor.class_embeddings(space.synonyms, templates))
        results |= {metric._replace(task="synonyms"): value for metric, value in measured.items()}
    return results, Candidates(class_emb, space.class_names, truth.labels)


def embed_captions(predictor: Predictor, captions: Sequence[Sequence[str]]) -> Candidates:
    """Embeds the captions of n images, as the candidates of retrieval."""
    texts = [caption for image_captions in captions for caption in image_captions]
    ends = np.cumsum([len(image_captions) for image_captions in captions])
    true = [range(end - len(image_captions), end) for end, image_captions in zip(ends, captions)]
    return Candidates(share_among_processes(predictor.encode_text)(texts), texts, true)


def drawn_images(n: int) -> np.ndarray:
    """Which of n images are in the figure of predictions: evenly spread, the same at every evaluation."""
    return np.unique(np.linspace(0, n - 1, min(n, DRAWN_IMAGES)).astype(int))


def draw_predictions(source: Source, sample: np.ndarray, image_emb: np.ndarray, candidates: Candidates) -> Image.Image:
    """Draws some images with their best candidates beside them and the true ones below.

    Args:
        source: of the images.
        sample: int64 [n], the index of each image in the source.
        image_emb: fp32 [n, d].
        candidates: what the images are matched with.
    """
    rows, texts = drawn_images(len(sample)), candidates.texts
    scores, ids = top_k_or_all(image_emb[rows], candidates.text_emb, DRAWN_ANSWERS)
    true = [candidates.true[i] for i in rows]
    answers = [
        [(texts[c], float(score), c in true_ids) for c, score in zip(best, best_scores)]
        for best, best_scores, true_ids in zip(ids.tolist(), scores, true)
    ]
    pixels = [preprocess.record_image(source[int(sample[i])]) for i in rows]
    return figures.prediction_grid(pixels, answers, [[texts[c] for c in true_ids] for true_ids in true])
