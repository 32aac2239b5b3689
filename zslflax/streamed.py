"""The objectives in blocks of rows and columns: what objectives.py computes, exactly, without its matrices.

A cross-entropy needs only a few statistics of each row. With soft labels p_ij and d_ij = s_ij − s_ii, by how
much column j is more similar to row i than the row's own pair is,

    −Σ_j p_ij · log softmax_j(scale · s_ij)  =  log Σ_j exp(scale · d_ij)  −  scale · Σ_j p_ij · d_ij,

where the differences keep a small loss as exact as log softmax would. The statistics of a set of columns
follow from those of its parts: a block's, a device's and the batch's are all made by `fold`, from those of
single columns. One sweep over the blocks of v_i · t_j (rows: this device's images, columns: all texts) gives the
rows' statistics, those of v → t, and the columns', those of t → v: the matrix of one direction is the transpose
of the other's, for the student and for the teacher. The columns' are then folded over the devices. The gradient
is a second sweep, which computes the blocks again. Memory: O((b + n) d + block²).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from zslflax.blocks import ALONG_FIRST, Reductions, log_sum, over_devices, sweep
from zslflax.transport import MASKED, similarity, streamed_potentials

LAST = jnp.iinfo(jnp.int32).max
SOFT = ("soft", "taught", "mean", "on_pair", "entropy")
# The statistics of a row that has seen no column yet; `fold` says what they are.
EMPTY = dict.fromkeys(("best", "hard", "soft", "taught"), MASKED) | {"index": LAST}
EMPTY |= dict.fromkeys(("sigmoid", "mean", "on_pair", "entropy"), 0.0)


class Fixed(NamedTuple):
    """What a sweep is given besides arrays."""

    names: tuple[str, ...]  # the statistics
    directions: int  # 1: v → t alone; 2: t → v as well
    remove_diagonal: bool
    block: int  # rows and columns at a time
    axis_name: str


def fold(x: dict[str, jax.Array], over: Reductions) -> dict[str, jax.Array]:
    """A row's statistics over a set of columns, from those over disjoint parts of the set.

    | best, index | max_j s_ij and the first j that has it |
    | sigmoid | Σ_j −log σ(z_ij (scale · s_ij + bias)) |
    | hard, soft | log Σ_j exp(scale · d_ij), of either scale |
    | taught | log Σ_j exp(u_ij) over the allowed columns, u the teacher's logits; p = exp(u − taught) |
    | mean, on_pair, entropy | Σ_j p_ij d_ij, p_ii and −Σ_j p_ij log p_ij |
    """
    best = over.largest(x["best"])
    y = {"best": best, "index": over.smallest(jnp.where(x["best"] == best, x["index"], LAST))}
    if "sigmoid" in x:
        y["sigmoid"] = over.total(x["sigmoid"])
    y |= {name: log_sum(x[name], over) for name in ("hard", "soft", "taught") if name in x}
    if "taught" in x:
        share = jnp.exp(x["taught"] - y["taught"])  # of the row's mass, in each part
        y |= {name: over.total(share * x[name]) for name in ("mean", "on_pair")}
        y["entropy"] = over.total(share * (x["entropy"] + y["taught"] - x["taught"]))
    return y


def single(fixed: Fixed, params, s, u, queries: dict, keys: dict) -> dict[str, jax.Array]:
    """The statistics over each single column, in one direction of a block; s, u are fp32 [keys, queries]."""
    valid, own = keys["valid"][:, None], keys["index"][:, None] == queries["index"]
    difference = jnp.where(own, 0.0, s - queries["pair"])
    x = {"best": jnp.where(valid, s, MASKED), "index": keys["index"][:, None]}
    if "sigmoid" in fixed.names:
        logits = jnp.exp(params["hard_log_scale"]) * s + params["bias"]
        x["sigmoid"] = jnp.where(valid, jax.nn.softplus(jnp.where(own, -logits, logits)), 0.0)
    if "hard" in fixed.names:
        x["hard"] = jnp.where(valid, jnp.exp(params["hard_log_scale"]) * difference, MASKED)
    if "taught" in fixed.names:
        allowed = valid & ~own if fixed.remove_diagonal else valid
        x["soft"] = jnp.where(valid, jnp.exp(params["soft_log_scale"]) * difference, MASKED)
        x["taught"] = jnp.where(allowed, u + keys["potential"][:, None], MASKED)
        x |= {"mean": difference, "on_pair": own.astype(jnp.float32), "entropy": jnp.float32(0.0)}
    return x


def directions(fixed: Fixed, params, s, rows: dict, columns: dict) -> list[dict[str, jax.Array]]:
    """`single` of a block s [rows, columns]: v → t, then t → v if that is wanted too."""
    taught = "taught" in fixed.names
    u = similarity(rows["teacher"], columns["teacher"]) if taught else s  # not looked at without a teacher
    both = ((s.T, u.T, rows, columns), (s, u, columns, rows))
    return [single(fixed, params, *arguments) for arguments in both[: fixed.directions]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def statistics(fixed: Fixed, params, rows: dict, columns: dict) -> list[dict[str, jax.Array]]:
    """The statistics of this device's pairs over the whole global batch, in each direction.

    Differentiable in the parameters and in the entries `student` and `pair`, through `hard`, `soft`, `mean`
    and `sigmoid`; nothing flows through the other statistics, nor to the teacher.

    Args:
        params: the objective's.
        rows: `student` (images), `pair` (s_ii), `valid`, `index`, and with soft labels `teacher` and
            `potential`; [b, …].
        columns: likewise of all texts; [n, …]. The teacher's logits are u_ij = x_i · y_j + the column's
            potential, and in the other direction the row's.

    Returns:
        A dict for each direction, of arrays [b].
    """
    return forward(fixed, params, rows, columns)[0]


def forward(fixed: Fixed, params, rows: dict, columns: dict):
    """`statistics`, and what its gradient needs."""

    def merge(y, x):
        return fold(jax.tree.map(lambda *parts: jnp.stack(parts), y, fold(x, ALONG_FIRST)), ALONG_FIRST)

    def visit(row, column, row_sums, column_sums, totals):
        x = directions(fixed, params, similarity(row["student"], column["student"]), row, column)
        row_sums = merge(row_sums, x[0])
        if fixed.directions == 2:
            column_sums = merge(column_sums, x[1])
        return row_sums, column_sums, totals

    def empty(side):
        return {name: jnp.full(side["index"].shape, EMPTY[name]) for name in fixed.names}

    b = rows["index"].shape[0]
    none = [empty(rows), empty(columns) if fixed.directions == 2 else {}]
    y, z, _ = sweep(visit, fixed.block, rows, columns, *none)
    if fixed.directions == 1:
        return [y], (params, rows, columns, [y])
    z = fold(z, over_devices(fixed.axis_name))
    own = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, rows["index"][0], b), z)
    return [y, own], (params, rows, columns, [y, z])


def moving(side: dict) -> dict:
    """What the gradient reaches."""
    return {name: side[name] for name in ("student", "pair")}


def linearised(x: dict, y: dict, cotangent: dict) -> jax.Array:
    """Σ cotangent · ∂y/∂x · x for y = fold(x): its gradient is that of a fold whose result is known."""

    def share(name):
        # No part is larger than the whole, except in the padding of a last block, whose whole is unknown.
        return jax.lax.stop_gradient(jnp.exp(jnp.minimum(x[name] - y[name], 0.0)))

    total = 0.0
    if "sigmoid" in y:
        total += jnp.sum(cotangent["sigmoid"] * x["sigmoid"])
    for name in ("hard", "soft"):
        if name in y:
            total += jnp.sum(cotangent[name] * share(name) * x[name])
    if "taught" in y:
        total += jnp.sum(cotangent["mean"] * share("taught") * x["mean"])
    return total


def backward(fixed: Fixed, kept, cotangents):
    """Gradients by the parameters, the rows and the columns, of which each device has its images' share."""
    params, rows, columns, y = kept
    # Row i of t → v is a column here, on every device: its owner's cotangent is needed by all.
    both = [cotangents[0]]
    if fixed.directions == 2:
        cotangent = {name: cotangents[1][name] for name in ("hard", "soft", "mean") if name in y[1]}
        both += [jax.tree.map(lambda x: jax.lax.all_gather(x, fixed.axis_name, tiled=True), cotangent)]

    def visit(row, column, row_sums, column_sums, totals):
        def total(row_moving, column_moving, params):
            sides = (row | row_moving, column | column_moving)
            x = directions(fixed, params, similarity(*(side["student"] for side in sides)), *sides)
            return sum(linearised(x, *side["whole"]) for x, side in zip(x, sides))

        gradients = jax.grad(total, argnums=(0, 1, 2))(moving(row), moving(column), params)
        return jax.tree.map(jnp.add, (row_sums, column_sums, totals), gradients)

    wholes = [{"whole": y_and_cotangent} for y_and_cotangent in zip(y, both)] + [{}]
    zeros = jax.tree.map(jnp.zeros_like, (moving(rows), moving(columns), params))
    of_rows, of_columns, of_params = sweep(visit, fixed.block, rows | wholes[0], columns | wholes[1], *zeros)
    return of_params, dict.fromkeys(rows) | of_rows, dict.fromkeys(columns) | of_columns


