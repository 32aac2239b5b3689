"""Contrastive objectives: each defines its targets; one cross-entropy serves all.

A global batch has n pairs, of which this device holds b consecutive ones. With unit embeddings, logits of images →
texts are s · v_i·t_j; texts → images are the transpose. The loss of a batch is the mean of both directions,

    loss = ½ [L(v → t) + L(t → v)],     L = mean over rows i of  −Σ_j y_ij · log softmax_j(s · q_i·k_j),

with targets y_ij from the table `OBJECTIVES`. Objectives with a teacher add a soft term, with a scale of its own:

    loss = α · L(y, s) + (1 − α) · L(ỹ, s̃),

where ỹ are the teacher's soft labels. Everything is fp32. Rows are computed in chunks where b × n is large.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from zslflax.losses.sinkhorn import MASKED, column_potential

LOG_LOGIT_SCALE_RANGE = (0.0, 4.605170186)  # log 1 … log 100; the train step clips the learnt values to it


class Embeddings(NamedTuple):
    """Unit embeddings of pairs, fp32: [b, d] on one device or [n, d] of the global batch."""

    image: jax.Array
    text: jax.Array


def one_hot_targets(config, positives: jax.Array, valid: jax.Array) -> jax.Array:
    """1 on the pair: InfoNCE, as in CLIP (arXiv 2103.00020). Several positives of a row share it equally."""
    return positives / jnp.maximum(jnp.sum(positives, axis=-1, keepdims=True), 1.0)


def smoothed_targets(config, positives: jax.Array, valid: jax.Array) -> jax.Array:
    """(1 − ε) on the pair, and ε / (n − 1) on each of the other valid columns."""
    others = jnp.where(valid, 1.0 - positives, 0.0)
    share = config.smoothing / jnp.maximum(jnp.sum(others, axis=-1, keepdims=True), 1.0)
    return (1.0 - config.smoothing) * one_hot_targets(config, positives, valid) + share * others


def distilled_targets(config, similarity: jax.Array, allowed: jax.Array, potential: jax.Array) -> jax.Array:
    """softmax_j(s_ij / τ) of the teacher's similarities: self-distillation (arXiv 2104.08945)."""
    return masked_softmax(similarity / config.teacher_temperature, allowed)


def transport_targets(config, similarity: jax.Array, allowed: jax.Array, potential: jax.Array) -> jax.Array:
    """softmax_j(s_ij / λ + g_j): rows of the transport plan of the teacher's similarities (OTTER, arXiv 2112.09445)."""
    return masked_softmax(similarity / config.sinkhorn_regulariser + potential, allowed)


class Objective(NamedTuple):
    """How an objective makes its targets.

    Attributes:
        hard_targets: (config, positives [c, n], valid [n]) → fp32 [c, n], each row summing to 1.
        soft_targets: (config, teacher similarities [c, n], allowed [c, n], column potential [n]) → fp32 [c, n];
            None where the objective needs no teacher.
        transport: whether the soft targets use the column potential of an optimal transport plan.
        pairwise: SigLIP's binary loss of every image-text pair (arXiv 2303.15343), instead of the cross-entropy.
    """

    hard_targets: Callable[[Any, jax.Array, jax.Array], jax.Array] = one_hot_targets
    soft_targets: Callable[[Any, jax.Array, jax.Array, jax.Array], jax.Array] | None = None
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


def init_params(config) -> dict[str, jax.Array]:
    """The objective's own parameters, fp32 scalars: the log of each learnt logit scale, and the sigmoid's bias."""
    objective = OBJECTIVES[config.name]
    init = {"log_logit_scale": config.log_logit_scale}
    if objective.needs_teacher:
        init["log_soft_logit_scale"] = config.log_logit_scale
    if objective.pairwise:
        init["logit_bias"] = config.logit_bias
    return {name: jnp.asarray(value, jnp.float32) for name, value in init.items()}


