"""Layers that several towers share: self-attention, perceptrons, layer scale, and pools by attention."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, x · Φ(x) with Φ the normal distribution's cumulative function; computed in fp32 (Hendrycks 2016).

    For its gradient, Φ(x) + x · Φ'(x), it keeps x alone and not also the terms of the formula.
    """
    wide = x.astype(jnp.float32)
    return (wide * normal_cdf(wide)).astype(x.dtype)


def gelu_backward(x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    """The gradient by x."""
    wide = x.astype(jnp.float32)
    slope = normal_cdf(wide) + wide * jnp.exp(-0.5 * wide * wide) / math.sqrt(2 * math.pi)
    return ((slope * gradient.astype(jnp.float32)).astype(x.dtype),)


def normal_cdf(x: jax.Array) -> jax.Array:
    """Φ(x)."""
    return 0.5 * (1 + jax.lax.erf(x / math.sqrt(2)))


gelu.defvjp(lambda x: (gelu(x), x), gelu_backward)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {  # by their names in Hugging Face's config.json
    "gelu": gelu,
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),  # CLIP's
    "silu": nn.silu,
}


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017) with the softmax in fp32.

    Attributes:
        heads: number of heads; divides the width.
        dtype: of the computation; parameters are fp32.
        use_bias: whether the projections have biases.
        key_bias: whether the keys have one; without, queries and values have theirs as "q_bias" and "v_bias".
        norm_eps: epsilon of a layer norm of the concatenated heads (Wang et al. 2022, arXiv 2210.06423); 0 for none.
        project: whether the concatenated heads are projected once more, as in a block.
    """

    heads: int
    dtype: Any = jnp.float32
    use_bias: bool = True
    key_bias: bool = True
    norm_eps: float = 0.0
    project: bool = True

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        mask: jax.Array | None = None,
        bias: jax.Array | None = None,
        rotation: tuple[jax.Array, jax.Array] | None = None,
        queries: int | None = None,
    ) -> jax.Array:
        """Maps [b, t, w] → [b, t, w].

        Args:
            x: one vector per position.
            mask: bool, broadcast to [b, heads, t, t]; True where a position (third axis) attends to another
                (fourth axis). None means that every position attends to every other.
            bias: of the logits, broadcast to [b, heads, t, t]; None for none.
            rotation: cosines and sines of the angles by which queries and keys are turned, see `rotate`; None for none.
            queries: q, the number of leading positions to compute, so that the result is [b, q, w]; None for all.
        """
        b, t, w = x.shape
        qkv = nn.Dense(3 * w, use_bias=self.use_bias and self.key_bias, dtype=self.dtype, name="qkv")(x)
        if self.use_bias and not self.key_bias:
            q_bias, v_bias = (self.param(name, nn.initializers.zeros, (w,)) for name in ("q_bias", "v_bias"))
            qkv = qkv + jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias]).astype(self.dtype)
        q, k, v = jnp.split(qkv.reshape(b, t, 3 * self.heads, w // self.heads), 3, axis=2)  # (b, t, heads, w / heads)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        y = jax.nn.dot_product_attention(q[:, :queries], k, v, bias=bias, mask=mask).reshape(b, -1, w)
        if self.norm_eps:
            y = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(y)
        return nn.Dense(w, use_bias=self.use_bias, dtype=self.dtype, name="out")(y) if self.project else y


def rotary_angles(position: jax.Array, width: int, base: float) -> tuple[jax.Array, jax.Array]:
    """Returns the cosines and sines of rotary position embeddings (Su et al. 2021, arXiv 2104.09864).

    Args:
        position: int32 [b, t].
        width: w, of a head.
        base: of the geometric series of frequencies.

    Returns:
        fp32 [b, t, 1, w / 2] of each.
    """
    angle = position[:, :, None, None].astype(jnp.float32) * rotary_frequencies(width, base)
    return jnp.cos(angle), jnp.sin(angle)


def rotary_frequencies(width: int, base: float) -> jax.Array:
    """Returns the angles between neighbouring positions, base^(−2j/width) for j = 0, …, width/2 − 1, as fp32."""
    return base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns [b, t, heads, w] by angles whose cosines and sines broadcast to [b, t, heads, w / 2].

    Each pair of channels i and i + w / 2 is a point in a plane.
    """
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Mlp(nn.Module):
    """Two dense layers with an activation between them.

    Attributes:
        hidden: width between the two layers.
        dtype: of the computation; parameters are fp32.
        activation: one of `ACTIVATIONS`.
        gated: whether the first layer also computes a factor for each activated value (Shazeer 2020, arXiv
            2002.05202).
        use_bias: whether the layers have biases.
        norm_eps: epsilon of a layer norm before the second layer; 0 for none.
    """

    hidden: int
    dtype: Any = jnp.float32
    activation: str = "gelu"
    gated: bool = False
    use_bias: bool = True
    norm_eps: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., w] → [..., w]."""
        width = 2 * self.hidden if self.gated else self.hidden
        y, *factor = jnp.split(
            nn.Dense(width, use_bias=self.use_bias, dtype=self.dtype, name="fc1")(x), width // self.hidden, axis=-1
        )
        y = ACTIVATIONS[self.activation](y)
        if factor:
            y = y * factor[0]
        if self.norm_eps:
            y = nn.LayerNorm(epsilon=self.norm_eps, dtype=self.dtype, name="norm")(y)
        return nn.Dense(x.shape[-1], use_bias=self.use_bias, dtype=self.dtype, name="fc2")(y)


class LayerScale(nn.Module):
    """Multiplies each channel by a learnt factor, at first 1e-5 (Touvron et al. 2021, arXiv 2103.17239).

    Attributes:
        dtype: of the computation; parameters are fp32.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., w] → [..., w]."""
        return x * self.param("scale", nn.initializers.constant(1e-5), (x.shape[-1],)).astype(self.dtype)


class AttentionPool(nn.Module):
    """Pools by a learnt query that attends to all patches, as in SigLIP (Zhai et al. 2021, arXiv 2106.04560).

    Attributes:
        heads, dtype, eps, hidden, activation: as of a `Block`.
    """

    heads: int
    dtype: Any
    eps: float
    hidden: int
    activation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, t, w] → [b, w]."""
        b, t, w = x.shape
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, w)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(probe, (b, 1, w)), x], axis=1)
        not_itself = (jnp.arange(t + 1) > 0)[None, None, None]
        x = Attention(self.heads, self.dtype, name="attention")(x, not_itself, queries=1)
        y = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name="norm")(x)
        return (x + Mlp(self.hidden, self.dtype, self.activation, name="mlp")(y))[:, 0]