statistics.defvjp(forward, backward)


def teach(fixed: Fixed, objective, teacher, rows: dict, columns: dict) -> tuple[dict, dict]:
    """Adds the teacher to both sides: u_ij = x_i · y_j, `objectives.teacher_similarities` over τ or λ.

    v_i·t_j + w_vv v_i·v_j + w_tt t_i·t_j = (v_i + w_tt t_i)·t_j + w_vv v_i·v_j: one inner product.
    """
    teacher = jax.lax.stop_gradient(teacher)
    x, y = teacher.image + objective.text_text * teacher.text, teacher.text
    if objective.image_image:
        x = jnp.concatenate([x, objective.image_image * teacher.image], axis=-1)
        y = jnp.concatenate([y, teacher.image], axis=-1)
    otter = objective.name == "otter"
    x /= objective.sinkhorn_regulariser if otter else objective.teacher_temperature
    y = jax.lax.all_gather(y, fixed.axis_name, tiled=True)
    f, g = jnp.zeros(x.shape[:1], jnp.float32), jnp.zeros(y.shape[:1], jnp.float32)
    if otter:
        # Nothing of the student goes along: of a loop that a gradient enters, jax computes beforehand what
        # does not change from one iteration to the next, and those are all blocks of u.
        sides = [{"teacher": z} | {k: side[k] for k in ("valid", "index")} for z, side in ((x, rows), (y, columns))]
        f, g = streamed_potentials(
            *sides,
            objective.sinkhorn_iterations,
            remove_diagonal=fixed.remove_diagonal,
            block=fixed.block,
            axis_name=fixed.axis_name,
        )
    return rows | {"teacher": x, "potential": f}, columns | {"teacher": y, "potential": g}


