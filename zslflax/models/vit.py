"""Vision transformer (Dosovitskiy et al. 2021) with pre-norm blocks; also as DINOv2, CLIP and SigLIP have it."""

import math
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
DINOV2 = {  # likewise; with layer scale (Oquab et al. 2023, arXiv 2304.07193)
    "dinov2_s14": (14, 384, 12, 6),
    "dinov2_b14": (14, 768, 12, 12),
    "dinov2_l14": (14, 1024, 24, 16),
}
REGISTERS = 4  # of "dinov2_s14_reg" and so on (Darcet et al. 2023, arXiv 2309.16588)
POOLS = ("cls", "mean", "cls_mean", "map")


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


class Block(nn.Module):
    """A pre-norm block: x + Attention(LN(x)), then x + Mlp(LN(x)).

    Attributes:
        heads: of the attention.
        dtype: of the computation.
        eps: of the layer norms.
        hidden: width inside the perceptron.
        layer_scale: whether a `LayerScale` follows the attention and the perceptron.
        activation: of the perceptron.
    """

    heads: int
    dtype: Any
    eps: float
    hidden: int
    layer_scale: bool = False
    activation: str = "gelu"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, t, w] → [b, t, w]."""
        y = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name="norm1")(x)
        x = x + self.scale(1, Attention(self.heads, self.dtype, name="attention")(y))
        y = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name="norm2")(x)
        return x + self.scale(2, Mlp(self.hidden, self.dtype, self.activation, name="mlp")(y))

    def scale(self, number: int, x: jax.Array) -> jax.Array:
        """Applies the layer scale of this number, if the block has layer scales."""
        return LayerScale(self.dtype, name=f"layer_scale{number}")(x) if self.layer_scale else x


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


class ViT(nn.Module):
    """Maps images to the class token, the mean of the patches, both, or a learnt pool, after the last layer norm.

    Attributes:
        patch: side of a patch in pixels; the sides of an image must be multiples of it.
        width, depth, heads: size of the transformer.
        dtype: of the computation; parameters are fp32.
        eps: of the layer norms: 1e-6 as in the original and in timm. (Hugging Face's copies of these weights say
            1e-12; the difference matters only where the variance is tiny.)
        remat: whether the backward pass recomputes the activations inside each block instead of storing them.
        layer_scale: whether the blocks have layer scales.
        registers: number of learnt tokens that take part in the attention and not in the output.
        pool: "cls": the class token; "mean": the mean over the patches; "cls_mean": one after the other (dino.txt,
            Jose et al. 2024, arXiv 2412.16334); "map": an `AttentionPool`.
        hidden: width inside the perceptrons; 0: 4 · width.
        activation: of the perceptrons, one of `transformer.ACTIVATIONS`.
        patch_bias: whether the embedding of patches has a bias.
        class_token: whether there is a class token.
        pre_norm: whether a layer norm precedes the first block (CLIP).
        patch_drop: share of the patches that training leaves out, at random for each image, so that a step computes
            less (FLIP, arXiv 2212.00794). The class token stays. Needs the random key "dropout".
        cut: whether the pixels at the right and the bottom that fill no patch are left out, instead of refused.
    """

    patch: int
    width: int
    depth: int
    heads: int
    dtype: Any = jnp.float32
    eps: float = 1e-6
    remat: bool = False
    layer_scale: bool = False
    registers: int = 0
    pool: str = "cls"
    hidden: int = 0
    activation: str = "gelu"
    patch_bias: bool = True
    class_token: bool = True
    pre_norm: bool = False
    patch_drop: float = 0.0
    cut: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps normalised pixels [b, h, w, 3] → fp32 [b, width], or [b, 2 · width] for "cls_mean".

        `train` drops patches. The parameters fit the images of the initialisation; for images of another size, the
        position embeddings are interpolated.

        Raises:
            UserError: patches do not fill the image.
        """
        if (x.shape[1] % self.patch or x.shape[2] % self.patch) and not self.cut:
            raise UserError(
                f"image of {x.shape[1]} × {x.shape[2]} pixels: expected multiples of the patch's "
                f"{self.patch}; change model.image.size or model.image.schedule"
            )
        tokens = self.embed_patches(x, train)
        if self.pre_norm:
            tokens = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name="pre_norm")(tokens)
        block = nn.remat(Block) if self.remat else Block
        hidden = self.hidden or 4 * self.width
        for i in range(self.depth):
            tokens = block(
                *(self.heads, self.dtype, self.eps, hidden, self.layer_scale, self.activation), name=f"block_{i}"
            )(tokens)
        norm = nn.LayerNorm(epsilon=self.eps, name="norm")
        if self.pool == "cls":
            return norm(tokens[:, 0].astype(jnp.float32))
        tokens = norm(tokens.astype(jnp.float32))
        patches = tokens[:, int(self.class_token) + self.registers :]
        if self.pool == "map":
            pool = AttentionPool(self.heads, self.dtype, self.eps, hidden, self.activation, name="pool")
            return pool(patches.astype(self.dtype)).astype(jnp.float32)
        mean = jnp.mean(patches, axis=1)
        return mean if self.pool == "mean" else jnp.concatenate([tokens[:, 0], mean], axis=-1)

    def embed_patches(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps normalised pixels [b, h, w, 3] → the tokens before the first block [b, t, width]."""
        patch = (self.patch, self.patch)
        embed = nn.Conv(
            self.width, patch, patch, "VALID", use_bias=self.patch_bias, dtype=self.dtype, name="patch_embed"
        )
        x = embed(x.astype(self.dtype))
        grid, first = x.shape[1:3], int(self.class_token)
        x = x.reshape(x.shape[0], -1, self.width)  # (b, patches, width), row by row
        leading = lambda token: jnp.broadcast_to(token, (x.shape[0], *token.shape[1:])).astype(self.dtype)
        init = nn.initializers.normal(0.02)
        if self.class_token:
            x = jnp.concatenate([leading(self.param("cls_token", init, (1, 1, self.width))), x], axis=1)
        if self.has_variable("params", "position"):
            position = interpolate_positions(self.get_variable("params", "position"), grid, first)
        else:
            position = self.param("position", init, (1, x.shape[1], self.width))
        x = x + position.astype(self.dtype)
        if train and self.patch_drop:
            kept = drop_patches(x[:, first:], self.patch_drop, self.make_rng("dropout"))
            x = jnp.concatenate([x[:, :first], kept], axis=1)
        if self.registers:  # they have no position and stand between the class token and the patches
            registers = leading(self.param("registers", init, (1, self.registers, self.width)))
            x = jnp.concatenate([x[:, :first], registers, x[:, first:]], axis=1)
        return x


def interpolate_positions(table: jax.Array, grid: tuple[int, ...], first: int = 1) -> jax.Array:
    """Resizes position embeddings of a square to a grid: [1, first + s², w] → [1, first + rows · columns, w].

    The interpolation is bicubic with antialiasing, as in timm. The first embedding is kept: the class token's.
    """
    rows, columns = grid
    if table.shape[1] == first + rows * columns:
        return table
    side, width = math.isqrt(table.shape[1] - first), table.shape[2]
    patches = jax.image.resize(table[:, first:].reshape(1, side, side, width), (1, rows, columns, width), "cubic")
    return jnp.concatenate([table[:, :first], patches.reshape(1, rows * columns, width)], axis=1)


def drop_patches(x: jax.Array, share: float, key: jax.Array) -> jax.Array:
    """A random subset of each image's patches, in their order: [b, t, w] → [b, t − ⌊share · t⌋, w]."""
    b, t, _ = x.shape
    kept = jnp.argsort(jax.random.uniform(key, (b, t)), axis=1)[:, : t - int(share * t)]
    return jnp.take_along_axis(x, jnp.sort(kept, axis=1)[..., None], axis=1)
