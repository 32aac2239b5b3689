"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545): convolutions in the form of a transformer's blocks."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zslflax.models.depthwise import DepthwiseConv
from zslflax.models.transformer import Mlp
from zslflax.models.vit import LayerScale

CONVNEXTS = {  # name: (blocks in each stage, channels in each stage)
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "convnext_large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}
EPS = 1e-6  # of the layer norms


class Block(nn.Module):
    """x + LayerScale(Mlp(LN(7×7 depthwise convolution of x))).

    Attributes:
        dtype: of the computation.
    """

    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] → [b, h, w, c]."""
        c = x.shape[-1]
        y = DepthwiseConv(7, 1, [(3, 3), (3, 3)], True, self.dtype, name="depthwise")(x)
        y = nn.LayerNorm(epsilon=EPS, dtype=self.dtype, name="norm")(y)
        return x + LayerScale(self.dtype, name="layer_scale")(Mlp(4 * c, self.dtype, name="mlp")(y))


class ConvNeXt(nn.Module):
    """Maps images to feature vectors: the layer norm of the average of the last stage.

    Attributes:
        depths, widths: blocks and channels in each stage.
        dtype: of the computation; parameters are fp32.
        remat: whether the backward pass recomputes the activations inside each block instead of storing them.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps normalised pixels [b, h, w, 3] → fp32 [b, f]; `train` changes nothing, all towers take it."""
        norm = partial(nn.LayerNorm, epsilon=EPS, dtype=self.dtype)
        block = nn.remat(Block) if self.remat else Block
        x = x.astype(self.dtype)
        for i, (depth, width) in enumerate(zip(self.depths, self.widths)):
            patch = (2, 2) if i else (4, 4)
            if i:
                x = norm(name=f"stage{i}_norm")(x)
            x = nn.Conv(width, patch, patch, "VALID", dtype=self.dtype, name=f"stage{i}_conv")(x)
            if not i:
                x = norm(name=f"stage{i}_norm")(x)
            for j in range(depth):
                x = block(self.dtype, name=f"stage{i}_{j}")(x)
        return nn.LayerNorm(epsilon=EPS, name="norm")(jnp.mean(x.astype(jnp.float32), axis=(1, 2)))
