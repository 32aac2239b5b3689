"""Everything that a run needs before its first step: data, model, state, teacher, evaluation."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zslflax import checkpoint, distributed
from zslflax.config import profiled_steps
from zslflax.data.features import TextFeatures
from zslflax.data.sources.opening import open_source
from zslflax.data.sources.subset import exclude_samples
from zslflax.errors import UserError
from zslflax.evaluation.test_sets import open_test_sets
from zslflax.inference.export import TEXT_FOLDER, save_text_encoder
from zslflax.inference.predictor import Predictor
from zslflax.inference.restore import build_model
from zslflax.losses.contrastive import init_params
from zslflax.models.import_weights.load import load_image_tower, load_text_tower
from zslflax.models.import_weights.locate import locate
from zslflax.models.partition import partition
from zslflax.training.evaluate import evaluate_state
from zslflax.training.input import cached_text_features, device_batches
from zslflax.training.metrics import Profile, Reporter
from zslflax.training.optimizer import build_optimizer, frozen_towers
from zslflax.training.step import TrainStep
from zslflax.training.train_state import TrainState, Tree, create_train_state, towers
from zslflax.training.workdir import write_config

log = logging.getLogger("zslflax")


@dataclasses.dataclass(frozen=True)
class Run:
    """All parts of a training run, ready for `train_loop`.

    Attributes:
        config: the whole config.
        state: the state to start from: new, or of the newest checkpoint.
        first_step: the step of that state.
        recent_metrics: metrics of the steps since the last report, oldest first.
        train_step: (state, batch) → (state, metrics).
        batches: yields (batch on the devices, errors of unreadable samples).
        evaluate: state → metrics of the test sets.
        checkpoints: Orbax's manager.
        reporter: writes metrics and progress. profile: traces some steps.
    """

    config: Any
    state: TrainState
    first_step: int
    recent_metrics: list[dict]
    train_step: TrainStep
    batches: Iterator[tuple[dict, tuple]]
    evaluate: Callable[[TrainState], dict[str, float]]
    checkpoints: Any
    reporter: Reporter
    profile: Profile


def set_up(
    config,
    workdir: Path,
    checkpoints,
    changed: bool = False,
    *,
    text_features: TextFeatures | None = None,
    extra_metrics: Callable | None = None,
) -> Run:
    """Builds a run. Parameters come, in this order, from:

        1. the newest checkpoint of `workdir` that is whole;
        2. the pretrained towers that the config names, and for the rest at random from `config.seed`.

    Args: as `zslflax.training.loop.train`; `checkpoints` is the workdir's manager.
    """
    model, tokenizer = build_model(config)
    teacher_model, fixed_teacher = load_fixed_teacher(config, tokenizer)
    sources = exclude_samples(
        [open_source(spec, config.data, "train") for spec in config.data.train], config.data.exclude
    )
    distributed.check_same_on_hosts("the number of training samples", list(map(len, sources)))
    test_sets = open_test_sets(config)

    resuming, recent_metrics = checkpoints.latest_step() is not None, []
    state, tx = create_state(config, model, pretrained=not resuming)
    if resuming:
        state = checkpoint.restore_newest(checkpoints, state)
        recent_metrics = checkpoint.recent_metrics(workdir, int(state.step))
        log.info("resuming from step %d in %s", state.step, workdir)
    first = int(state.step)
    if first > config.steps:
        raise UserError(f"config: steps is {config.steps}, but {workdir} is at step {first} already")
    if distributed.is_main() and (changed or not resuming):
        save_text_encoder(config, tokenizer, workdir / TEXT_FOLDER)
    write_config(config, workdir)
    log_setup(config, state, sources)

    fixed_teacher = distributed.replicate(without_shared_towers(fixed_teacher, state.frozen_params))
    text_features = text_features or cached_text_features(config, model, state)
    predictor = Predictor(config, model, None, tokenizer, text_features=text_features)
    main = distributed.is_main()
    return Run(
        config=config,
        state=state,
        first_step=first,
        recent_metrics=recent_metrics,
        train_step=TrainStep(fixed_teacher, model=model, teacher_model=teacher_model or model, tx=tx, config=config),
        batches=device_batches(
            config, sources, tokenizer, first, text_features if "text" in state.frozen_params else None
        ),
        evaluate=functools.partial(evaluate_state, predictor, test_sets, workdir, extra_metrics),
        checkpoints=checkpoints,
        reporter=Reporter(workdir, first - len(recent_metrics), config.steps, main),
        profile=Profile(profiled_steps(config) if main else None, workdir / "profile"),
    )


def create_state(config, model, *, pretrained: bool) -> tuple[TrainState, Any]:
    """The state before the first step, replicated over this host's devices, and the optimiser.

    Args:
        pretrained: whether to import the pretrained towers that the config names.
    """
    size, tokens = config.model.image.size, config.model.text.max_tokens
    example = (jnp.zeros((1, size, size, 3), jnp.uint8), jnp.zeros((1, tokens), jnp.int32), jnp.ones((1, tokens), bool))
    key, objective_params = jax.random.key(config.seed), init_params(config.objective)
    shapes = {**jax.eval_shape(model.init, key, *example)["params"], "objective": objective_params}
    tx = build_optimizer(config, shapes, config.steps)  # checks the patterns before any parameter is made
    variables = jax.jit(model.init)(key, *example)
    variables = {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}
    if pretrained:
        variables = import_towers(config, variables)
    variables["params"] = {**variables["params"], "objective": objective_params}
    frozen = frozen_towers(shapes, config.freeze)
    state = create_train_state(variables, tx, ema=config.teacher.kind == "ema", frozen=frozen)
    return distributed.replicate(state), tx  # placed as the step returns it, or it would be compiled twice


def import_towers(config, variables: Tree) -> Tree:
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


def load_fixed_teacher(config, tokenizer) -> tuple[Any, Tree]:
    """The model and the variables of the teacher of teacher.kind "checkpoint"; (None, {}) for other kinds."""
    if config.teacher.kind != "checkpoint":
        return None, {}
    teacher = Predictor.restore(config.teacher.workdir)
    if teacher.tokenizer.identity != tokenizer.identity:
        raise UserError(
            f"the teacher in {config.teacher.workdir} uses the tokenizer {teacher.tokenizer.identity}, the student "
            f"{tokenizer.identity}; both see the same tokens, so give the student the teacher's tokenizer "
            "(model.text.tokenizer, model.text.max_tokens)"
        )
    if teacher.config.model.image.size != config.model.image.size:
        raise UserError(
            f"the teacher in {config.teacher.workdir} takes images of {teacher.config.model.image.size} pixels, the "
            f"student of {config.model.image.size}; set model.image.size to the teacher's"
        )
    log.info("teacher: step %d of %s, fixed", teacher.step, config.teacher.workdir)
    variables = jax.device_get(teacher.variables)
    return teacher.model, {**variables, "params": towers(variables["params"])}


def without_shared_towers(fixed_teacher: Tree, frozen_params: Tree) -> Tree:
    """A teacher's variables without the towers that equal the student's frozen ones bit for bit."""
    if not fixed_teacher:
        return {}
    params = fixed_teacher["params"]
    shared = tuple(m for m, frozen in frozen_params.items() if trees_equal(params[m]["tower"], frozen["tower"]))
    return {**fixed_teacher, "params": partition(params, shared)[0]}


def trees_equal(a: Tree, b: Tree) -> bool:
    """Whether two trees have the same structure and equal arrays."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def log_setup(config, state: TrainState, sources) -> None:
    """Logs what is trained, and on what."""
    frozen = state.frozen_params
    tower = lambda m: (frozen.get(m) or state.params[m])["tower"]
    millions = lambda m: sum(x.size for x in jax.tree.leaves(tower(m))) / 1e6
    log.info(
        "%s: image tower %s %.1fM parameters%s, text tower %.1fM%s; %s",
        config.name,
        config.model.image.name,
        millions("image"),
        " (frozen)" if "image" in frozen else "",
        millions("text"),
        " (frozen)" if "text" in frozen else "",
        config.objective.name,
    )
    log.info(
        "%s pairs, batches of %d on %d %s device(s), %d steps",
        f"{sum(map(len, sources)):,}",
        config.batch_size,
        jax.device_count(),
        jax.default_backend(),
        config.steps,
    )
