"""Builds all parts of a run before its first step: data, model, state, teacher, step, evaluation."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from zslflax import checkpoint, distributed
from zslflax.background import BackgroundIterator
from zslflax.checkpoint import CheckpointManager
from zslflax.checkpoint_recovery import restore_newest
from zslflax.config import is_classifier, keeps_average, profiled_steps
from zslflax.data.features import TextFeatures
from zslflax.data.sources.base import Source
from zslflax.data.sources.opening import open_source
from zslflax.data.sources.subset import exclude_samples
from zslflax.errors import UserError
from zslflax.evaluation.test_sets import check_test_sets, open_test_sets
from zslflax.inference.classifier import Classifier
from zslflax.inference.export import IMAGE_FOLDER, TEXT_FOLDER, save_image_encoder, save_text_encoder
from zslflax.inference.model_checks import check_shapes
from zslflax.inference.predictor import Predictor
from zslflax.inference.restore import build_model
from zslflax.inference.test_names import write_test_names
from zslflax.losses import classification
from zslflax.losses.classification import needs_labels
from zslflax.losses.contrastive import init_params
from zslflax.models.build import example_inputs
from zslflax.models.import_weights.load import load_image_tower, load_text_tower
from zslflax.models.import_weights.locate import locate
from zslflax.models.partition import Tree
from zslflax.models.two_tower import TwoTower
from zslflax.training.classes import needs_class_names, read_sentences, with_classes
from zslflax.training.evaluate import evaluate_state
from zslflax.training.frozen_features import FrozenFeatures, open_features
from zslflax.training.input import device_batches
from zslflax.training.metrics import Profile, Reporter
from zslflax.training.optimizer import build_optimizer, frozen_towers, warmup_length
from zslflax.training.startup import StartupTimes
from zslflax.training.step import TrainStep
from zslflax.training.teacher import check_same_classes, load_fixed_teacher, without_shared_towers
from zslflax.training.train_state import TrainState, create_train_state, towers
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
        evaluate=functools.partial(evaluate_state, predictor, test_sets, workdir, extra_metrics, features.of_images),
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


def create_or_restore_state(
    config: ConfigDict, model: TwoTower, workdir: Path, checkpoints: CheckpointManager, teacher_width: int
) -> tuple[TrainState, optax.GradientTransformation, list[dict[str, Any]]]:
    """The state to start from. Its parameters come, in this order, from:

        1. the newest checkpoint of `workdir` that is complete;
        2. the model in `config.init_from`;
        3. the pretrained towers that the config names, and for the rest at random from `config.seed`.

    Returns:
        The state, the optimiser, and the metrics of the steps since the last report.

    Raises:
        UserError: no checkpoint can be restored, or the newest one is beyond `config.steps`.
    """
    if checkpoints.latest_step() is None:
        return *create_state(config, model, pretrained=True, teacher_width=teacher_width), []
    create, variables, tx = plan_state(config, model, teacher_width)
    state = restore_newest(checkpoints, jax.eval_shape(create, variables))
    step = int(state.step)
    log.info("resuming from step %d in %s", step, workdir)
    if step > config.steps:
        raise UserError(f"config: steps is {config.steps}, but {workdir} is at step {step} already")
    return state, tx, checkpoint.recent_metrics(workdir, step)


def create_state(
    config: ConfigDict, model: TwoTower, *, pretrained: bool, teacher_width: int | None = None
) -> tuple[TrainState, optax.GradientTransformation]:
    """The state before the first step, replicated over this host's devices, and the optimiser.

    Args:
        config: the whole config.
        model: the student's.
        pretrained: whether to import the model or the pretrained towers that the config names.
        teacher_width: of the teacher's embeddings; None: as wide as the student's.
    """
    create, variables, tx = plan_state(config, model, teacher_width)
    if pretrained:
        variables = copy_model(config, variables) if config.init_from else import_towers(config, variables)
    variables = fill_at_random(config, model, variables)
    # jit compiles once instead of once for every shape. The state is placed as the step returns it, or the step would
    # be compiled twice.
    return distributed.replicate(jax.jit(create)(variables)), tx


def plan_state(
    config: ConfigDict, model: TwoTower, teacher_width: int | None = None
) -> tuple[Callable[[Tree], TrainState], Tree, optax.GradientTransformation]:
    """What a state is made of, before any parameter is made; checks the config's patterns and sizes of images.

    Args:
        config, model, teacher_width: as `create_state` takes them.

    Returns:
        The function from the variables {"params", "batch_stats"} of the model to the state, the shapes of these
        variables, and the optimiser.
    """
    example = example_inputs(model, config.model)
    for pixels, _ in config.model.image.schedule:
        image = jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.uint8)
        jax.eval_shape(model.init, jax.random.key(0), image, *example[1:])  # raises an error where this size cannot be
    key = jax.random.key(config.seed)
    variables: Tree = jax.eval_shape(jitted_init(model), key, *example)
    params = {**variables["params"]}
    params["objective"] = init_objective(config, jax.random.fold_in(key, 1), params, teacher_width)
    tx = build_optimizer(config, params, config.steps)
    frozen = frozen_towers(params, config.freeze)

    def create(variables: Tree) -> TrainState:
        with_objective = {**variables, "params": {**variables["params"], "objective": params["objective"]}}
        return create_train_state(with_objective, tx, ema=keeps_average(config), frozen=frozen)

    return create, {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}, tx


def fill_at_random(config: ConfigDict, model: TwoTower, variables: Tree) -> Tree:
    """Replaces what are only shapes in the variables by random arrays. What is there already is not computed again."""
    leaves, structure = jax.tree.flatten(variables)
    missing = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)]
    init = jitted_init(model)  # was traced for the shapes

    @jax.jit
    def init_missing(key: jax.Array, *example: jax.Array) -> list[jax.Array]:
        created: Tree = init(key, *example)
        created = jax.tree.leaves({"params": created["params"], "batch_stats": created.get("batch_stats", {})})
        return [created[i] for i in missing]

    if missing:
        example = [jnp.ones(x.shape, x.dtype) for x in example_inputs(model, config.model)]
        for i, leaf in zip(missing, init_missing(jax.random.key(config.seed), *example), strict=True):
            leaves[i] = leaf
    return jax.tree.unflatten(structure, leaves)


@functools.lru_cache(maxsize=1)
def jitted_init(model: TwoTower) -> Any:
    """`model.init` under jit. The next run of the same model in this process does not trace it again."""
    return jax.jit(model.init)


def init_objective(config: ConfigDict, key: jax.Array, shapes: Tree, teacher_width: int | None = None) -> Tree:
    """The initial parameters of the objective.

    Args:
        config: the whole config.
        key: of random weights.
        shapes: of the model's parameters.
        teacher_width: as `create_state` takes it.
    """
    if not is_classifier(config):
        width = config.model.embed_dim
        return init_params(config.objective, key, width, teacher_width or width)
    features, classes = shapes["image"]["projection"]["kernel"].shape
    sentences = config.objective.sentences and read_sentences(config.objective.sentences, config.model.class_names)
    return classification.init_params(config.objective, key, features, classes, len(sentences))


def copy_model(config: ConfigDict, variables: Tree) -> Tree:
    """The variables of the model in `config.init_from`.

    Raises:
        UserError: they have other names or shapes than `variables`.
    """
    start = Predictor.restore(config.init_from, cache="")
    copied = jax.device_get(start.variables)
    copied["params"] = towers(copied["params"])
    if is_classifier(config):
        check_same_classes(config, start, config.init_from)
    shapes = lambda tree: {name: x.shape for name, x in flatten_dict(tree, sep="/").items()}
    check_shapes(shapes(variables), shapes(copied), Path(config.init_from))
    log.info("starting from step %d of %s", start.step, config.init_from)
    return copied


def import_towers(config: ConfigDict, variables: Tree) -> Tree:
    """Replaces the random towers by the pretrained ones that the config names."""
    image, text = config.model.image, config.model.text
    params, batch_stats = dict(variables["params"]), dict(variables["batch_stats"])
    if image.pretrained:
        tower = {"params": params["image"]["tower"], "batch_stats": batch_stats.get("image", {}).get("tower", {})}
        tower = load_image_tower(locate(image.pretrained), image.name, tower, image.size)
        params["image"] = {**params["image"], "tower": tower["params"]}
        if batch_stats:
            batch_stats["image"] = {"tower": tower["batch_stats"]}
    if text.pretrained:
        tower = load_text_tower(locate(text.pretrained), {"params": params["text"]["tower"]})
        params["text"] = {**params["text"], "tower": tower["params"]}
    return {"params": params, "batch_stats": batch_stats}


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
    log.info(
        "%s samples, batches of %d on %d %s device(s), %d steps",
        f"{sum(map(len, sources)):,}",
        config.batch_size,
        jax.device_count(),
        jax.default_backend(),
        config.steps,
    )
