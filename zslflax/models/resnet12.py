"""ResNet-12, the image tower of few-shot learning: four wide blocks, LeakyReLU and DropBlock."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zslflax.models.batch_norm import batch_norm
from zslflax.models.resnet import KAIMING

RESNET12S = {"resnet12": (64, 160, 320, 640)}  # channels of the stages (RFS, arXiv 2003.11539; SKD, arXiv 2006.09785)
SLOPE = 0.1  # of LeakyReLU below 0
DROP_RATE = 0.1  # of all stages; the released code raises that of DropBlock from 0 over 40,000 steps
LARGE_BLOCK, SMALL_BLOCK = 5, 2  # side of the dropped squares; the small one where the map is smaller than the large


def drop_block(x: jax.Array, key: jax.Array, rate: float, block: int) -> jax.Array:
    """Sets random squares of each channel to 0 and scales the rest so that its mean stays (arXiv 1810.12890).

    Args:
        x: [b, h, h, c].
        key: of the draw.
        rate: the share of the elements that are dropped, about: squares may overlap.
        block: side of the squares, at most h.
    """
    b, h, w, c = x.shape
    inner = (h - block + 1) * (w - block + 1)  # places of a square within the map
    centres = jax.random.bernoulli(key, rate * h * w / (block**2 * inner), (b, h - block + 1, w - block + 1, c))
    grow = ((0, 0), (block - 1, block - 1), (block - 1, block - 1), (0, 0))
    dropped = nn.max_pool(jnp.pad(centres.astype(x.dtype), grow), (block, block))
    kept = 1.0 - dropped
    return x * kept * (kept.size / jnp.maximum(jnp.sum(kept.astype(jnp.float32)), 1.0)).astype(x.dtype)


class Block(nn.Module):
    """Three 3×3 convolutions beside a 1×1 one, then a pooling that halves the resolution.

    Attributes:
        width: channels.
        squares: whether to drop squares (DropBlock) instead of single elements, in training.
        dtype: of the computation.
        norm: creates a normalisation layer from its name.
    """

    width: int
    squares: bool
    dtype: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] → [b, ⌊h/2⌋, ⌊w/2⌋, width]; drops where `apply` gets an rng called "dropout"."""
        conv = partial(nn.Conv, self.width, use_bias=False, dtype=self.dtype, kernel_init=KAIMING)
        activation = partial(nn.leaky_relu, negative_slope=SLOPE)
        y = activation(self.norm(name="bn1")(conv((3, 3), name="conv1")(x)))
        y = activation(self.norm(name="bn2")(conv((3, 3), name="conv2")(y)))
        y = self.norm(name="bn3")(conv((3, 3), name="conv3")(y))
        shortcut = self.norm(name="downsample_bn")(conv((1, 1), name="downsample_conv")(x))
        x = nn.max_pool(activation(y + shortcut), window_shape=(2, 2), strides=(2, 2))
        if not self.has_rng("dropout"):
            return x
        if not self.squares:
            return nn.Dropout(DROP_RATE, deterministic=False)(x)
        side = LARGE_BLOCK if min(x.shape[1:3]) >= LARGE_BLOCK else SMALL_BLOCK
        return drop_block(x, self.make_rng("dropout"), DROP_RATE, min(side, *x.shape[1:3]))


class ResNet12(nn.Module):
    """Maps images to feature vectors by global average pooling of the last stage.

    Attributes:
        widths: channels of the four stages, of which the last two have DropBlock.
        dtype: of the computation; parameters and batch statistics are fp32.
        axis_name: the mapped axis over which training synchronises batch statistics; None for no synchronisation.
        remat: whether the backward pass recomputes the activations inside each block instead of storing them.
    """

    widths: tuple[int, ...]
    dtype: Any = jnp.float32
    axis_name: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps normalised pixels [b, h, w, 3], of at least 16 × 16 → fp32 [b, f], f the last of the widths.

        Args:
            x: pixels with the mean subtracted and divided by the standard deviation.
            train: whether to normalise by the statistics of the batch, which then also update the running averages.
        """
        norm = batch_norm(self.dtype, self.axis_name, train)
        block, x = nn.remat(Block) if self.remat else Block, x.astype(self.dtype)
        for i, width in enumerate(self.widths):
            x = block(width, i >= 2, self.dtype, norm, name=f"layer{i + 1}")(x)
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))
