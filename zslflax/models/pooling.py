"""Max pooling with a gradient that is no scatter."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

POSITIONS = tuple(itertools.product(range(3), range(3)))  # in a window, row by row


def max_pool(x: jax.Array) -> jax.Array:
    """Maps [b, h, w, c] → the maxima of 3×3 pixels around every second one, [b, ⌈h/2⌉, ⌈w/2⌉, c].

    The gradient goes to the first of several equal maxima. XLA's own is a scatter: atomic additions on a GPU, one
    element after the other on a CPU. TPUs have an operation for it.
    """
    if jax.default_backend() == "tpu":
        return nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
    _, h, w, _ = x.shape
    return pool_even(jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), constant_values=-jnp.inf))


@jax.custom_vjp
def pool_even(x: jax.Array) -> jax.Array:
    """`max_pool` of an even height and width; for its gradient, a byte says where each maximum was."""
    return nn.max_pool(x, window_shape=(3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))


def forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The maxima, and their indices among the `POSITIONS` of their windows, uint8."""
    b, h, w, c = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 0), (1, 0), (0, 0)), constant_values=-jnp.inf)
    values = [jax.lax.slice(padded, (0, i, j, 0), (b, i + h - 1, j + w - 1, c), (1, 2, 2, 1)) for i, j in POSITIONS]
    maximum, index = values[0], jnp.zeros(values[0].shape, jnp.uint8)
    for k, value in enumerate(values[1:], start=1):
        index = jnp.where(value > maximum, jnp.uint8(k), index)
        maximum = jnp.maximum(value, maximum)
    return maximum, index


def backward(index: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    """The gradient by x: each dy at the place of its maximum. A place is in up to four windows."""
    spread = lambda values, i, j: jax.lax.pad(
        values, jnp.float32(0), ((0, 0, 0), (i - 1, 2 - i, 1), (j - 1, 2 - j, 1), (0, 0, 0))
    )
    dy32 = dy.astype(jnp.float32)
    dx = sum(spread(jnp.where(index == k, dy32, 0.0), i, j) for k, (i, j) in enumerate(POSITIONS))
    return (jnp.asarray(dx, dy.dtype),)


pool_even.defvjp(forward, backward)
