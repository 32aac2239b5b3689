"""The train state, and the teacher's moving average in it."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np

Tree = Any  # a nested dict of arrays


class TrainState(flax.struct.PyTreeNode):
    """All that a run carries from step to step; what a checkpoint holds.

    Attributes:
        step: int32 scalar, the number of steps taken.
        params: the student's, fp32: {"image": {"tower", "projection"}, "text": {"tower", "projection"}, "objective"}.
        batch_stats: running statistics of the student's batch normalisation ({} without).
        opt_state: the optimiser's.
        teacher_params: moving average of `params`, without "objective" and without towers that are frozen for ever,
            which it shares with the student; {} unless teacher.kind is "ema".
        teacher_batch_stats: moving average of `batch_stats`.
        bad_steps: int32 scalar, the number of steps whose loss, gradient or update was not finite and was dropped.
        bad_step: int32 scalar, the one that was too many, -1 if none. From then on the state stays as it was before it.
    """

    step: jax.Array
    params: Tree
    batch_stats: Tree
    opt_state: Tree
    teacher_params: Tree
    teacher_batch_stats: Tree
    bad_steps: jax.Array
    bad_step: jax.Array


def create(variables: Tree, tx, *, ema: bool, frozen: tuple[str, ...]) -> TrainState:
    """The state before the first step; the teacher starts as a copy of the student.

    Args:
        variables: {"params", "batch_stats"} of the model, with "objective" among the parameters.
        tx: from `optimizer.build`.
        ema: whether there is a moving average.
        frozen: the modalities whose tower is frozen for ever: it has neither optimiser state nor average.
    """
    params, batch_stats = variables["params"], variables["batch_stats"]
    trained = trainable(params, frozen)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=tx.init(trained),
        teacher_params={m: jax.tree.map(jnp.copy, trained[m]) for m in ("image", "text")} if ema else {},
        teacher_batch_stats=jax.tree.map(jnp.copy, batch_stats) if ema else {},
        bad_steps=jnp.zeros((), jnp.int32),
        bad_step=jnp.full((), -1, jnp.int32),
    )


def trainable(params: Tree, frozen: tuple[str, ...]) -> Tree:
    """`params` without the towers of the modalities in `frozen`."""
    return {
        group: {part: p for part, p in parts.items() if part != "tower" or group not in frozen}
        for group, parts in params.items()
    }


def merge(params: Tree, part: Tree) -> Tree:
    """`params` with the groups' entries that `part` has in place of its own: undoes `trainable`."""
    return {group: {**entries, **part.get(group, {})} for group, entries in params.items()}


def without_shared(teacher: Tree, params: Tree, frozen: tuple[str, ...]) -> Tree:
    """The variables of another run's model without the frozen towers that are the student's own, bit for bit."""
    if not teacher:
        return teacher
    towers = ((modality, teacher["params"][modality]["tower"], params[modality]["tower"]) for modality in frozen)
    return {
        **teacher,
        "params": trainable(teacher["params"], tuple(m for m, own, other in towers if equal(own, other))),
    }


def equal(a: Tree, b: Tree) -> bool:
    """Whether two trees have the same structure and the same values."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)))


def update_average(average: Tree, student: Tree, decay: float, updates: jax.Array) -> Tree:
    """average ← d · average + (1 − d) · student, with d = min(decay, (1 + k) / (10 + k)) at the k-th update, from 1.

    The warm-up lets the average forget its random start; OTTER's release and TensorFlow's ExponentialMovingAverage use
    the same.
    """
    k = updates.astype(jnp.float32)
    d = jnp.minimum(jnp.float32(decay), (1.0 + k) / (10.0 + k))
    return jax.tree.map(lambda a, s: a + (1.0 - d) * (s - a), average, student)


def student_variables(state: TrainState) -> Tree:
    """What the model is applied to, as the student."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def teacher_variables(state: TrainState, batch_norm: str = "ema") -> Tree:
    """What the model is applied to, as the EMA teacher; a tower that is frozen for ever is the student's own.

    `batch_norm` says whose running statistics it has: "student", else the average's.
    """
    batch_stats = state.batch_stats if batch_norm == "student" else state.teacher_batch_stats
    return {"params": merge(state.params, state.teacher_params), "batch_stats": batch_stats}
