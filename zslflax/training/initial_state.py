"""The state that a run starts from: of a checkpoint, of another model, or of pretrained towers and random weights."""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from zslflax import checkpoint, distributed
from zslflax.checkpoint import CheckpointManager
from zslflax.checkpoint_recovery import restore_newest
from zslflax.config import is_classifier, keeps_average
from zslflax.errors import UserError
from zslflax.inference.model_checks import check_shapes
from zslflax.inference.predictor import Predictor
from zslflax.losses import classification
from zslflax.losses.contrastive import init_params
from zslflax.models.build import example_inputs
from zslflax.models.import_weights.load import load_image_tower, load_text_tower
from zslflax.models.import_weights.locate import locate_weights
from zslflax.models.partition import Tree
from zslflax.models.two_tower import TwoTower
from zslflax.training.classes import read_sentences
from zslflax.training.optimizer import build_optimizer, frozen_towers
from zslflax.training.teacher import check_same_classes
from zslflax.training.train_state import TrainState, create_train_state, towers

log = logging.getLogger("zslflax")


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

    # It runs once. With fewer optimisations a CPU makes the same values, and compiles in a quarter of the time.
    quickly = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None

    @functools.partial(jax.jit, compiler_options=quickly)
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
        tower = load_image_tower(locate_weights(image, "image"), image.name, tower, image.size)
        params["image"] = {**params["image"], "tower": tower["params"]}
        if batch_stats:
            batch_stats["image"] = {"tower": tower["batch_stats"]}
    if text.pretrained:
        tower = load_text_tower(locate_weights(text, "text"), {"params": params["text"]["tower"]})
        params["text"] = {**params["text"], "tower": tower["params"]}
    return {"params": params, "batch_stats": batch_stats}
