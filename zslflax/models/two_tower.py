"""The image tower, the text tower, and their projections to the joint space."""

import difflib
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zslflax.models.bert import Bert, BertConfig
from zslflax.models.pretrained import locate
from zslflax.models.resnet import RESNETS, ResNet
from zslflax.models.vit import VITS, ViT


class Side(nn.Module):
    """A tower and the linear projection after it."""

    tower: nn.Module
    projection: nn.Module

    def __call__(self, *inputs, train: bool) -> jax.Array:
        return self.project(self.features(*inputs, train=train))

    def features(self, *inputs, train: bool) -> jax.Array:
        return self.tower(*inputs, train=train)

    def packed_features(self, *inputs, train: bool) -> jax.Array:
        return self.tower.packed(*inputs, train=train)

    def project(self, features: jax.Array) -> jax.Array:
        """[b, f] → unit vectors fp32 [b, d]."""
        x = self.projection(features.astype(jnp.float32))
        # Not x / norm(x), whose gradient at 0 is NaN, also where a mask takes the row out of the loss.
        return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-12))


class TwoTower(nn.Module):
    """Images and texts to unit vectors in one space.

    Parameters are {"image": {"tower", "projection"}, "text": {"tower", "projection"}}. Everything is
    available as `model.apply(variables, …, method="encode_image")` and so on.

    Attributes:
        image, text: the two sides.
        mean, std: of the pixels in [0, 1], per channel, as the image tower expects them.
    """

    image: Side
    text: Side
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: jax.Array, text: jax.Array, text_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.encode_image(image), self.encode_text(text, text_mask)

    def image_features(self, image: jax.Array, train: bool = False) -> jax.Array:
        """uint8 [b, s, s, 3] → the image tower's output fp32 [b, f]."""
        pixels = image.astype(jnp.float32) / 255.0
        return self.image.features((pixels - jnp.asarray(self.mean)) / jnp.asarray(self.std), train=train)

    def text_features(self, text: jax.Array, text_mask: jax.Array, train: bool = False) -> jax.Array:
        """int32 [b, t], bool [b, t] → the text tower's output fp32 [b, f]."""
        return self.text.features(text, text_mask, train=train)

    def packed_text_features(
        self, text: jax.Array, segment: jax.Array, position: jax.Array, texts: int, train: bool = False
    ) -> jax.Array:
        """The same of texts that share rows, int32 [rows, t] each → fp32 [texts, f]; see `Bert.packed`."""
        return self.text.packed_features(text, segment, position, texts, train=train)

    def project_image(self, features: jax.Array) -> jax.Array:
        """The image tower's output → unit vectors fp32 [b, d]."""
        return self.image.project(features)

    def project_text(self, features: jax.Array) -> jax.Array:
        """The text tower's output → unit vectors fp32 [b, d]."""
        return self.text.project(features)

    def encode_image(self, image: jax.Array, train: bool = False) -> jax.Array:
        """uint8 [b, s, s, 3] → unit vectors fp32 [b, d]; without `train`, each from its image alone."""
        return self.project_image(self.image_features(image, train))

    def encode_text(self, text: jax.Array, text_mask: jax.Array, train: bool = False) -> jax.Array:
        """int32 [b, t], bool [b, t] → unit vectors fp32 [b, d]."""
        return self.project_text(self.text_features(text, text_mask, train))


def build(config, *, dtype: Any = jnp.float32, axis_name: str | None = None) -> TwoTower:
    """The model that a config's `model` section describes.

    Args:
        config: `embed_dim`, `image.{name, mean, std, remat}`,
            `text.{pretrained, dropout, max_tokens, scratch, remat}`.
            Where `text.pretrained` is given, that folder's config.json has the text tower's sizes.
        dtype: of the towers' computation.
        axis_name: the mapped axis over which batch statistics are synchronised.

    Raises:
        ValueError: no such image tower, or more tokens than the text tower has positions.
    """
    bert = text_config(config.text)
    if config.text.max_tokens > bert.max_tokens:
        raise ValueError(
            f"model.text.max_tokens is {config.text.max_tokens}; the encoder has {bert.max_tokens} positions, "
            f"nearest that works: {bert.max_tokens}"
        )
    project = lambda: nn.Dense(config.embed_dim)
    return TwoTower(
        image=Side(image_tower(config.image.name, dtype, axis_name, config.image.remat), project()),
        text=Side(Bert(bert, dtype, config.text.remat), project()),
        mean=tuple(config.image.mean),
        std=tuple(config.image.std),
    )


def image_tower(name: str, dtype: Any, axis_name: str | None, remat: bool) -> nn.Module:
    """A ResNet or a ViT by its name."""
    options = {"dtype": dtype, "remat": remat}
    if name in RESNETS:
        return ResNet(*RESNETS[name], **options, axis_name=axis_name)
    if name == "resnet_nano":  # the quick start's: 8 layers, 0.3 million parameters
        return ResNet((1, 1, 1), False, **options, axis_name=axis_name, stem_width=32, small=True)
    if name in VITS:
        return ViT(*VITS[name], **options)
    towers = [*RESNETS, "resnet_nano", *VITS]
    near = difflib.get_close_matches(name, towers, n=1, cutoff=0.0)[0]
    raise ValueError(f"model.image.name is {name!r}; expected one of {', '.join(towers)}; nearest: {near}")


def text_config(config) -> BertConfig:
    """The text tower's sizes: those of the pretrained folder's config.json, or the config's own."""
    if config.pretrained:
        return BertConfig.from_hf(json.loads((locate(config.pretrained) / "config.json").read_text()), config.dropout)
    s = config.scratch
    return BertConfig(s.vocab_size, s.width, s.layers, s.heads, 4 * s.width, dropout=config.dropout)
