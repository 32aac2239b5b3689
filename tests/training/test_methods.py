"""The training step of a classifier: N devices equal one, micro-batches equal the whole, and the update is right."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.testing.training import (
    SIZE,
    STEPS,
    N,
    Perceptron,
    assert_close,
    make_config,
    make_two_tower,
    map_step,
    split_batch,
)
from zslflax import distributed
from zslflax.config import keeps_average
from zslflax.losses import classification
from zslflax.models.two_tower import ProjectedTower, TwoTower
from zslflax.training.optimizer import build_optimizer, frozen_towers
from zslflax.training.train_state import TrainState, create_train_state

C, M, F = 5, 7, 8  # classes, sentences, width of the tower
CONFIGS = {
    "cross_entropy": dict(rotation_weight=2.0),
    "logit_distillation": dict(rotation_weight=1.0),
    "prompt_distillation": dict(fairness_weight=0.5, teacher_scale=5.0),
}


# Labels that the moving average of the student refines, of some images.
REFINED = {"objective__refine_weight": 0.4, "objective__refine_from": 0, "objective__min_confidence": 0.35}


class Plain(nn.Module):
    """An image tower without batch normalisation."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.tanh(nn.Dense(F)(x.reshape(len(x), -1)))


def make_classifier(tower: nn.Module) -> TwoTower:
    return TwoTower(ProjectedTower(tower, nn.Dense(C), unit=False), None, (0.5,) * 3, (0.25,) * 3)


def make_batch(seed: int) -> dict[str, np.ndarray]:
    """A random batch, of which two images are invalid."""
    rng = np.random.default_rng(seed)
    valid = np.ones(N, bool)
    valid[[1, 6]] = False
    return {
        "image": rng.integers(0, 256, (N, SIZE, SIZE, 3), dtype=np.uint8),
        "label": np.where(valid, rng.integers(0, C, N), -1).astype(np.int32),
        "valid": valid,
        "teacher_features": rng.standard_normal((N, F)).astype(np.float32),
        "has_reasons": rng.random(N) < 0.5,
        "weak_image": rng.integers(0, 256, (N, SIZE, SIZE, 3), dtype=np.uint8),
    }


def case(objective: str, tower: nn.Module, **fields: Any) -> tuple[ConfigDict, TwoTower, TwoTower, dict, dict]:
    """The config, the models of student and teacher, the student's variables, and the teacher's."""
    config = make_config(objective, teacher__kind="none", optimizer__no_decay=(), **fields)
    config.objective.update(CONFIGS[objective])
    model, teacher_model, teacher = make_classifier(tower), make_two_tower(), {}
    init = lambda model, seed: jax.jit(model.init)(jax.random.key(seed), make_batch(0)["image"])
    variables = {"batch_stats": {}} | init(model, 0)
    if objective == "logit_distillation":
        teacher_model, teacher = model, {"batch_stats": {}} | init(model, 1)
    if objective == "prompt_distillation":
        rng = np.random.default_rng(5)
        unit = lambda x: (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)
        kernel = rng.standard_normal((F, 12)).astype(np.float32)
        teacher = {
            "params": {"image": {"projection": {"kernel": kernel, "bias": np.zeros(12, np.float32)}}},
            "class_emb": unit(rng.standard_normal((C, 12))),
            "sentence_emb": unit(rng.standard_normal((M, 12))),
        }
    heads = classification.init_params(config.objective, jax.random.key(2), F, C, M)
    variables["params"] = {**variables["params"], "objective": heads}
    return config, model, teacher_model, variables, teacher


def run_steps(objective: str, tower: nn.Module, devices: int = 1, **fields: Any) -> list[tuple[TrainState, dict]]:
    config, model, teacher_model, variables, teacher = case(objective, tower, **fields)
    tx, frozen = build_optimizer(config, variables["params"], STEPS), frozen_towers(variables["params"], config.freeze)
    state = create_train_state(variables, tx, ema=keeps_average(config), frozen=frozen)
    state = distributed.replicate(state, devices)
    step = map_step(dict(model=model, teacher_model=teacher_model, tx=tx, config=config), devices)
    history = []
    for seed in range(2):
        state, metrics = step(state, teacher, split_batch(make_batch(seed), devices))
        history.append(jax.device_get((state, metrics)))
    return history


@pytest.mark.parametrize("objective", CONFIGS)
def test_four_devices_equal_one(objective):
    """With batch normalisation, invalid images and the fairness term, which all couple the images of a batch."""
    for (one, one_metrics), (four, four_metrics) in zip(
        run_steps(objective, Perceptron()), run_steps(objective, Perceptron(), devices=4)
    ):
        assert_close(one.params, four.params, atol=2e-5)
        assert_close(one.batch_stats, four.batch_stats, atol=1e-5)
        assert_close(one_metrics, four_metrics, atol=1e-5)
    assert float(one_metrics["pairs"]) == N - 2


@pytest.mark.parametrize("objective", CONFIGS)
def test_micro_batches_equal_the_whole(objective):
    (whole, whole_metrics), (parts, parts_metrics) = (
        run_steps(objective, Plain(), micro_batch=size)[-1] for size in (0, 2)
    )
    assert_close(whole.params, parts.params, atol=1e-5)
    assert_close(whole_metrics, parts_metrics, atol=1e-5)


