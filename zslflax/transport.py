"""Sinkhorn's algorithm in the log domain: entropy-regularised optimal transport between a batch's images and texts."""

import jax
import jax.numpy as jnp

from zslflax.blocks import log_sum, over_devices, sweep

MASKED = -1e9  # stands for minus infinity in fp32 logits: finite, so that a row without any valid entry has no NaN


def similarity(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Inner products: [b, d] × [n, d] → fp32 [b, n]."""
    return jnp.einsum("bd,nd->bn", queries, keys, precision=jax.lax.Precision.HIGHEST)


def column_potential(similarity: jax.Array, valid: jax.Array, regulariser: float, iterations: int) -> jax.Array:
    """The column potential g of the transport plan P_ij = exp(f_i + S_ij / λ + g_j) after so many Sinkhorn iterations.

    The plan maximises <P, S> + λ H(P) among those with uniform row and column sums (OTTER, arXiv 2112.09445,
    equation 5; Cuturi 2013). One iteration scales the rows to their sums, then the columns, as OTTER's release does.

    Args:
        similarity: fp32 [n, n], S; the higher, the better the fit. Entries at `MASKED` or below carry no mass.
        valid: bool [n]; rows and columns that are False carry no mass.
        regulariser: λ > 0, in units of the similarity.
        iterations: number of (row, column) scalings.

    Returns:
        fp32 [n], zero where not valid. The row-normalised plan is softmax_j(S_ij / λ + g_j): f cancels.
    """
    logits = jnp.where(valid[:, None] & valid[None, :], similarity / regulariser, MASKED)
    log_mass = -jnp.log(jnp.maximum(jnp.sum(valid.astype(jnp.float32)), 1.0))

    def scale(_, g):
        f = jnp.where(valid, log_mass - jax.nn.logsumexp(logits + g[None, :], axis=1), 0.0)
        return jnp.where(valid, log_mass - jax.nn.logsumexp(logits + f[:, None], axis=0), 0.0)

    return jax.lax.fori_loop(0, iterations, scale, jnp.zeros(similarity.shape[1], jnp.float32))


def streamed_potentials(
    rows: dict, columns: dict, iterations: int, *, remove_diagonal: bool, block: int, axis_name: str
) -> tuple[jax.Array, jax.Array]:
    """`column_potential` of a matrix and of its transpose; u_ij = S_ij / λ is recomputed in blocks.

    Rows first gives the plan of v → t and its column potential g; columns first that of t → v and its row
    potential f. Each scaling of one is computed beside a scaling of the other, from the same block, in 2 ×
    iterations sweeps of, both from the values before,

        g ← log mass − log Σ_i exp(u_ij + f_i)     and     f ← log mass − log Σ_j exp(u_ij + g_j).

    Args:
        rows: `teacher` fp32 [b, d], `valid` bool [b] and `index` int32 [b] of this device's images.
        columns: likewise of all texts [n, …]; u_ij is the inner product of the `teacher` entries.
        iterations: number of (row, column) scalings.
        remove_diagonal: whether a pair's own entry carries no mass.
        block: rows and columns at a time.
        axis_name: the mapped axis over which the images are spread.

    Returns:
        f, fp32 [b], of this device's images, and g, fp32 [n], of all texts; zero where not valid.
    """
    log_mass = -jnp.log(jnp.maximum(jnp.sum(columns["valid"].astype(jnp.float32)), 1.0))

    def visit(row, column, row_sums, column_sums, totals):
        massive = row["valid"][:, None] & column["valid"]
        if remove_diagonal:
            massive &= row["index"][:, None] != column["index"]
        u = jnp.where(massive, similarity(row["teacher"], column["teacher"]), MASKED)
        row_sums = jnp.logaddexp(row_sums, jax.nn.logsumexp(u + column["potential"], axis=1))
        column_sums = jnp.logaddexp(column_sums, jax.nn.logsumexp(u + row["potential"][:, None], axis=0))
        return row_sums, column_sums, totals

    def scale(_, f_and_g):
        sides = [side | {"potential": x} for side, x in zip((rows, columns), f_and_g)]
        empty = [jnp.full_like(x, MASKED) for x in f_and_g]
        row_sums, column_sums, _ = sweep(visit, block, *sides, *empty)
        column_sums = log_sum(column_sums, over_devices(axis_name))
        sums = ((rows, row_sums), (columns, column_sums))
        return tuple(jnp.where(side["valid"], log_mass - x, 0.0) for side, x in sums)

    zeros = tuple(jnp.zeros(side["valid"].shape, jnp.float32) for side in (rows, columns))
    return jax.lax.fori_loop(0, 2 * iterations, scale, zeros)
