"""Sinkhorn against the POT library, and its invariants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zslflax.losses.contrastive import masked_softmax
from zslflax.losses.sinkhorn import MASKED, column_potential

pytestmark = pytest.mark.usefixtures("strict_types")
N = 12


@pytest.fixture(scope="module")
def similarity():
    rng = np.random.default_rng(1)
    return rng.uniform(-1, 1, size=(N, N)).astype(np.float32)


def row_normalised_plan(similarity, valid, regulariser, iterations, chunks=1):
    """The plan on one device; invalid rows and columns carry no mass."""
    n = len(valid)
    logits = np.where(valid & valid[:, None], similarity / np.float32(regulariser), np.float32(MASKED))

    def potential(rows):
        return column_potential(lambda x: x, rows.reshape(chunks, -1, n), jnp.asarray(valid), iterations, "data")

    g = jax.vmap(potential, axis_name="data")(jnp.asarray(logits)[None])[0]
    return np.asarray(masked_softmax(logits + g, jnp.asarray(valid)[None, :]))


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("iterations", [1, 5, 500])
@pytest.mark.parametrize("regulariser", [0.15, 0.02])
def test_plan_agrees_with_pot(require, similarity, regulariser, iterations, chunks):
    ot = require("ot")
    mass = np.full(N, 1 / N)
    # POT scales columns first: on the transposed problem that is rows first. A stopping threshold of 0 keeps it going.
    plan = ot.bregman.sinkhorn_log(
        mass, mass, -similarity.T.astype(np.float64), regulariser, numItermax=iterations, stopThr=0, warn=False
    ).T
    ours = row_normalised_plan(similarity, np.ones(N, bool), regulariser, iterations, chunks)
    np.testing.assert_allclose(ours, plan / plan.sum(axis=1, keepdims=True), atol=2e-5)


def test_converged_plan_has_uniform_marginals(similarity):
    ours = row_normalised_plan(similarity, np.ones(N, bool), 0.3, 500)
    np.testing.assert_allclose(ours.sum(axis=0), 1.0, atol=1e-4)


def test_invalid_rows_and_columns_count_as_if_they_were_not_there(similarity):
    valid = np.arange(N) % 3 != 1
    ours = row_normalised_plan(similarity, valid, 0.15, 5)[valid][:, valid]
    alone = row_normalised_plan(similarity[valid][:, valid], np.ones(valid.sum(), bool), 0.15, 5)
    np.testing.assert_allclose(ours, alone, rtol=1e-4, atol=1e-7)


def test_independent_problems_are_solved_side_by_side(similarity):
    def potentials(rows):
        return column_potential(lambda x: x, rows[None], jnp.ones(N, bool), 5, "data")

    solve = jax.vmap(potentials, axis_name="data")
    both = solve(jnp.stack([similarity, similarity.T])[None] / 0.15)[0]
    for logits, ours in zip((similarity, similarity.T), both, strict=True):
        np.testing.assert_allclose(ours, solve(jnp.asarray(logits)[None] / 0.15)[0], rtol=1e-5, atol=1e-6)
