"""ResNet v1.5 (He et al. 2015, stride in the 3×3 convolution), the image tower of the paper; ResNet-D; and CLIP's."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zslflax.errors import UserError
from zslflax.models.batch_norm import batch_norm
from zslflax.models.pooling import max_pool
from zslflax.models.transformer import Attention
from zslflax.models.vit import interpolate_positions

RESNETS = {  # name: (blocks in each stage, whether they are bottlenecks)
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
}
RESNET_DS = {f"{name}d": sizes for name, sizes in RESNETS.items()}  # ResNet-D (He et al. 2018, arXiv 1812.01187)

KAIMING = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015b, as in torchvision


@jax.custom_vjp
def add_relu(x: jax.Array, y: jax.Array) -> jax.Array:
    """ReLU of x + y, of one shape. Its gradient is read off the result instead of x and y, which need not be kept."""
    return nn.relu(x + y)


def add_relu_backward(result: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The gradients by x and y. XLA would replace "result > 0" by the sum that it has to compute again."""
    both = jnp.where(result != 0, gradient, 0)
    return both, both


add_relu.defvjp(lambda x, y: (nn.relu(x + y),) * 2, add_relu_backward)


class StemConv(nn.Module):
    """The 7×7 convolution of stride 2 and padding 3, in the form that suits accelerators.

    Matrix units are filled badly by the 3 channels of an image. With each 2×2 pixels as 12 channels of one, the same
    products are a 4×4 convolution of stride 1; its kernel is the 7×7 one with a row and a column of zeros in front.
    The results differ by rounding alone. On a CPU the plain form is the faster one.

    Attributes:
        features: channels of the result.
        dtype: of the computation.
        pixels_as_channels: whether to compute in that form; None: wherever the backend is not a CPU.
    """

    features: int
    dtype: Any
    pixels_as_channels: bool | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] → [b, ⌈h/2⌉, ⌈w/2⌉, features]."""
        kernel = self.param("kernel", KAIMING, (7, 7, x.shape[-1], self.features)).astype(self.dtype)
        stride, padding = 2, ((3, 3), (3, 3))
        if jax.default_backend() != "cpu" if self.pixels_as_channels is None else self.pixels_as_channels:
            x = jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
            x = space_to_depth(x)
            kernel = space_to_depth(jnp.pad(kernel, ((1, 0), (1, 0), (0, 0), (0, 0))).transpose(3, 0, 1, 2))
            kernel, stride, padding = kernel.transpose(1, 2, 3, 0), 1, ((2, 1), (2, 1))
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype), kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )


def space_to_depth(x: jax.Array) -> jax.Array:
    """Each 2×2 pixels as the channels of one: [b, h, w, c] → [b, h/2, w/2, 4c]."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // 2, 2, w // 2, 2, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, 4 * c)


