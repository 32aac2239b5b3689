"""Builds the two-tower model that a config describes: from a tower's name to its module."""

import json
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from zslflax.errors import UserError, nearest_names
from zslflax.models.bert import Bert, BertConfig
from zslflax.models.import_weights.locate import locate
from zslflax.models.resnet import RESNETS, ResNet
from zslflax.models.two_tower import Side, TwoTower
from zslflax.models.vit import VITS, ViT


def build_two_tower(config, *, dtype: Any = jnp.float32, axis_name: str | None = None) -> TwoTower:
    """The model that a config's `model` section describes.

    Args:
        config: `embed_dim`, `image.{name, mean, std, remat}`,
            `text.{pretrained, dropout, max_tokens, scratch, remat, projection}`.
            Where `text.pretrained` is given, that folder's config.json has the text tower's sizes.
        dtype: of the towers' computation.
        axis_name: the mapped axis over which batch statistics are synchronised.

    Raises:
        ValueError: no such image tower, or more tokens than the text tower has positions.
    """
    bert = text_config(config.text)
    if config.text.max_tokens > bert.max_tokens:
        raise UserError(
            f"model.text.max_tokens is {config.text.max_tokens}; the encoder has {bert.max_tokens} positions, "
            f"nearest that works: {bert.max_tokens}"
        )
    if not config.text.projection and bert.width != config.embed_dim:
        raise UserError(
            f"model.text.projection is False, but the text tower is {bert.width} wide and model.embed_dim is "
            f"{config.embed_dim}; set model.embed_dim={bert.width} or model.text.projection=True"
        )
    project = lambda: nn.Dense(config.embed_dim)
    return TwoTower(
        image=Side(image_tower(config.image.name, dtype, axis_name, config.image.remat), project()),
        text=Side(Bert(bert, dtype, config.text.remat), project() if config.text.projection else None),
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
    raise UserError(
        f"model.image.name is {name!r}; expected one of {', '.join(towers)}; nearest: {nearest_names(name, towers)}"
    )


def text_config(config) -> BertConfig:
    """The text tower's sizes: those of the pretrained folder's config.json, or the config's own."""
    if config.pretrained:
        return BertConfig.from_hf(json.loads((locate(config.pretrained) / "config.json").read_text()), config.dropout)
    s = config.scratch
    return BertConfig(s.vocab_size, s.width, s.layers, s.heads, 4 * s.width, dropout=config.dropout)
