"""Few-shot evaluation of a trained model: opens labelled images, embeds them with augmented views, and measures."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from zslflax.background import load_ahead
from zslflax.config import default_config
from zslflax.data.cores import choose_threads
from zslflax.data.images import BadSample
from zslflax.data.preprocess import record_image
from zslflax.data.sources.base import Source
from zslflax.data.sources.opening import open_source
from zslflax.data.sources.subset import keep_classes
from zslflax.data.views import Views, evaluation_view
from zslflax.errors import UserError
from zslflax.evaluation.few_shot import few_shot, linear_probe, nearest_neighbours
from zslflax.inference.predictor import Predictor
from zslflax.progress import Progress

log = logging.getLogger("zslflax")
CHUNK = 512  # crops that are embedded at once
# Smallest share of the area in an augmented view of a shot. The published random crops of 84 pixels out of 100 are 0.7.
CROP_SCALE = 0.7


class EmbeddedViews(NamedTuple):
    """Embedded images of which each has one class.

    Attributes:
        labels: int64 [n].
        centre: by output of the model, embeddings of the centre crops, fp32 [n, d].
        views: the same of v augmented views, fp32 [n, v, d].
    """

    labels: np.ndarray
    centre: dict[str, np.ndarray]
    views: dict[str, np.ndarray]


def open_labelled(spec: str, class_names: Sequence[str] | None = None, kept: Sequence[str] | None = None) -> Source:
    """Opens labelled images, perhaps of some classes alone.

    Args:
        spec: a source, as `open_source` takes it for a test set.
        class_names: the names of the labels, where the source has labels without names.
        kept: the names or ids of the classes to keep; None: all.

    Raises:
        UserError: there is no such source or class.
    """
    source = open_source(spec, default_config().data, "test")
    return source if kept is None else keep_classes(source, kept, class_names)


def single_labels(source: Source) -> tuple[np.ndarray, np.ndarray]:
    """The images of a source that have exactly one class: their indices and labels, int64 [n]; others are counted.

    Raises:
        UserError: there is none.
    """
    labels: list[tuple[int, ...]] = []
    for index in range(len(source)):
        try:
            labels.append(source.read_annotations(index)["label"])
        except BadSample as error:
            log.warning("left out the unreadable sample %s: %s", error.name, error)
            labels.append(())
    indices = np.array([index for index, image_labels in enumerate(labels) if len(image_labels) == 1], np.int64)
    if not len(indices):
        raise UserError(f"none of the {len(source)} images has exactly one label, which few-shot evaluation needs")
    if len(indices) < len(source):
        log.warning("left out %d of %d images, which have no label or several", len(source) - len(indices), len(source))
    return indices, np.array([labels[index][0] for index in indices], np.int64)


def embed_views(predictor: Predictor, source: Source, num_views: int, seed: int = 0) -> EmbeddedViews:
    """Embeds each image of a source that has one class: its centre crop, and augmented views.

    Args:
        predictor: the model.
        source: of labelled images.
        num_views: v, random crops that may be mirrored; 0 for none.
        seed: of the random crops.
    """
    centre = evaluation_view(predictor.config)
    augmented = Views(num_views, centre.size, scale=(CROP_SCALE, 1.0), flip=True, seed=seed)
    if num_views == 1:  # `Views` of one view are centre crops
        raise UserError("expected 0 augmented views, for the shots as they are, or at least 2; found 1")
    indices, labels = single_labels(source)

    def load(index: Any) -> np.ndarray | None:
        try:
            image = record_image(source[int(index)])
        except BadSample as error:
            name = source.read_annotations(int(index))["name"]
            log.warning("left out the unreadable sample %s: %s", name, error)
            return None
        return np.stack([centre(image, index, 0), *(augmented(image, index, v) for v in range(num_views))])

    def embedded_chunks() -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        progress, per_chunk = Progress("few-shot images", "images", len(indices)), max(1, CHUNK // (1 + num_views))
        numbers = np.split(np.arange(len(indices)), np.arange(per_chunk, len(indices), per_chunk))
        with ThreadPoolExecutor(choose_threads(0)) as pool:
            for rows, images in load_ahead(pool, lambda row: load(int(indices[row])), numbers):
                readable = [image is not None for image in images]
                if any(readable):
                    pixels = np.concatenate([image for image in images if image is not None])
                    outputs = predictor.image_outputs(pixels)
                    kept = sum(readable)
                    yield rows[readable], {k: x.reshape(kept, 1 + num_views, -1) for k, x in outputs.items()}
                progress.update(len(rows))

    chunks = list(embedded_chunks())
    if not chunks:
        raise UserError(f"none of the {len(indices)} images can be read")
    rows, outputs = zip(*chunks)
    joined = {name: np.concatenate([chunk[name] for chunk in outputs]) for name in outputs[0]}
    return EmbeddedViews(
        labels[np.concatenate(rows)],
        {name: x[:, 0] for name, x in joined.items()},
        {name: x[:, 1:] for name, x in joined.items()},
    )


def measure_few_shot(
    images: EmbeddedViews, *, shots: Sequence[int], ways: int, queries: int, episodes: int, seed: int = 0
) -> dict[str, float]:
    """Measures each output of a model in few-shot episodes.

    Returns:
        "OUTPUT/K-shot/centroid" and "…/logistic", each with "/low" and "/high", as `few_shot` gives them.
    """
    metrics: dict[str, float] = {}
    for output, embeddings in images.centre.items():
        views = images.views[output] if images.views[output].shape[1] else None
        for k in shots:
            found = few_shot(
                embeddings,
                images.labels,
                support_views=views,
                ways=ways,
                shots=k,
                queries=queries,
                num_episodes=episodes,
                seed=seed,
            )
            metrics |= {f"{output}/{k}-shot/{name}": value for name, value in found.items()}
    return metrics


def measure_whole_set(train: EmbeddedViews, test: EmbeddedViews, resamples: int = 1_000) -> dict[str, float]:
    """Measures each output by nearest neighbours and a linear probe, which learn from a whole labelled set.

    Returns:
        "OUTPUT/neighbours" and "OUTPUT/probe", each with "/low" and "/high", the 95% interval over test images.
    """
    metrics: dict[str, float] = {}
    for output, train_emb in train.centre.items():
        arguments = train_emb, train.labels, test.centre[output], test.labels
        k = min(20, len(train_emb))
        for name, found in (
            ("neighbours", nearest_neighbours(*arguments, k=k, resamples=resamples)),
            ("probe", linear_probe(*arguments, resamples=resamples)),
        ):
            metrics |= {f"{output}/{name}{key.removeprefix('accuracy')}": x for key, x in found.items() if key != "C"}
    return metrics


def format_metrics(metrics: dict[str, float]) -> str:
    """The metrics in percent, one a line, with half the width of their intervals."""
    lines = []
    for name, value in metrics.items():
        if name.endswith(("/low", "/high")):
            continue
        half = (metrics[f"{name}/high"] - metrics[f"{name}/low"]) / 2
        lines.append(f"{name:<32}{100 * value:6.1f} ± {100 * half:.1f}")
    return "\n".join(lines)