class QueryPool(nn.Module):
    """Pools by a learnt query of a width of its own, as open_clip's CoCa does (Yu et al. 2022, arXiv 2205.01917).

    Attributes:
        heads: of the attention.
        width: of the query and of the output.
        dtype, eps: as of a `Block`.
    """

    heads: int
    width: int
    dtype: Any
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, t, w] → [b, width]."""
        b, width = x.shape[0], self.width
        norm = partial(nn.LayerNorm, epsilon=self.eps, dtype=self.dtype)
        dense = partial(nn.Dense, width, use_bias=False, dtype=self.dtype)
        query = self.param("query", nn.initializers.normal(1.0), (1, width))
        bias = self.param("bias", nn.initializers.zeros, (3 * width,)).astype(self.dtype)
        query, x = jnp.broadcast_to(norm(name="query_norm")(query), (b, 1, width)), norm(name="norm")(x)
        q = dense(name="q")(query) + bias[:width]
        k = dense(name="k")(x) + bias[width : 2 * width]
        v = dense(name="v")(x) + bias[2 * width :]
        q, k, v = (y.reshape(b, -1, self.heads, width // self.heads) for y in (q, k, v))
        y = jax.nn.dot_product_attention(q, k, v).reshape(b, width)
        return nn.Dense(width, dtype=self.dtype, name="out")(y)
