"""Computes the features of a config's frozen towers before training: of its training data and its test sets.

zslflax features --config=photos [--config.FIELD=VALUE …]

The same command continues after a stop. Several processes, started as for training, share the work.
"""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import app
from ml_collections import ConfigDict

from zslflax import distributed
from zslflax.cli import exit_on_error, start_logging
from zslflax.config import is_classifier
from zslflax.config_checks import check_devices, validate
from zslflax.data import pipeline
from zslflax.data.sources.base import Source
from zslflax.data.text import Tokenizer
from zslflax.data.text_features import TextFeatures
from zslflax.errors import UserError
from zslflax.evaluation.test_sets import open_test_sets
from zslflax.inference.prompts import resolve_templates
from zslflax.inference.restore import build_model
from zslflax.main import CONFIG, parse
from zslflax.progress import Progress
from zslflax.training.frozen_features import open_features
from zslflax.training.initial_state import create_state
from zslflax.training.setup import open_train_sources
from zslflax.training.teacher import load_fixed_teacher

log = logging.getLogger("zslflax")
BATCH_SIZE = 1 << 10  # samples whose captions are tokenized at once


def compute_features(config: ConfigDict) -> None:
    """Computes what is missing of the features that training and evaluation by this config will ask for.

    Raises:
        UserError: `features.folder` is empty, or no tower is frozen.
        StorageError: the folder cannot be written, or the disk has too little space.
    """
    if not config.features.folder:
        raise UserError("features.folder is empty; give the folder in which features are kept")
    if is_classifier(config):
        raise UserError("a classifier has no frozen towers whose features are kept; its run computes its teacher's")
    model, tokenizer = build_model(config)
    assert tokenizer is not None
    sources = open_train_sources(config)
    test_sources = [test_set.source for test_set in open_test_sets(config)]
    teacher_width = None
    if config.objective.feature_weight:  # patterns may name the objective's layers, which depend on this width
        teacher_width = load_fixed_teacher(config, model, tokenizer, sources).width
    state, _ = create_state(config, model, pretrained=True, teacher_width=teacher_width)
    features = open_features(config, model, tokenizer, state, sources, test_sources)
    images = list(features.train_images)
    if features.open_test_images is not None:
        images += map(features.open_test_images, test_sources)
    if features.text is not None and features.text_frozen:
        compute_text_features(features.text, tokenizer, [*sources, *test_sources], config)
    for source_features in images:
        source_features.fill()
    distributed.wait_for_hosts()
    unreadable = sum(len(source_features.missing(unreadable=True)) for source_features in images)
    log.info("features of %s images are in %s", f"{sum(map(len, images)) - unreadable:,}", config.features.folder)
    if unreadable:
        log.warning("%s images cannot be read, or are computed by other hosts on their own disks", f"{unreadable:,}")


def compute_text_features(
    features: TextFeatures, tokenizer: Tokenizer, sources: Sequence[Source], config: ConfigDict
) -> None:
    """Computes the features of this host's share of all captions."""
    progress = Progress("text features", "samples", sum(map(len, sources)) // jax.process_count())
    for source in sources:
        host, hosts = jax.process_index(), jax.process_count()
        batches = pipeline.eval_batches(
            source,
            batch_size=BATCH_SIZE,
            image_size=1,
            resize=1,
            process_index=host,
            process_count=hosts,
            threads=config.data.threads,
            read_images=False,
        )
        for batch in batches:
            captions = [text for texts in batch["captions"] for text in texts if text.strip()]
            if captions:
                features(*tokenizer(captions))
            progress.update(int(np.count_nonzero(batch["index"] >= 0)))


def run(_: Any) -> None:
    """Does what the flags ask for."""
    start_logging()
    config = CONFIG.value
    validate(config)
    resolve_templates(config)
    distributed.initialize(config.compilation_cache)
    check_devices(config, jax.device_count())
    compute_features(config)


def main() -> None:
    """The command."""
    with exit_on_error():
        app.run(run, flags_parser=parse)


if __name__ == "__main__":
    main()
