"""FastViT (Vasu et al. 2023, arXiv 2303.14189): convolutions of several branches, and attention in the last stages.

Also as MobileCLIP has it (Vasu et al. 2023, arXiv 2311.17049). The branches stay apart, as in training.
"""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from zslflax.models.batch_norm import batch_norm
from zslflax.models.depthwise import DepthwiseConv
from zslflax.models.resnet import KAIMING
from zslflax.models.transformer import Attention, LayerScale, gelu

HEAD_WIDTH = 32  # channels of an attention head


class Variant(NamedTuple):
    """A network.

    Attributes:
        depths, widths: blocks and channels in each stage.
        expansion: factor of the channels inside a perceptron.
        attention: how many of the last stages mix positions by attention, the others by convolutions.
        activated: whether a GELU follows the large convolution between two stages.
        squeezed: whether the large convolutions before the last two stages weight their channels.
        layer_norm: whether attention follows a layer norm instead of a batch norm, and the stem has no small branches.
    """

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    expansion: int
    attention: int
    activated: bool = False
    squeezed: bool = False
    layer_norm: bool = False


FASTVITS = {
    "fastvit_t8": Variant((2, 2, 4, 2), (48, 96, 192, 384), 3, 0),
    "fastvit_t12": Variant((2, 2, 6, 2), (64, 128, 256, 512), 3, 0),
    "fastvit_s12": Variant((2, 2, 6, 2), (64, 128, 256, 512), 4, 0),
    "fastvit_sa12": Variant((2, 2, 6, 2), (64, 128, 256, 512), 4, 1),
    "fastvit_sa24": Variant((4, 4, 12, 4), (64, 128, 256, 512), 4, 1),
    "fastvit_sa36": Variant((6, 6, 18, 6), (64, 128, 256, 512), 4, 1),
    "fastvit_ma36": Variant((6, 6, 18, 6), (76, 152, 304, 608), 4, 1),
    "fastvit_mci0": Variant((2, 6, 10, 2), (64, 128, 256, 512), 3, 1, True, True),
    "fastvit_mci1": Variant((4, 12, 20, 4), (64, 128, 256, 512), 3, 1, True, True),
    "fastvit_mci2": Variant((4, 12, 24, 4), (80, 160, 320, 640), 3, 1, True, True),
    "fastvit_mci3": Variant((2, 12, 24, 4, 2), (96, 192, 384, 768, 1536), 4, 2, True, False, True),
    "fastvit_mci4": Variant((2, 12, 24, 4, 4), (128, 256, 512, 1024, 2048), 4, 2, True, False, True),
}


class Branches(nn.Module):
    """The sum of two convolutions of the input and the input itself, each with its own batch norm (RepVGG, MobileOne).

    Attributes:
        channels: of the output.
        kernel: side of the larger kernel in pixels.
        norm: creates a normalisation layer from its name.
        dtype: of the computation.
        stride: 2 halves the resolution.
        small: side of the smaller kernel; 0 for no such branch.
        depthwise: whether each output is of one input channel.
        skip: whether the input is added, where it has the shape of the output.
    """

    channels: int
    kernel: int
    norm: Any
    dtype: Any
    stride: int = 1
    small: int = 1
    depthwise: bool = False
    skip: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] → [b, h / stride, w / stride, channels]."""
        y = self.norm(name="conv_bn")(self.convolution(x, self.kernel, "conv"))
        if 0 < self.small < self.kernel:
            y += self.norm(name="small_bn")(self.convolution(x, self.small, "small_conv"))
        if self.skip and x.shape == y.shape:
            y += self.norm(name="skip_bn")(x)
        return y

    def convolution(self, x: jax.Array, kernel: int, name: str) -> jax.Array:
        """One of the two convolutions."""
        padding = [((kernel - 1) // 2,) * 2] * 2
        if self.depthwise:
            x = jnp.repeat(x, self.channels // x.shape[-1], axis=-1)
            return DepthwiseConv(kernel, self.stride, padding, False, self.dtype, name=name)(x)
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=KAIMING)
        return conv(self.channels, (kernel, kernel), self.stride, padding, name=name)(x)


class Squeeze(nn.Module):
    """Multiplies each channel by a weight that depends on the means of all channels (Hu et al. 2018).

    Attributes:
        hidden: channels between the two layers.
        dtype: of the computation.
    """

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] → [b, h, w, c]."""
        conv = partial(nn.Conv, kernel_size=(1, 1), dtype=self.dtype)
        y = jnp.mean(x, axis=(1, 2), keepdims=True)
        y = conv(x.shape[-1], name="fc2")(nn.relu(conv(self.hidden, name="fc1")(y)))
        return x * nn.sigmoid(y)


