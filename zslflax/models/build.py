"""Builds the model that a config describes: two towers, or a classifier."""

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
from zslflax.models.bert import Bert, BertConfig
from zslflax.models.convnext import CONVNEXTS, ConvNeXt
from zslflax.models.fastvit import FASTVITS, FastViT
from zslflax.models.import_weights.architecture import read_architecture, text_architecture
from zslflax.models.import_weights.description import read_pixel_statistics, read_text_pooling
from zslflax.models.import_weights.image_architecture import (
    clip_resnet_architecture,
    convnext_architecture,
    fastvit_architecture,
    vit_architecture,
)
from zslflax.models.import_weights.locate import locate_weights
from zslflax.models.mobilenet import MOBILENETS, MobileNet
from zslflax.models.resnet import RESNET_DS, RESNETS, ResNet
from zslflax.models.resnet12 import RESNET12S, ResNet12
from zslflax.models.two_tower import MlpProjection, ProjectedTower, TwoTower
from zslflax.models.vit import DINOV2, DINOV3, DINOV3_ROTARY, POOLS, REGISTERS, VITS, ViT

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
    image = configured_tower(config.image, dtype, axis_name)
    example = jnp.zeros((1, config.image.size, config.image.size, 3))
    image_width = lambda: jax.eval_shape(image.init_with_output, jax.random.key(0), example)[0].shape[-1]
    return TwoTower(
        image=ProjectedTower(image, projection(config, "image", image_width)),
        text=ProjectedTower(Bert(bert, dtype, config.text.remat), projection(config, "text", lambda: bert.width)),
        mean=tuple(config.image.mean),
        std=tuple(config.image.std),
    )


def build_classifier(config: ConfigDict, *, dtype: Any = jnp.float32, axis_name: str | None = None) -> TwoTower:
    """Builds the classifier that the `model` section of a config describes: an image tower and a linear head.

    Args:
        config: the section; `class_names` is not empty.
        dtype, axis_name: as in `build_two_tower`.

    Raises:
        UserError: there is no such image tower.
    """
    config = resolve_model(config, check=False)
    tower = configured_tower(config.image, dtype, axis_name)
    head = ProjectedTower(tower, nn.Dense(len(config.class_names)), unit=False)
    return TwoTower(image=head, text=None, mean=tuple(config.image.mean), std=tuple(config.image.std))


def configured_tower(config: ConfigDict, dtype: Any, axis_name: str | None) -> Any:
    """Builds the image tower that the `model.image` section of a config names or whose files describe it.

    Raises:
        UserError: there is no such tower, or it has not what the section asks of it.
    """
    if config.name:
        tower = image_tower(config.name, dtype, axis_name, config.remat, config.pool)
    else:
        tower = described_tower(config, dtype, axis_name)
    if not config.patch_drop:
        return tower
    if not isinstance(tower, ViT):
        raise UserError(
            f"model.image.patch_drop is {config.patch_drop}, but {config.name or 'this tower'} has no patches; set it "
            "to 0, or model.image.name to a ViT"
        )
    return tower.clone(patch_drop=config.patch_drop)


