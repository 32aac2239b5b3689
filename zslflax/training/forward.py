"""Runs the towers inside the train step: the student's, the teacher's, and those that are never trained."""

import functools
from typing import Any

import jax
from ml_collections import ConfigDict

from zslflax.losses.contrastive import needs_teacher
from zslflax.losses.pairs import Embeddings
from zslflax.models.partition import MODALITIES, Tree
from zslflax.models.two_tower import TwoTower
from zslflax.training.train_state import TrainState, student_variables, teacher_variables

DeviceBatch = dict[str, jax.Array]
Rngs = dict[str, jax.Array] | None


def embed(
    model: TwoTower,
    variables: Tree,
    batch: DeviceBatch,
    features: dict[str, jax.Array],
    *,
    train: tuple[str, ...],
    rngs: Rngs = None,
) -> tuple[Embeddings, Tree]:
    """Unit embeddings of this device's pairs, and the batch statistics after them.

    Args:
        model: the two towers and projections.
        variables: {"params", "batch_stats"}.
        batch: as `train_step` takes it.
        features: outputs of the towers that need not run, by modality.
        train: the modalities whose tower runs in training mode (batch statistics, dropout).
        rngs: the keys of the dropout; None for no dropout.
    """
    features, batch_stats = dict(features), variables["batch_stats"]
    for modality in MODALITIES:
        if modality not in features:
            current = {**variables, "batch_stats": batch_stats}
            features[modality], batch_stats = tower_features(
                model, current, batch, modality, train=modality in train, rngs=rngs
            )
    image_emb: Any = model.apply(variables, features["image"], method="project_image", rngs=rngs)
    text_emb: Any = model.apply(variables, features["text"], method="project_text", rngs=rngs)
    return Embeddings(image_emb, text_emb), batch_stats


def tower_features(
    model: TwoTower, variables: Tree, batch: DeviceBatch, modality: str, *, train: bool, rngs: Rngs = None
) -> tuple[jax.Array, Tree]:
    """One tower's output fp32 [b, f] for this device's pairs, and the batch statistics after it."""
    method, inputs = f"{modality}_features", tower_inputs(batch, modality)
    if modality == "text" and "text_segment" in batch:
        method = "packed_text_features"
    apply: Any = functools.partial(model.apply, variables, *inputs, train=train, method=method)
    if not train:
        return apply(), variables["batch_stats"]
    outputs, updated = apply(mutable=["batch_stats"], rngs=rngs)
    return outputs, {**variables["batch_stats"], **updated.get("batch_stats", {})}


def tower_inputs(batch: DeviceBatch, modality: str) -> tuple[Any, ...]:
    """The arguments of `TwoTower.image_features`, `text_features` or `packed_text_features`."""
    if modality == "image":
        return (batch["image"],)
    if "text_segment" in batch:
        return batch["text"], batch["text_segment"], batch["text_position"], len(batch["valid"])
    return batch["text"], batch["text_mask"]


def no_grad_outputs(
    state: TrainState,
    fixed_teacher: Tree,
    model: TwoTower,
    teacher_model: TwoTower,
    config: ConfigDict,
    batch: DeviceBatch,
) -> tuple[dict[str, jax.Array], Embeddings | None]:
    """What needs no gradient: the frozen towers' outputs by modality, and the teacher's embeddings.

    A tower is frozen forever, or for now, where the batch has its outputs. The teacher shares the outputs of those of
    its towers that are the student's frozen ones. Its embeddings are None
    for an objective without a teacher.
    """
    student = student_variables(state)
    features = {
        modality: batch[f"{modality}_features"]
        if f"{modality}_features" in batch
        else tower_features(model, student, batch, modality, train=False)[0]
        for modality in MODALITIES
        if modality in state.frozen_params or f"{modality}_features" in batch
    }
    if not needs_teacher(config.objective):
        return features, None
    teacher = teacher_variables(state, fixed_teacher, config.teacher.batch_norm)
    own_towers = {m for m, params in fixed_teacher.get("params", {}).items() if "tower" in params}
    shared = {modality: x for modality, x in features.items() if modality not in own_towers}
    by_batch = not fixed_teacher and normalises_by_batch(config, teacher)
    return features, embed(teacher_model, teacher, batch, shared, train=("image",) if by_batch else ())[0]


def normalises_by_batch(config: ConfigDict, average: Tree) -> bool:
    """Whether the image tower of the student's moving average normalises by the statistics of the batch."""
    return config.teacher.batch_norm == "batch" and bool(average["batch_stats"])
