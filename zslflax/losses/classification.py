"""Objectives of classifiers: learning from labels and rotations, from an earlier generation, or from prompts.

A classifier maps an image x to logits z(x) of c classes. R_r x is the image turned by r · 90°, H is a cross-entropy,
and z̄ and v̄ are the teacher's. All are means over the images of a batch, in fp32.

    cross_entropy           H(label, z) and, with γ = `rotation_weight` above 0, the same for all four rotations and
    (SKD, generation 0)     γ · the binary cross-entropies of a rotation head on the logits, W z(R_r x) + b, with r

    logit_distillation      T² · KL(softmax(z̄ / T) ‖ softmax(z / T)) + γ/3 · Σ_{r = 1, 2, 3} ‖z(R_r x) − z(x)‖₂
    (SKD, generation 1)

    prompt_distillation     α · H(p, z) + (1 − α) · KL(q ‖ softmax(W f + b)) + λ · (1/c) Σ_c −log mean_x softmax_c(z)

SKD is Rajasegaran et al. 2020 (arXiv 2006.09785). `prompt_distillation` learns from a zero-shot teacher with unit
embedding v̄ of the image: its labels p = softmax(s · v̄·c_j) over the embeddings of the class names, and its reasons
q = softmax(s · v̄·u_k) over those of sentences that describe the classes, learnt by a second head on the features f
(Vöge, Gurgul and Lessmann 2024, arXiv 2403.15886, in text). The last term keeps every class in use, and with w =
`refine_weight` above 0 the student's moving average z̃ refines the labels on a weakly augmented view x̂ of the image,
both as in MUST (Li et al. 2022, arXiv 2206.02967):

    p ← (1 − w) · p + w · softmax(z̃(x̂))

The heads other than z belong to the objective, and are not part of the trained classifier.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from zslflax.losses.contrastive import inner_products
from zslflax.losses.heads import Params, dense, init_dense

ROTATIONS = 4


class Outputs(NamedTuple):
    """What a classifier says of a batch in its r = 1 or 4 rotations.

    Attributes:
        features: of the tower, fp32 [b, r, f].
        logits: z, fp32 [b, r, c].
    """

    features: jax.Array
    logits: jax.Array


class Targets(NamedTuple):
    """What a classifier learns from. A field is None where the objective does not use it.

    Attributes:
        label: int32 [b].
        teacher_logits: z̄ of the upright images, fp32 [b, c].
        soft_labels: p, fp32 [b, c].
        reasons: q, fp32 [b, m].
        has_reasons: bool [b], whether the image has reasons.
        refined: bool [b], whether the student's moving average has a share in p.
    """

    label: Any = None
    teacher_logits: Any = None
    soft_labels: Any = None
    reasons: Any = None
    has_reasons: Any = None
    refined: Any = None


def label_losses(
    config: ConfigDict, params: Params, outputs: Outputs, targets: Targets, valid: jax.Array, axis_name: str
) -> dict[str, jax.Array]:
    """Cross-entropy with the label, for all rotations, and with the rotation: generation 0 of SKD. fp32 [b] each."""
    label, rotations = targets.label, outputs.logits.shape[1]
    assert label is not None
    labels = jnp.broadcast_to(label[:, None], (len(label), rotations))
    label_loss = optax.softmax_cross_entropy_with_integer_labels(outputs.logits, labels)
    losses = {"label_loss": label_loss.mean(axis=1)}
    losses |= {"accuracy": is_best(outputs.logits[:, 0], label), "loss": losses["label_loss"]}
    if config.rotation_weight:
        logits = dense(params["rotation_head"], outputs.logits)  # (b, 4, 4)
        rotation_loss = optax.sigmoid_binary_cross_entropy(logits, jnp.eye(ROTATIONS)).mean(axis=(1, 2))
        turn = jnp.broadcast_to(jnp.arange(ROTATIONS), labels.shape)
        losses |= {"rotation_loss": rotation_loss, "rotation_accuracy": is_best(logits, turn).mean(axis=1)}
        losses["loss"] = losses["label_loss"] + config.rotation_weight * rotation_loss
    return losses


def distillation_losses(
    config: ConfigDict, params: Params, outputs: Outputs, targets: Targets, valid: jax.Array, axis_name: str
) -> dict[str, jax.Array]:
    """Divergence from the teacher's logits, and how far rotations move the logits: generation 1 of SKD. fp32 [b]."""
    upright, turned = outputs.logits[:, 0], outputs.logits[:, 1:]
    assert targets.teacher_logits is not None
    soft_labels = jax.nn.softmax(targets.teacher_logits / config.temperature)
    distil_loss = optax.kl_divergence(jax.nn.log_softmax(upright / config.temperature), soft_labels)
    distil_loss *= config.temperature**2
    losses = {"distil_loss": distil_loss, "loss": distil_loss}
    if config.rotation_weight:
        losses["rotation_loss"] = safe_norm(turned - upright[:, None]).mean(axis=1)
        losses["loss"] = distil_loss + config.rotation_weight * losses["rotation_loss"]
    return losses