def smoothed(objective, hard, scale, pair, queries, keys, valid, axis_name) -> jax.Array:
    """The cross-entropy with `objectives.smoothed_targets` y: (Σ_j y_ij) · hard_i − scale · Σ_j y_ij d_ij."""
    weights = valid.astype(jnp.float32)
    others = jax.lax.psum(jnp.sum(weights), axis_name) - weights
    key_sum = jax.lax.psum(jnp.sum(weights[:, None] * keys, axis=0), axis_name)
    of_all = jnp.sum(queries * key_sum, axis=-1)
    differences = of_all - weights * pair - others * pair  # Σ of d_ij over the valid others
    share = objective.smoothing / jnp.maximum(others, 1.0)
    return (1.0 - objective.smoothing + share * others) * hard - scale * share * differences


def pair_rows(objective, params, student, teacher, valid, axis_name) -> dict[str, jax.Array]:
    """`objectives.whole_rows` in blocks of `objective.block` rows and columns: the same values."""

    def gather(x):
        return jax.lax.all_gather(x, axis_name, tiled=True)

    b = valid.shape[0]
    own = jax.lax.axis_index(axis_name) * b + jnp.arange(b, dtype=jnp.int32)
    pair = jnp.sum(student.image * student.text, axis=-1)
    rows = {"student": student.image, "pair": pair, "valid": valid, "index": own}
    columns = jax.tree.map(gather, rows | {"student": student.text})
    sigmoid = objective.name == "sigmoid"
    softs = () if teacher is None else SOFT
    fixed = Fixed(
        names=("best", "index", "sigmoid" if sigmoid else "hard", *softs),
        directions=1 if sigmoid else 2,  # the sigmoid's loss is symmetric
        remove_diagonal=objective.remove_diagonal,
        block=objective.block,
        axis_name=axis_name,
    )
    if softs:
        rows, columns = teach(fixed, objective, teacher, rows, columns)

    scale = jnp.exp(params["hard_log_scale"])
    results = []
    for y, queries, keys in zip(statistics(fixed, params, rows, columns), student, reversed(student)):
        row = {"batch_accuracy": (y["index"] == own).astype(jnp.float32)}
        row["hard_loss"] = y["sigmoid"] if sigmoid else y["hard"]
        if objective.name == "label_smoothing":
            row["hard_loss"] = smoothed(objective, y["hard"], scale, pair, queries, keys, valid, axis_name)
        if softs:
            soft_loss = y["soft"] - jnp.exp(params["soft_log_scale"]) * y["mean"]
            explained = {"soft_loss": soft_loss, "soft_entropy": y["entropy"], "soft_on_pair": y["on_pair"]}
            some = y["taught"] > 0.5 * MASKED  # a row that allows no column has no soft label
            row |= {name: jnp.where(some, x, 0.0) for name, x in explained.items()}
        results.append(row)
    return jax.tree.map(lambda *x: sum(x) / len(x), *results)
