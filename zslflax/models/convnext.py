"""ConvNeXt (Liu et al. 2022, arXiv 2201.03545): convolutions in the form of a transformer's blocks."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zslflax.models.depthwise import DepthwiseConv
from zslflax.models.transformer import LayerScale, Mlp

CONVNEXTS = {  # name: (blocks in each stage, channels in each stage, epsilon of the layer norms)
    "convnext_tiny": ((3, 3, 9, 3), (96, 192, 384, 768), 1e-6),
    "convnext_small": ((3, 3, 27, 3), (96, 192, 384, 768), 1e-6),
    "convnext_base": ((3, 3, 27, 3), (128, 256, 512, 1024), 1e-6),
    "convnext_large": ((3, 3, 27, 3), (192, 384, 768, 1536), 1e-6),
    "convnext_xlarge": ((3, 3, 27, 3), (256, 512, 1024, 2048), 1e-6),
    "convnext_xxlarge": ((3, 4, 30, 3), (384, 768, 1536, 3072), 1e-5),  # of LAION's CLIP
}


class Block(nn.Module):
    """x + LayerScale(Mlp(LN(7×7 depthwise convolution of x))).

    Attributes:
        dtype: of the computation.
        eps: of the layer norm.
    """

    dtype: Any
    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] → [b, h, w, c]."""
        c = x.shape[-1]
        y = DepthwiseConv(7, 1, [(3, 3), (3, 3)], True, self.dtype, name="depthwise")(x)
        y = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name="norm")(y)
        return x + LayerScale(self.dtype, name="layer_scale")(Mlp(4 * c, self.dtype, name="mlp")(y))


class ConvNeXt(nn.Module):
    """Maps images to feature vectors: the layer norm of the average of the last stage.

    Attributes:
        depths, widths: blocks and channels in each stage.
        eps: of the layer norms.
        dtype: of the computation; parameters are fp32.
        remat: whether the backward pass recomputes the activations inside each block instead of storing them.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    eps: float = 1e-6
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps normalised pixels [b, h, w, 3] → fp32 [b, f]; `train` changes nothing, all towers take it."""
        norm = partial(nn.LayerNorm, epsilon=self.eps, dtype=self.dtype)
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
                x = block(self.dtype, self.eps, name=f"stage{i}_{j}")(x)
        return nn.LayerNorm(epsilon=self.eps, name="norm")(jnp.mean(x.astype(jnp.float32), axis=(1, 2)))
