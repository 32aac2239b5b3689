"""ResNet v1.5 (He et al. 2015, with the stride in the 3×3 convolution): the paper's image tower."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

RESNETS = {  # blocks per stage, and whether they are bottlenecks
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
}


KAIMING = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015b; as torchvision does


class Block(nn.Module):
    """One residual block: [b, h, w, c] → [b, h / stride, w / stride, width × (4 if bottleneck else 1)]."""

    width: int
    stride: int
    bottleneck: bool
    dtype: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=KAIMING)
        near = ((1, 1), (1, 1))  # PyTorch's padding; "SAME" differs where the stride is 2
        stride = (self.stride, self.stride)
        out = self.width * 4 if self.bottleneck else self.width
        if self.bottleneck:
            y = nn.relu(self.norm(name="bn1")(conv(self.width, (1, 1), name="conv1")(x)))
            y = nn.relu(self.norm(name="bn2")(conv(self.width, (3, 3), stride, near, name="conv2")(y)))
            y = self.norm(name="bn3")(conv(out, (1, 1), name="conv3")(y))
        else:
            y = nn.relu(self.norm(name="bn1")(conv(self.width, (3, 3), stride, near, name="conv1")(x)))
            y = self.norm(name="bn2")(conv(out, (3, 3), (1, 1), near, name="conv2")(y))
        if x.shape != y.shape:
            x = self.norm(name="downsample_bn")(conv(out, (1, 1), stride, name="downsample_conv")(x))
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Images to features, averaged over the picture.

    Attributes:
        stages: blocks in each stage.
        bottleneck: whether blocks are bottlenecks (50 layers and more).
        dtype: of the computation; parameters and batch statistics are fp32.
        axis_name: the mapped axis over which batch statistics are synchronised in training; `None` where
            there is none.
        stem_width: channels after the first convolution; stage i has stem_width · 2^i (· 4 if bottleneck).
        small: for pictures of 32 pixels: a first convolution of 3×3 and no pooling after it, so that the first stage
            sees half the picture's resolution instead of a quarter.
        remat: for a gradient, keep only the blocks' inputs, and compute what is inside them once more.
    """

    stages: tuple[int, ...]
    bottleneck: bool
    dtype: Any = jnp.float32
    axis_name: str | None = None
    stem_width: int = 64
    small: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """[b, h, w, 3] normalised pixels → fp32 [b, f]; `train` normalises by the batch."""
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name=self.axis_name if train else None,
        )
        conv = partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=KAIMING)
        side, near = (3, 1) if self.small else (7, 3)
        x = conv(self.stem_width, (side, side), (2, 2), ((near, near), (near, near)), name="conv1")(
            x.astype(self.dtype)
        )
        x = nn.relu(norm(name="bn1")(x))
        if not self.small:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        block = nn.remat(Block) if self.remat else Block
        for i, blocks in enumerate(self.stages):
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                width = self.stem_width * 2**i
                x = block(width, stride, self.bottleneck, self.dtype, norm, name=f"layer{i + 1}_{j}")(x)
        return jnp.mean(x.astype(jnp.float32), axis=(1, 2))
