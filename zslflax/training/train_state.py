"""The train state: all that a run carries from step to step, with the teacher's moving average."""

from collections.abc import Sequence

import flax
import jax
import jax.numpy as jnp
import optax

from zslflax.models.partition import MODALITIES, Tree, combine, partition


class TrainState(flax.struct.PyTreeNode):
    """All that a run carries from step to step, and what a checkpoint holds.

    Attributes:
        step: int32 scalar, the number of steps taken.
        params: the student's trained parameters, fp32:
            {"image": {"tower", "projection"}, "text": {"tower", "projection"}, "objective": {…}}. A classifier has no
            "text", and its head is the "projection".
        frozen_params: the towers that are never trained, {modality: {"tower"}}; student and EMA teacher share them.
        batch_stats: running statistics of the student's batch normalisation ({} without).
        opt_state: the optimiser's state, of `params`.
        teacher_params: moving average of `params` without "objective"; {} unless the run keeps it (`keeps_average`).
        teacher_batch_stats: moving average of `batch_stats`.
        nonfinite_steps: int32 scalar, the number of steps that were skipped because they were not finite.
        failed_step: int32 scalar, the first non-finite step that was not skipped, or -1. From then on the state stays
            as it was before that step.
    """

    step: jax.Array
    params: Tree
    frozen_params: Tree
    batch_stats: Tree
    opt_state: Tree
    teacher_params: Tree
    teacher_batch_stats: Tree
    nonfinite_steps: jax.Array
    failed_step: jax.Array


def create_train_state(
    variables: Tree, tx: optax.GradientTransformation, *, ema: bool, frozen: tuple[str, ...]
) -> TrainState:
    """The state before the first step. The moving average starts as a copy of the student.

    Args:
        variables: {"params", "batch_stats"} of the model, with "objective" among the parameters.
        tx: the optimiser, from `build_optimizer`.
        ema: whether to keep the moving average.
        frozen: the modalities whose tower is never trained; it has neither optimiser state nor average.
    """
    params, frozen_params = partition(variables["params"], frozen)
    batch_stats = variables["batch_stats"]
    copy = lambda tree: jax.tree.map(jnp.copy, tree)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen_params=frozen_params,
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        teacher_params=copy(towers(params)) if ema else {},
        teacher_batch_stats=copy(batch_stats) if ema else {},
        nonfinite_steps=jnp.zeros((), jnp.int32),
        failed_step=jnp.full((), -1, jnp.int32),
    )


def towers(params: Tree) -> Tree:
    """The parameters of towers and projections, without the objective's."""
    return {modality: params[modality] for modality in MODALITIES if modality in params}


def student_variables(state: TrainState) -> Tree:
    """The model's variables as the student, {"params", "batch_stats"}."""
    return {"params": combine(state.params, state.frozen_params), "batch_stats": state.batch_stats}


def teacher_variables(state: TrainState, fixed_teacher: Tree | None = None, batch_norm: str = "ema") -> Tree:
    """The model's variables as the teacher, {"params", "batch_stats"}: the EMA, or a fixed teacher from a checkpoint.

    Args:
        state: the train state.
        fixed_teacher: {"params", "batch_stats"} of another run's model, without the towers that are equal to the
            student's frozen ones; None or {} for the EMA teacher.
        batch_norm: whose running statistics an EMA teacher uses: "student", or else its own.
    """
    if fixed_teacher:
        params, batch_stats = fixed_teacher["params"], fixed_teacher["batch_stats"]
    else:
        params = state.teacher_params
        batch_stats = state.batch_stats if batch_norm == "student" else state.teacher_batch_stats
    return {"params": combine(params, state.frozen_params), "batch_stats": batch_stats}


def updates_at_size(schedule: Sequence[tuple[int, int]], updates: jax.Array) -> jax.Array:
    """How many of the updates were made since the size of the images last changed.

    Batch statistics depend on that size. Their average counts these updates, and so forgets what it was before.

    >>> [int(updates_at_size(((128, 5), (160, 7)), jnp.int32(k))) for k in (4, 5, 6, 7, 8, 20)]
    [4, 5, 1, 2, 1, 13]

    Args:
        schedule: `config.model.image.schedule`.
        updates: k, an int32 scalar.
    """
    last = jnp.zeros_like(updates)
    for _, step in schedule:
        last = jnp.where(updates > step, step, last)
    return updates - last


def update_ema(average: Tree, student: Tree, decay: float, updates: jax.Array) -> Tree:
    """average ← d · average + (1 − d) · student, with d = min(decay, (1 + k) / (10 + k)) at the k-th update, from 1.

    The warm-up lets the average forget its random start, as TensorFlow's ExponentialMovingAverage does.

    Args:
        average: the teacher's arrays.
        student: the student's, of the same structure.
        decay: the largest d.
        updates: k, an int32 scalar.

    >>> average = update_ema(jnp.float32(0.0), jnp.float32(1.0), decay=0.999, updates=jnp.int32(1))
    >>> round(float(average), 4)  # 1 − 2 / 11
    0.8182
    """
    k = updates.astype(jnp.float32)
    d = jnp.minimum(jnp.float32(decay), (1.0 + k) / (10.0 + k))
    return jax.tree.map(lambda a, s: a + (1.0 - d) * (s - a), average, student)