def prompt_losses(
    config: ConfigDict, params: Params, outputs: Outputs, targets: Targets, valid: jax.Array, axis_name: str
) -> dict[str, jax.Array]:
    """Cross-entropy with a zero-shot teacher's labels, and divergence from its reasons. fp32 [b] each.

    An image whose highest probability is below `min_confidence` has no label loss. One without reasons has the label
    loss alone, with weight 1. `hard_labels` takes the teacher's best class for its probabilities.
    """
    logits, p = outputs.logits[:, 0], targets.soft_labels
    assert p is not None
    best = jnp.argmax(p, axis=1)
    confident = (jnp.max(p, axis=1) >= config.min_confidence).astype(jnp.float32)
    labels = jax.nn.one_hot(best, p.shape[1]) if config.hard_labels else p
    label_loss = confident * optax.safe_softmax_cross_entropy(logits, labels)
    losses = {"label_loss": label_loss, "loss": label_loss}
    losses |= {"confident": confident, "agreement": is_best(logits, best)}
    if targets.reasons is not None and targets.has_reasons is not None:
        log_reasons = jax.nn.log_softmax(dense(params["reason_head"], outputs.features[:, 0]))
        reason_loss = optax.kl_divergence(log_reasons, targets.reasons)
        both = config.alpha * label_loss + (1.0 - config.alpha) * reason_loss
        losses |= {"reason_loss": reason_loss, "loss": jnp.where(targets.has_reasons, both, label_loss)}
    if targets.refined is not None:
        losses["refined"] = targets.refined.astype(jnp.float32)
    if config.fairness_weight:
        losses["fairness_loss"] = jnp.broadcast_to(fairness(logits, valid, axis_name), label_loss.shape)
        losses["loss"] += config.fairness_weight * losses["fairness_loss"]
    return losses


def prompt_targets(
    config: ConfigDict, teacher_emb: jax.Array, class_emb: jax.Array, sentence_emb: jax.Array | None
) -> Targets:
    """The labels p and the reasons q of a zero-shot teacher.

    Args:
        config: the `objective` section of the config.
        teacher_emb: v̄, unit vectors fp32 [b, d].
        class_emb: of the class names, fp32 [c, d].
        sentence_emb: of the sentences, fp32 [m, d]; None for no reasons.
    """
    probabilities = lambda text_emb: jax.nn.softmax(config.teacher_scale * inner_products(teacher_emb, text_emb))
    reasons = None if sentence_emb is None else probabilities(sentence_emb)
    return Targets(soft_labels=probabilities(class_emb), reasons=reasons)


