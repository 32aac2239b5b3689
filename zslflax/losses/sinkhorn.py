"""Sinkhorn's algorithm in the log domain: entropy-regularised optimal transport between images and texts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

MASKED = -1e9  # stands for minus infinity in fp32 logits; finite, so that a fully masked row gives no NaN


def column_potential(
    row_logits: Callable[[Any], jax.Array], chunks: Any, valid: jax.Array, iterations: int, axis_name: str
) -> jax.Array:
    """The column potential g of the transport plan P_ij = exp(f_i + S_ij / λ + g_j).

    The plan maximises ⟨P, S⟩ + λ H(P) among those with uniform row and column sums (Cuturi 2013; OTTER, arXiv
    2112.09445). One iteration scales the rows, then the columns, as OTTER's released code does:

        f_i ← log(1/n) − log Σ_j exp(S_ij / λ + g_j),     g_j ← log(1/n) − log Σ_i exp(S_ij / λ + f_i)

    The row-normalised plan is softmax_j(S_ij / λ + g_j): f cancels. The rows are spread over the devices of `axis_name`
    and, on each device, over chunks: no n × n matrix exists where there are several chunks.

    Args:
        row_logits: maps a chunk of c rows to S_ij / λ, fp32 [..., c, n], with `MASKED` where a pair may carry no mass.
            Leading axes are independent problems.
        chunks: this device's rows, a pytree of arrays [chunks, c, …].
        valid: bool [n], the pairs of the global batch that take part; n in the equations is their number.
        iterations: the number of (row, column) scalings.
        axis_name: the mapped axis over which the rows are spread.

    Returns:
        g, fp32 [..., n], the same on all devices; zero for a column without mass.
    """
    log_mass = -jnp.log(jnp.maximum(jnp.sum(valid.astype(jnp.float32)), 1.0))
    first = jax.tree.map(lambda x: x[0], chunks)
    *problems, _, n = jax.eval_shape(row_logits, first).shape
    if len(jax.tree.leaves(chunks)[0]) == 1:  # compute the logits of a single chunk once, not in every iteration
        logits = row_logits(first)
        chunk_logits = lambda _: logits
    else:
        chunk_logits = row_logits

    def potential(log_sum: jax.Array) -> jax.Array:
        return jnp.where(log_sum > 0.5 * MASKED, log_mass - log_sum, 0.0)

    def scale_rows_then_columns(_: int, g: jax.Array) -> jax.Array:
        def add_chunk(column_sums: jax.Array, rows: Any) -> tuple[jax.Array, None]:
            logits = chunk_logits(rows)
            f = potential(jax.nn.logsumexp(logits + g[..., None, :], axis=-1))  # (..., c)
            return jnp.logaddexp(column_sums, jax.nn.logsumexp(logits + f[..., None], axis=-2)), None

        empty = jnp.full_like(g, MASKED)
        column_sums = jax.lax.scan(add_chunk, empty, chunks)[0]  # (..., n), logs of sums over this device's rows
        largest = jax.lax.pmax(column_sums, axis_name)
        total = jax.lax.psum(jnp.exp(column_sums - largest), axis_name)
        return potential(largest + jnp.log(total))

    return jax.lax.fori_loop(0, iterations, scale_rows_then_columns, jnp.zeros((*problems, n), jnp.float32))