def average_pixels(x: jax.Array) -> jax.Array:
    """The mean of each 2×2 pixels: [b, h, w, c] → [b, h/2, w/2, c], h and w even."""
    b, h, w, c = x.shape
    return jnp.mean(x.reshape(b, h // 2, 2, w // 2, 2, c), axis=(2, 4))


class Block(nn.Module):
    """One residual block.

    Attributes:
        width: channels inside the block; a bottleneck block returns 4 · width channels, another one width channels.
        stride: of the block; 2 halves the resolution.
        bottleneck: whether the block is a bottleneck (1×1, 3×3, 1×1) or a basic block (3×3, 3×3).
        dtype: of the computation.
        norm: creates a normalisation layer from its name.
        average: whether the shortcut averages 2×2 pixels instead of leaving out three of four (ResNet-D).
        antialias: whether the block does so too, after its 3×3 convolution (CLIP).
    """

    width: int
    stride: int
    bottleneck: bool
    dtype: Any
    norm: Any
    average: bool = False
    antialias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] → [b, h / stride, w / stride, width · (4 if bottleneck else 1)]."""
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=KAIMING)
        padding = ((1, 1), (1, 1))  # as in PyTorch; "SAME" pads differently where the stride is 2
        stride = (self.stride, self.stride)
        out = self.width * 4 if self.bottleneck else self.width
        if self.bottleneck:
            y = nn.relu(self.norm(name="bn1")(conv(self.width, (1, 1), name="conv1")(x)))
            inner = (1, 1) if self.antialias else stride
            y = nn.relu(self.norm(name="bn2")(conv(self.width, (3, 3), inner, padding, name="conv2")(y)))
            y = average_pixels(y) if inner != stride else y
            y = self.norm(name="bn3")(conv(out, (1, 1), name="conv3")(y))
        else:
            y = nn.relu(self.norm(name="bn1")(conv(self.width, (3, 3), stride, padding, name="conv1")(x)))
            y = self.norm(name="bn2")(conv(out, (3, 3), (1, 1), padding, name="conv2")(y))
        if x.shape != y.shape:
            if self.average and self.stride > 1:
                if self.antialias:
                    x = average_pixels(x)
                else:
                    x = nn.avg_pool(x, window_shape=stride, strides=stride, padding="SAME", count_include_pad=False)
                stride = (1, 1)
            x = self.norm(name="downsample_bn")(conv(out, (1, 1), stride, name="downsample_conv")(x))
        return add_relu(x, y)


class MeanQueryPool(nn.Module):
    """Pools by attention of the mean over all pixels to it and to them (Radford et al. 2021, arXiv 2103.00020).

    Attributes:
        heads: of the attention.
        dtype: of the computation.
    """

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] → [b, c]; for another h and w than at first, the position embeddings are interpolated."""
        b, h, w, c = x.shape
        x = x.reshape(b, h * w, c)
        x = jnp.concatenate([jnp.mean(x, axis=1, keepdims=True), x], axis=1)  # (b, 1 + h * w, c)
        if self.has_variable("params", "position"):
            position = interpolate_positions(self.get_variable("params", "position"), (h, w))
        else:
            position = self.param("position", nn.initializers.normal(c**-0.5), (1, 1 + h * w, c))
        x = x + position.astype(self.dtype)
        return Attention(self.heads, self.dtype, project=False, name="attention")(x, queries=1)[:, 0]


class ResNet(nn.Module):
    """Maps images to feature vectors: the average over the last stage, or an attention pool of it.

    Attributes:
        stages: number of blocks in each stage.
        bottleneck: whether the blocks are bottlenecks (as in networks of 50 layers and more).
        dtype: of the computation; parameters and batch statistics are fp32.
        axis_name: the mapped axis over which training synchronises batch statistics; None for no synchronisation.
        stem_width: channels after the first convolution; stage i has stem_width · 2^i (· 4 if bottleneck).
        small: whether the images are small (32 pixels): the first convolution is then 3×3 and no pooling follows it,
            so that the first stage sees half of the image's resolution instead of a quarter.
        remat: whether the backward pass recomputes the activations inside each block instead of storing them.
        deep: whether this is a ResNet-D: three 3×3 convolutions instead of the 7×7 one, and averages in the shortcuts.
        heads: of the attention pool of CLIP's ResNets, 0 without. Those are ResNet-Ds with averages instead of all
            other strides and of the maximum after the stem. The output is what precedes the joint projection.
    """

    stages: tuple[int, ...]
    bottleneck: bool
    dtype: Any = jnp.float32
    axis_name: str | None = None
    stem_width: int = 64
    small: bool = False
    remat: bool = False
    deep: bool = False
    heads: int = 0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps normalised pixels [b, h, w, 3] → fp32 [b, f].

        Args:
            x: pixels with the mean subtracted and divided by the standard deviation.
            train: whether to normalise by the statistics of the batch, which then also update the running averages.

        Raises:
            UserError: the image's sides are no multiples of what CLIP's ResNets average over.
        """
        unit = 4 * 2 ** (len(self.stages) - 1)
        if self.heads and (x.shape[1] % unit or x.shape[2] % unit):
            raise UserError(
                f"image of {x.shape[1]} × {x.shape[2]} pixels: expected multiples of {unit} for CLIP's ResNets; "
                "change model.image.size or model.image.schedule"
            )
        norm = batch_norm(self.dtype, self.axis_name, train)
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=KAIMING)
        x = x.astype(self.dtype)
        if self.deep:
            half, same = self.stem_width // 2, ((1, 1), (1, 1))
            x = nn.relu(norm(name="stem_bn1")(conv(half, (3, 3), (2, 2), same, name="stem_conv1")(x)))
            x = nn.relu(norm(name="stem_bn2")(conv(half, (3, 3), (1, 1), same, name="stem_conv2")(x)))
        stem: nn.Module
        if self.deep:
            stem = conv(self.stem_width, (3, 3), (1, 1), ((1, 1), (1, 1)), name="conv1")
        elif self.small:
            stem = conv(self.stem_width, (3, 3), (2, 2), ((1, 1), (1, 1)), name="conv1")
        else:
            stem = StemConv(self.stem_width, self.dtype, name="conv1")
        x = nn.relu(norm(name="bn1")(stem(x)))
        if self.heads:
            x = average_pixels(x)
        elif not self.small:
            x = self.max_pool(x)
        block = nn.remat(Block) if self.remat else Block
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                width = self.stem_width * 2**i
                kind = (width, stride, self.bottleneck, self.dtype, norm, self.deep, bool(self.heads))
                x = block(*kind, name=f"layer{i + 1}_{j}")(x)
        if self.heads:
            return MeanQueryPool(self.heads, self.dtype, name="pool")(x).astype(jnp.float32)
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))

    def max_pool(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] → the maxima of 3×3 pixels around every second one, [b, h / 2, w / 2, c]."""
        return max_pool(x)