def example_inputs(model: TwoTower, config: ConfigDict) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes of one row of a model's inputs, as `model.init` takes them.

    Args:
        model: built from the config.
        config: the `model` section.
    """
    size, tokens = config.image.size, config.text.max_tokens
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)
    text, mask = (jax.ShapeDtypeStruct((1, tokens), kind) for kind in (jnp.int32, jnp.bool_))
    return (image,) if model.text is None else (image, text, mask)


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
        published = read_pixel_statistics(locate_weights(image, "image"))
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
    if not config.class_names:  # a classifier has no text tower
        text.pool = text_pool(text)
    return config


def text_pool(config: ConfigDict) -> str:
    """Returns the pooling of the text tower that the `model.text` section of a config describes, see `BertConfig`."""
    pool = config.pool
    if not pool and config.pretrained:
        folder = locate_weights(config, "text")
        own = text_architecture(read_architecture(folder)).pool  # "mean" unless the file says; then other files may
        pool = read_text_pooling(folder) if own == "mean" else own
    if pool not in ("", "mean", "cls", "last"):
        raise UserError(f'model.text.pool is {pool!r}; expected "", mean, cls or last')
    return pool or "mean"


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
    if kind in ("linear", "linear_no_bias"):
        return nn.Dense(width, use_bias=kind == "linear")
    if kind == "mlp":
        return MlpProjection(width, config.projection.hidden, config.projection.dropout)
    if kind != "none":
        raise UserError(f"model.{modality}.projection is {kind!r}; expected linear, linear_no_bias, mlp or none")
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
    resnet_d = partial(resnet, deep=True)
    convnext = partial(ConvNeXt, dtype=dtype, remat=remat)
    mobilenet = partial(MobileNet, dtype=dtype, axis_name=axis_name, remat=remat)
    fastvit = partial(FastViT, dtype=dtype, axis_name=axis_name, remat=remat)
    vit = partial(ViT, dtype=dtype, remat=remat)
    dinov2 = partial(vit, layer_scale=True)
    rotary = {"table": False, "rotary": DINOV3_ROTARY, "registers": REGISTERS, "key_bias": False, "eps": 1e-5}
    dinov3 = partial(dinov2, **rotary)
    dinov3_plus = partial(dinov3, activation="silu", gated=True)
    towers: dict[str, nn.Module] = {
        **{tower: resnet(*sizes) for tower, sizes in RESNETS.items()},
        **{tower: ResNet12(widths, dtype, axis_name, remat) for tower, widths in RESNET12S.items()},
        "resnet_nano": resnet((1, 1, 1), False, stem_width=32, small=True),  # 8 layers, 0.3 million parameters
        **{tower: resnet_d(*sizes) for tower, sizes in RESNET_DS.items()},
        **{tower: convnext(*sizes) for tower, sizes in CONVNEXTS.items()},
        **{tower: mobilenet(variant) for tower, variant in MOBILENETS.items()},
        **{tower: fastvit(variant) for tower, variant in FASTVITS.items()},
        **{tower: vit(*sizes) for tower, sizes in VITS.items()},
        **{tower: dinov2(*sizes) for tower, sizes in DINOV2.items()},
        **{f"{tower}_reg": dinov2(*sizes, registers=REGISTERS) for tower, sizes in DINOV2.items()},
        **{tower: (dinov3_plus if tower.endswith("plus") else dinov3)(*sizes) for tower, sizes in DINOV3.items()},
    }
    if name not in towers:
        raise UserError(
            f"model.image.name is {name!r}; expected one of {', '.join(towers)}; nearest: {nearest_names(name, towers)}"
        )
    return with_pool(towers[name], name, pool)


def described_tower(config: ConfigDict, dtype: Any, axis_name: str | None = None) -> nn.Module:
    """Builds the image tower that the files of `image.pretrained` describe.

    Args:
        config: the `model.image` section.
        dtype, axis_name: as in `build_two_tower`.

    Raises:
        UserError: there are no such files, or they describe a tower that has to be named.
    """
    if not config.pretrained:
        raise UserError('model.image.name is ""; expected a name, or model.image.pretrained, whose files describe it')
    folder = locate_weights(config, "image")
    values = read_architecture(folder)
    tower: nn.Module
    if fields := clip_resnet_architecture(values):
        tower = ResNet(**fields, dtype=dtype, axis_name=axis_name, remat=config.remat)
    elif fields := convnext_architecture(values):
        tower = ConvNeXt(**fields, dtype=dtype, remat=config.remat)
    elif fields := fastvit_architecture(values):
        tower = FastViT(**fields, dtype=dtype, axis_name=axis_name, remat=config.remat)
    elif fields := vit_architecture(values):
        tower = ViT(**fields, dtype=dtype, remat=config.remat)
    else:
        raise UserError(
            f'model.image.name is "", but {folder} has model_type {values.get("model_type")!r}; expected clip, '
            "clip_vision_model, siglip or siglip_vision_model, or give the name of the tower"
        )
    return with_pool(tower, "this tower", config.pool)


def with_pool(tower: Any, name: str, pool: str) -> Any:
    """Returns the tower called `name` with a value of `image.pool`, "" for its own; refuses one that it lacks."""
    choices = POOLS if isinstance(tower, ViT) and tower.pool in POOLS else ()
    if pool and pool not in choices:
        pools = f'"" or one of {", ".join(choices)}' if choices else '"": it has one way to pool'
        raise UserError(f"model.image.pool is {pool!r}; expected of {name} {pools}")
    if pool.startswith("cls") and not getattr(tower, "class_token", True):
        raise UserError(f"model.image.pool is {pool!r}, but {name} has no class token; expected mean or map")
    return tower.clone(pool=pool) if pool else tower


def text_config(config: ConfigDict) -> BertConfig:
    """Returns the sizes of the text tower that the `model.text` section of a config describes.

    They come from the config.json of the pretrained encoder, or from `scratch` where there is none.
    """
    if config.pretrained:
        sizes = text_architecture(read_architecture(locate_weights(config, "text")), config.dropout)
    else:
        s = config.scratch
        sizes = BertConfig(s.vocab_size, s.width, s.layers, s.heads, 4 * s.width, dropout=config.dropout)
    return dataclasses.replace(sizes, pool=text_pool(config))
