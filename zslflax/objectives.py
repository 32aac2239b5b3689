"""Soft and hard targets, and the one cross-entropy that they share.

Notation: a global batch has `n` pairs, of which this device holds `b` consecutive ones; `v` are unit image embeddings,
`t` unit text embeddings. A direction takes one modality as rows (queries) and the other as columns (keys):

    loss = ½ [ L(v → t) + L(t → v) ],     L = mean over rows of  −Σ_j target_ij · log softmax_j(scale · q_i · k_j)

Each objective only says what the targets are. Everything is fp32 and at full matrix precision. What is written here on
whole matrices, streamed.py computes in blocks, without holding any; `pair_losses` chooses.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from zslflax import streamed, transport
from zslflax.transport import MASKED, similarity

OBJECTIVES = ("info_nce", "label_smoothing", "self_distillation", "otter", "sigmoid")
LOG_SCALE_RANGE = (0.0, 4.605170186)  # log 1 … log 100; the step keeps the learnt log-scales inside


class Embeddings(NamedTuple):
    """Unit embeddings of pairs, fp32; (b, d) on one device or (n, d) of the global batch."""

    image: jax.Array
    text: jax.Array


def init_params(objective) -> dict[str, jax.Array]:
    """The objective's own parameters: the log of each learnt logit scale, and the sigmoid's bias (fp32 scalars)."""
    init = {"hard_log_scale": objective.log_scale}
    if objective.name in SOFT_TARGETS:
        init["soft_log_scale"] = objective.log_scale
    if objective.name == "sigmoid":
        init["bias"] = objective.bias
    return {name: jnp.asarray(value, jnp.float32) for name, value in init.items()}


def cross_entropy(logits: jax.Array, targets: jax.Array, columns: jax.Array) -> jax.Array:
    """−Σ_j target_ij · log softmax_j(logits_ij) over the valid columns: [b, n], [b, n], bool [n] → [b]."""
    log_q = jax.nn.log_softmax(jnp.where(columns, logits, MASKED), axis=-1)
    return -jnp.sum(targets * log_q, axis=-1)


def masked_softmax(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """Softmax over the allowed entries; exactly zero elsewhere, and everywhere in a row that allows none."""
    return jnp.where(allowed, jax.nn.softmax(jnp.where(allowed, logits, MASKED), axis=-1), 0.0)


def smoothed_targets(pairing: jax.Array, columns: jax.Array, smoothing: float) -> jax.Array:
    """(1 − ε) on the pair and ε / (n − 1) on each of the n − 1 other valid columns."""
    others = jnp.where(columns, 1.0 - pairing, 0.0)
    share = smoothing / jnp.maximum(jnp.sum(others, axis=-1, keepdims=True), 1.0)
    return (1.0 - smoothing) * pairing + share * others


def teacher_similarities(objective, rows: Embeddings, batch: Embeddings) -> tuple[jax.Array, jax.Array]:
    """How well each column fits each row, says the teacher: image → text and text → image, fp32 [rows, n] each.

        s_ij = v_i·t_j + w_vv v_i·v_j + w_tt t_i·t_j     and     t_i·v_j + w_vv v_i·v_j + w_tt t_i·t_j

    The paper's soft labels (arXiv 2104.08945, section 3.2) are the first term alone; OTTER (arXiv 2112.09445,
    section 3.3) adds the others, in its release with weights of 1.
    """
    within = 0.0
    if objective.image_image:
        within += objective.image_image * similarity(rows.image, batch.image)
    if objective.text_text:
        within += objective.text_text * similarity(rows.text, batch.text)
    return similarity(rows.image, batch.text) + within, similarity(rows.text, batch.image) + within


def distilled_targets(objective, s: jax.Array, pairing: jax.Array, columns: jax.Array, _whole) -> jax.Array:
    """softmax_j(s_ij / τ): self-distillation's soft labels (arXiv 2104.08945, section 3.2), fp32 [b, n]."""
    return masked_softmax(s / objective.teacher_temperature, allowed_targets(objective, pairing, columns))


def transported_targets(objective, s: jax.Array, pairing: jax.Array, columns: jax.Array, whole) -> jax.Array:
    """The row-normalised Sinkhorn plan of the global batch's similarities (arXiv 2112.09445, section 3.3), fp32 [b, n].

    The plan couples all rows: every device solves `whole` [n, n], of which `s` are its own rows.
    """
    if objective.remove_diagonal:
        whole = jnp.where(jnp.eye(whole.shape[0], dtype=bool), MASKED, whole)
    g = transport.column_potential(whole, columns, objective.sinkhorn_regulariser, objective.sinkhorn_iterations)
    return masked_softmax(s / objective.sinkhorn_regulariser + g, allowed_targets(objective, pairing, columns))


SOFT_TARGETS = {"self_distillation": distilled_targets, "otter": transported_targets}


def allowed_targets(objective, pairing: jax.Array, columns: jax.Array) -> jax.Array:
    """Which columns may have soft-label mass: the valid ones, without the pair itself where the config removes it.

    OTTER removes it, because the hard term holds it already. A row left with no column has no soft target: zeros.
    """
    return columns & (pairing == 0) if objective.remove_diagonal else jnp.broadcast_to(columns, pairing.shape)