class Mlp(nn.Module):
    """A 7×7 depthwise convolution and a perceptron of each position.

    Attributes:
        expansion: factor of the channels inside the perceptron.
        norm, dtype: as of `Branches`.
    """

    expansion: int
    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] → [b, h, w, c]."""
        c = x.shape[-1]
        conv = partial(nn.Conv, kernel_size=(1, 1), dtype=self.dtype)
        x = DepthwiseConv(7, 1, [(3, 3), (3, 3)], False, self.dtype, name="conv")(x)
        x = self.norm(name="conv_bn")(x)
        return conv(c, name="fc2")(gelu(conv(self.expansion * c, name="fc1")(x)))


class MixerBlock(nn.Module):
    """Mixes positions by convolutions (RepMixer), and then channels; both are added to the input.

    Attributes:
        variant: the network.
        norm, dtype: as of `Branches`.
    """

    variant: Variant
    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] → [b, h, w, c]."""
        mixer = Branches(x.shape[-1], 3, self.norm, self.dtype, depthwise=True, name="mixer")
        x += LayerScale(self.dtype, name="layer_scale_mixer")(mixer(x) - self.norm(name="mixer_bn")(x))
        y = Mlp(self.variant.expansion, self.norm, self.dtype, name="mlp")(x)
        return x + LayerScale(self.dtype, name="layer_scale")(y)


class AttentionBlock(nn.Module):
    """Mixes positions by attention, and then channels; both are added to the input. Attributes as of `MixerBlock`."""

    variant: Variant
    norm: Any
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] → [b, h, w, c]."""
        b, h, w, c = x.shape
        norm = partial(nn.LayerNorm, epsilon=1e-5, dtype=self.dtype) if self.variant.layer_norm else self.norm
        y = norm(name="norm")(x).reshape(b, h * w, c)
        y = Attention(c // HEAD_WIDTH, self.dtype, use_bias=False, project=False, name="attention")(y)
        y = nn.Dense(c, dtype=self.dtype, name="out")(y).reshape(x.shape)
        x += LayerScale(self.dtype, name="layer_scale1")(y)
        y = Mlp(self.variant.expansion, self.norm, self.dtype, name="mlp")(x)
        return x + LayerScale(self.dtype, name="layer_scale2")(y)


class FastViT(nn.Module):
    """Maps images to feature vectors by global average pooling of a last convolution.

    Attributes:
        variant: one of `FASTVITS`.
        dtype: of the computation; parameters and batch statistics are fp32.
        axis_name: the mapped axis over which training synchronises batch statistics; None for no synchronisation.
        remat: whether the backward pass recomputes the activations inside each block instead of storing them.
    """

    variant: Variant
    dtype: Any = jnp.float32
    axis_name: str | None = None
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps normalised pixels [b, h, w, 3] → fp32 [b, 2 · the channels of the last stage].

        Args:
            x: pixels with the mean subtracted and divided by the standard deviation.
            train: whether to normalise by the statistics of the batch, which then also update the running averages.
        """
        v, stages = self.variant, len(self.variant.depths)
        norm = batch_norm(self.dtype, self.axis_name, train)
        branches = partial(Branches, norm=norm, dtype=self.dtype)
        blocks = [nn.remat(block) if self.remat else block for block in (MixerBlock, AttentionBlock)]
        small, x = int(not v.layer_norm), x.astype(self.dtype)
        for i, (kernel, stride) in enumerate(((3, 2), (3, 2), (1, 1))):
            stem = branches(v.widths[0], kernel, stride=stride, small=small, depthwise=i == 1, name=f"stem{i}")
            x = gelu(stem(x))
        for i, (depth, width) in enumerate(zip(v.depths, v.widths)):
            if i:
                large = branches(width, 7, stride=2, small=3, depthwise=True, skip=False, name=f"stage{i}_large")
                x = large(x)
                if v.squeezed and i >= stages - 2:
                    x = Squeeze(width // 4, self.dtype, name=f"stage{i}_squeeze")(x)
                x = gelu(x) if v.activated else x
                x = gelu(branches(width, 1, name=f"stage{i}_point")(x))
            if attention := i >= stages - v.attention:
                position = DepthwiseConv(7, 1, [(3, 3), (3, 3)], True, self.dtype, name=f"stage{i}_position")
                x = x + position(x)
            for j in range(depth):
                x = blocks[attention](v, norm, self.dtype, name=f"stage{i}_{j}")(x)
        x = branches(2 * x.shape[-1], 3, depthwise=True, name="last")(x)
        x = gelu(Squeeze(x.shape[-1] // 16, self.dtype, name="last_squeeze")(x))
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))
