"""Builds the two-tower model that a config describes."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from zslflax.errors import UserError, nearest_names
from zslflax.files import read_json
from zslflax.models.bert import Bert, BertConfig
from zslflax.models.import_weights.description import read_pixel_statistics, read_text_pooling
from zslflax.models.import_weights.locate import locate
from zslflax.models.mobilenet import MOBILENETS, MobileNet
from zslflax.models.resnet import RESNETS, ResNet
from zslflax.models.two_tower import MlpProjection, ProjectedTower, TwoTower
from zslflax.models.vit import DINOV2, POOLS, REGISTERS, VITS, ViT

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB values in [0, 1] (torchvision)


def build_two_tower(config: ConfigDict, *, dtype: Any = jnp.float32, axis_name: str | None = None) -> TwoTower:
    """Builds the model that the `model` section of a config describes.

    Args:
        config: the section, see `zslflax.config.model_fields`.
        dtype: of the computation inside the towers.
        axis_name: the mapped axis over which batch statistics are synchronised.

    Raises:
        UserError: there is no such image tower, `text.max_tokens` exceeds the positions of the text tower, or a
            tower of another width than `embed_dim` has no projection.
    """
    config = resolve_model(config, check=False)
    bert = text_config(config.text)
    if config.text.max_tokens > bert.max_tokens:
        raise UserError(
            f"model.text.max_tokens is {config.text.max_tokens}; the encoder has {bert.max_tokens} positions, "
            f"nearest that works: {bert.max_tokens}"
        )
    image: Any = image_tower(config.image.name, dtype, axis_name, config.image.remat, config.image.pool)
    if config.image.patch_drop:
        if not isinstance(image, ViT):
            raise UserError(
                f"model.image.patch_drop is {config.image.patch_drop}, but {config.image.name} has no patches; set it "
                "to 0, or model.image.name to a ViT"
            )
        image = image.clone(patch_drop=config.image.patch_drop)
    example = jnp.zeros((1, config.image.size, config.image.size, 3))
    image_width = lambda: jax.eval_shape(image.init_with_output, jax.random.key(0), example)[0].shape[-1]
    return TwoTower(
        image=ProjectedTower(image, projection(config, "image", image_width)),
        text=ProjectedTower(Bert(bert, dtype, config.text.remat), projection(config, "text", lambda: bert.width)),
        mean=tuple(config.image.mean),
        std=tuple(config.image.std),
    )


def resolve_model(config: ConfigDict, check: bool = True) -> ConfigDict:
    """Returns the `model` section of a config with values for `image.mean`, `image.std` and `text.pool`.

    Empty ones are replaced by what the files of the pretrained weights say, or else by the tower's own.

    Args:
        config: the `model` section.
        check: whether to refuse a mean or deviation that contradicts those files.

    Raises:
        UserError: see `check`; or the text encoder has a pooling that is not implemented.
    """
    config = config.copy_and_resolve_references()
    image, text = config.image, config.text
    published = None
    if image.pretrained and (check or not (image.mean and image.std)):
        published = read_pixel_statistics(locate(image.pretrained))
    own = (0.5,) * 3, (0.5,) * 3
    fallback = own if image.name.startswith("efficientnet_lite") else (IMAGENET_MEAN, IMAGENET_STD)
    for field, default in zip(("mean", "std"), fallback):
        value, written = getattr(published, field, default), tuple(image[field])
        contradicts = bool(published and written) and not np.allclose(written, value, atol=1e-4)
        if check and contradicts and not image.allow_other_statistics:
            raise UserError(
                f"model.image.{field} is {written}, but {published and published.path} says {value}; set "
                f'model.image.{field} to "()" for that, or model.image.allow_other_statistics=True'
            )
        image[field] = written or value
    text.pool = text_pool(text)
    return config


def text_pool(config: ConfigDict) -> str:
    """Returns the pooling of the text tower that the `model.text` section of a config describes: "mean" or "cls"."""
    pool = config.pool or (read_text_pooling(locate(config.pretrained)) if config.pretrained else "mean")
    if pool not in ("mean", "cls"):
        raise UserError(f'model.text.pool is {pool!r}; expected "", mean or cls')
    return pool


def projection(config: ConfigDict, modality: str, tower_width: Callable[[], int]) -> nn.Module | None:
    """Builds the projection after the tower of a modality; None for none.

    Args:
        config: the `model` section.
        modality: "image" or "text".
        tower_width: returns the width of the tower's output; called for a tower without projection.

    Raises:
        UserError: there is no such kind of projection, or none after a tower of another width than `embed_dim`.
    """
    kind, width = config[modality].projection, config.embed_dim
    if kind == "linear":
        return nn.Dense(width)
    if kind == "mlp":
        return MlpProjection(width, config.projection.hidden, config.projection.dropout)
    if kind != "none":
        raise UserError(f"model.{modality}.projection is {kind!r}; expected linear, mlp or none")
    if tower_width() != width:
        raise UserError(
            f"model.{modality}.projection is 'none', but the {modality} tower is {tower_width()} wide and "
            f"model.embed_dim is {width}; set model.embed_dim={tower_width()} or model.{modality}.projection=linear"
        )
    return None


def image_tower(name: str, dtype: Any, axis_name: str | None, remat: bool, pool: str = "") -> nn.Module:
    """Builds the image tower called `name`; `pool` is that of a `ViT`, or "" for the tower's own.

    >>> image_tower("vit_b16", jnp.bfloat16, None, remat=False).width
    768

    Raises:
        UserError: there is no such tower; names the nearest one. Or the tower has no such pool.
    """
    resnet = partial(ResNet, dtype=dtype, axis_name=axis_name, remat=remat)
    mobilenet = partial(MobileNet, dtype=dtype, axis_name=axis_name, remat=remat)
    vit = partial(ViT, dtype=dtype, remat=remat, pool=pool or "cls")
    dinov2 = partial(vit, layer_scale=True)
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
        "dinov2_s14": dinov2(*DINOV2["dinov2_s14"]),
        "dinov2_b14": dinov2(*DINOV2["dinov2_b14"]),
        "dinov2_l14": dinov2(*DINOV2["dinov2_l14"]),
        "dinov2_s14_reg": dinov2(*DINOV2["dinov2_s14"], registers=REGISTERS),
        "dinov2_b14_reg": dinov2(*DINOV2["dinov2_b14"], registers=REGISTERS),
        "dinov2_l14_reg": dinov2(*DINOV2["dinov2_l14"], registers=REGISTERS),
    }
    if name not in towers:
        raise UserError(
            f"model.image.name is {name!r}; expected one of {', '.join(towers)}; nearest: {nearest_names(name, towers)}"
        )
    tower = towers[name]
    if pool and not (isinstance(tower, ViT) and pool in POOLS):
        pools = f'"" or one of {", ".join(POOLS)}' if isinstance(tower, ViT) else '"": it averages over the image'
        raise UserError(f"model.image.pool is {pool!r}; expected of {name} {pools}")
    return tower


def text_config(config: ConfigDict) -> BertConfig:
    """Returns the sizes of the text tower that the `model.text` section of a config describes.

    They come from the config.json of the pretrained encoder, or from `scratch` where there is none.
    """
    if config.pretrained:
        sizes = BertConfig.from_hf(read_json(locate(config.pretrained) / "config.json"), config.dropout)
    else:
        s = config.scratch
        sizes = BertConfig(s.vocab_size, s.width, s.layers, s.heads, 4 * s.width, dropout=config.dropout)
    return dataclasses.replace(sizes, pool=text_pool(config))
