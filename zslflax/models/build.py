"""Builds the two-tower model that a config describes."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from ml_collections import ConfigDict

from zslflax.errors import UserError, nearest_names
from zslflax.files import read_json
from zslflax.models.bert import Bert, BertConfig
from zslflax.models.import_weights.locate import locate
from zslflax.models.mobilenet import MOBILENETS, MobileNet
from zslflax.models.resnet import RESNETS, ResNet
from zslflax.models.two_tower import ProjectedTower, TwoTower
from zslflax.models.vit import VITS, ViT


def build_two_tower(config: ConfigDict, *, dtype: Any = jnp.float32, axis_name: str | None = None) -> TwoTower:
    """Builds the model that the `model` section of a config describes.

    Args:
        config: `embed_dim`, `image.{name, mean, std, remat}`, and
            `text.{pretrained, dropout, max_tokens, scratch, remat, projection}`.
        dtype: of the computation inside the towers.
        axis_name: the mapped axis over which batch statistics are synchronised.

    Raises:
        UserError: there is no such image tower, `text.max_tokens` exceeds the positions of the text tower, or a text
            tower of another width than `embed_dim` has no projection.
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
    text_projection = nn.Dense(config.embed_dim) if config.text.projection else None
    image = image_tower(config.image.name, dtype, axis_name, config.image.remat)
    return TwoTower(
        image=ProjectedTower(image, nn.Dense(config.embed_dim)),
        text=ProjectedTower(Bert(bert, dtype, config.text.remat), text_projection),
        mean=tuple(config.image.mean),
        std=tuple(config.image.std),
    )


def image_tower(name: str, dtype: Any, axis_name: str | None, remat: bool) -> nn.Module:
    """Builds the image tower called `name`.

    >>> image_tower("vit_b16", jnp.bfloat16, None, remat=False).width
    768

    Raises:
        UserError: there is no such tower; names the nearest one.
    """
    resnet = partial(ResNet, dtype=dtype, axis_name=axis_name, remat=remat)
    mobilenet = partial(MobileNet, dtype=dtype, axis_name=axis_name, remat=remat)
    vit = partial(ViT, dtype=dtype, remat=remat)
    towers: dict[str, nn.Module] = {
        "resnet18": resnet(*RESNETS["resnet18"]),
        "resnet34": resnet(*RESNETS["resnet34"]),
        "resnet50": resnet(*RESNETS["resnet50"]),
        "resnet101": resnet(*RESNETS["resnet101"]),
        "resnet_nano": resnet((1, 1, 1), False, stem_width=32, small=True),  # 8 layers, 0.3 million parameters
        "mobilenet_v2": mobilenet(MOBILENETS["mobilenet_v2"]),
        "efficientnet_lite0": mobilenet(MOBILENETS["efficientnet_lite0"]),
        "efficientnet_lite1": mobilenet(MOBILENETS["efficientnet_lite1"]),
        "efficientnet_lite2": mobilenet(MOBILENETS["efficientnet_lite2"]),
        "efficientnet_lite3": mobilenet(MOBILENETS["efficientnet_lite3"]),
        "efficientnet_lite4": mobilenet(MOBILENETS["efficientnet_lite4"]),
        "vit_nano4": vit(*VITS["vit_nano4"]),
        "vit_ti16": vit(*VITS["vit_ti16"]),
        "vit_s16": vit(*VITS["vit_s16"]),
        "vit_b16": vit(*VITS["vit_b16"]),
        "vit_b32": vit(*VITS["vit_b32"]),
    }
    if name not in towers:
        raise UserError(
            f"model.image.name is {name!r}; expected one of {', '.join(towers)}; nearest: {nearest_names(name, towers)}"
        )
    return towers[name]


def text_config(config: ConfigDict) -> BertConfig:
    """Returns the sizes of the text tower that the `model.text` section of a config describes.

    They come from the config.json of the pretrained encoder, or from `scratch` where there is none.
    """
    if config.pretrained:
        return BertConfig.from_hf(read_json(locate(config.pretrained) / "config.json"), config.dropout)
    s = config.scratch
    return BertConfig(s.vocab_size, s.width, s.layers, s.heads, 4 * s.width, dropout=config.dropout)
