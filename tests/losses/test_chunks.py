"""Losses in chunks of rows against losses of whole matrices, which test_contrastive.py holds to their equations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from tests.testing.losses import (
    assert_equal,
    distinct_params,
    losses_and_gradients,
    normalise,
    objective_config,
    of_valid,
    run_objective,
)
from zslflax.losses.chunks import count_chunks, map_chunks
from zslflax.losses.contrastive import OBJECTIVES, inner_products
from zslflax.losses.pairs import Embeddings
from zslflax.losses.sinkhorn import MASKED, column_potential

pytestmark = pytest.mark.usefixtures("strict_types")
N, D, WIDE = 24, 5, 7
CHUNK = 50  # similarities: two rows of 24; the six rows of one of four devices are three chunks


# A small λ: potentials of hundreds, whose exp overflows.
SMALL_REGULARISER = objective_config(
    "otter", image_image_weight=0.0, remove_diagonal=False, sinkhorn_regulariser=0.01, sinkhorn_iterations=2
)
DEFAULTS = [objective_config(name) for name in OBJECTIVES]
VARIANTS = DEFAULTS + [
    objective_config(
        "self_distillation",
        image_image_weight=0.3,
        text_text_weight=0.6,
        remove_diagonal=True,
        teacher_temperature=0.2,
        alpha=0.3,
        soft_ramp_steps=10,
    ),
    SMALL_REGULARISER,
    objective_config("info_nce", feature_weight=20.0),
]


def related_pairs(noise=1.0, n=N):
    """Embeddings of the student and of the teacher; those of texts are those of the images with noise."""
    rng = np.random.default_rng(0)

    def embeddings(width):
        image = rng.normal(size=(n, width))
        return Embeddings(normalise(image), normalise(image + noise * rng.normal(size=image.shape)))

    return embeddings(D), embeddings(WIDE)


def run(config, max_similarities, student, teacher, valid, devices):
    config = objective_config(**{**config, "max_similarities": max_similarities})
    return of_valid(run_objective(config, student, teacher, valid, devices), valid)


@pytest.mark.parametrize(
    "config, devices",
    [(o, 4) for o in VARIANTS] + [(objective_config("label_smoothing"), 1), (objective_config("otter"), 1)],
    ids=lambda value: getattr(value, "name", value),
)
def test_chunks_equal_the_whole(config, devices):
    valid = np.ones(N, bool)
    valid[[2, 7, 8, 23]] = False
    student, teacher = related_pairs()
    assert count_chunks(N // devices, N, CHUNK) == N // devices // 2
    whole = run(config, 0, student, teacher, valid, 1)
    assert_equal(run(config, CHUNK, student, teacher, valid, devices), whole)
    assert np.abs(whole[2].image).max() > 1e-3  # there is a gradient to compare
    assert 0 < whole[0]["in_batch_accuracy"].mean() < 1


@pytest.mark.parametrize("config", VARIANTS, ids=lambda o: o.name)
@pytest.mark.parametrize("case", ["none valid", "one valid", "two valid", "identical", "a device without any"])
def test_chunks_equal_the_whole_of_degenerate_batches(config, case):
    valid = {
        "none valid": np.zeros(N, bool),
        "one valid": np.arange(N) == 2,
        "two valid": np.isin(np.arange(N), (2, 20)),
        "identical": np.ones(N, bool),
        "a device without any": np.arange(N) >= N // 4,
    }[case]
    student, teacher = related_pairs()
    if case == "identical":
        student, teacher = jax.tree.map(lambda x: np.repeat(x[:1], N, axis=0), (student, teacher))
    ours = run(config, CHUNK, student, teacher, valid, 4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(ours))
    assert_equal(ours, run(config, 0, student, teacher, valid, 1))


def test_outliers_do_not_overflow():
    """An image and a text that are far from all others: Sinkhorn raises their potentials by 200."""
    (student, teacher), valid = related_pairs(), np.ones(N, bool)
    teacher = jax.tree.map(lambda x: x[:1] + 0.1 * x, teacher)
    teacher.image[3] *= -1
    teacher.text[5] *= -1
    teacher = jax.tree.map(normalise, teacher)
    ours = run(SMALL_REGULARISER, CHUNK, student, teacher, valid, 4)
    assert_equal(ours, run(SMALL_REGULARISER, 0, student, teacher, valid, 1))


def test_small_losses_are_as_exact_as_large_ones():
    """The error of a well-trained pair's loss is the rounding error of 1 + loss, not of the logits."""
    (student, _), valid = related_pairs(noise=0.1), np.ones(N, bool)
    ours = run(objective_config("info_nce"), CHUNK, student, None, valid, 4)[0]
    v, t = (np.asarray(x, np.float64) for x in student)
    logits = np.exp(np.float64(np.float32(3.9))) * v @ t.T
    exact = 0.0
    for x in (logits, logits.T):
        exact += 0.5 * np.log1p(np.sum(np.exp(x - np.diag(x)[:, None]) * (1 - np.eye(N)), axis=1))
    small = exact < 1e-2
    assert small.sum() > 4 and exact[small].min() < 1e-4
    np.testing.assert_allclose(ours["loss"], exact, rtol=3e-5, atol=1.2e-7)


