"""The gradient of a loss that couples all rows of a batch, with activations for one micro-batch at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from zslflax.losses.chunks import join, split
from zslflax.models.partition import Tree


def compute_gradients(
    embed: Callable[[Tree, Any, jax.Array], tuple[Any, Tree]],
    loss_fn: Callable[[Tree, Any], tuple[jax.Array, Tree]],
    params: Tree,
    inputs: Tree,
    key: jax.Array,
    num_micro_batches: int,
) -> tuple[Tree, Tree, Tree]:
    """The gradient by `params` of loss_fn(params["objective"], v), where v = embed(params, inputs, key) are embeddings.

    With one micro-batch, all activations are kept for the backward pass. With several, those of one micro-batch at a
    time are kept, as in GradCache (Gao et al. 2021, arXiv 2101.06983): by the chain rule

        d loss / d params = Σ_i (d v_i / d params)ᵀ · d loss / d v_i,

    first all v are computed without activations, then the gradient of the loss by v, then each micro-batch once more
    with its part of that gradient. Both passes draw the same dropout. The sum is fp32.

    Args:
        embed: (params, inputs, key) → (embeddings, or other outputs: a tree of arrays [b, …]; batch statistics).
        loss_fn: (params["objective"], the outputs for all of this device's rows) → (scalar, metrics).
        params: the trained parameters.
        inputs: a tree of arrays, whose lengths `num_micro_batches` divides.
        key: the key of the dropout.
        num_micro_batches: how many parts of `inputs` are embedded one after another.

    Returns:
        The gradient, the metrics of `loss_fn`, and the batch statistics (of several micro-batches, their mean).
    """
    if num_micro_batches == 1:

        def embed_and_loss(params: Tree) -> tuple[jax.Array, tuple[Tree, Tree]]:
            student_emb, batch_stats = embed(params, inputs, key)
            loss, metrics = loss_fn(params["objective"], student_emb)
            return loss, (metrics, batch_stats)

        grads, (metrics, batch_stats) = jax.grad(embed_and_loss, has_aux=True)(params)
        return grads, metrics, batch_stats

    micro_batches = split(inputs, num_micro_batches), jax.random.split(key, num_micro_batches)
    student_emb, batch_stats = jax.lax.map(lambda inputs_and_key: embed(params, *inputs_and_key), micro_batches)
    loss_grads = jax.grad(loss_fn, (0, 1), has_aux=True)
    (objective_grads, emb_grads), metrics = loss_grads(params["objective"], join(student_emb))

    def add_micro_batch(total: Tree, micro_batch: tuple[Any, Any]) -> tuple[Tree, None]:
        inputs_and_key, emb_grad = micro_batch
        _, vjp_fn, _ = jax.vjp(lambda params: embed(params, *inputs_and_key), params, has_aux=True)
        return jax.tree.map(jnp.add, total, *vjp_fn(emb_grad)), None

    zero = jax.tree.map(jnp.zeros_like, params) | {"objective": objective_grads}
    grads, _ = jax.lax.scan(add_micro_batch, zero, (micro_batches, split(emb_grads, num_micro_batches)))
    # x_0 + mean(x_i − x_0) leaves statistics that do not change exactly as they are.
    batch_stats = jax.tree.map(lambda x: x[0] + jnp.mean(x - x[0], axis=0), batch_stats)
    return grads, metrics, batch_stats
