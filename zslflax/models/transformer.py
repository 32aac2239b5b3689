"""Self-attention and the two-layer perceptron, which the image and the text transformer share."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) with the softmax in fp32.

    Attributes:
        heads: number of heads; divides the width.
        dtype: of the computation; parameters are fp32.
    """

    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Maps [b, t, w] → [b, t, w].

        Args:
            x: one vector per position.
            mask: bool, broadcast to [b, heads, t, t]; True where a position (third axis) attends to another
                (fourth axis). None means that every position attends to every other.
        """
        b, t, w = x.shape
        qkv = nn.Dense(3 * w, dtype=self.dtype, name="qkv")(x)
        q, k, v = jnp.split(qkv.reshape(b, t, 3 * self.heads, w // self.heads), 3, axis=2)  # (b, t, heads, w / heads)
        y = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return nn.Dense(w, dtype=self.dtype, name="out")(y.reshape(b, t, w))


class Mlp(nn.Module):
    """Two dense layers with the exact GELU between them.

    Attributes:
        hidden: width between the two layers.
        dtype: of the computation; parameters are fp32.
    """

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., w] → [..., w]."""
        y = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype, name="fc1")(x), approximate=False)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name="fc2")(y)
