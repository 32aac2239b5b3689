"""Contrastive objectives: each defines its targets; one cross-entropy serves all.

A global batch has n image-text pairs with unit embeddings v_i and t_i. The logits of images → texts are s · v_i·t_j,
and those of texts → images the transpose. The loss of a batch is the mean of both directions,

    loss = ½ [L(v → t) + L(t → v)],     L(y, s) = mean over rows i of  −Σ_j y_ij · log softmax_j(s · q_i·k_j),

where the objective defines the targets y_ij: see `OBJECTIVES`. Objectives with a teacher add a soft term, with a learnt
scale s̃ of its own:

    loss = α · L(y, s) + (1 − α) · L(ỹ, s̃),

where ỹ are the teacher's soft labels. In code, an axis of size 2 holds the two directions. Everything is fp32.

Every objective may add w · mean over pairs i of (‖v_i − ṽ_i‖² + ‖t_i − t̃_i‖²) / d, with w = `feature_weight` and the
teacher's embeddings ṽ_i and t̃_i of width d: see `feature_loss`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from zslflax.losses.chunks import count_chunks, map_chunks, split
from zslflax.losses.feature_distillation import feature_loss, init_heads
from zslflax.losses.heads import Params
from zslflax.losses.pairs import Embeddings, PairIds, Pairs, find_columns, soft_label_columns
from zslflax.losses.sinkhorn import MASKED, column_potential

LOG_LOGIT_SCALE_RANGE = (0.0, 4.605170186)  # log 1 … log 100; the train step clips the learnt values to it


def one_hot_targets(config: ConfigDict, positives: jax.Array, valid: jax.Array) -> jax.Array:
    """1 on the pair: InfoNCE, as in CLIP (arXiv 2103.00020). Several positives of a row share it equally."""
    return positives / jnp.maximum(jnp.sum(positives, axis=-1, keepdims=True), 1.0)


def smoothed_targets(config: ConfigDict, positives: jax.Array, valid: jax.Array) -> jax.Array:
    """1 − ε on the positives together, and ε / m on each of the m other valid columns.

    >>> config = ConfigDict({"smoothing": 0.2})
    >>> smoothed_targets(config, positives=jnp.array([[1.0, 0.0, 0.0, 0.0]]), valid=jnp.array([1, 1, 1, 0], bool))
    Array([[0.8, 0.1, 0.1, 0. ]], dtype=float32)
    """
    others = jnp.where(valid, 1.0 - positives, 0.0)
    share = config.smoothing / jnp.maximum(jnp.sum(others, axis=-1, keepdims=True), 1.0)
    return (1.0 - config.smoothing) * one_hot_targets(config, positives, valid) + share * others


def distilled_targets(
    config: ConfigDict, similarities: jax.Array, allowed: jax.Array, potential: jax.Array
) -> jax.Array:
    """softmax_j(s_ij / τ) of the teacher's similarities: self-distillation (arXiv 2104.08945)."""
    return masked_softmax(similarities / config.teacher_temperature, allowed)


def transport_targets(
    config: ConfigDict, similarities: jax.Array, allowed: jax.Array, potential: jax.Array
) -> jax.Array:
    """softmax_j(s_ij / λ + g_j): the transport plan of the teacher's similarities by rows (OTTER, arXiv 2112.09445)."""
    return masked_softmax(similarities / config.sinkhorn_regulariser + potential, allowed)


