"""This host's training batches, their text as tokens, packed, or as what a frozen tower made of it."""

import logging

import jax
import jax.numpy as jnp
import numpy as np

from zslflax import parallel, predict
from zslflax.data import packing, pairs
from zslflax.data.lengths import count_lengths
from zslflax.features import TextFeatures

log = logging.getLogger("zslflax")


def train_batches(config, sources, tokenizer, start_step: int):
    """This host's share of the batches from a step on."""
    return pairs.train_batches(
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


def kept_text_features(config, model, state, frozen: tuple[str, ...]) -> TextFeatures:
    """Features of captions, for as long as the text tower stays the same: for ever, or until the next evaluation."""
    capacity = max(config.model.text.keep_features, predict.KEPT_TEXTS)
    if "text" not in frozen:
        return TextFeatures(model, None, capacity)
    tower = jax.tree.map(jnp.copy, state.params["text"]["tower"])  # a copy, for the step takes the state's buffers over
    variables = parallel.replicate({"params": {"text": {"tower": tower}}})
    return TextFeatures(model, variables, capacity, frozen=True)


def with_text_features(batches, text_features: TextFeatures):
    """The same batches with the output of a frozen text tower."""
    for batch in batches:
        yield batch | {"text_features": text_features(batch["text"], batch["text_mask"])}


def with_packed_text(config, sources, tokenizer, batches):
    """The same batches with captions packed, those of a micro-batch in as few rows as the training captions allow."""
    options = dict(seed=config.seed, process_index=jax.process_index(), process_count=jax.process_count())
    counts = count_lengths(sources, config.data.weights, tokenizer, threads=config.data.threads, **options)
    counts = parallel.gather_hosts(counts[None]).sum(axis=0)  # one shape on all hosts, whatever each could read
    share, width = config.batch_size // jax.device_count(), config.model.text.pack
    captions = config.micro_batch or share
    rows = packing.rows_needed(counts, captions, width)
    log.info(
        "captions of %.1f tokens on average: %d at a time are packed into %d rows of %d, "
        "%.1f tokens each instead of %d",
        counts @ np.arange(len(counts)) / max(counts.sum(), 1),
        captions,
        rows,
        width,
        rows * width / captions,
        config.model.text.max_tokens,
    )
    return packing.pack_batches(batches, rows, width, jax.local_device_count() * (share // captions))
