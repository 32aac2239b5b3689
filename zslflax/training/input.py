"""The train step's input: batches on the devices, with captions as tokens, as packed tokens, or as frozen features."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from zslflax import distributed
from zslflax.data import packing, pipeline
from zslflax.data.caption_lengths import count_lengths
from zslflax.data.features import DEFAULT_CAPACITY, TextFeatures
from zslflax.data.preprocess import Batch
from zslflax.data.sources.base import Source
from zslflax.data.text import Tokenizer
from zslflax.models.two_tower import TwoTower
from zslflax.training.train_state import TrainState

log = logging.getLogger("zslflax")


def device_batches(
    config: ConfigDict,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    start_step: int,
    text_features: TextFeatures | None,
) -> Iterator[tuple[dict[str, jax.Array], Any]]:
    """Yields (batch on the devices, errors of unreadable samples) from a step on.

    Args:
        config: the whole config.
        sources: the training sources.
        tokenizer: the text tower's tokenizer.
        start_step: the number of batches to leave out.
        text_features: features of a frozen text tower; None where the text tower is trained.
    """
    batches: Iterator[Any] = host_batches(config, sources, tokenizer, start_step)
    if text_features is not None and config.model.text.cached_captions:
        batches = with_text_features(batches, text_features)
    elif config.model.text.pack_length:
        batches = with_packed_text(config, sources, tokenizer, batches)
    return distributed.prefetch_to_devices(batches)


def host_batches(
    config: ConfigDict, sources: Sequence[Source], tokenizer: Tokenizer, start_step: int
) -> Iterator[Batch]:
    """This host's share of the batches from a step on."""
    return pipeline.train_batches(
        sources,
        config.data.weights,
        tokenizer,
        batch_size=config.batch_size,
        image_size=config.model.image.size,
        seed=config.seed,
        start_step=start_step,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        crop_scale=config.data.crop_scale,
        flip=config.data.flip,
        threads=config.data.threads,
        workers=config.data.workers,
    )


def cached_text_features(config: ConfigDict, model: TwoTower, state: TrainState) -> TextFeatures:
    """A cache of texts' features. It lasts for the whole run if the text tower is frozen, or else for one state."""
    capacity = max(config.model.text.cached_captions, DEFAULT_CAPACITY)
    if "text" not in state.frozen_params:
        return TextFeatures(model, None, capacity)
    tower = jax.tree.map(jnp.copy, state.frozen_params["text"]["tower"])  # a copy: the step donates the state's buffers
    variables = distributed.replicate({"params": {"text": {"tower": tower}}})
    return TextFeatures(model, variables, capacity, frozen=True)


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
