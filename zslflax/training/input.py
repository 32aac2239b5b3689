"""The train step's input: batches on the devices, with captions as tokens, as packed tokens, or as frozen features."""

import contextlib
import functools
import itertools
import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from zslflax import distributed
from zslflax.background import BackgroundIterator
from zslflax.config import is_classifier
from zslflax.data import packing, pipeline
from zslflax.data.batch import Batch
from zslflax.data.caption_lengths import count_lengths
from zslflax.data.image_features import ImageFeatures, with_image_features
from zslflax.data.sources.base import Source
from zslflax.data.streams import REASONS_STREAM
from zslflax.data.text import Tokenizer
from zslflax.data.text_features import TextFeatures
from zslflax.data.views import evaluation_view
from zslflax.losses.classification import needs_labels, refines_labels
from zslflax.training.optimizer import FOREVER

log = logging.getLogger("zslflax")


def device_batches(
    config: ConfigDict,
    sources: Sequence[Source],
    tokenizer: Tokenizer | None,
    start_step: int,
    text_features: TextFeatures | None,
    image_features: Sequence[ImageFeatures] = (),
    images_from: int = FOREVER,
    teacher_features: Sequence[ImageFeatures] = (),
) -> BackgroundIterator[tuple[dict[str, jax.Array], Any]]:
    """Yields (batch on the devices, errors of unreadable samples) from a step on.

    Everything that a batch needs runs in a thread: assembling, packing, text features, and the copy to the devices.

    Args:
        config: the whole config.
        sources: the training sources.
        tokenizer: the text tower's tokenizer; None for a classifier.
        start_step: the number of batches to leave out.
        text_features: features of a frozen text tower; None where the text tower is trained.
        image_features: of each source's images, by a frozen image tower; (): batches have images.
        images_from: the step from which batches have images nevertheless, because the tower is trained.
        teacher_features: of each source's images, by the image tower of a classifier's zero-shot teacher.
    """
    # All processes exchange values here, and not later in a thread of their own.
    load = functools.partial(host_batches, config, sources, tokenizer, distributed.local_processes())
    if is_classifier(config):
        batches = classifier_batches(config, sources, load(start_step), teacher_features)
    elif image_features:
        batches = feature_batches(load, start_step, image_features, images_from, config.features.views)
    else:
        batches = load(start_step)
    if text_features is not None and (config.features.folder or config.model.text.cached_captions):
        batches = with_text_features(batches, text_features)
    elif config.model.text.pack_length and tokenizer is not None:
        batches = with_packed_text(config, sources, tokenizer, batches)
    return distributed.prefetch_to_devices(batches)


def host_batches(
    config: ConfigDict,
    sources: Sequence[Source],
    tokenizer: Tokenizer | None,
    local_processes: int,
    start_step: int,
    views: int = 0,
) -> Iterator[Batch]:
    """This host's share of the batches from a step on; with `views`, of positions of images instead of images.

    The images have the sizes of `config.model.image.schedule`.
    """
    load = functools.partial(
        pipeline.train_batches,
        sources,
        config.data.weights,
        tokenizer,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        crop_scale=config.data.crop_scale,
        flip=config.data.flip,
        threads=config.data.threads,
        workers=config.data.workers,
        local_processes=local_processes,
        views=views,
        with_ids=config.objective.duplicates != "negative",
        classes=len(config.model.class_names) if needs_labels(config.objective) else 0,
        weak_view=evaluation_view(config) if refines_labels(config.objective) else None,
    )
    full = config.model.image.size, config.steps
    sizes = [full] if views else [*config.model.image.schedule, full]
    sizes = [(size, until) for size, until in sizes if start_step < until] or [full]
    first = load(image_size=sizes[0][0], start_step=start_step)  # raises errors here, and not later in a thread
    return first if len(sizes) == 1 else batches_of_sizes(first, load, sizes, start_step)


