"""Each objective against its equation in NumPy, on one and four devices, with and without invalid pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.losses import STEP, distinct_params, normalise, objective_config, of_valid, run_objective
from zslflax.losses import contrastive
from zslflax.losses.chunks import split
from zslflax.losses.contrastive import OBJECTIVES
from zslflax.losses.pairs import Embeddings, Pairs, soft_label_columns

pytestmark = pytest.mark.usefixtures("strict_types")
N, D, WIDE = 8, 5, 7
ALL = np.ones(N, bool)


@pytest.fixture(scope="module")
def pairs():
    """The student's embeddings, and the teacher's, which are wider."""
    rng = np.random.default_rng(0)
    random = lambda d: normalise(rng.normal(size=(N, d)))
    return Embeddings(random(D), random(D)), Embeddings(random(WIDE), random(WIDE))


def softmax(x):
    e = np.exp(x - x.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def feature_distance(student, teacher, params):
    """The squared distance of both modalities' embeddings, averaged over their elements."""
    total = 0.0
    for modality, x, target in zip(("image", "text"), student, teacher):
        if x.shape != target.shape:
            head = params["feature_heads"][modality]
            x = x @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
            x = x / np.linalg.norm(x, axis=1, keepdims=True)
        total += np.mean((x - target) ** 2)
    return total


def written_out(o, student, teacher, params):
    """The objective of a batch in float64, written down from the papers."""
    scale, soft_scale = (float(np.exp(params.get(name, 0.0))) for name in ("log_logit_scale", "log_soft_logit_scale"))
    total = o.feature_weight * feature_distance(student, teacher, params) if o.feature_weight else 0.0
    v, t = (np.asarray(x, np.float64) for x in student)
    tv, tt = (np.asarray(x, np.float64) for x in teacher)
    n = len(v)
    if o.name == "sigmoid":
        z = 2 * np.eye(n) - 1
        return total + np.sum(np.log1p(np.exp(-z * (scale * v @ t.T + o.logit_bias)))) / n
    for s, cross in ((v @ t.T, tv @ tt.T), (t @ v.T, tt @ tv.T)):
        hard = np.eye(n)
        if o.name == "label_smoothing":
            hard = np.where(np.eye(n) > 0, 1 - o.smoothing, o.smoothing / (n - 1))
        loss = -np.sum(hard * np.log(softmax(scale * s))) / n
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
            distilled = -np.sum(soft * np.log(softmax(soft_scale * s))) / n
            weight = (1 - o.alpha) * min(1.0, (int(STEP) + 1) / max(o.soft_ramp_steps, 1))
            loss = (1 - weight) * loss + weight * distilled
        total += loss / 2
    return total


VARIANTS = [objective_config(name) for name in OBJECTIVES] + [
    objective_config(
        "self_distillation",
        image_image_weight=0.3,
        text_text_weight=0.6,
        teacher_temperature=0.2,
        alpha=0.3,
        soft_ramp_steps=10,
    ),
    objective_config("self_distillation", remove_diagonal=True, teacher_temperature=0.5),
    objective_config(
        "otter", image_image_weight=0.0, text_text_weight=0.5, remove_diagonal=False, sinkhorn_iterations=2
    ),
    objective_config("info_nce", feature_weight=20.0),
    objective_config("self_distillation", feature_weight=3.0),
    objective_config("sigmoid", feature_weight=3.0),
]


@pytest.mark.parametrize("config", VARIANTS, ids=lambda o: o.name)
def test_loss_agrees_with_its_equation(config, pairs):
    losses, _, _ = run_objective(config, *pairs, ALL)
    expected = written_out(config, *pairs, distinct_params(config, D, WIDE))
    np.testing.assert_allclose(losses["loss"].mean(), expected, rtol=2e-5)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda o: o.name)
def test_four_devices_compute_what_one_does(config, pairs):
    valid = np.array([1, 1, 0, 1, 1, 1, 1, 0], bool)
    one, four = (of_valid(run_objective(config, *pairs, valid, devices), valid) for devices in (1, 4))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, four)
    assert np.abs(one[2].image).max() > 1e-3  # there is a gradient to compare


@pytest.mark.parametrize("config", VARIANTS, ids=lambda o: o.name)
def test_an_invalid_pair_counts_as_if_it_were_not_in_the_batch(config, pairs):
    valid = np.array([1, 1, 0, 1, 0, 1, 1, 1], bool)
    garbage = jax.tree.map(lambda x: np.where(valid[:, None], x, np.roll(x, 1, axis=1)), pairs)
    masked, masked_params, masked_emb = of_valid(run_objective(config, *garbage, valid), valid)
    rest = jax.tree.map(lambda x: x[valid], pairs)
    whole, whole_params, whole_emb = run_objective(config, *rest, np.ones(valid.sum(), bool))
    check = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    jax.tree.map(check, (masked, masked_params), (whole, whole_params))
    jax.tree.map(lambda a, b: check(a[valid], b), masked_emb, whole_emb)
    jax.tree.map(lambda a: check(a[~valid], 0.0), masked_emb)


@pytest.mark.parametrize("config", VARIANTS, ids=lambda o: o.name)
@pytest.mark.parametrize("case", ["none valid", "one valid", "identical"])
def test_degenerate_batches_stay_finite(config, case, pairs):
    valid = {"none valid": ~ALL, "one valid": np.arange(N) == 2, "identical": ALL}[case]
    if case == "identical":
        pairs = jax.tree.map(lambda x: np.repeat(x[:1], N, axis=0), pairs)
    for leaf in jax.tree.leaves(run_objective(config, *pairs, valid)):
        assert np.isfinite(leaf).all()


@pytest.mark.parametrize("name", ["self_distillation", "otter"])
def test_the_loss_is_not_differentiated_by_the_teacher(name, pairs):
    config = objective_config(name)
    student, teacher = jax.tree.map(lambda x: jnp.asarray(x)[None], pairs)

    def loss(teacher):
        of_device = lambda *x: contrastive.pair_losses(
            config, contrastive.init_params(config), *x, step=STEP, axis_name="data"
        )
        return jnp.mean(jax.vmap(of_device, axis_name="data")(student, teacher, ALL[None])["loss"])

    assert all(np.all(np.asarray(gradient) == 0) for gradient in jax.grad(loss)(teacher))


def test_transport_targets_sum_to_one_and_leave_out_the_pair(pairs):
    config = objective_config("otter")
    rows = Pairs(np.arange(N, dtype=np.int32), jnp.asarray(ALL), *jax.tree.map(jnp.asarray, pairs))
    allowed = soft_label_columns(config, rows, rows)
    potential = jax.vmap(
        lambda rows: contrastive.plan_potential(config, split(rows, 1), rows, "data"), axis_name="data"
    )(jax.tree.map(lambda x: x[None], rows))[0]
    similarities = contrastive.teacher_similarities(config, rows, rows)
    for targets in np.asarray(contrastive.transport_targets(config, similarities, allowed, potential)):
        np.testing.assert_allclose(targets.sum(axis=1), 1.0, rtol=1e-5)
        np.testing.assert_array_equal(np.diag(targets), 0.0)


def test_a_low_temperature_makes_soft_labels_certain_and_a_high_one_uniform(pairs):
    entropy = {
        temperature: run_objective(objective_config("self_distillation", teacher_temperature=temperature), *pairs, ALL)[
            0
        ]["soft_entropy"].mean()
        for temperature in (1e-3, 1e3)
    }
    assert entropy[1e-3] < 0.01 and entropy[1e3] == pytest.approx(np.log(N), rel=1e-3)
