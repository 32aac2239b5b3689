"""Builds all parts of a run before its first step: data, model, teacher, step, evaluation."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from zslflax import distributed
from zslflax.background import BackgroundIterator
from zslflax.checkpoint import CheckpointManager
from zslflax.config import is_classifier, profiled_steps
from zslflax.data.sources.base import Source
from zslflax.data.sources.opening import open_source
from zslflax.data.sources.subset import exclude_samples
from zslflax.data.text_features import TextFeatures
from zslflax.errors import UserError
from zslflax.evaluation.test_sets import check_test_sets, open_test_sets
from zslflax.inference.classifier import Classifier
from zslflax.inference.export import IMAGE_FOLDER, TEXT_FOLDER, save_image_encoder, save_text_encoder
from zslflax.inference.predictor import Predictor
from zslflax.inference.restore import build_model
from zslflax.inference.test_names import write_test_names
from zslflax.losses.classification import needs_labels
from zslflax.models.partition import Tree
from zslflax.training.classes import needs_class_names, with_classes
from zslflax.training.evaluate import evaluate_state
from zslflax.training.frozen_features import FrozenFeatures, open_features
from zslflax.training.initial_state import create_or_restore_state
from zslflax.training.input import device_batches
from zslflax.training.metrics import Profile, Reporter
from zslflax.training.optimizer import warmup_length
from zslflax.training.startup import StartupTimes
from zslflax.training.step import TrainStep
from zslflax.training.teacher import load_fixed_teacher, without_shared_towers
from zslflax.training.train_state import TrainState
from zslflax.training.wandb_run import WandbRun
from zslflax.training.workdir import check_data, write_config, write_data

log = logging.getLogger("zslflax")


@dataclasses.dataclass(frozen=True)
class Run:
    """All parts of a training run, ready for `train_loop`.

    Attributes:
        config: the whole config.
        state: the state to start from: new, or of the newest checkpoint.
        first_step: the step of that state.
        recent_metrics: metrics of the steps since the last report, oldest first; the loop adds to them.
        train_step: (state, batch) → (state, metrics).
        batches: yields (batch on the devices, errors of unreadable samples), which it makes in a thread.
        first_pass: the number of pairs in whose batches features of frozen towers are computed; 0 where none are.
        evaluate: state → metrics of the test sets.
        checkpoints: the workdir's manager.
        reporter: writes metrics and shows progress.
        profile: writes a trace of some steps.
        startup: measures the time to the end of the first step.
    """

    config: ConfigDict
    state: TrainState
    first_step: int
    recent_metrics: list[dict[str, Any]]
    train_step: TrainStep
    batches: BackgroundIterator[tuple[dict[str, jax.Array], Any]]
    first_pass: int
    evaluate: Callable[[TrainState], dict[str, float]]
    checkpoints: CheckpointManager
    reporter: Reporter
    profile: Profile
    startup: StartupTimes


def set_up(
    config: ConfigDict,
    workdir: Path,
    checkpoints: CheckpointManager,
    changed: bool = False,
    *,
    sources: Sequence[Source] | None = None,
    text_features: TextFeatures | None = None,
    extra_metrics: Callable[[dict[str, Predictor]], dict[str, float]] | None = None,
    startup: StartupTimes | None = None,
) -> Run:
    """Builds a run. Its arguments are those of `zslflax.training.loop.train`, and the workdir's checkpoint manager.

    Errors that a user can fix are found here, before any training.
    """
    startup = startup or StartupTimes(0.0)
    with startup.phase("opening the data"):
        model, tokenizer = build_model(config)
        sources = open_train_sources(config, sources)
        check_data(config.data.train, sources, workdir, changed)
        test_sets = open_test_sets(config)
        check_test_sets(test_sets)
    with startup.phase("building the state"):
        teacher = load_fixed_teacher(config, model, tokenizer, sources)
        state, tx, recent_metrics = create_or_restore_state(config, model, workdir, checkpoints, teacher.width)
    first_step = int(state.step)
    if distributed.is_main() and (changed or first_step == 0):
        if tokenizer is not None:
            save_text_encoder(config, tokenizer, workdir / TEXT_FOLDER)
        save_image_encoder(config, workdir / IMAGE_FOLDER)
    write_config(config, workdir)
    write_data(config.data.train, sources, workdir)
    if distributed.is_main():
        write_test_names(workdir, {s.name: s.label_space.class_names for s in test_sets if s.label_space is not None})
    log_setup(config, state, sources)

    fixed_teacher = distributed.replicate(without_shared_towers(teacher.variables, state.frozen_params))
    features = open_features(config, model, tokenizer, state, sources, [test_set.source for test_set in test_sets])
    check_teacher_needs_no_images(config, features, fixed_teacher)
    text_features = text_features or features.text
    predictor_class = Classifier if tokenizer is None else Predictor
    predictor = predictor_class(config, model, None, tokenizer, text_features=text_features)
    main = distributed.is_main()
    return Run(
        config=config,
        state=state,
        first_step=first_step,
        recent_metrics=recent_metrics,
        train_step=TrainStep(fixed_teacher, model=model, teacher_model=teacher.model, tx=tx, config=config),
        batches=device_batches(
            config,
            sources,
            tokenizer,
            first_step,
            text_features if features.text_frozen else None,
            features.train_images,
            features.images_from,
            teacher.features,
        ),
        first_pass=sum(map(len, sources)) if features.text_frozen or features.train_images else 0,
        evaluate=functools.partial(
            evaluate_state, predictor, test_sets, workdir, extra_metrics, features.open_test_images
        ),
        checkpoints=checkpoints,
        reporter=Reporter(
            workdir,
            first_step - len(recent_metrics),
            config.steps,
            main,
            WandbRun(config, workdir) if main and config.wandb else None,
        ),
        profile=Profile(profiled_steps(config) if main else None, workdir / "profile"),
        startup=startup,
    )


def check_teacher_needs_no_images(config: ConfigDict, features: FrozenFeatures, fixed_teacher: Tree) -> None:
    """Raises a UserError where steps read no images and the teacher has an image tower of its own."""
    if features.train_images and "tower" in fixed_teacher.get("params", {}).get("image", {}):
        raise UserError(
            f"features.folder is {config.features.folder!r}, so that steps read no images, but the teacher in "
            f"{config.teacher.workdir} has another image tower, which needs them; set features.folder=''"
        )


def open_sources(config: ConfigDict) -> list[Source]:
    """Opens the sources that `config.data.train` names.

    Images need neither captions nor classes where the names of a classifier's classes are given, and no labels are.
    """
    captions = not is_classifier(config)
    images_alone = not (captions or needs_labels(config.objective) or needs_class_names(config))
    return [open_source(spec, config.data, "train", captions, images_alone) for spec in config.data.train]


def open_train_sources(config: ConfigDict, sources: Sequence[Source] | None = None) -> list[Source]:
    """Opens the training sources, or takes those that are given, without the samples that the config excludes."""
    sources = open_sources(config) if sources is None else sources
    if len(sources) != len(config.data.train):
        raise UserError(f"there are {len(sources)} sources, but config.data.train names {len(config.data.train)}")
    sources = exclude_samples(sources, config.data.exclude)
    if needs_labels(config.objective):
        sources = [with_classes(source, config.model.class_names) for source in sources]
    distributed.check_same_on_hosts("the number of training samples", list(map(len, sources)))
    return sources


def log_setup(config: ConfigDict, state: TrainState, sources: Sequence[Source]) -> None:
    """Logs what is trained, and on what."""
    frozen = state.frozen_params
    tower = lambda m: (frozen.get(m) or state.params[m])["tower"]
    millions = lambda m: sum(x.size for x in jax.tree.leaves(tower(m))) / 1e6
    text = f"{len(config.model.class_names)} classes"
    if "text" in state.params:
        text = f"text tower {millions('text'):.1f}M{' (frozen)' if 'text' in frozen else ''}"
    log.info(
        "%s: image tower %s %.1fM parameters%s, %s; %s",
        config.name,
        config.model.image.name or config.model.image.pretrained,
        millions("image"),
        " (frozen)" if "image" in frozen else "",
        text,
        config.objective.name,
    )
    if (warmup := warmup_length(config.optimizer, config.steps)) < config.optimizer.warmup_steps:
        log.info(
            "the run is short: the warm-up takes %d steps, half of it, and not optimizer.warmup_steps = %d",
            warmup,
            config.optimizer.warmup_steps,
        )
    samples = sum(map(len, sources))
    passes = config.steps * config.batch_size / samples
    log.info(
        "%s samples, batches of %d on %d %s device(s), %s steps = %s passes",
        f"{samples:,}",
        config.batch_size,
        jax.device_count(),
        jax.default_backend(),
        config.steps,
        f"{passes:,.1f}" if passes >= 1 else f"{passes:.2g}",
    )
