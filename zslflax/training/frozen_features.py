"""Opens the features of a config's frozen towers: what is kept on disk, and under which identity."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

import zslflax
from zslflax import distributed
from zslflax.data.feature_files import FLOAT_TYPES, TextFile, hash_arrays, open_folder
from zslflax.data.features import DEFAULT_CAPACITY, TextFeatures
from zslflax.data.image_features import FrozenImageTower, ImageFeatures, Views
from zslflax.data.sources.base import Source
from zslflax.data.text import Tokenizer
from zslflax.models.build import text_config
from zslflax.models.partition import Tree
from zslflax.models.two_tower import TwoTower


def open_image_tower(config: ConfigDict, model: TwoTower, tower: Tree, batch_stats: Tree) -> FrozenImageTower:
    """The frozen image tower, with the folder of its features.

    Args:
        config: the whole config; `features.folder` is given.
        model: the two-tower model.
        tower: the parameters of its image tower.
        batch_stats: of the model, {} without batch normalisation.
    """
    statistics = {"image": {"tower": batch_stats["image"]["tower"]}} if "image" in batch_stats else {}
    variables = {"params": {"image": {"tower": tower}}, "batch_stats": statistics}
    image = config.model.image
    identity = {
        "weights": hash_arrays(flatten_dict(jax.device_get(variables), sep="/")),
        "tower": image.name,
        "mean": list(image.mean),
        "std": list(image.std),
        "compute_dtype": config.compute_dtype,
        "version": zslflax.__version__,
    }
    root, features = Path(config.features.folder), config.features
    return FrozenImageTower(model, copied(variables), identity, root, features.dtype, config.data.threads)


def copied(variables: Tree) -> Tree:
    """A copy of variables on all local devices: the train step donates the state's own."""
    return distributed.replicate(jax.tree.map(jnp.copy, variables))


def evaluation_view(config: ConfigDict) -> Views:
    """The centre crop of evaluation."""
    size = config.model.image.size
    return Views(1, size, round(size * config.eval.resize_factor))


def training_views(config: ConfigDict) -> Views:
    """The views of a training image: the crop of evaluation, or several random crops."""
    if config.features.views == 1:
        return evaluation_view(config)
    low, high = config.data.crop_scale
    flip, seed = config.data.flip, config.features.seed
    return Views(config.features.views, config.model.image.size, scale=(float(low), float(high)), flip=flip, seed=seed)


def open_train_features(config: ConfigDict, tower: FrozenImageTower, sources: Sequence[Source]) -> list[ImageFeatures]:
    """The features of the training images, one for each source."""
    return [tower.features_of(source, training_views(config)) for source in sources]


def open_text_features(
    config: ConfigDict, model: TwoTower, tokenizer: Tokenizer, frozen_tower: Tree | None
) -> TextFeatures:
    """The features of texts: on disk or in memory for the whole run if the text tower is frozen, or for one state.

    Args:
        config: the whole config.
        model: the two-tower model.
        tokenizer: of the texts.
        frozen_tower: the parameters of the text tower; None where it is trained.
    """
    capacity = max(config.model.text.cached_captions, DEFAULT_CAPACITY)
    if frozen_tower is None:
        return TextFeatures(model, None, capacity)
    variables = copied({"params": {"text": {"tower": frozen_tower}}})
    if not config.features.folder:
        return TextFeatures(model, variables, capacity, frozen=True)
    sizes = text_config(config.model.text)
    identity: dict[str, Any] = {
        "weights": hash_arrays(flatten_dict(jax.device_get(frozen_tower), sep="/")),
        "sizes": dataclasses.asdict(sizes),
        "compute_dtype": config.compute_dtype,
        "tokenizer": tokenizer.identity,
        "version": zslflax.__version__,
        "dtype": config.features.dtype,
    }
    folder = open_folder(Path(config.features.folder), "texts", identity)
    store = TextFile(folder, sizes.width, FLOAT_TYPES[config.features.dtype])
    return TextFeatures(model, variables, capacity, frozen=True, store=store)