class Objective(NamedTuple):
    """How an objective makes its targets.

    Attributes:
        hard_targets: (config, positives fp32 [c, n], valid [n] or [c, n]) → fp32 [c, n], each row summing to 1.
        soft_targets: (config, teacher's similarities [2, c, n], allowed [c, n], column potential [2, 1, n]) → fp32
            [2, c, n]; None where the objective needs no teacher.
        transport: whether the soft targets use the column potential of an optimal transport plan.
        pairwise: whether the loss is SigLIP's binary one of every image-text pair, instead of the cross-entropy.
    """

    hard_targets: Callable[[ConfigDict, jax.Array, jax.Array], jax.Array] = one_hot_targets
    soft_targets: Callable[[ConfigDict, jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    transport: bool = False
    pairwise: bool = False

    @property
    def needs_teacher(self) -> bool:
        return self.soft_targets is not None


OBJECTIVES = {
    "info_nce": Objective(),
    "label_smoothing": Objective(smoothed_targets),
    "self_distillation": Objective(soft_targets=distilled_targets),
    "otter": Objective(soft_targets=transport_targets, transport=True),
    "sigmoid": Objective(pairwise=True),
}


def needs_teacher(config: ConfigDict) -> bool:
    """Whether the objective of a config's section `objective` learns from a teacher."""
    return OBJECTIVES[config.name].needs_teacher or config.feature_weight > 0


def init_params(config: ConfigDict, key: jax.Array | None = None, width: int = 0, teacher_width: int = 0) -> Params:
    """The objective's own parameters: fp32 scalars, and the layers of `feature_loss` where the widths differ.

    The scalars are the log of each learnt logit scale, and the sigmoid's bias.

    Args:
        config: the `objective` section of the config.
        key: of the layers' random weights.
        width, teacher_width: of the embeddings of student and teacher.
    """
    objective = OBJECTIVES[config.name]
    init = {"log_logit_scale": config.log_logit_scale}
    if objective.needs_teacher:
        init["log_soft_logit_scale"] = config.log_logit_scale
    if objective.pairwise:
        init["logit_bias"] = config.logit_bias
    params: Params = {name: jnp.asarray(value, jnp.float32) for name, value in init.items()}
    if config.feature_weight and width != teacher_width:
        assert key is not None
        params["feature_heads"] = init_heads(key, width, teacher_width)
    return params


def pair_losses(
    config: ConfigDict,
    params: Params,
    student: Embeddings,
    teacher: Embeddings | None,
    valid: jax.Array,
    ids: PairIds | None = None,
    *,
    step: jax.Array,
    axis_name: str,
) -> dict[str, jax.Array]:
    """The loss of each of this device's pairs against the whole global batch, both directions averaged.

    Runs inside a mapped axis. The gather keeps its gradient: the gradients of all devices' rows, summed over the
    devices, are those of one device that holds the global batch. Where b × n is larger than `config.max_similarities`,
    the rows are computed in chunks, and again for the gradient: memory is O(max_similarities + n·d), not O(b·n).

    Args:
        config: the `objective` section of the config.
        params: as `init_params` returns them.
        student: embeddings [b, d] of this device's pairs.
        teacher: the teacher's embeddings of the same pairs, of any width; None where the objective needs none.
        valid: bool [b]. The values of an invalid pair are finite and meaningless: the caller leaves them out of the
            mean.
        ids: of the same pairs [b, 2]; None where `config.duplicates` is "negative".
        step: int32 scalar, for the ramp of the soft term.
        axis_name: the mapped axis over which the global batch is spread.

    Returns:
        `loss` and its parts, fp32 [b] each.
    """
    teacher = jax.lax.stop_gradient(teacher)
    gather = lambda x: jax.lax.all_gather(x, axis_name, tiled=True)
    student_batch, teacher_batch, valid_batch, ids_batch = jax.tree.map(gather, (student, teacher, valid, ids))
    b, n = len(valid), len(valid_batch)
    own_positions = jax.lax.axis_index(axis_name) * b + jnp.arange(b, dtype=jnp.int32)
    rows = Pairs(own_positions, valid, student, teacher, ids)
    batch = Pairs(jnp.arange(n, dtype=jnp.int32), valid_batch, student_batch, teacher_batch, ids_batch)
    num_chunks = count_chunks(b, n, config.max_similarities)

    objective, potential = OBJECTIVES[config.name], jnp.zeros(())
    if objective.transport:
        potential = plan_potential(config, split(rows, num_chunks), batch, axis_name)
    losses_of = sigmoid_losses if objective.pairwise else softmax_losses
    row_losses: Callable[[Pairs], dict[str, jax.Array]] = partial(losses_of, config, params, batch, potential)
    if num_chunks > 1:
        row_losses = jax.checkpoint(row_losses, prevent_cse=False)  # keep no chunk's matrices for the gradient
    losses = map_chunks(row_losses, rows, num_chunks)
    losses["loss"] = losses["hard_loss"]
    if objective.needs_teacher:
        weight = soft_weight(config, step)
        losses["loss"] = (1.0 - weight) * losses["hard_loss"] + weight * losses["soft_loss"]
    if config.feature_weight:
        assert teacher is not None
        losses["feature_loss"] = feature_loss(params, student, teacher)
        losses["loss"] += config.feature_weight * losses["feature_loss"]
    return losses


def softmax_losses(
    config: ConfigDict, params: Params, batch: Pairs, potential: jax.Array, rows: Pairs
) -> dict[str, jax.Array]:
    """The cross-entropies of a chunk of rows with their hard and soft targets, both directions averaged: fp32 [c]."""
    objective = OBJECTIVES[config.name]
    positives, valid = find_columns(config, rows, batch)  # (c, n), and (n,) or (c, n)
    similarities = both_directions(rows.student, batch.student)  # (2, c, n)
    logits = jnp.exp(params["log_logit_scale"]) * similarities
    hard = objective.hard_targets(config, positives, valid)
    losses = {
        "hard_loss": cross_entropy(logits, hard, valid),
        "in_batch_accuracy": best_is_positive(logits, positives, valid),
    }
    if objective.soft_targets:
        allowed = soft_label_columns(config, rows, batch)
        soft = objective.soft_targets(config, teacher_similarities(config, rows, batch), allowed, potential)
        soft_logits = jnp.exp(params["log_soft_logit_scale"]) * similarities
        losses |= {
            "soft_loss": cross_entropy(soft_logits, soft, valid),
            "soft_entropy": jnp.sum(jax.scipy.special.entr(soft), axis=-1),  # the minimum of soft_loss, in nats
            "soft_on_pair": jnp.sum(soft * positives, axis=-1),  # the teacher's belief in the given pair
        }
    return {name: jnp.mean(value, axis=0) for name, value in losses.items()}


def sigmoid_losses(
    config: ConfigDict, params: Params, batch: Pairs, potential: jax.Array, rows: Pairs
) -> dict[str, jax.Array]:
    """Σ_j −log σ(±(s · v_i·t_j + bias)), + on positives and − elsewhere (SigLIP, arXiv 2303.15343): fp32 [c].

    The loss of texts → images is the same sum over the batch, so one direction is both.
    """
    positives, valid = find_columns(config, rows, batch)
    similarities = inner_products(rows.student.image, batch.student.text)
    logits = jnp.exp(params["log_logit_scale"]) * similarities + params["logit_bias"]
    losses = jax.nn.softplus((1.0 - 2.0 * positives) * logits)  # (c, n)
    return {
        "hard_loss": jnp.sum(jnp.where(valid, losses, 0.0), axis=-1),
        "in_batch_accuracy": best_is_positive(logits, positives, valid),
    }


def cross_entropy(logits: jax.Array, targets: jax.Array, valid: jax.Array) -> jax.Array:
    """−Σ_j y_ij · log softmax_j(logits_ij) over the valid columns.

    Args:
        logits: fp32 [..., n].
        targets: fp32 [..., n].
        valid: bool [n] or [..., n].

    Returns:
        fp32 [...].

    >>> logits, targets = jnp.array([[2.0, 0.0, 9.0]]), jnp.array([[1.0, 0.0, 0.0]])
    >>> cross_entropy(logits, targets, valid=jnp.array([True, True, False])).round(4)  # log(1 + exp(-2))
    Array([0.1269], dtype=float32)
    """
    return -jnp.sum(targets * jax.nn.log_softmax(jnp.where(valid, logits, MASKED), axis=-1), axis=-1)


def masked_softmax(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """Softmax over the allowed entries; exactly zero elsewhere, and everywhere in a row that allows none.

    >>> masked_softmax(jnp.array([[1.0, 1.0, 9.0], [1.0, 1.0, 9.0]]), jnp.array([[1, 1, 0], [0, 0, 0]], bool))
    Array([[0.5, 0.5, 0. ],
           [0. , 0. , 0. ]], dtype=float32)
    """
    return jnp.where(allowed, jax.nn.softmax(jnp.where(allowed, logits, MASKED), axis=-1), 0.0)


def inner_products(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """q_i·k_j at full fp32 precision: [c, d] × [n, d] → fp32 [c, n]."""
    return jnp.einsum("cd,nd->cn", queries, keys, precision=jax.lax.Precision.HIGHEST)


def both_directions(rows: Embeddings, batch: Embeddings) -> jax.Array:
    """The similarities v_i·t_j of images → texts and t_i·v_j of texts → images, fp32 [2, c, n]."""
    return jnp.stack([inner_products(rows.image, batch.text), inner_products(rows.text, batch.image)])


def teacher_similarities(config: ConfigDict, rows: Pairs, batch: Pairs) -> jax.Array:
    """How well each column fits each row according to the teacher, in both directions: fp32 [2, c, n].

        s_ij = v_i·t_j + w_vv v_i·v_j + w_tt t_i·t_j     and     t_i·v_j + w_vv v_i·v_j + w_tt t_i·t_j

    The paper (arXiv 2104.08945) uses the first term alone; OTTER's released scripts set both weights to 1.
    """
    assert rows.teacher is not None and batch.teacher is not None
    similarities = both_directions(rows.teacher, batch.teacher)
    if config.image_image_weight:
        similarities += config.image_image_weight * inner_products(rows.teacher.image, batch.teacher.image)
    if config.text_text_weight:
        similarities += config.text_text_weight * inner_products(rows.teacher.text, batch.teacher.text)
    return similarities


def plan_potential(config: ConfigDict, chunks: Pairs, batch: Pairs, axis_name: str) -> jax.Array:
    """The column potentials of both directions' transport plans, fp32 [2, 1, n].

    Args:
        chunks: this device's pairs, with arrays [chunks, c, …].
    """

    def row_logits(rows: Pairs) -> jax.Array:
        has_mass = soft_label_columns(config, rows, batch) & rows.valid[:, None]
        return jnp.where(has_mass, teacher_similarities(config, rows, batch) / config.sinkhorn_regulariser, MASKED)

    chunks = jax.lax.stop_gradient(chunks)
    return column_potential(row_logits, chunks, batch.valid, config.sinkhorn_iterations, axis_name)[:, None]


def best_is_positive(logits: jax.Array, positives: jax.Array, valid: jax.Array) -> jax.Array:
    """Whether the highest valid column of each row is a positive: fp32 [..., c] for logits [..., c, n]."""
    best = jnp.argmax(jnp.where(valid, logits, MASKED), axis=-1)
    return positives[jnp.arange(len(positives)), best]


def soft_weight(config: ConfigDict, step: jax.Array) -> jax.Array:
    """1 − α, reached linearly over the first `soft_ramp_steps` steps (ALBEF, arXiv 2107.07651, does so in an epoch)."""
    ramp = jnp.minimum(1.0, (step.astype(jnp.float32) + 1.0) / max(config.soft_ramp_steps, 1))
    return (1.0 - config.alpha) * ramp