def similarity(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Inner products at full fp32 precision: [b, d] × [n, d] → fp32 [b, n]."""
    return jnp.einsum("bd,nd->bn", queries, keys, precision=jax.lax.Precision.HIGHEST)


def teacher_similarities(config, rows: Embeddings, batch: Embeddings) -> tuple[jax.Array, jax.Array]:
    """How well the teacher says each column fits each row: images → texts and texts → images, fp32 [c, n] each.

        s_ij = v_i·t_j + w_vv v_i·v_j + w_tt t_i·t_j     and     t_i·v_j + w_vv v_i·v_j + w_tt t_i·t_j

    The paper (arXiv 2104.08945) uses the first term alone; OTTER's released scripts set both weights to 1.
    """
    within = 0.0
    if config.image_image_weight:
        within += config.image_image_weight * similarity(rows.image, batch.image)
    if config.text_text_weight:
        within += config.text_text_weight * similarity(rows.text, batch.text)
    return similarity(rows.image, batch.text) + within, similarity(rows.text, batch.image) + within


def masked_softmax(logits: jax.Array, allowed: jax.Array) -> jax.Array:
    """Softmax over the allowed entries; exactly zero elsewhere, and everywhere in a row that allows none."""
    return jnp.where(allowed, jax.nn.softmax(jnp.where(allowed, logits, MASKED), axis=-1), 0.0)


def cross_entropy(logits: jax.Array, targets: jax.Array, valid: jax.Array) -> jax.Array:
    """−Σ_j y_ij · log softmax_j(logits_ij) over the valid columns.

    Args:
        logits, targets: fp32 [c, n]. valid: bool [n].

    Returns:
        fp32 [c].

    >>> logits, targets = jnp.array([[2.0, 0.0, 9.0]]), jnp.array([[1.0, 0.0, 0.0]])
    >>> cross_entropy(logits, targets, valid=jnp.array([True, True, False])).round(4)  # log(1 + exp(-2))
    Array([0.1269], dtype=float32)
    """
    return -jnp.sum(targets * jax.nn.log_softmax(jnp.where(valid, logits, MASKED), axis=-1), axis=-1)


def softmax_losses(params, similarity, hard, soft, positives, valid) -> dict[str, jax.Array]:
    """One direction of a cross-entropy objective, per row: fp32 [c] each.

    Args:
        params: of the objective.
        similarity: the student's, fp32 [c, n].
        hard, soft: targets fp32 [c, n]; `soft` may be None.
        positives: fp32 [c, n], 1 on the pair. valid: bool [n].
    """
    logits = jnp.exp(params["log_logit_scale"]) * similarity
    losses = {
        "hard_loss": cross_entropy(logits, hard, valid),
        "in_batch_accuracy": best_is_positive(logits, positives, valid),
    }
    if soft is None:
        return losses
    return losses | {
        "soft_loss": cross_entropy(jnp.exp(params["log_soft_logit_scale"]) * similarity, soft, valid),
        "soft_entropy": jnp.sum(jax.scipy.special.entr(soft), axis=-1),  # the minimum of soft_loss, in nats
        "soft_on_pair": jnp.sum(soft * positives, axis=-1),  # the teacher's belief in the given pair
    }


def sigmoid_losses(params, similarity, positives, valid) -> dict[str, jax.Array]:
    """Σ_j −log σ(±(s · v_i·t_j + bias)), + on the pair and − elsewhere (SigLIP, arXiv 2303.15343); fp32 [c] each."""
    logits = jnp.exp(params["log_logit_scale"]) * similarity + params["logit_bias"]
    signs = 2.0 * positives - 1.0
    losses = jnp.where(valid, jax.nn.softplus(-signs * logits), 0.0)
    return {
        "hard_loss": jnp.sum(losses, axis=-1),
        "in_batch_accuracy": best_is_positive(logits, positives, valid),
    }


def best_is_positive(logits: jax.Array, positives: jax.Array, valid: jax.Array) -> jax.Array:
    """Whether the highest valid column of each row is a positive, as fp32 [c]."""
    best = jnp.argmax(jnp.where(valid, logits, MASKED), axis=-1)
    return jnp.take_along_axis(positives, best[:, None], axis=-1)[:, 0]


def soft_weight(config, step: jax.Array) -> jax.Array:
    """1 − α, reached linearly over the first `soft_ramp_steps` steps (ALBEF, arXiv 2107.07651, does so in an epoch)."""
    ramp = jnp.minimum(1.0, (step.astype(jnp.float32) + 1.0) / max(config.soft_ramp_steps, 1))
    return (1.0 - config.alpha) * ramp


def pair_losses(config, params, student: Embeddings, teacher, valid, *, step, axis_name) -> dict[str, jax.Array]:
    """The loss of each of this device's pairs against the whole global batch, both directions averaged.

    Runs inside a mapped axis. The gather keeps its gradient: the gradient of all devices' rows, summed over the devices,
    is that of one device that holds the global batch. Where b × n is larger than `config.max_similarities`, the rows
    are computed in chunks and once more for the gradient: memory is O(max_similarities + n·d), not O(b·n).

    Args:
        config: the `objective` section of the config.
        params: as `init_params` returns them.
        student: this device's unit embeddings, fp32 [b, d].
        teacher: the teacher's `Embeddings` of the same pairs, of any width; None where the objective needs none.
        valid: bool [b]; an invalid pair is neither a positive nor a negative of any other. The values of its own row
            are finite and meaningless: the caller leaves them out of the mean.
        step: int32 scalar, for the ramp of the soft term.
        axis_name: the mapped axis over which the global batch is spread.

    Returns:
        `loss` and its parts, fp32 [b] each.
    """
    objective = OBJECTIVES[config.name]
    gather = lambda x: jax.lax.all_gather(x, axis_name, tiled=True)
    b = valid.shape[0]
    batch, columns = Embeddings(*map(gather, student)), gather(valid)  # (n, d), (n,)
    n = columns.shape[0]
    index = jax.lax.axis_index(axis_name) * b + jnp.arange(b, dtype=jnp.int32)  # (b,), of the own pairs
    rows = {"index": index, "student": student}
    potentials = (0.0, 0.0)
    if objective.needs_teacher:
        rows["teacher"] = teacher = jax.lax.stop_gradient(teacher)
        teacher_batch = Embeddings(*map(gather, teacher))
    num_chunks = count_chunks(b, n, config.max_similarities)

    def allowed(positives):
        """Which columns may carry soft-label mass: the valid ones, without the pair where the config removes it."""
        return columns & (positives == 0) if config.remove_diagonal else jnp.broadcast_to(columns, positives.shape)

    def chunk_losses(rows):
        positives = jax.nn.one_hot(rows["index"], n, dtype=jnp.float32)  # (c, n)
        image_to_text = similarity(rows["student"].image, batch.text)
        if objective.pairwise:  # symmetric: one direction is both
            return sigmoid_losses(params, image_to_text, positives, columns)
        text_to_image = similarity(rows["student"].text, batch.image)
        hard, soft = objective.hard_targets(config, positives, columns), (None, None)
        if objective.needs_teacher:
            similarities = teacher_similarities(config, rows["teacher"], teacher_batch)
            soft = [
                objective.soft_targets(config, s, allowed(positives), potential)
                for s, potential in zip(similarities, potentials)
            ]
        directions = [
            softmax_losses(params, s, hard, targets, positives, columns)
            for s, targets in zip((image_to_text, text_to_image), soft)
        ]
        return jax.tree.map(lambda x, y: 0.5 * (x + y), *directions)

    chunks = split(rows, num_chunks)
    if objective.transport:

        def plan_logits(direction):
            def row_logits(rows):
                mass = allowed(jax.nn.one_hot(rows["index"], n)) & columns[rows["index"], None]
                s = teacher_similarities(config, rows["teacher"], teacher_batch)[direction]
                return jnp.where(mass, s / config.sinkhorn_regulariser, MASKED)

            return row_logits

        potentials = [
            column_potential(plan_logits(direction), chunks, columns, config.sinkhorn_iterations, axis_name)
            for direction in (0, 1)
        ]
    losses = chunk_losses(rows) if num_chunks == 1 else join(jax.lax.map(jax.checkpoint(chunk_losses), chunks))
    if not objective.needs_teacher:
        return losses | {"loss": losses["hard_loss"]}
    weight = soft_weight(config, step)
    return losses | {"loss": (1.0 - weight) * losses["hard_loss"] + weight * losses["soft_loss"]}


def count_chunks(b: int, n: int, max_similarities: int) -> int:
    """The smallest divisor of b that makes chunks of at most `max_similarities` of the b × n similarities.

    >>> count_chunks(b=32_768, n=32_768, max_similarities=2**22)
    256
    """
    divisors = (chunks for chunks in range(1, b + 1) if b % chunks == 0)
    return next((chunks for chunks in divisors if b // chunks * n <= max_similarities), b) if max_similarities else 1


def split(tree, num_chunks: int):
    """Every array [b, …] → [num_chunks, b / num_chunks, …]."""
    return jax.tree.map(lambda x: x.reshape(num_chunks, x.shape[0] // num_chunks, *x.shape[1:]), tree)


def join(tree):
    """Undoes `split`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)