def test_potentials_of_chunks_on_four_devices_equal_those_of_the_whole():
    _, teacher = related_pairs()
    valid, position = jnp.arange(N) % 5 != 1, np.arange(N, dtype=np.int32)
    regulariser = np.float32(0.15)

    def potential(devices, chunks):
        def of_device(position, image):
            def row_logits(rows):
                position, image = rows
                has_mass = valid & valid[position][:, None] & (position[:, None] != np.arange(N, dtype=np.int32))
                return jnp.where(has_mass, inner_products(image, teacher.text) / regulariser, np.float32(MASKED))

            rows = jax.tree.map(lambda x: x.reshape(chunks, -1, *x.shape[1:]), (position, image))
            return column_potential(row_logits, rows, valid, 5, "data")

        split = [jnp.asarray(x).reshape(devices, -1, *x.shape[1:]) for x in (position, teacher.image)]
        return jax.pmap(of_device, "data", out_axes=None, devices=jax.devices()[:devices])(*split)

    np.testing.assert_allclose(potential(4, chunks=3), potential(1, chunks=1), rtol=1e-5, atol=1e-5)


def array_sizes(jaxpr):
    """The number of elements of every array that a jaxpr computes, inner jaxprs included."""
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars if hasattr(variable.aval, "size"))
        for inner in jaxprs_in_params(equation.params):
            yield from array_sizes(inner)


@pytest.mark.parametrize("config", DEFAULTS, ids=lambda o: o.name)
def test_no_matrix_of_the_whole_batch_exists(config):
    """Every array is at most as large as the inputs together or as both directions' similarities of a chunk."""
    n, rows = 512, 7

    def largest(max_similarities):
        student, teacher = related_pairs(n=n)
        sized = objective_config(**{**config, "max_similarities": max_similarities})
        teacher = teacher if OBJECTIVES[config.name].needs_teacher else None
        function = functools.partial(losses_and_gradients, sized, distinct_params(sized))
        inputs = jax.tree.map(lambda x: x[None], (student, teacher, np.ones(n, bool)))
        return max(array_sizes(jax.make_jaxpr(jax.vmap(function, axis_name="data"))(*inputs).jaxpr))

    assert largest(rows * n) <= n * 2 * WIDE
    assert largest(0) >= n * n  # the measure sees the matrices of the whole


@pytest.mark.parametrize(
    "rows, columns, max_elements, chunks",
    [
        (64, 64, 64 * 64, 1),
        (64, 128, 64 * 64, 2),
        (8, 512, 64 * 64, 1),
        (24, 24, 50, 12),
        (6, 24, 24 * 5, 2),  # chunks of three rows: five do not divide six
        (6, 24, 1, 6),  # a chunk has at least one row
        (1 << 15, 1 << 15, 0, 1),
    ],
)
def test_chunks_are_as_few_as_the_limit_allows(rows, columns, max_elements, chunks):
    assert count_chunks(rows, columns, max_elements) == chunks


@pytest.mark.parametrize("num_chunks", [1, 2, 6])
def test_mapped_chunks_are_joined_in_order(num_chunks):
    x = {"a": jnp.arange(12.0).reshape(6, 2), "b": jnp.arange(6.0)}
    mapped = map_chunks(lambda tree: jax.tree.map(lambda x: 2.0 * x, tree), x, num_chunks)
    assert_equal(mapped, jax.tree.map(lambda x: 2.0 * x, x), tolerance=0.0)