def soft_targets(objective, teacher: Embeddings, gather, pairing, columns) -> tuple[jax.Array, jax.Array]:
    """The teacher's soft labels of this device's rows, image → text and text → image; no gradient flows through."""
    batch = Embeddings(*map(gather, teacher))
    rows = teacher_similarities(objective, teacher, batch)
    wholes = teacher_similarities(objective, batch, batch) if objective.name == "otter" else (None, None)
    targets = SOFT_TARGETS[objective.name]
    return tuple(
        jax.lax.stop_gradient(targets(objective, s, pairing, columns, whole)) for s, whole in zip(rows, wholes)
    )


def soft_weight(objective, step: jax.Array) -> jax.Array:
    """1 − α, reached linearly over the first `ramp_steps` steps (ALBEF, arXiv 2107.07651, ramps so over an epoch)."""
    ramp = jnp.minimum(1.0, (step.astype(jnp.float32) + 1.0) / max(objective.ramp_steps, 1))
    return (1.0 - objective.alpha) * ramp


def hits(logits: jax.Array, pairing: jax.Array, columns: jax.Array) -> jax.Array:
    """Whether a row's best valid column is its pair, as fp32 [b]."""
    best = jnp.argmax(jnp.where(columns, logits, MASKED), axis=-1)
    return (best == jnp.argmax(pairing, axis=-1)).astype(jnp.float32)


def softmax_rows(objective, params, s, soft, pairing, columns) -> dict[str, jax.Array]:
    """One direction of a cross-entropy objective; `s`: the student's similarities, `soft`: the soft labels or None."""
    logits = jnp.exp(params["hard_log_scale"]) * s
    smoothing = objective.smoothing if objective.name == "label_smoothing" else 0.0
    hard = cross_entropy(logits, smoothed_targets(pairing, columns, smoothing), columns)
    rows = {"hard_loss": hard, "batch_accuracy": hits(logits, pairing, columns)}
    if soft is None:
        return rows
    return rows | {
        "soft_loss": cross_entropy(jnp.exp(params["soft_log_scale"]) * s, soft, columns),
        "soft_entropy": jnp.sum(jax.scipy.special.entr(soft), axis=-1),  # the floor of soft_loss, in nats
        "soft_on_pair": jnp.sum(soft * pairing, axis=-1),  # how far the teacher believes the given pairing
    }


def sigmoid_rows(params, s, pairing, columns) -> dict[str, jax.Array]:
    """SigLIP's pairwise loss (arXiv 2303.15343, section 3.2): −Σ_j log σ(z_ij (scale · v_i·t_j + bias)), z = ±1."""
    logits = jnp.exp(params["hard_log_scale"]) * s + params["bias"]
    losses = -jax.nn.log_sigmoid(jnp.where(pairing > 0, logits, -logits))
    return {
        "hard_loss": jnp.sum(jnp.where(columns, losses, 0.0), axis=-1),
        "batch_accuracy": hits(logits, pairing, columns),
    }


def whole_rows(objective, params, student: Embeddings, teacher, valid, axis_name) -> dict[str, jax.Array]:
    """What explains each of this device's rows, both directions averaged, from whole matrices [b, n]."""

    def gather(x):
        return jax.lax.all_gather(x, axis_name, tiled=True)

    b = valid.shape[0]
    columns = gather(valid)  # (n,)
    own = jax.lax.axis_index(axis_name) * b + jnp.arange(b, dtype=jnp.int32)
    pairing = jax.nn.one_hot(own, columns.shape[0], dtype=jnp.float32)  # (b, n)
    image_to_text = similarity(student.image, gather(student.text))
    if objective.name == "sigmoid":  # symmetric: one direction is both
        return sigmoid_rows(params, image_to_text, pairing, columns)
    text_to_image = similarity(student.text, gather(student.image))
    softs = (None, None) if teacher is None else soft_targets(objective, teacher, gather, pairing, columns)
    directions = [
        softmax_rows(objective, params, s, soft, pairing, columns)
        for s, soft in zip((image_to_text, text_to_image), softs)
    ]
    return jax.tree.map(lambda x, y: 0.5 * (x + y), *directions)


def is_streamed(objective, b: int, n: int) -> bool:
    """Whether the largest matrix of the plain form, [b, n] or Sinkhorn's [n, n], has more than block² entries."""
    rows = n if objective.name == "otter" else b
    return 0 < objective.block**2 < rows * n


def pair_losses(objective, params, student: Embeddings, teacher, valid, *, step, axis_name) -> dict[str, jax.Array]:
    """The objective of each of this device's pairs against the whole global batch, both directions averaged.

    Runs inside a mapped axis. The gather keeps its gradient: the gradient of the sum of all devices' rows, summed over
    the devices, is that of one device holding the global batch.

    Args:
        objective: the config's `objective` section.
        params: what `init_params` returns, as learnt.
        student: this device's unit embeddings, fp32 [b, d].
        teacher: the teacher's `Embeddings` of the same pairs, of any width; `None` where the objective needs none.
        valid: bool [b]; a False pair is neither positive nor negative to any other. Its own row's values are finite but
            mean nothing: the caller leaves them out of the mean.
        step: int32 scalar, for the ramp.
        axis_name: the mapped axis over which the global batch is spread.

    Returns:
        `loss` and what explains it, each fp32 [b].
    """

    b = valid.shape[0]
    n = b * jax.lax.axis_size(axis_name)
    form = streamed.pair_rows if is_streamed(objective, b, n) else whole_rows
    rows = form(objective, params, student, teacher, valid, axis_name)
    if teacher is None:
        return {"loss": rows["hard_loss"], "batch_accuracy": rows["batch_accuracy"]}
    weight = soft_weight(objective, step)
    return rows | {"loss": (1.0 - weight) * rows["hard_loss"] + weight * rows["soft_loss"]}
