"""MobileNetV2 (Sandler et al. 2018) and EfficientNet-Lite (the EfficientNet of Tan and Le 2019 without attention)."""

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from zslflax.models.batch_norm import batch_norm
from zslflax.models.depthwise import DepthwiseConv, Padding
from zslflax.models.resnet import KAIMING


class Stage(NamedTuple):
    """The blocks of one stage: their number and kernel size, the first one's stride, their expansion and channels."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


MOBILENET_V2 = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(3, 3, 2, 6, 32),
    Stage(4, 3, 2, 6, 64),
    Stage(3, 3, 1, 6, 96),
    Stage(3, 3, 2, 6, 160),
    Stage(1, 3, 1, 6, 320),
)
EFFICIENTNET_LITE0 = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


def scale(stages: tuple[Stage, ...], width: float, depth: float) -> tuple[Stage, ...]:
    """Scales EfficientNet-Lite: channels in multiples of 8; the first and the last stage keep their depth.

    >>> [stage.channels for stage in scale(EFFICIENTNET_LITE0, width=1.4, depth=1.8)]
    [24, 32, 56, 112, 160, 272, 448]
    """

    def channels(count: int) -> int:
        rounded = max(8, int(count * width + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * count * width else rounded

    last = len(stages) - 1
    return tuple(
        stage._replace(
            channels=channels(stage.channels),
            blocks=stage.blocks if i in (0, last) else math.ceil(stage.blocks * depth),
        )
        for i, stage in enumerate(stages)
    )


class Variant(NamedTuple):
    """A network: its stages, the epsilon of its batch normalisation, and whether it pads as TensorFlow does."""

    stages: tuple[Stage, ...]
    eps: float
    tensorflow_padding: bool


MOBILENETS = {
    "mobilenet_v2": Variant(MOBILENET_V2, 1e-5, False),
    "efficientnet_lite0": Variant(EFFICIENTNET_LITE0, 1e-3, True),
    "efficientnet_lite1": Variant(scale(EFFICIENTNET_LITE0, 1.0, 1.1), 1e-3, True),
    "efficientnet_lite2": Variant(scale(EFFICIENTNET_LITE0, 1.1, 1.2), 1e-3, True),
    "efficientnet_lite3": Variant(scale(EFFICIENTNET_LITE0, 1.2, 1.4), 1e-3, True),
    "efficientnet_lite4": Variant(scale(EFFICIENTNET_LITE0, 1.4, 1.8), 1e-3, True),
}


def paddings(x: jax.Array, kernel: int, stride: int, tensorflow: bool) -> Padding:
    """Returns the zeros around the height and the width of x [b, h, w, c].

    TensorFlow's "SAME" depends on the size of the image; PyTorch's padding is (kernel − 1) / 2 on every side.
    """
    if not tensorflow:
        return [((kernel - 1) // 2, (kernel - 1) // 2)] * 2
    total = [max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side in x.shape[1:3]]
    return [(zeros // 2, zeros - zeros // 2) for zeros in total]


class InvertedResidual(nn.Module):
    """A block that expands its channels (1×1), filters each one (depthwise) and projects them (1×1).

    The input is added to the output where both have the same shape.

    Attributes:
        expansion: factor of the channels inside the block; 1 leaves the first convolution out.
        kernel, stride, tensorflow_padding: of the depthwise convolution.
        channels: of the output.
        dtype: of the computation.
        norm: creates a normalisation layer from its name.
    """

    expansion: int
    kernel: int
    stride: int
    channels: int
    tensorflow_padding: bool
    dtype: Any
    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] → [b, h / stride, w / stride, channels]."""
        conv = functools.partial(nn.Conv, kernel_size=(1, 1), use_bias=False, dtype=self.dtype, kernel_init=KAIMING)
        y = x
        if self.expansion > 1:
            y = nn.relu6(self.norm(name="expand_bn")(conv(x.shape[-1] * self.expansion, name="expand_conv")(y)))
        padding = paddings(y, self.kernel, self.stride, self.tensorflow_padding)
        y = DepthwiseConv(self.kernel, self.stride, padding, False, self.dtype, name="depthwise_conv")(y)
        y = nn.relu6(self.norm(name="depthwise_bn")(y))
        y = self.norm(name="project_bn")(conv(self.channels, name="project_conv")(y))
        return x + y if x.shape == y.shape else y


class MobileNet(nn.Module):
    """Maps images to feature vectors by global average pooling of the last of its convolutions.

    Attributes:
        variant: one of `MOBILENETS`.
        dtype: of the computation; parameters and batch statistics are fp32.
        axis_name: the mapped axis over which training synchronises batch statistics; None for no synchronisation.
        remat: whether the backward pass recomputes the activations inside each block instead of storing them.
    """

    variant: Variant
    dtype: Any = jnp.float32
    axis_name: str | None = None
    remat: bool = False

    @property
    def epsilon(self) -> float:
        """Added to the variance of the batch normalisations."""
        return self.variant.eps

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps normalised pixels [b, h, w, 3] → fp32 [b, 1280].

        Args:
            x: pixels with the mean subtracted and divided by the standard deviation.
            train: whether to normalise by the statistics of the batch, which then also update the running averages.
        """
        stages, _, tensorflow_padding = self.variant
        norm = batch_norm(self.dtype, self.axis_name, train, self.epsilon)
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=KAIMING)
        padding = paddings(x, 3, 2, tensorflow_padding)
        x = nn.relu6(norm(name="stem_bn")(conv(32, (3, 3), 2, padding, name="stem_conv")(x.astype(self.dtype))))
        block = nn.remat(InvertedResidual) if self.remat else InvertedResidual
        shapes = [
            (stage.expansion, stage.kernel, stage.stride if i == 0 else 1, stage.channels)
            for stage in stages
            for i in range(stage.blocks)
        ]
        for i, shape in enumerate(shapes):
            x = block(*shape, tensorflow_padding, self.dtype, norm, name=f"block_{i}")(x)
        x = nn.relu6(norm(name="head_bn")(conv(1280, (1, 1), name="head_conv")(x)))
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))
