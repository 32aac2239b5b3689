"""Sinkhorn's algorithm in the log domain: entropy-regularised optimal transport between a batch's images and texts."""

import jax
import jax.numpy as jnp

MASKED = -1e9  # stands for minus infinity in fp32 logits: finite, so that a row without any valid entry has no NaN


def column_potential(similarity: jax.Array, valid: jax.Array, regulariser: float, iterations: int) -> jax.Array:
    """The column potential g of the transport plan P_ij = exp(f_i + S_ij / λ + g_j) after a number of Sinkhorn iterations.

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
