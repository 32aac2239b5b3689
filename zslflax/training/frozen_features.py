"""Opens the features of a config's frozen towers: what is kept on disk, and under which identity."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

import zslflax
from zslflax import distributed
from zslflax.data.feature_files import FLOAT_TYPES, TextFile, folder_path, open_folder
from zslflax.data.image_features import FrozenImageTower, ImageFeatures, log_size
from zslflax.data.sources.base import Source
from zslflax.data.text import Tokenizer
from zslflax.data.text_features import DEFAULT_CAPACITY, TextFeatures
from zslflax.data.views import evaluation_view, training_views
from zslflax.errors import StorageError, UserError
from zslflax.files import hash_arrays
from zslflax.inference.predictor import Predictor
from zslflax.models.build import text_config
from zslflax.models.import_weights.architecture import read_architecture
from zslflax.models.import_weights.image_architecture import image_architecture
from zslflax.models.import_weights.locate import locate
from zslflax.models.partition import Tree, combine
from zslflax.models.two_tower import TwoTower
from zslflax.training.optimizer import FOREVER, frozen_until
from zslflax.training.train_state import TrainState

log = logging.getLogger("zslflax")

# Fields of config.model.image that change no feature, or stand in the identity of features by another name.
NOT_OF_FEATURES = (
    *("pretrained", "mean", "std", "remat", "projection", "allow_other_statistics"),
    *("patch_drop", "schedule"),
)


@dataclasses.dataclass(frozen=True)
class FrozenFeatures:
    """The features of a run's frozen towers.

    Attributes:
        text: of any texts; None for a classifier.
        text_frozen: whether the text tower is frozen for the whole run.
        train_images: of each training source's images; [] where steps read images from the first one on.
        images_from: the step from which steps read images, or `FOREVER`.
        open_test_images: opens the features of a test set's images; None where the image tower is trained at some time.
    """

    text: TextFeatures | None
    text_frozen: bool
    train_images: list[ImageFeatures]
    images_from: int
    open_test_images: Callable[[Source], ImageFeatures] | None


def open_features(
    config: ConfigDict,
    model: TwoTower,
    tokenizer: Tokenizer | None,
    state: TrainState,
    sources: Sequence[Source],
    test_sources: Sequence[Source],
) -> FrozenFeatures:
    """Opens the features of the frozen towers, and logs their size.

    Args:
        config: the whole config.
        model: the two-tower model.
        tokenizer: of the texts; None for a classifier, whose steps always read images.
        state: the state that the run starts from.
        sources: of the training images.
        test_sources: of the test sets.

    Raises:
        UserError: `features.folder` is given and no tower is frozen.
        StorageError: the folder cannot be written, or the disk has too little space.
    """
    if tokenizer is None:
        return FrozenFeatures(None, False, [], 0, None)
    params, folder = combine(state.params, state.frozen_params), config.features.folder
    until = frozen_until(params, config.freeze)
    if folder and until["text"] != FOREVER and not until["image"]:
        raise UserError(
            f"features.folder is {folder!r}, but no tower is frozen: the text tower for the whole run, or the image "
            "tower until some step; set features.folder='', or freeze one, such as freeze=\"(('image/tower', -1),)\""
        )
    text_frozen = until["text"] == FOREVER
    text = open_text_features(config, model, tokenizer, params["text"]["tower"] if text_frozen else None)
    if not folder or 0 <= until["image"] <= int(state.step):
        return FrozenFeatures(text, text_frozen, [], 0, None)
    tower = open_image_tower(config, model, params["image"]["tower"], state.batch_stats)
    train_images = [tower.features_of(source, training_views(config)) for source in sources]
    if until["image"] != FOREVER:
        log_size(train_images)
        return FrozenFeatures(text, text_frozen, train_images, until["image"], None)
    open_test_images = functools.partial(tower.features_of, views=evaluation_view(config))
    log_size([*train_images, *map(open_test_images, test_sources)])
    return FrozenFeatures(text, text_frozen, train_images, FOREVER, open_test_images)


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
    identity = {
        "weights": hash_arrays(flatten_dict(jax.device_get(variables), sep="/")),
        "tower": {field: value for field, value in config.model.image.items() if field not in NOT_OF_FEATURES},
        "mean": list(model.mean),
        "std": list(model.std),
        "compute_dtype": config.compute_dtype,
        "version": zslflax.__version__,
    }
    if not config.model.image.name:
        values = read_architecture(locate(config.model.image.pretrained))
        identity["described"] = image_architecture(values)
    root, features = Path(config.features.folder), config.features
    return FrozenImageTower(model, copied(variables), identity, root, features.dtype, config.data.threads)


def open_kept_features(predictor: Predictor, config: ConfigDict) -> Callable[[Source], ImageFeatures | None]:
    """Opens the features that the run of a trained model has kept of its frozen towers.

    The predictor takes the features of texts from there. No folder is made for what the run has not kept: a model's
    config never says where to write.

    Args:
        predictor: as `Predictor.restore` returns it.
        config: of its run, or the same with other values of `features` and `eval`.

    Returns:
        Opens the features of a source's images in the crop of evaluation; None where none were kept.
    """
    params = predictor.variables["params"]
    nothing = lambda source: None
    if not config.features.folder or not Path(config.features.folder).expanduser().is_dir():
        return nothing
    until = frozen_until(params, config.freeze)
    if predictor.tokenizer is not None and until["text"] == FOREVER:
        text_tower = params["text"]["tower"]
        identity = text_identity(config, predictor.tokenizer, text_tower)
        if folder_path(Path(config.features.folder), "texts", identity).is_dir():
            predictor.text_features = open_text_features(config, predictor.model, predictor.tokenizer, text_tower)
    if until["image"] != FOREVER:
        return nothing
    tower = open_image_tower(config, predictor.model, params["image"]["tower"], predictor.variables["batch_stats"])
    view = evaluation_view(config)

    def open_test_images(source: Source) -> ImageFeatures | None:
        if not tower.has_features_of(source, view):
            return None
        try:
            return tower.features_of(source, view)
        except StorageError as error:
            log.warning("images are read, because their features cannot be opened: %s", error)
            return None

    return open_test_images


def copied(variables: Tree) -> Tree:
    """A copy of variables on all local devices: the train step donates the state's own."""
    return distributed.replicate(jax.tree.map(jnp.copy, variables))


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
    folder = open_folder(Path(config.features.folder), "texts", text_identity(config, tokenizer, frozen_tower))
    store = TextFile(folder, text_config(config.model.text).width, FLOAT_TYPES[config.features.dtype])
    return TextFeatures(model, variables, capacity, frozen=True, store=store)


def text_identity(config: ConfigDict, tokenizer: Tokenizer, tower: Tree) -> dict[str, Any]:
    """All that the features of a text depend on besides its tokens, as a JSON value."""
    return {
        "weights": hash_arrays(flatten_dict(jax.device_get(tower), sep="/")),
        "sizes": dataclasses.asdict(text_config(config.model.text)),
        "compute_dtype": config.compute_dtype,
        "tokenizer": tokenizer.identity,
        "version": zslflax.__version__,
        "dtype": config.features.dtype,
    }