@pytest.mark.parametrize("objective", CONFIGS)
def test_the_gradient_is_that_of_the_mean_loss_over_valid_images(objective):
    config, model, _, variables, teacher = case(objective, Plain())
    (state, metrics), _ = run_steps(objective, Plain())
    batch = make_batch(0)
    kept = {name: jnp.asarray(x[batch["valid"]]) for name, x in batch.items()}
    images, rotations = kept["image"], 4 if objective != "prompt_distillation" else 1
    turned = [jnp.rot90(images, r, axes=(1, 2)) for r in range(rotations)]
    targets = classification.Targets(label=kept["label"])
    if objective == "logit_distillation":
        targets = classification.Targets(teacher_logits=model.apply(teacher, images, method="encode_image"))
    if objective == "prompt_distillation":
        projection = teacher["params"]["image"]["projection"]["kernel"]
        emb = kept["teacher_features"] @ projection
        emb /= jnp.linalg.norm(emb, axis=1, keepdims=True)
        targets = classification.prompt_targets(config.objective, emb, teacher["class_emb"], teacher["sentence_emb"])
        targets = targets._replace(has_reasons=kept["has_reasons"])

    def loss(params):
        variables = {"params": {"image": params["image"]}}
        features = [model.apply(variables, x, method="image_features") for x in turned]
        logits = [model.apply(variables, x, method="encode_image") for x in turned]
        outputs = classification.Outputs(jnp.stack(features, axis=1), jnp.stack(logits, axis=1))
        losses = functools.partial(classification.image_losses, step=jnp.int32(0), axis_name="data")
        mapped = jax.vmap(
            lambda outputs: losses(config.objective, params["objective"], outputs, targets, kept["valid"]),
            axis_name="data",
        )
        return mapped(jax.tree.map(lambda x: x[None], outputs))["loss"].mean()

    value, grads = jax.value_and_grad(loss)(variables["params"])
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)  # the first step of SGD
    assert_close(jax.device_get(expected), state.params, atol=2e-6)


@pytest.mark.parametrize("objective", CONFIGS)
def test_a_frozen_tower_stays_and_the_heads_are_trained(objective):
    _, _, _, variables, _ = case(objective, Perceptron())
    state, _ = run_steps(objective, Perceptron(), freeze=(("image/tower", -1),))[-1]
    tower = variables["params"]["image"]["tower"]
    assert "tower" not in state.params["image"]
    jax.tree.map(np.testing.assert_array_equal, state.frozen_params["image"]["tower"], jax.device_get(tower))
    trained = lambda params: jax.tree.leaves((params["image"]["projection"], params["objective"]))
    assert all(not np.array_equal(x, y) for x, y in zip(trained(state.params), trained(variables["params"])))


@pytest.mark.parametrize("batch_norm", ["batch", "ema", "student"])
def test_refined_labels_are_the_same_on_four_devices(batch_norm):
    one, four = (
        run_steps("prompt_distillation", Perceptron(), devices, teacher__batch_norm=batch_norm, **REFINED)
        for devices in (1, 4)
    )
    for (state, metrics), (other, other_metrics) in zip(one, four, strict=True):
        assert_close(state, other, atol=2e-5)
        assert_close(metrics, other_metrics, atol=1e-5)
        assert 0 < metrics["refined"] < 1


def test_refined_labels_are_the_same_in_micro_batches():
    whole, parts = (run_steps("prompt_distillation", Plain(), micro_batch=size, **REFINED)[-1] for size in (0, 2))
    assert_close(whole, parts, atol=1e-5)
    assert 0 < whole[1]["refined"] < 1


def test_labels_are_refined_from_a_step_on_by_the_moving_average_on_the_weak_view():
    """The labels of the second step in NumPy; the first step is that of a run that refines nothing."""
    _, model, _, variables, teacher = case("prompt_distillation", Plain(), **REFINED)
    (plain, plain_metrics), _ = run_steps("prompt_distillation", Plain(), objective__min_confidence=0.35)
    (first, first_metrics), (_, metrics) = run_steps(
        "prompt_distillation", Plain(), **REFINED | {"objective__refine_from": 1}
    )
    assert first_metrics["refined"] == 0.0 and first_metrics["loss"] == plain_metrics["loss"]
    jax.tree.map(np.testing.assert_array_equal, first.params, plain.params)
    assert plain.teacher_params == {}
    average = lambda a, s: 2 / 11 * np.asarray(a) + 9 / 11 * s  # after the first update
    expected = jax.tree.map(average, {"image": variables["params"]["image"]}, {"image": first.params["image"]})
    assert_close(first.teacher_params, expected, atol=1e-6)

    batch, softmax = make_batch(1), lambda x: np.asarray(jax.nn.softmax(jnp.asarray(x)))
    logits = lambda params, images: np.asarray(model.apply({"params": params}, images, method="encode_image"))
    emb = batch["teacher_features"] @ teacher["params"]["image"]["projection"]["kernel"]
    p = softmax(5.0 * emb / np.linalg.norm(emb, axis=1, keepdims=True) @ teacher["class_emb"].T)
    own = softmax(logits(first.teacher_params, batch["weak_image"]))
    refined = own.max(axis=1) >= 0.35
    label = np.where(refined[:, None], 0.6 * p + 0.4 * own, p)
    log_p = np.log(softmax(logits({"image": first.params["image"]}, batch["image"])))
    losses = (label.max(axis=1) >= 0.35) * -(label * log_p).sum(axis=1)
    np.testing.assert_allclose(metrics["label_loss"], losses[batch["valid"]].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["refined"], refined[batch["valid"]].mean(), rtol=1e-6)
    assert 0 < metrics["refined"] < 1


def test_a_frozen_tower_labels_the_weak_view_too():
    state, metrics = run_steps("prompt_distillation", Perceptron(), freeze=(("image/tower", -1),), **REFINED)[-1]
    assert "tower" not in state.teacher_params["image"] and 0 < metrics["refined"]