def batches_of_sizes(
    batches: Generator[Batch],
    load: Callable[..., Generator[Batch]],
    sizes: Sequence[tuple[int, int]],
    start_step: int,
) -> Generator[Batch]:
    """The batches from a step on, whose images have one size after another.

    Args:
        batches: those with images of the first size.
        load: makes batches from its arguments `image_size` and `start_step`.
        sizes: (pixels, the step until which images have this size).
        start_step: of the first batch.
    """
    for (_, until), (size, _) in itertools.pairwise(sizes):
        with contextlib.closing(batches):
            yield from itertools.islice(batches, until - start_step)
        log.info("training images have %d pixels from step %d on; the step is compiled again", size, until)
        batches, start_step = load(image_size=size, start_step=until), until
    yield from batches


def classifier_batches(
    config: ConfigDict, sources: Sequence[Source], batches: Iterator[Batch], teacher_features: Sequence[ImageFeatures]
) -> Iterator[Batch]:
    """Batches as a classifier's step takes them: with the teacher's features of the images, where it has a teacher."""
    if teacher_features:
        batches = with_reasons(config, sources, batches)
        batches = with_image_features(batches, teacher_features, "teacher_features")
    for batch in batches:
        yield without_positions(batch)


def with_reasons(config: ConfigDict, sources: Sequence[Source], batches: Iterator[Batch]) -> Iterator[Batch]:
    """Adds whether an image has reasons: a fixed part of each source, drawn by `config.seed`."""
    rank = [np.random.default_rng([REASONS_STREAM, config.seed, k]).permutation(len(s)) for k, s in enumerate(sources)]
    share = config.objective.reasons_share
    for batch in batches:
        places = zip(batch["source"].tolist(), batch["index"].tolist())
        yield batch | {"has_reasons": np.array([rank[k][i] < share * len(rank[k]) for k, i in places], bool)}


def without_positions(batch: Batch) -> Batch:
    """The batch without where its samples are from, which is of no use on the devices."""
    return Batch(**{k: x for k, x in batch.items() if k not in ("source", "index")})  # type: ignore[typeddict-item]


def feature_batches(
    load: Callable[..., Iterator[Batch]],
    start_step: int,
    image_features: Sequence[ImageFeatures],
    images_from: int,
    views: int,
) -> Iterator[Batch]:
    """This host's share of the batches from a step on, with features of images until `images_from`.

    Args:
        load: `host_batches` from its argument `start_step` on.
        start_step, image_features, images_from: as `device_batches` takes them.
        views: of each image.
    """
    steps = None if images_from == FOREVER else max(0, images_from - start_step)
    batches = load(start_step, views)
    for batch in itertools.islice(with_image_features(batches, image_features), steps):
        yield without_positions(batch)
    yield from load(max(start_step, images_from))


def with_text_features(batches: Iterator[Batch], text_features: TextFeatures) -> Iterator[Batch]:
    """Adds the output of a frozen text tower to batches."""
    for batch in batches:
        yield batch | {"text_features": text_features(batch["text"], batch["text_mask"])}


def with_packed_text(
    config: ConfigDict, sources: Sequence[Source], tokenizer: Tokenizer, batches: Iterator[Batch]
) -> Iterator[Batch]:
    """Packs the captions of each micro-batch into as few rows as the lengths of the training captions allow."""
    options: dict[str, Any] = dict(
        seed=config.seed, process_index=jax.process_index(), process_count=jax.process_count()
    )
    counts = count_lengths(sources, config.data.weights, tokenizer, threads=config.data.threads, **options)
    counts = distributed.gather_hosts(counts[None]).sum(axis=0)  # the same shape on all hosts
    per_device, length = config.batch_size // jax.device_count(), config.model.text.pack_length
    captions = config.micro_batch or per_device
    rows = packing.rows_needed(counts, captions, length)
    log.info(
        "captions have %.1f tokens on average; %d captions at a time are packed into %d rows of %d tokens: "
        "%.1f tokens for each instead of %d",
        counts @ np.arange(len(counts)) / max(counts.sum(), 1),
        captions,
        rows,
        length,
        rows * length / captions,
        config.model.text.max_tokens,
    )
    return packing.pack_batches(batches, rows, length, jax.local_device_count() * (per_device // captions))