def refined_labels(config: ConfigDict, p: jax.Array, average_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(1 − w) p + w softmax(z̃), where the softmax has `min_confidence`, and p elsewhere; w is `refine_weight`.

    The moving average sees the crop of evaluation, and the student learns the label on its random crop. In MUST, whose
    student starts as the zero-shot classifier, w is 1.

    Args:
        config: the `objective` section of the config.
        p: the teacher's labels, fp32 [b, c].
        average_logits: z̃, of the moving average, fp32 [b, c].

    Returns:
        The labels, fp32 [b, c], and whether they are refined, bool [b].
    """
    average = jax.nn.softmax(average_logits)
    confident = jnp.max(average, axis=1) >= config.min_confidence
    mixed = (1.0 - config.refine_weight) * p + config.refine_weight * average
    return jnp.where(confident[:, None], mixed, p), confident


class Objective(NamedTuple):
    """How a classifier learns.

    Attributes:
        losses: (config, objective's params, `Outputs`, `Targets`, valid bool [b], name of the mapped axis) → "loss" and
            its parts, fp32 [b] each.
        needs_labels: whether the images have labels.
        needs_teacher: "" for no teacher, "logits" for another classifier, "prompts" for a zero-shot model.
    """

    losses: Callable[..., dict[str, jax.Array]]
    needs_labels: bool
    needs_teacher: str


OBJECTIVES = {
    "cross_entropy": Objective(label_losses, needs_labels=True, needs_teacher=""),
    "logit_distillation": Objective(distillation_losses, needs_labels=False, needs_teacher="logits"),
    "prompt_distillation": Objective(prompt_losses, needs_labels=False, needs_teacher="prompts"),
}


def needs_labels(config: ConfigDict) -> bool:
    """Whether the objective of a config's section `objective` learns from labels of the images."""
    return config.name in OBJECTIVES and OBJECTIVES[config.name].needs_labels


def refines_labels(config: ConfigDict) -> bool:
    """Whether the student's moving average has a share in the labels: see `refined_labels`."""
    return config.name == "prompt_distillation" and config.refine_weight > 0


def image_losses(
    config: ConfigDict,
    params: Params,
    student: Outputs,
    targets: Targets,
    valid: jax.Array,
    *,
    step: jax.Array,
    axis_name: str,
) -> dict[str, jax.Array]:
    """The loss of each of this device's images; arguments as of `contrastive.pair_losses`.

    Returns:
        `loss` and its parts, fp32 [b] each.
    """
    return OBJECTIVES[config.name].losses(config, params, student, jax.lax.stop_gradient(targets), valid, axis_name)


def num_rotations(config: ConfigDict) -> int:
    """In how many rotations the student sees each image: 4 with a rotation term, 1 without."""
    return ROTATIONS if config.name != "prompt_distillation" and config.rotation_weight else 1


def rotate(images: jax.Array) -> jax.Array:
    """Images in their four rotations, counter-clockwise: [b, s, s, 3] → [b, 4, s, s, 3].

    >>> rotate(jnp.array([[1, 2], [3, 4]])[None, :, :, None])[0, 1, :, :, 0]
    Array([[2, 4],
           [1, 3]], dtype=int32)
    """
    return jnp.stack([jnp.rot90(images, r, axes=(1, 2)) for r in range(ROTATIONS)], axis=1)


def init_params(config: ConfigDict, key: jax.Array, features: int, classes: int, sentences: int) -> Params:
    """The heads of the objective.

    Args:
        config: the `objective` section of the config.
        key: of the random weights.
        features: f, width of the tower.
        classes: c.
        sentences: m; 0 for no reasons.
    """
    if config.name == "cross_entropy" and config.rotation_weight:
        return {"rotation_head": init_dense(key, classes, ROTATIONS)}
    if config.name == "prompt_distillation" and sentences:
        return {"reason_head": init_dense(key, features, sentences)}
    return {}


def is_best(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Whether the highest logit is the label's: fp32 [..., c], int32 [...] → fp32 [...]."""
    return (jnp.argmax(logits, axis=-1) == label).astype(jnp.float32)


def safe_norm(x: jax.Array) -> jax.Array:
    """‖x‖₂ of the last axis. Its gradient at 0, where generation 1 may start, is 0 instead of NaN."""
    return optax.safe_norm(x, 0.0, axis=-1)


def fairness(logits: jax.Array, valid: jax.Array, axis_name: str) -> jax.Array:
    """(1/c) Σ_c −log p̄_c, where p̄ is the mean of softmax(logits) over the valid images of the global batch.

    It is log c where all classes are equally frequent, and grows where one vanishes. It is a mean over classes, as in
    MUST, so that its weight does not depend on their number.

    Args:
        logits: fp32 [b, c].
        valid: bool [b].
        axis_name: the mapped axis over which the global batch is spread.
    """
    p = jnp.where(valid[:, None], jax.nn.softmax(logits), 0.0)
    total, count = jax.lax.psum((p.sum(axis=0), jnp.sum(valid.astype(jnp.float32))), axis_name)
    return -jnp.mean(jnp.log(total / jnp.maximum(count, 1.0) + 1e-8))
