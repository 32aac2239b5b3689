"""Objectives of classifiers against NumPy and PyTorch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from zslflax.config import default_config
from zslflax.losses import classification
from zslflax.losses.classification import Outputs, Targets

B, C, F, M = 6, 5, 7, 9  # images, classes, features, sentences
RNG = np.random.default_rng(0)
LABEL = RNG.integers(0, C, B).astype(np.int32)
VALID = np.ones(B, bool)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def objective_config(name: str, **fields: float) -> ConfigDict:
    config = default_config().objective
    config.update({"name": name, **fields})
    return config


def losses_of(config: ConfigDict, outputs: Outputs, targets: Targets, params: dict, devices: int = 1) -> dict:
    """The losses of all images, computed by so many devices."""
    per_device = lambda tree: jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), tree)
    function = functools.partial(classification.image_losses, config, step=jnp.int32(0), axis_name="data")
    mapped = jax.pmap(function, "data", in_axes=(None, 0, 0, 0), devices=jax.devices()[:devices])
    losses = mapped(params, per_device(outputs), per_device(targets), per_device(VALID))
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1), losses)


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_generation_0_equals_pytorch(require):
    torch = require("torch")
    nn = torch.nn.functional
    z, params = normal(B, 4, C), {"rotation_head": {"kernel": normal(C, 4), "bias": normal(4)}}
    outputs = Outputs(normal(B, 4, F), z)
    found = losses_of(objective_config("cross_entropy", rotation_weight=2.0), outputs, Targets(LABEL), params)
    # As in the authors' code: the four rotations one after the other in a batch of 4 b images.
    logits = torch.tensor(z.transpose(1, 0, 2).reshape(4 * B, C))
    label = torch.tensor(LABEL).long().repeat(4)
    turned = torch.eye(4).repeat_interleave(B, dim=0)
    rotation = logits @ torch.tensor(params["rotation_head"]["kernel"]) + torch.tensor(params["rotation_head"]["bias"])
    expected = nn.cross_entropy(logits, label) + 2.0 * nn.binary_cross_entropy_with_logits(rotation, turned)
    np.testing.assert_allclose(found["loss"].mean(), expected.item(), rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], z[:, 0].argmax(axis=1) == LABEL)
    hits = rotation.argmax(dim=1) == turned.argmax(dim=1)
    np.testing.assert_allclose(found["rotation_accuracy"].mean(), hits.float().mean().item(), rtol=1e-6)


def test_cross_entropy_without_rotations_equals_numpy():
    z = normal(B, 1, C)
    found = losses_of(objective_config("cross_entropy"), Outputs(normal(B, 1, F), z), Targets(LABEL), {})
    np.testing.assert_allclose(found["loss"], -log_softmax(z[:, 0])[np.arange(B), LABEL], rtol=1e-5)
    assert set(found) == {"loss", "label_loss", "accuracy"}


def test_generation_1_equals_pytorch(require):
    torch = require("torch")
    nn = torch.nn.functional
    z, teacher = normal(B, 4, C), normal(B, C)
    config = objective_config("logit_distillation", rotation_weight=1.5, temperature=2.0)
    found = losses_of(config, Outputs(normal(B, 4, F), z), Targets(teacher_logits=teacher), {})
    student = torch.tensor(z)
    soft = nn.softmax(torch.tensor(teacher) / 2, dim=1)
    expected = 4 * nn.kl_div(nn.log_softmax(student[:, 0] / 2, dim=1), soft, reduction="sum") / B
    for r in (1, 2, 3):
        expected += 1.5 / 3 * torch.norm(student[:, r] - student[:, 0], dim=1).mean()
    np.testing.assert_allclose(found["loss"].mean(), expected.item(), rtol=1e-5)


def test_generation_1_has_no_gradient_where_it_starts():
    """A copy of its teacher whose logits are the same for all rotations: both terms are at their minimum."""
    config, teacher = objective_config("logit_distillation", rotation_weight=1.0), jnp.asarray(normal(B, C))
    loss = lambda z: classification.distillation_losses(
        config, {}, Outputs(z, jnp.repeat(z[:, None], 4, axis=1)), Targets(teacher_logits=teacher), VALID, "data"
    )["loss"].sum()
    np.testing.assert_allclose(jax.grad(loss)(teacher), 0.0, atol=1e-6)


def prompt_case(**fields: float) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray]:
    """The found losses; and the student's log-probabilities, the teacher's labels and its reasons, by NumPy."""
    config = objective_config("prompt_distillation", teacher_scale=10.0, **fields)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    rng = np.random.default_rng(1)
    emb, names, sentences = (unit(rng.standard_normal((n, 3)).astype(np.float32)) for n in (B, C, M))
    outputs = Outputs(*(rng.standard_normal((B, 1, n)).astype(np.float32) for n in (F, C)))
    head = {"kernel": rng.standard_normal((F, M)).astype(np.float32), "bias": np.zeros(M, np.float32)}
    targets = classification.prompt_targets(config, emb, names, sentences)
    targets = targets._replace(has_reasons=np.arange(B) % 2 == 0)
    found = losses_of(config, outputs, targets, {"reason_head": head})
    labels, reasons = np.exp(log_softmax(10 * emb @ names.T)), np.exp(log_softmax(10 * emb @ sentences.T))
    np.testing.assert_allclose(targets.soft_labels, labels, rtol=1e-4)
    np.testing.assert_allclose(targets.reasons, reasons, rtol=1e-4)
    divergence = (reasons * (np.log(reasons) - log_softmax(outputs.features[:, 0] @ head["kernel"]))).sum(axis=1)
    return found, log_softmax(outputs.logits[:, 0]), labels, divergence


def test_prompt_distillation_equals_numpy():
    found, log_p, labels, divergence = prompt_case(alpha=0.3)
    cross_entropy = -(labels * log_p).sum(axis=1)
    has_reasons = np.arange(B) % 2 == 0
    expected = np.where(has_reasons, 0.3 * cross_entropy + 0.7 * divergence, cross_entropy)
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-4)
    np.testing.assert_allclose(found["reason_loss"], divergence, rtol=1e-4)


def test_hard_labels_and_the_confidence_threshold_equal_numpy():
    _, log_p, labels, _ = prompt_case()
    threshold = float(np.median(labels.max(axis=1)))
    found, *_ = prompt_case(hard_labels=True, min_confidence=threshold)
    confident = labels.max(axis=1) >= threshold
    assert 0 < confident.sum() < B
    np.testing.assert_allclose(found["confident"], confident)
    expected = np.where(confident, -log_p[np.arange(B), labels.argmax(axis=1)], 0.0)
    np.testing.assert_allclose(found["label_loss"], expected, rtol=1e-4)


def test_refined_labels_equal_numpy():
    rng = np.random.default_rng(2)
    p, logits = (np.exp(log_softmax(rng.standard_normal((B, C)))), 2 * rng.standard_normal((B, C)).astype(np.float32))
    average = np.exp(log_softmax(logits))
    threshold = float(np.median(average.max(axis=1)))
    config = objective_config("prompt_distillation", refine_weight=0.3, min_confidence=threshold)
    labels, refined = classification.refined_labels(config, p, logits)
    np.testing.assert_array_equal(refined, average.max(axis=1) >= threshold)
    assert 0 < refined.sum() < B
    np.testing.assert_allclose(labels, np.where(refined[:, None], 0.7 * p + 0.3 * average, p), rtol=1e-5)
    np.testing.assert_allclose(labels.sum(axis=1), 1.0, rtol=1e-5)


def test_the_fairness_term_is_of_the_global_batch():
    found, log_p, _, _ = prompt_case(fairness_weight=0.5)
    without, *_ = prompt_case()
    fairness = -np.log(np.exp(log_p).mean(axis=0)).mean()
    np.testing.assert_allclose(found["fairness_loss"], fairness, rtol=1e-4)
    np.testing.assert_allclose(found["loss"] - without["loss"], 0.5 * fairness, rtol=1e-3)
    outputs = Outputs(np.zeros((B, 1, F), np.float32), log_p[:, None])
    targets = Targets(soft_labels=np.exp(log_p))
    config = objective_config("prompt_distillation", fairness_weight=0.5)
    one, two = (losses_of(config, outputs, targets, {}, devices) for devices in (1, 2))
    np.testing.assert_allclose(one["loss"], two["loss"], rtol=1e-5)


@pytest.mark.parametrize(("weight", "classes_in_use"), [(0.0, 1), (5.0, 3)])
def test_fairness_keeps_classes_that_the_teacher_hardly_names(weight, classes_in_use):
    """The teacher finds class 0 the most likely of all images, and the true class a little more likely than usual.

    A student of its labels names class 0 alone; with the fairness term it names all three classes.
    """
    group = np.arange(60) % 3
    labels = np.full((60, 3), 0.15) + 0.1 * np.eye(3)[group]
    labels[:, 0] += 0.3
    x = jnp.asarray(np.eye(3)[group] + 0.1 * np.random.default_rng(0).standard_normal((60, 3)), jnp.float32)
    targets = Targets(soft_labels=jnp.asarray(labels / labels.sum(axis=1, keepdims=True), jnp.float32))
    config = objective_config("prompt_distillation", fairness_weight=weight)
    valid = jnp.ones(60, bool)

    def loss(weights: jax.Array) -> jax.Array:
        outputs = Outputs(x[:, None], (x @ weights)[:, None])
        return classification.prompt_losses(config, {}, outputs, targets, valid, "data")["loss"].mean()

    def train(weights: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 300, lambda _, w: w - 0.5 * jax.grad(loss)(w), weights)

    weights = jax.pmap(train, "data", devices=jax.devices()[:1])(jnp.zeros((1, 3, 3)))[0]
    assert len(set(np.argmax(x @ weights, axis=1).tolist())) == classes_in_use


def test_rotations_equal_pytorch(require):
    torch = require("torch")
    images = RNG.integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    found = np.asarray(classification.rotate(jnp.asarray(images)))
    for r in range(4):
        np.testing.assert_array_equal(found[:, r], torch.rot90(torch.tensor(images), r, (1, 2)).numpy())


def test_the_heads_are_those_that_the_objective_uses():
    init = functools.partial(classification.init_params, key=jax.random.key(0), features=F, classes=C)
    shapes = lambda **fields: jax.tree.map(jnp.shape, init(objective_config(**fields), sentences=M))
    assert shapes(name="cross_entropy", rotation_weight=1.0) == {"rotation_head": {"kernel": (C, 4), "bias": (4,)}}
    assert shapes(name="prompt_distillation") == {"reason_head": {"kernel": (F, M), "bias": (M,)}}
    assert shapes(name="cross_entropy") == shapes(name="logit_distillation", rotation_weight=1.0) == {}
    assert init(objective_config("prompt_distillation"), sentences=0) == {}
