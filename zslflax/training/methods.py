"""What the training step asks of a kind of model: two towers, or a classifier. Everything else is the same for both."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from zslflax.config import is_classifier
from zslflax.losses import classification
from zslflax.losses.classification import (
    Outputs,
    Targets,
    image_losses,
    num_rotations,
    prompt_targets,
    refined_labels,
    refines_labels,
    rotate,
)
from zslflax.losses.contrastive import pair_losses
from zslflax.losses.pairs import Embeddings, PairIds
from zslflax.models.partition import MODALITIES, Tree
from zslflax.models.two_tower import TwoTower
from zslflax.training.forward import (
    DeviceBatch,
    Rngs,
    embed,
    no_grad_outputs,
    normalises_by_batch,
    tower_features,
)
from zslflax.training.train_state import TrainState, student_variables, teacher_variables

Features = dict[str, jax.Array]  # outputs of towers that need no gradient, by modality


class Method(NamedTuple):
    """How a kind of model is run and compared in the training step; b rows are those of a device or a micro-batch.

    Attributes:
        no_grad_outputs: (state, fixed teacher, model, teacher's model, config, batch) → what needs no gradient: the
            frozen towers' outputs by modality, and what the loss compares with; arrays [b, …].
        student_outputs: (model, variables, batch, frozen towers' outputs, rngs, config) → what the loss compares,
            arrays [b, …], and the batch statistics after it.
        losses: (config.objective, its parameters, outputs, what they are compared with, batch, step=, axis_name=) →
            "loss" and its parts, fp32 [b] each.
    """

    no_grad_outputs: Callable[..., tuple[Features, Any]]
    student_outputs: Callable[..., tuple[Any, Tree]]
    losses: Callable[..., dict[str, jax.Array]]


def embed_pairs(
    model: TwoTower, variables: Tree, batch: DeviceBatch, features: Features, rngs: Rngs, config: ConfigDict
) -> tuple[Any, Tree]:
    """`Embeddings` of image-text pairs by the student."""
    return embed(model, variables, batch, features, train=MODALITIES, rngs=rngs)


def classify_images(
    model: TwoTower, variables: Tree, batch: DeviceBatch, features: Features, rngs: Rngs, config: ConfigDict
) -> tuple[Outputs, Tree]:
    """`Outputs` of images by the student, in all the rotations that the objective compares."""
    rotations, batch_stats = num_rotations(config.objective), variables["batch_stats"]
    if "image" in features:
        image_features = features["image"]  # (b, r, f)
    else:
        images = flat_rotations(batch["image"], rotations)
        flat, batch_stats = tower_features(model, variables, {"image": images}, "image", train=True, rngs=rngs)
        image_features = flat.reshape(-1, rotations, flat.shape[-1])
    logits: Any = model.apply(variables, image_features, method="project_image")
    return Outputs(image_features, logits), batch_stats


def classifier_targets(
    state: TrainState,
    fixed_teacher: Tree,
    model: TwoTower,
    teacher_model: TwoTower,
    config: ConfigDict,
    batch: DeviceBatch,
) -> tuple[Features, Targets]:
    """What a classifier learns from, and the output of its image tower where that is never trained."""
    objective, rotations = config.objective, num_rotations(config.objective)
    features: Features = {}
    if "image" in state.frozen_params:
        images = flat_rotations(batch["image"], rotations)
        flat, _ = tower_features(model, student_variables(state), {"image": images}, "image", train=False)
        features["image"] = flat.reshape(-1, rotations, flat.shape[-1])
    kind = classification.OBJECTIVES[objective.name].needs_teacher
    if kind == "logits":
        teacher = teacher_variables(state, fixed_teacher, config.teacher.batch_norm)
        logits: Any = teacher_model.apply(teacher, batch["image"], method="encode_image")
        return features, Targets(teacher_logits=logits)
    if kind == "prompts":
        projection = {"params": {"image": fixed_teacher["params"]["image"]}}
        teacher_emb: Any = teacher_model.apply(projection, batch["teacher_features"], method="project_image")
        class_emb, sentence_emb = fixed_teacher["class_emb"], fixed_teacher.get("sentence_emb")
        targets = prompt_targets(objective, teacher_emb, class_emb, sentence_emb)
        targets = targets._replace(has_reasons=batch["has_reasons"])
        return features, with_refined_labels(state, model, config, batch, targets)
    return features, Targets(label=batch["label"])


def with_refined_labels(
    state: TrainState, model: TwoTower, config: ConfigDict, batch: DeviceBatch, targets: Targets
) -> Targets:
    """The targets, whose labels the student's moving average refines from step `objective.refine_from` on."""
    objective, p = config.objective, targets.soft_labels
    if not refines_labels(objective):
        return targets

    def refine() -> tuple[jax.Array, jax.Array]:
        average, inputs = teacher_variables(state, None, config.teacher.batch_norm), {"image": batch["weak_image"]}
        by_batch = normalises_by_batch(config, average)
        features, _ = tower_features(model, average, inputs, "image", train=by_batch)
        logits: Any = model.apply(average, features, method="project_image")
        return refined_labels(objective, p, logits)

    unrefined = p, jnp.zeros(len(p), bool)
    labels, refined = jax.lax.cond(state.step >= objective.refine_from, refine, lambda: unrefined)
    return targets._replace(soft_labels=labels, refined=refined)


def compare_pairs(
    config: ConfigDict, params: Tree, student: Embeddings, teacher: Embeddings | None, batch: DeviceBatch, **where: Any
) -> dict[str, jax.Array]:
    """`contrastive.pair_losses` of a batch."""
    ids = PairIds(batch["image_id"], batch["text_id"]) if config.duplicates != "negative" else None
    return pair_losses(config, params, student, teacher, batch["valid"], ids, **where)


def compare_classes(
    config: ConfigDict, params: Tree, outputs: Outputs, targets: Targets, batch: DeviceBatch, **where: Any
) -> dict[str, jax.Array]:
    """`classification.image_losses` of a batch."""
    return image_losses(config, params, outputs, targets, batch["valid"], **where)


def flat_rotations(images: jax.Array, rotations: int) -> jax.Array:
    """Images in one or all four rotations, those of an image beside each other: [b, s, s, 3] → [b · r, s, s, 3]."""
    return images if rotations == 1 else rotate(images).reshape(-1, *images.shape[1:])


TWO_TOWERS = Method(no_grad_outputs, embed_pairs, compare_pairs)
CLASSIFIER = Method(classifier_targets, classify_images, compare_classes)


def method_of(config: ConfigDict) -> Method:
    """How the model of a config is trained."""
    return CLASSIFIER if is_classifier(config) else TWO_TOWERS
