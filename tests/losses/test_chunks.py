"""The streamed objectives against the plain ones, which test_objectives.py holds to their equations."""

import functools

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tests.losses.test_contrastive import make
from zslflax.losses import contrastive, sinkhorn
from zslflax.losses.contrastive import OBJECTIVES, SOFT_TARGETS, Embeddings

pytestmark = pytest.mark.usefixtures("strict_types")
N, D, WIDE = 24, 5, 7
STEP = jnp.int32(3)


DEFAULTS = [make(name) for name in OBJECTIVES]
VARIANTS = DEFAULTS + [
    make(
        "self_distillation",
        image_image_weight=0.3,
        text_text_weight=0.6,
        remove_diagonal=True,
        teacher_temperature=0.2,
        alpha=0.3,
        soft_ramp_steps=10,
    ),
    # A small λ: potentials of hundreds, whose exp overflows.
    make("otter", image_image_weight=0.0, remove_diagonal=False, sinkhorn_regulariser=0.01, sinkhorn_iterations=2),
]


def pairs(seed=0, noise=1.0, n=N):
    """Student and teacher; the captions are the images' embeddings with noise."""
    rng = np.random.default_rng(seed)

    def unit(x):
        return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)

    def related(width):
        image = rng.normal(size=(n, width))
        return Embeddings(unit(image), unit(image + noise * rng.normal(size=image.shape)))

    return related(D), related(WIDE)


def local_gradients(objective, params, student, teacher, valid):
    """Per-row values; the mean loss's gradients, by the parameters and by this device's embeddings."""
    weight = valid.astype(jnp.float32)
    weight /= jnp.maximum(jax.lax.psum(weight.sum(), "data"), 1.0)

    def loss(params, student):
        rows = contrastive.pair_losses(objective, params, student, teacher, valid, step=STEP, axis_name="data")
        return jnp.sum(rows["loss"] * weight), rows

    (g_params, g_student), rows = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, student)
    return rows, jax.lax.psum(g_params, "data"), g_student


@functools.cache
def mapped(objective, devices):
    local = functools.partial(local_gradients, objective)
    axes = {"in_axes": (None, 0, 0, 0), "out_axes": (0, None, 0)}
    return jax.pmap(local, "data", **axes, devices=jax.devices()[:devices])


def run(objective, block, student, teacher, valid, devices):
    """(values of the valid rows, gradients of the parameters, gradients of the embeddings), NumPy."""
    objective = ml_collections.FrozenConfigDict({**objective, "block": block})
    params = contrastive.init_params(objective)
    params = {k: v if k == "bias" else v - 0.3 * i for i, (k, v) in enumerate(params.items())}
    taught = teacher if objective.name in SOFT_TARGETS else None
    split = lambda tree: jax.tree.map(lambda x: jnp.asarray(x).reshape(devices, -1, *x.shape[1:]), tree)
    rows, g_params, g_student = mapped(objective, devices)(params, *split((student, taught, valid)))
    rows, g_student = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), (rows, g_student))
    return {name: row[valid] for name, row in rows.items()}, jax.tree.map(np.asarray, g_params), g_student


def assert_equal(ours, plain, tolerance=1e-5):
    """To a share of an array's largest value: a sum's rounding follows its terms, not what they leave."""
    assert jax.tree.structure(ours) == jax.tree.structure(plain)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain)):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(b).max(initial=0.0)))


@pytest.mark.parametrize(
    "objective, devices",
    [(o, 4) for o in VARIANTS] + [(make("label_smoothing"), 1), (make("otter"), 1)],
    ids=lambda value: getattr(value, "name", value),
)
def test_equals_the_plain_form(objective, devices, block=5):
    """Blocks that do not divide the batch: 24 columns are 5 of 5, one padded; a device's 6 rows 2 of 3."""
    valid = np.ones(N, bool)
    valid[[2, 7, 8, 23]] = False
    student, teacher = pairs()
    assert contrastive.is_streamed(make(objective.name, block=block), N // devices, N)
    plain = run(objective, 0, student, teacher, valid, 1)
    assert_equal(run(objective, block, student, teacher, valid, devices), plain)
    assert np.abs(plain[2].image).max() > 1e-3  # there is a gradient to compare
    assert 0 < plain[0]["in_batch_accuracy"].mean() < 1


@pytest.mark.parametrize("objective", VARIANTS, ids=lambda o: o.name)
@pytest.mark.parametrize("case", ["none valid", "one valid", "two valid", "identical", "a device without any"])
def test_degenerate_batches_equal_too(objective, case):
    valid = {
        "none valid": np.zeros(N, bool),
        "one valid": np.arange(N) == 2,
        "two valid": np.isin(np.arange(N), (2, 20)),
        "identical": np.ones(N, bool),
        "a device without any": np.arange(N) >= N // 4,
    }[case]
    student, teacher = pairs()
    if case == "identical":
        student, teacher = jax.tree.map(lambda x: np.repeat(x[:1], N, axis=0), (student, teacher))
    ours = run(objective, 5, student, teacher, valid, 4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ours))
    assert_equal(ours, run(objective, 0, student, teacher, valid, 1))


