"""Vision transformer (Dosovitskiy et al. 2021) with pre-norm blocks.

Also as DINOv2, DINOv3, CLIP, CLIPA, CoCa, SigLIP, EVA-CLIP and PE-Core have it.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from zslflax.errors import UserError
from zslflax.models.transformer import Attention, AttentionPool, LayerScale, Mlp, QueryPool, rotary_frequencies

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
DINOV3 = {  # likewise (Siméoni et al. 2025, arXiv 2508.10104); "plus": with gated perceptrons
    "dinov3_s16": (16, 384, 12, 6),
    "dinov3_s16_plus": (16, 384, 12, 6),
    "dinov3_b16": (16, 768, 12, 12),
    "dinov3_l16": (16, 1024, 24, 16),
    "dinov3_h16_plus": (16, 1280, 32, 20),
}
POOLS = ("cls", "mean", "cls_mean", "map", "cls_map")


class Rotary(NamedTuple):
    """Rotary position embeddings of a grid of patches (Heo et al. 2024, arXiv 2403.13298).

    One half of the angles are those of a patch's row, the other those of its column. Patch i of n along a side of the
    image is at span · ((i + anchor) / n − origin), whatever the resolution; the angles are this times base^(−4j/w) for
    j = 0, …, w/4 − 1, where w is the width of a head.

    Attributes:
        base: of the geometric series of frequencies.
        span: length of the side of an image.
        anchor: which point of a patch is meant: 0 its near edge, 0.5 its centre, 1 its far edge.
        origin: which point of the image has the angle 0, likewise.
    """

    base: float = 10_000.0
    span: float = 16.0
    anchor: float = 0.0
    origin: float = 0.0

    def angles(self, grid: tuple[int, ...], width: int) -> jax.Array:
        """Returns the angles of all patches of a grid of rows and columns, row by row, fp32 [patches, width / 2]."""
        frequency = rotary_frequencies(width // 2, self.base)
        sides = [self.span * ((jnp.arange(n) + self.anchor) / n - self.origin) for n in grid]
        position = jnp.stack(jnp.meshgrid(*sides, indexing="ij"), axis=-1)  # (rows, columns, 2)
        return (position[..., None] * frequency).reshape(-1, width // 2)


DINOV3_ROTARY = Rotary(base=100.0, span=4 * math.pi, anchor=0.5, origin=0.5)


class Block(nn.Module):
    """A pre-norm block: x + Attention(LN(x)), then x + Mlp(LN(x)).

    Attributes:
        heads: of the attention.
        dtype: of the computation.
        eps: of the layer norms.
        hidden: width inside the perceptron.
        layer_scale: whether a `LayerScale` follows the attention and the perceptron.
        activation, gated: of the perceptron.
        key_bias: of the attention.
        inner_norm: whether the attention and the perceptron have a layer norm before their last layer.
    """

    heads: int
    dtype: Any
    eps: float
    hidden: int
    layer_scale: bool = False
    activation: str = "gelu"
    gated: bool = False
    key_bias: bool = True
    inner_norm: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, rotation: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        """Maps [b, t, w] → [b, t, w]; `rotation` is that of `Attention`."""
        norm_eps = self.eps if self.inner_norm else 0.0
        y = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name="norm1")(x)
        attention = Attention(self.heads, self.dtype, key_bias=self.key_bias, norm_eps=norm_eps, name="attention")
        x = x + self.scale(1, attention(y, rotation=rotation))
        y = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name="norm2")(x)
        mlp = Mlp(self.hidden, self.dtype, self.activation, self.gated, norm_eps=norm_eps, name="mlp")
        return x + self.scale(2, mlp(y))

    def scale(self, number: int, x: jax.Array) -> jax.Array:
        """Applies the layer scale of this number, if the block has layer scales."""
        return LayerScale(self.dtype, name=f"layer_scale{number}")(x) if self.layer_scale else x


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
            Jose et al. 2024, arXiv 2412.16334); "map": an `AttentionPool` of the patches; "cls_map": one of the class
            token and the patches; "query": a `QueryPool` of these, before the last layer norm (CoCa).
        mean_first: whether the mean over the patches is taken before the last layer norm, not after it (CLIPA).
        pool_size: heads and width inside the perceptron of the `AttentionPool`; empty: those of the blocks. Or heads
            and width of the `QueryPool`.
        hidden: width inside the perceptrons; 0: 4 · width.
        activation: of the perceptrons, one of `transformer.ACTIVATIONS`.
        gated: whether the perceptrons are gated, see `transformer.Mlp`.
        key_bias: whether the keys of the attentions have biases.
        inner_norm: whether the attentions and the perceptrons have a layer norm before their last layer (EVA-02).
        table: whether there is a table of position embeddings.
        rotary: of the patches alone, beside the table or instead of it; None for none.
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
    mean_first: bool = False
    pool_size: tuple[int, ...] = ()
    hidden: int = 0
    activation: str = "gelu"
    gated: bool = False
    key_bias: bool = True
    inner_norm: bool = False
    table: bool = True
    rotary: Rotary | None = None
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
        tokens, angles = self.embed_patches(x, train)
        rotation = None if angles is None else (jnp.cos(angles), jnp.sin(angles))
        if self.pre_norm:
            tokens = nn.LayerNorm(epsilon=self.eps, dtype=self.dtype, name="pre_norm")(tokens)
        hidden = self.hidden or 4 * self.width
        block = partial(
            nn.remat(Block) if self.remat else Block,
            *(self.heads, self.dtype, self.eps, hidden, self.layer_scale, self.activation, self.gated),
            key_bias=self.key_bias,
            inner_norm=self.inner_norm,
        )
        for i in range(self.depth):
            tokens = block(name=f"block_{i}")(tokens, rotation)
        norm = nn.LayerNorm(epsilon=self.eps, name="norm")
        last, first = tokens.astype(jnp.float32), int(self.class_token) + self.registers
        if self.pool == "cls":
            return norm(last[:, 0])
        if self.pool == "query":
            heads, width = self.pool_size
            query_pool = QueryPool(heads, width, self.dtype, self.eps, name="pool")
            return norm(query_pool(tokens).astype(jnp.float32))
        tokens = norm(last)
        patches = tokens[:, first:]
        if self.pool in ("map", "cls_map"):
            heads, hidden = self.pool_size or (self.heads, hidden)
            pool = AttentionPool(heads, self.dtype, self.eps, hidden, self.activation, name="pool")
            pooled = patches if self.pool == "map" else jnp.concatenate([tokens[:, :1], patches], axis=1)
            return pool(pooled.astype(self.dtype)).astype(jnp.float32)
        mean = norm(jnp.mean(last[:, first:], axis=1)) if self.mean_first else jnp.mean(patches, axis=1)
        return mean if self.pool == "mean" else jnp.concatenate([tokens[:, 0], mean], axis=-1)

    def embed_patches(self, x: jax.Array, train: bool) -> tuple[jax.Array, jax.Array | None]:
        """Maps normalised pixels [b, h, w, 3] → the tokens before the first block [b, t, width], and their angles.

        The angles, of `rotary`, are fp32 [1 or b, t, 1, width / heads / 2]; those of the first tokens are 0.
        """
        patch = (self.patch, self.patch)
        embed = nn.Conv(
            self.width, patch, patch, "VALID", use_bias=self.patch_bias, dtype=self.dtype, name="patch_embed"
        )
        x = embed(x.astype(self.dtype))
        grid, first = x.shape[1:3], int(self.class_token)
        x = x.reshape(x.shape[0], -1, self.width)  # (b, patches, width), row by row
        angles = self.rotary.angles(grid, self.width // self.heads)[None] if self.rotary else None
        leading = lambda token: jnp.broadcast_to(token, (x.shape[0], *token.shape[1:])).astype(self.dtype)
        init = nn.initializers.normal(0.02)
        if self.class_token:
            x = jnp.concatenate([leading(self.param("cls_token", init, (1, 1, self.width))), x], axis=1)
        if self.table:
            if self.has_variable("params", "position"):
                position = interpolate_positions(self.get_variable("params", "position"), grid, first)
            else:
                position = self.param("position", init, (1, x.shape[1], self.width))
            x = x + position.astype(self.dtype)
        if train and self.patch_drop:
            kept = kept_patches(x.shape[0], grid[0] * grid[1], self.patch_drop, self.make_rng("dropout"))
            x = jnp.concatenate([x[:, :first], jnp.take_along_axis(x[:, first:], kept[..., None], axis=1)], axis=1)
            angles = angles if angles is None else angles[0, kept]
        if self.registers:  # they have no position and stand between the class token and the patches
            registers = leading(self.param("registers", init, (1, self.registers, self.width)))
            x = jnp.concatenate([x[:, :first], registers, x[:, first:]], axis=1)
        if angles is None:
            return x, None
        return x, jnp.pad(angles, ((0, 0), (first + self.registers, 0), (0, 0)))[:, :, None]


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


def kept_patches(b: int, t: int, share: float, key: jax.Array) -> jax.Array:
    """Draws which of t patches of b images stay when a share is dropped: int32 [b, t − ⌊share · t⌋], sorted."""
    kept = jnp.argsort(jax.random.uniform(key, (b, t)), axis=1)[:, : t - int(share * t)]
    return jnp.sort(kept, axis=1)
