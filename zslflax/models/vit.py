"""Vision transformer (Dosovitskiy et al. 2021) with pre-norm blocks and a class token."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zslflax.errors import UserError
from zslflax.models.transformer import Attention, Mlp

VITS = {  # name: (patch in pixels, width, depth, heads)
    "vit_nano4": (4, 128, 4, 4),  # for 32-pixel images on a CPU
    "vit_ti16": (16, 192, 12, 3),
    "vit_s16": (16, 384, 12, 6),
    "vit_b16": (16, 768, 12, 12),
    "vit_b32": (32, 768, 12, 12),
}


class Block(nn.Module):
    """A pre-norm block: x + Attention(LN(x)), then x + Mlp(LN(x)).

    Attributes:
        heads: of the attention.
        dtype: of the computation.
        eps: of the layer norms.
    """

    heads: int
    dtype: Any
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, t, w] → [b, t, w]."""
        y = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name="norm1")(x)
        x = x + Attention(self.heads, self.dtype, name="attention")(y)
        y = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name="norm2")(x)
        return x + Mlp(4 * x.shape[-1], self.dtype, name="mlp")(y)


class ViT(nn.Module):
    """Maps images to the class token after the last layer norm.

    Attributes:
        patch: side of a patch in pixels; the sides of an image must be multiples of it.
        width, depth, heads: size of the transformer.
        dtype: of the computation; parameters are fp32.
        eps: of the layer norms: 1e-6 as in the original and in timm. (Hugging Face's copies of these weights say
            1e-12; the difference matters only where the variance is tiny.)
        remat: whether the backward pass recomputes the activations inside each block instead of storing them.
    """

    patch: int
    width: int
    depth: int
    heads: int
    dtype: Any = jnp.float32
    eps: float = 1e-6
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps normalised pixels [b, h, w, 3] → fp32 [b, width]. `train` changes nothing; all towers take it.

        Raises:
            UserError: patches do not fill the image.
        """
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise UserError(
                f"image of {x.shape[1]} × {x.shape[2]} pixels: expected multiples of the patch's "
                f"{self.patch}; change model.image.size"
            )
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, patch, "VALID", dtype=self.dtype, name="patch_embed")(x.astype(self.dtype))
        x = x.reshape(x.shape[0], -1, self.width)  # (b, patches, width), row by row
        cls = self.param("cls_token", nn.initializers.normal(0.02), (1, 1, self.width))
        x = jnp.concatenate([jnp.broadcast_to(cls, (x.shape[0], 1, self.width)).astype(self.dtype), x], axis=1)
        position = self.param("position", nn.initializers.normal(0.02), (1, x.shape[1], self.width))
        x = x + position.astype(self.dtype)
        block = nn.remat(Block) if self.remat else Block
        for i in range(self.depth):
            x = block(self.heads, self.dtype, self.eps, name=f"block_{i}")(x)
        return nn.LayerNorm(epsilon=self.eps, name="norm")(x[:, 0].astype(jnp.float32))
