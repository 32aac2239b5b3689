"""Linear layers that belong to an objective: they are trained with the model, and are no part of it."""

from typing import Any

import jax
import jax.numpy as jnp

Params = dict[str, Any]


def init_dense(key: jax.Array, inputs: int, outputs: int) -> Params:
    """The parameters of a linear layer."""
    return {"kernel": jax.nn.initializers.lecun_normal()(key, (inputs, outputs)), "bias": jnp.zeros(outputs)}


def dense(params: Params, x: jax.Array) -> jax.Array:
    """A linear layer of the last axis."""
    return x @ params["kernel"] + params["bias"]
