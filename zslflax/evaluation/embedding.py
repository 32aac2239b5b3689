"""Embeds a test set with one or several models, on all devices of all processes."""

import dataclasses
import logging
from collections.abc import Mapping

import jax
import numpy as np
from ml_collections import ConfigDict

from zslflax import distributed
from zslflax.data import pipeline
from zslflax.data.image_features import ImageFeatures, with_image_features
from zslflax.data.sources.base import Source
from zslflax.errors import UserError
from zslflax.inference.predictor import Predictor

log = logging.getLogger("zslflax")
LOGGED_ERRORS = 5


@dataclasses.dataclass(frozen=True)
class EmbeddedImages:
    """The readable samples of a source on the host, in the order of the source.

    Attributes:
        sample: int64 [n], the index of each sample in the source.
        image_emb: by model, unit vectors fp32 [n, d].
        labels: n tuples of labels, as the source has them.
        captions: n tuples of texts that are not blank.
    """

    sample: np.ndarray
    image_emb: dict[str, np.ndarray]
    labels: list[tuple[int, ...]]
    captions: list[tuple[str, ...]]


def embed_images(
    predictors: Mapping[str, Predictor],
    source: Source,
    name: str,
    config: ConfigDict,
    features: ImageFeatures | None = None,
) -> EmbeddedImages:
    """Embeds every readable sample by every predictor. Each process reads and embeds its share; all get the whole.

    Args:
        predictors: by model; they all take images of one size.
        source: its samples.
        name: of the source in messages.
        config: the whole config.
        features: of the source's images, by the frozen image tower that all predictors share; None: images are read.

    Raises:
        UserError: no sample can be read.
    """
    size = next(iter(predictors.values())).config.model.image.size
    batches = pipeline.eval_batches(
        source,
        batch_size=config.eval.batch_size // jax.process_count(),
        image_size=size,
        resize=round(size * config.eval.resize_factor),
        interpolation=config.eval.interpolation,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        threads=config.data.threads,
        read_images=features is None,
    )
    if features is not None:
        batches = with_image_features(batches, [features])
    parts: dict[str, list[np.ndarray]] = {model: [] for model in predictors}
    samples, descriptions = [], []
    errors: list[tuple[str, str]] = []
    for batch in batches:
        for model, predictor in predictors.items():
            project = predictor.encode_image if features is None else predictor.project_image
            parts[model].append(project(batch["image"] if features is None else batch["image_features"]))
        samples.append(np.where(batch["valid"], batch["index"], -1))
        descriptions += [
            (labels, [text for text in captions if text.strip()])
            for labels, captions in zip(batch["labels"], batch["captions"])
        ]
        errors += batch["errors"]
    for sample_name, message in errors[:LOGGED_ERRORS]:
        log.warning("%s: left out the unreadable sample %s: %s", name, sample_name, message)

    sample = distributed.gather_hosts(np.concatenate(samples))
    image_emb = {model: distributed.gather_hosts(np.concatenate(embeddings)) for model, embeddings in parts.items()}
    descriptions = [description for host in distributed.gather_json(descriptions) for description in host]
    order = np.argsort(sample, kind="stable")[np.count_nonzero(sample < 0) :]
    if not len(order):
        first = "".join(f"; the first error is of {sample_name}: {message}" for sample_name, message in errors[:1])
        raise UserError(f"{name}: none of the {len(source)} samples can be read{first}")
    return EmbeddedImages(
        sample=sample[order],
        image_emb={model: embeddings[order] for model, embeddings in image_emb.items()},
        labels=[tuple(descriptions[i][0]) for i in order],
        captions=[tuple(descriptions[i][1]) for i in order],
    )
