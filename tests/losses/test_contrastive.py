"""Each objective against its equation in plain NumPy, over one and four devices, with and without unreadable pairs."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from zslflax.config import default_config, set_objective
from zslflax.losses import contrastive
from zslflax.losses.contrastive import OBJECTIVES, Embeddings

pytestmark = pytest.mark.usefixtures("strict_types")
N, D = 8, 5
STEP = jnp.int32(3)


def make(name, **fields):
    config = default_config()
    set_objective(config, name)
    for field, value in fields.items():
        config.objective[field] = value
    return ml_collections.FrozenConfigDict(config.objective)  # hashable


def unit(rng, n=N, d=D):
    x = rng.normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    return Embeddings(unit(rng), unit(rng)), Embeddings(unit(rng, d=7), unit(rng, d=7))


@functools.cache
def mapped(objective, devices):
    """(params, student, teacher, valid) → (mean metrics, gradient of the parameters), gradient of the embeddings."""

    def local(params, student, taught, valid):
        weight = valid.astype(jnp.float32)
        weight /= jnp.maximum(jax.lax.psum(weight.sum(), "data"), 1.0)

        def loss(params, student):
            rows = contrastive.pair_losses(objective, params, student, taught, valid, step=STEP, axis_name="data")
            means = jax.tree.map(lambda row: jnp.sum(row * weight), rows)
            return means["loss"], means

        (g_params, g_student), means = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, student)
        return jax.lax.psum((means, g_params), "data"), g_student

    outputs = ((None, None), 0)
    return jax.pmap(local, "data", in_axes=(None, 0, 0, 0), out_axes=outputs, devices=jax.devices()[:devices])


def run(objective, student, teacher, valid, devices=1, params=None):
    params = contrastive.init_params(objective) if params is None else params
    taught = teacher if objective.name in contrastive.SOFT_TARGETS else None
    split = lambda tree: jax.tree.map(lambda x: jnp.asarray(x).reshape(devices, -1, *x.shape[1:]), tree)
    (means, g_params), g_student = mapped(objective, devices)(params, *split((student, taught, np.asarray(valid))))
    return jax.tree.map(np.asarray, (means, g_params, jax.tree.map(lambda g: g.reshape(-1, D), g_student)))


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def plain(o, student, teacher, scale_hard, scale_soft):
    """The objective of a batch in float64, written down from the papers."""
    v, t = (np.asarray(x, np.float64) for x in student)
    tv, tt = (np.asarray(x, np.float64) for x in teacher)
    n = len(v)
    if o.name == "sigmoid":
        z = 2 * np.eye(n) - 1
        return np.sum(np.log1p(np.exp(-z * (scale_hard * v @ t.T + o.bias)))) / n
    total = 0.0
    for s, cross in ((v @ t.T, tv @ tt.T), (t @ v.T, tt @ tv.T)):
        hard = np.eye(n)
        if o.name == "label_smoothing":
            hard = np.where(np.eye(n) > 0, 1 - o.smoothing, o.smoothing / (n - 1))
        loss = -np.sum(hard * np.log(softmax(scale_hard * s))) / n
        if o.name in ("self_distillation", "otter"):
            fit = cross + o.image_image_weight * tv @ tv.T + o.text_text_weight * tt @ tt.T
            if o.remove_diagonal:
                fit = fit - 1e3 * np.eye(n)
            if o.name == "self_distillation":
                soft = softmax(fit / o.teacher_temperature)
            else:
                plan = np.exp(fit / o.sinkhorn_regulariser)
                for _ in range(o.sinkhorn_iterations):
                    plan = plan / plan.sum(axis=1, keepdims=True) / n
                    plan = plan / plan.sum(axis=0, keepdims=True) / n
                soft = plan / plan.sum(axis=1, keepdims=True)
            distilled = -np.sum(soft * np.log(softmax(scale_soft * s))) / n
            weight = (1 - o.alpha) * min(1.0, (int(STEP) + 1) / max(o.soft_ramp_steps, 1))
            loss = (1 - weight) * loss + weight * distilled
        total += loss / 2
    return total


VARIANTS = [make(name) for name in OBJECTIVES] + [
    make(
        "self_distillation",
        image_image_weight=0.3,
        text_text_weight=0.6,
        teacher_temperature=0.2,
        alpha=0.3,
        soft_ramp_steps=10,
    ),
    make("self_distillation", remove_diagonal=True, teacher_temperature=0.5),
    make("otter", image_image_weight=0.0, text_text_weight=0.5, remove_diagonal=False, sinkhorn_iterations=2),
]


@pytest.mark.parametrize("objective", VARIANTS, ids=lambda o: o.name)
def test_agrees_with_its_equation(objective, pairs):
    params = contrastive.init_params(objective)
    params = {k: v if k == "bias" else v + 0.1 * i for i, (k, v) in enumerate(params.items())}
    means, _, _ = run(objective, *pairs, np.ones(N, bool), params=params)
    scales = [float(np.exp(params.get(k, 0.0))) for k in ("log_logit_scale", "log_soft_logit_scale")]
    np.testing.assert_allclose(means["loss"], plain(objective, *pairs, *scales), rtol=2e-5)


@pytest.mark.parametrize("objective", VARIANTS, ids=lambda o: o.name)
def test_four_devices_compute_what_one_does(objective, pairs):
    valid = np.array([1, 1, 0, 1, 1, 1, 1, 0], bool)
    one, four = (run(objective, *pairs, valid, devices) for devices in (1, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, four)
    assert np.abs(one[2].image).max() > 1e-3  # there is a gradient to compare


@pytest.mark.parametrize("objective", VARIANTS, ids=lambda o: o.name)
def test_an_unreadable_pair_is_as_if_it_were_not_there(objective, pairs):
    valid = np.array([1, 1, 0, 1, 0, 1, 1, 1], bool)
    garbage = jax.tree.map(lambda x: np.where(valid[:, None], x, np.roll(x, 1, axis=1)), pairs)
    masked, masked_params, masked_emb = run(objective, *garbage, valid)
    rest = jax.tree.map(lambda x: x[valid], pairs)
    whole, whole_params, whole_emb = run(objective, *rest, np.ones(valid.sum(), bool))
    check = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(check, (masked, masked_params), (whole, whole_params))
    jax.tree.map(lambda a, b: check(a[valid], b), masked_emb, whole_emb)
    jax.tree.map(lambda a: check(a[~valid], 0.0), masked_emb)


@pytest.mark.parametrize("objective", VARIANTS, ids=lambda o: o.name)
@pytest.mark.parametrize("case", ["none valid", "one valid", "identical"])
def test_degenerate_batches_stay_finite(objective, case, pairs):
    valid = {"none valid": np.zeros(N, bool), "one valid": np.arange(N) == 2, "identical": np.ones(N, bool)}[case]
    if case == "identical":
        pairs = jax.tree.map(lambda x: np.repeat(x[:1], N, axis=0), pairs)
    for leaf in jax.tree.leaves(run(objective, *pairs, valid)):
        assert np.isfinite(leaf).all()


def test_soft_labels_are_not_differentiated_and_sum_to_one(pairs):
    objective = make("otter")
    identity = lambda x: x
    pairing, columns = jnp.eye(N), jnp.ones(N, bool)

    def total(teacher):
        targets = contrastive.soft_targets(objective, teacher, identity, pairing, columns)
        return sum(jnp.sum(t * jnp.arange(N, dtype=jnp.float32)) for t in targets), targets

    gradient, targets = jax.grad(total, has_aux=True)(Embeddings(*map(jnp.asarray, pairs[1])))
    assert all(np.all(np.asarray(g) == 0) for g in gradient)
    for t in targets:
        np.testing.assert_allclose(np.asarray(t).sum(axis=1), 1.0, rtol=1e-5)
        np.testing.assert_array_equal(np.diag(t), 0.0)


def test_a_fixed_low_temperature_follows_the_teacher_to_one_caption(pairs):
    """The direction of τ: a cold teacher is certain, a hot one knows nothing."""
    pairing, columns = jnp.eye(N), jnp.ones(N, bool)
    entropy = {}
    for temperature in (1e-3, 1e3):
        objective = make("self_distillation", teacher_temperature=temperature)
        t, _ = contrastive.soft_targets(
            objective, Embeddings(*map(jnp.asarray, pairs[1])), lambda x: x, pairing, columns
        )
        entropy[temperature] = float(jnp.mean(jnp.sum(jax.scipy.special.entr(t), axis=-1)))
    assert entropy[1e-3] < 0.01 and entropy[1e3] == pytest.approx(np.log(N), rel=1e-3)