def test_outliers_overflow_no_padding():
    """Of an image and a caption that fit nothing, Sinkhorn raises the potentials until they do: by 200."""
    (student, teacher), valid = pairs(), np.ones(N, bool)
    teacher = jax.tree.map(lambda x: x[:1] + 0.1 * x, teacher)
    teacher.image[3] *= -1
    teacher.text[5] *= -1
    teacher = jax.tree.map(lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True), teacher)
    ours = run(VARIANTS[-1], 5, student, teacher, valid, 4)
    assert_equal(ours, run(VARIANTS[-1], 0, student, teacher, valid, 1))


def test_small_losses_are_as_exact_as_large_ones():
    """Of well-trained pairs: to the rounding of 1 + loss, as log_softmax has it, not of the logits."""
    (student, _), valid = pairs(noise=0.1), np.ones(N, bool)
    ours = run(make("info_nce"), 5, student, None, valid, 4)[0]
    v, t = (np.asarray(x, np.float64) for x in student)
    logits = np.exp(np.float64(np.float32(3.9))) * v @ t.T
    exact = 0.0
    for x in (logits, logits.T):
        exact += 0.5 * np.log1p(np.sum(np.exp(x - np.diag(x)[:, None]) * (1 - np.eye(N)), axis=1))
    small = exact < 1e-2
    assert small.sum() > 4 and exact[small].min() < 1e-4
    np.testing.assert_allclose(ours["loss"], exact, rtol=3e-5, atol=1.2e-7)


def test_potentials_equal_the_plain_ones():
    _, teacher = pairs()
    valid, index = np.arange(N) % 5 != 1, np.arange(N, dtype=np.int32)
    image, text = (np.float32(1 / 0.15) * teacher.image, teacher.text)

    def potentials(image, text, valid, index):
        rows = {"teacher": image, "valid": valid, "index": index}
        columns = {"teacher": text, "valid": valid, "index": index}
        gathered = jax.tree.map(lambda x: jax.lax.all_gather(x, "data", tiled=True), columns)
        return sinkhorn.streamed_potentials(rows, gathered, 5, remove_diagonal=True, block=4, axis_name="data")

    split = jax.tree.map(lambda x: jnp.asarray(x).reshape(4, -1, *x.shape[1:]), (image, text, valid, index))
    f, g = jax.pmap(potentials, "data", out_axes=(0, None))(*split)
    s = np.where(np.eye(N, dtype=bool), np.float32(sinkhorn.MASKED), teacher.image @ teacher.text.T)
    for ours, matrix in ((g, s), (f.reshape(-1), s.T)):
        plain = sinkhorn.column_potential(jnp.asarray(matrix), jnp.asarray(valid), 0.15, 5)
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


def sizes(jaxpr):
    """The number of elements of every array that a program computes, inner programs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size"))
        for inner in jaxprs_in_params(equation.params):
            yield from sizes(inner)


@pytest.mark.parametrize("objective", DEFAULTS, ids=lambda o: o.name)
def test_no_matrix_exists(objective):
    """Every array of the step is at most of the inputs' size or a block's (not that of a batch's matrix)."""
    n, block = 512, 32

    def largest(block):
        student, teacher = pairs(n=n)
        config = make(objective.name, block=block)
        taught = teacher if objective.name in SOFT_TARGETS else None
        local = functools.partial(local_gradients, config, contrastive.init_params(config))
        split = jax.tree.map(lambda x: x[None], (student, taught, np.ones(n, bool)))
        return max(sizes(jax.make_jaxpr(jax.vmap(local, axis_name="data"))(*split).jaxpr))

    assert largest(block) <= n * 2 * WIDE
    assert largest(0) >= n * n  # the measure sees the plain form's matrices


def test_the_largest_matrix_decides():
    large, never, otter = make("info_nce", block=64), make("info_nce", block=0), make("otter", block=64)
    assert not contrastive.is_streamed(large, 64, 64) and contrastive.is_streamed(large, 64, 128)
    assert not contrastive.is_streamed(large, 8, 512) and contrastive.is_streamed(otter, 8, 512)
    assert not contrastive.is_streamed(never, 1 << 15, 1 << 15)
