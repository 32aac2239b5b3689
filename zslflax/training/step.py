"""One training step: forward, loss, gradient, update, teacher. Read it beside losses/."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict, FrozenConfigDict

from zslflax.config import keeps_average
from zslflax.distributed import AXIS
from zslflax.losses.chunks import map_chunks
from zslflax.losses.contrastive import LOG_LOGIT_SCALE_RANGE
from zslflax.models.partition import Tree, combine
from zslflax.models.two_tower import TwoTower
from zslflax.training import flops
from zslflax.training.forward import DeviceBatch
from zslflax.training.gradients import compute_gradients
from zslflax.training.methods import method_of
from zslflax.training.train_state import TrainState, student_variables, towers, update_ema, updates_at_size

Metrics = dict[str, jax.Array]


def train_step(
    state: TrainState,
    fixed_teacher: Tree,
    batch: DeviceBatch,
    *,
    model: TwoTower,
    teacher_model: TwoTower,
    tx: optax.GradientTransformation,
    config: ConfigDict,
) -> tuple[TrainState, Metrics]:
    """One update from one global batch, of which this device holds b pairs.

    N devices compute what one device would on the same global batch: gathered negatives keep their gradient, batch
    normalisation is synchronised, and the loss is divided by the number of valid pairs of the global batch.

    With `config.micro_batch` the towers run on that many pairs at a time and the update is still that of the whole
    batch, except for what couples pairs inside a tower: batch normalisation uses the statistics of a micro-batch (of
    all devices' i-th together), its running statistics move once a step by the mean over micro-batches, and dropout is
    drawn for each micro-batch.

    Args:
        state: the same on every device.
        fixed_teacher: variables of the teacher from a checkpoint, as `teacher_variables` takes them; {} for the EMA.
        batch: `image` uint8 [b, s, s, 3], `text` int32 [b, t], `text_mask` bool [b, t], `valid` bool [b]. Text may be
            packed instead (`data.packing`), each micro-batch by itself. A frozen tower's output `image_features` or
            `text_features` fp32 [b, f] may stand in for its input. `image_id` and `text_id` uint32 [b, 2] are there
            unless duplicates are negatives. A classifier takes `label` int32 [b] instead of the text, or
            `teacher_features` fp32 [b, f] and `has_reasons` bool [b], and `weak_image` like `image` where it refines
            its teacher's labels.
        model: the student's `TwoTower`.
        teacher_model: the teacher's; for the EMA the same.
        tx: the optimiser, from `build_optimizer`.
        config: the whole config.

    Returns:
        The next state; and metrics, fp32 scalars averaged over the valid pairs of the global batch. `truncated` is a
        number of pairs; `nonfinite_steps` and `failed_step` are int32, as in the state.
    """
    valid = batch["valid"].astype(jnp.float32)  # (b,)
    num_pairs = jnp.maximum(jax.lax.psum(jnp.sum(valid), AXIS), 1.0)
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.seed), state.step), jax.lax.axis_index(AXIS))
    num_micro_batches, method = len(valid) // (config.micro_batch or len(valid)), method_of(config)

    run_without_grad = functools.partial(method.no_grad_outputs, state, fixed_teacher, model, teacher_model, config)
    frozen_features, targets = map_chunks(run_without_grad, batch, num_micro_batches)

    def run_student(params: Tree, inputs: tuple[DeviceBatch, dict[str, jax.Array]], key: jax.Array) -> tuple[Any, Tree]:
        variables = {**student_variables(state), "params": combine(params, state.frozen_params)}
        return method.student_outputs(model, variables, *inputs, {"dropout": key}, config)

    def loss_fn(objective_params: Tree, outputs: Any) -> tuple[jax.Array, Metrics]:
        losses = method.losses(
            config.objective,
            objective_params,
            outputs,
            targets,
            batch,
            step=state.step,
            axis_name=AXIS,
        )
        means = jax.tree.map(lambda x: jnp.sum(valid * x) / num_pairs, losses)  # this device's part of the mean
        return means["loss"], means

    grads, metrics, batch_stats = compute_gradients(
        run_student, loss_fn, state.params, (batch, frozen_features), key, num_micro_batches
    )
    grads, metrics = jax.lax.psum((grads, metrics), AXIS)
    state, metrics["grad_norm"] = apply_gradients(state, grads, batch_stats, metrics["loss"], tx, config)

    metrics |= logit_scales(state.params["objective"]) | {"pairs": num_pairs}
    metrics |= {"nonfinite_steps": state.nonfinite_steps, "failed_step": state.failed_step}
    if "text_truncated" in batch:
        metrics["truncated"] = jax.lax.psum(jnp.sum(batch["text_truncated"].astype(jnp.float32)), AXIS)
    return state, metrics


def apply_gradients(
    state: TrainState,
    grads: Tree,
    batch_stats: Tree,
    loss: jax.Array,
    tx: optax.GradientTransformation,
    config: ConfigDict,
) -> tuple[TrainState, jax.Array]:
    """Updates the student, then its moving average; a non-finite update is left out.

    Args:
        state: before the step.
        grads: gradients of `state.params`, summed over the devices.
        batch_stats: the student's batch statistics after the step.
        loss: of the global batch.
        tx: the optimiser.
        config: the whole config.

    Returns:
        The state after the step, and the gradient's norm.
    """
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = clip_logit_scales(optax.apply_updates(state.params, updates))
    new_state = state.replace(step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state)
    if keeps_average(config):
        average = functools.partial(update_ema, decay=config.teacher.ema_decay)
        teacher_params = average(state.teacher_params, towers(params), updates=new_state.step)
        at_size = updates_at_size(config.model.image.schedule, new_state.step)
        teacher_batch_stats = average(state.teacher_batch_stats, batch_stats, updates=at_size)
        new_state = new_state.replace(teacher_params=teacher_params, teacher_batch_stats=teacher_batch_stats)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(optax.tree.norm(updates))
    return keep_finite(state, new_state, finite, config.optimizer.max_nonfinite_steps), grad_norm


def keep_finite(state: TrainState, new_state: TrainState, finite: jax.Array, max_nonfinite_steps: int) -> TrainState:
    """`new_state` after a finite step; otherwise `state` with the step counted as skipped.

    A non-finite step beyond the `max_nonfinite_steps` that may be skipped fails the run: from then on the state stays
    as it was before that step.
    """
    tolerated = state.nonfinite_steps < max_nonfinite_steps
    skipped = state.replace(
        step=jnp.where(tolerated, state.step + 1, state.step),
        nonfinite_steps=jnp.where(tolerated, state.nonfinite_steps + 1, state.nonfinite_steps),
        failed_step=jnp.where(tolerated, state.failed_step, state.step),
    )
    next_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_state, skipped)
    return jax.tree.map(lambda new, old: jnp.where(state.failed_step < 0, new, old), next_state, state)


def clip_logit_scales(params: Tree) -> Tree:
    """Clips the learnt log-scales to their range after the update; a clip in the forward pass would stop gradients."""
    clipped = {
        name: jnp.clip(value, *LOG_LOGIT_SCALE_RANGE) if name.endswith("logit_scale") else value
        for name, value in params["objective"].items()
    }
    return {**params, "objective": clipped}


def logit_scales(objective_params: dict[str, jax.Array]) -> Metrics:
    """The learnt logit scales: the exponentials of the parameters `log_…`.

    >>> logit_scales({"log_logit_scale": jnp.log(10.0), "logit_bias": jnp.float32(-10.0)})
    {'logit_scale': Array(10., dtype=float32, weak_type=True)}
    """
    return {
        name.removeprefix("log_"): jnp.exp(value) for name, value in objective_params.items() if name.startswith("log_")
    }


# The part of a config that the step sees. Runs that differ in nothing else share one compiled step.
SEEN = ("seed", "steps", "micro_batch", "freeze", "model", "objective", "teacher", "optimizer")


@dataclasses.dataclass(frozen=True)
class StepArguments:
    """The keyword arguments of `train_step`. Equal ones lead to the same computation."""

    model: TwoTower
    teacher_model: TwoTower
    config: FrozenConfigDict
    tx: optax.GradientTransformation = dataclasses.field(compare=False)  # follows from the others


class MappedStep:
    """`train_step` mapped over all devices: (state, fixed teacher, batch) → (state, metrics). The state is donated.

    Attributes:
        flops: floating-point operations of one device in a step, known after the first call.
    """

    def __init__(self, arguments: StepArguments):
        self.flops = 0
        jitted = jax.jit(functools.partial(train_step, **vars(arguments)))

        def count_and_step(state: TrainState, fixed_teacher: Tree, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
            self.flops = flops.count(jitted.trace(state, fixed_teacher, batch).jaxpr).total()
            return jitted(state, fixed_teacher, batch)  # reuses the trace above

        self.mapped = jax.pmap(count_and_step, AXIS, in_axes=(None, None, 0), out_axes=(None, None), donate_argnums=0)


mapped_step = functools.lru_cache(maxsize=2)(MappedStep)  # a run that goes on in the same process compiles nothing


class TrainStep:
    """`train_step` over all devices: (state, batch) → (state, metrics).

    The state is one plain pytree, replicated over the devices, and donated; a batch has a leading axis of this host's
    devices.

    Args:
        fixed_teacher, model, teacher_model, tx, config: as `train_step` takes them.
    """

    def __init__(
        self,
        fixed_teacher: Tree,
        *,
        model: TwoTower,
        teacher_model: TwoTower,
        tx: optax.GradientTransformation,
        config: ConfigDict,
    ):
        seen = FrozenConfigDict({name: config[name] for name in SEEN})
        self.shared, self.fixed_teacher = mapped_step(StepArguments(model, teacher_model, seen, tx)), fixed_teacher

    @property
    def flops(self) -> int:
        """Floating-point operations of one device in a step, known after the first call."""
        return self.shared.flops

    def __call__(self, state: TrainState, batch: DeviceBatch) -> tuple[TrainState, Metrics]:
        return self.shared.mapped(state, self.fixed_teacher, batch)
