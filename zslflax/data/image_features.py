"""Features of a frozen image tower: each image of a source is computed once, and kept on disk."""

import dataclasses
import functools
import logging
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen

from zslflax import distributed
from zslflax.background import load_ahead
from zslflax.data.batch import Batch
from zslflax.data.cores import choose_threads
from zslflax.data.feature_files import (
    COMPUTED,
    FLOAT_TYPES,
    MISSING,
    UNREADABLE,
    RowFile,
    folder_path,
    open_folder,
)
from zslflax.data.images import BadSample
from zslflax.data.preprocess import content_id, record_image
from zslflax.data.sources.base import Source
from zslflax.data.sources.subset import Subset, whole_source
from zslflax.data.views import Views
from zslflax.device_batches import map_method
from zslflax.errors import StorageError
from zslflax.models.partition import Tree
from zslflax.progress import Progress

log = logging.getLogger("zslflax")

CPU_BATCH_SIZE, BATCH_SIZE = 32, 256  # images per device in a call; one shape, so that features never vary
UNREADABLE_MESSAGE = "its image could not be read when its features were computed"


@functools.lru_cache(maxsize=1)
def image_apply(model: linen.Module) -> Any:
    """(variables, images) → the image tower's outputs: one function for a model, which jax traces once in a process."""
    return lambda variables, image: model.apply(variables, image, method="image_features")


class FrozenImageTower:
    """A frozen image tower, and the folder in which what it computes is kept.

    Args:
        model: a `TwoTower`.
        variables: its variables on the devices; those of the image tower are enough.
        identity: all that a feature depends on besides the image and its view, as a JSON value.
        root: `config.features.folder`.
        dtype: in which features are kept, one of `FLOAT_TYPES`.
        threads: that read and decode; 0: automatic.
    """

    def __init__(
        self, model: linen.Module, variables: Tree, identity: dict[str, Any], root: Path, dtype: str, threads: int = 0
    ):
        self.apply, self.variables = image_apply(model), variables
        self.apply_fn = map_method(model, "image_features")
        self.identity, self.root, self.dtype, self.threads = identity, root, dtype, choose_threads(threads)
        self.width = functools.cache(self.trace_width)  # tracing a deep tower takes a second

    def trace_width(self, size: int) -> int:
        """f, of images of s pixels."""
        image = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
        shape: Any = jax.eval_shape(self.apply, self.variables, image)
        return shape.shape[1]

    def features_of(self, source: Source, views: Views) -> "ImageFeatures":
        """Opens the features of a source's images; those of a `Subset` are kept with the whole source's."""
        return ImageFeatures(self, source, views)

    def identity_of(self, source: Source, views: Views) -> dict[str, Any]:
        """All that the features of a source's images depend on, as a JSON value."""
        return self.identity | {
            "views": dataclasses.asdict(views),
            "source": source.fingerprint(),
            "shape": [len(source) * views.count, self.width(views.size)],
            "dtype": self.dtype,
        }

    def has_features_of(self, source: Source, views: Views) -> bool:
        """Whether features of a source's images were kept before, perhaps not all."""
        return folder_path(self.root, "images", self.identity_of(whole_source(source), views)).is_dir()


class ImageFeatures:
    """The features of a source's images, which are computed when they are first asked for.

    Args:
        tower: computes them.
        source: of the images.
        views: of each image.

    Raises:
        StorageError: the folder cannot be written.
    """

    def __init__(self, tower: FrozenImageTower, source: Source, views: Views):
        self.tower, self.views, self.source = tower, views, source
        self.whole = whole_source(source)
        self.indices = source.indices if isinstance(source, Subset) else None  # of its images in the whole source
        self.width, count = tower.width(views.size), len(self.whole) * views.count
        folder = open_folder(tower.root, "images", tower.identity_of(self.whole, views))
        self.rows = RowFile(folder, count, self.width, FLOAT_TYPES[tower.dtype])
        self.ids = self.rows.open_array("image_ids", np.dtype("<u4"), (len(self.whole), 2))  # 0 where it is missing
        self.progress: Progress | None = None

    def __len__(self) -> int:
        """The number of views of all images."""
        return len(self.source) * self.views.count

    def row_numbers(self, index: np.ndarray, view: np.ndarray) -> np.ndarray:
        """The rows in the file of views of the source's images, int64 [b]."""
        index = index if self.indices is None else self.indices[index]
        return index.astype(np.int64) * self.views.count + view

    def missing(self, *, unreadable: bool = False) -> np.ndarray:
        """The rows of this source that are not computed yet, int64.

        Args:
            unreadable: whether to count those whose image could not be read.
        """
        index, view = np.divmod(np.arange(len(self), dtype=np.int64), self.views.count)
        numbers = self.row_numbers(index, view)
        status = self.rows.status[numbers]
        return numbers[(status != COMPUTED) if unreadable else (status == MISSING)]

    def __call__(self, index: np.ndarray, view: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The features of images, as they are kept: the same numbers when they are computed and when they are read.

        Args:
            index: int [b], of images in the source.
            view: int [b]; default: the first.

        Returns:
            fp32 [b, f], and whether each image can be read, bool [b]; the features of others are zeros.
        """
        numbers = self.row_numbers(index, np.zeros_like(index) if view is None else view)
        features, status = self.rows.read(numbers)
        if (status == MISSING).any():
            self.compute(np.unique(numbers[status == MISSING]))
            features, status = self.rows.read(numbers)
        if (status == MISSING).any():
            raise StorageError(f"{self.rows.folder} does not return what was written to it; is the disk damaged?")
        features[status == UNREADABLE] = 0.0
        return features, status == COMPUTED

    def image_ids(self, index: np.ndarray) -> np.ndarray:
        """The ids of images by their index in the source, as `preprocess.content_id` gives them: uint32 [b, 2].

        An image's file is read the first time; the ids are kept beside the features. An unreadable image has the id 0.
        """
        images = index if self.indices is None else self.indices[index]
        missing = np.unique(images[~self.ids[images].any(axis=1)])
        if len(missing):
            with ThreadPoolExecutor(self.tower.threads) as pool:
                self.rows.write_entries("image_ids", missing, list(pool.map(self.compute_id, missing)))
        return self.ids[images].astype(np.uint32)

    def compute_id(self, index: int) -> bytes:
        """The id of an image by its index in the whole source; 0 where it cannot be read."""
        try:
            return content_id(self.whole[int(index)]["image"]).tobytes()
        except BadSample:
            return bytes(8)

    def fill(self) -> None:
        """Computes all that is missing, and tries unreadable images again. Several processes share the work."""
        numbers = self.missing(unreadable=True)
        own = numbers[numbers % jax.process_count() == jax.process_index()]
        if len(own):
            self.compute(own)

    def compute(self, numbers: np.ndarray) -> None:
        """Computes rows and writes them, in batches that fit into the devices' memory."""
        if self.progress is None:
            self.progress = Progress("image features", "images", len(self.missing()))
        per_device = CPU_BATCH_SIZE if jax.default_backend() == "cpu" else BATCH_SIZE
        while len(numbers):
            size = min(per_device * jax.local_device_count(), self.tower.apply_fn.max_rows)
            try:
                return self.compute_in_batches(numbers, size)
            except Exception as error:
                self.tower.apply_fn.halve(size, error)
                numbers = np.intersect1d(numbers, self.missing(unreadable=True))

    def compute_in_batches(self, numbers: np.ndarray, size: int) -> None:
        """Computes rows in batches of a size and writes them; images are read while the devices compute."""
        chunks = [numbers[start : start + size] for start in range(0, len(numbers), size)]
        with ThreadPoolExecutor(self.tower.threads) as pool:
            pending: tuple[np.ndarray, np.ndarray, jax.Array] | None = None
            for chunk, pixels in load_ahead(pool, self.load, chunks):
                readable = np.array([image is not None for image in pixels], bool)
                inputs = np.zeros((size, self.views.size, self.views.size, 3), np.uint8)
                for i, image in enumerate(pixels):
                    if image is not None:
                        inputs[i] = image
                output = self.tower.apply_fn(self.tower.variables, distributed.shard((inputs,)))
                if pending is not None:
                    self.write(*pending)
                pending = chunk, readable, output
            if pending is not None:
                self.write(*pending)

    def load(self, number: int) -> np.ndarray | None:
        """The view in a row, uint8 [s, s, 3]; None where the image cannot be read."""
        index, view = divmod(int(number), self.views.count)
        try:
            return self.views(record_image(self.whole[index]), index, view)
        except BadSample:
            return None

    def write(self, numbers: np.ndarray, readable: np.ndarray, output: jax.Array) -> None:
        """Writes the tower's output for rows, [devices, per device, f], and marks the unreadable ones."""
        values = np.asarray(output).reshape(-1, self.width)[: len(numbers)].astype(np.float32)
        self.rows.write(numbers[readable], values[readable])
        self.rows.mark_unreadable(numbers[~readable])
        assert self.progress is not None
        self.progress.update(len(numbers))


def with_image_features(
    batches: Iterator[Batch], features: Sequence[ImageFeatures], key: str = "image_features"
) -> Iterator[Batch]:
    """Adds the features of images to batches that have their `index`, and `source` and `view` unless these are all 0.

    A sample whose image cannot be read becomes invalid, with an error. Batches with `text_id` get `image_id` as well.

    Args:
        batches: from `pipeline.train_batches` or `eval_batches`.
        features: of each source.
        key: under which the features are added.
    """
    for batch in batches:
        valid, index, errors = batch["valid"].copy(), batch["index"], list(batch["errors"])
        source, view = batch.get("source", np.zeros_like(index)), batch.get("view", np.zeros_like(index))
        image_features = np.zeros((len(index), features[0].width), np.float32)
        image_id = np.zeros((len(index), 2), np.uint32)
        for number, source_features in enumerate(features):
            rows = np.flatnonzero(batch["valid"] & (source == number))
            image_features[rows], valid[rows] = source_features(index[rows], view[rows])
            if "text_id" in batch:
                image_id[rows] = source_features.image_ids(index[rows])
            for i in index[rows[~valid[rows]]].tolist():
                errors.append((source_features.source.read_annotations(i)["name"], UNREADABLE_MESSAGE))
        rest = {key: value for key, value in batch.items() if key not in ("source", "view")}
        added = {key: image_features, "valid": valid, "errors": tuple(errors)}
        if "text_id" in batch:
            added["image_id"] = image_id
        yield Batch(**(rest | added))  # type: ignore[typeddict-item]


def log_size(features: Sequence[ImageFeatures]) -> None:
    """Logs how many images are computed and will be, and what they take on the disk.

    Raises:
        StorageError: the disk has less space than they take.
    """
    megabytes = lambda source, views: views * (source.width * source.rows.dtype.itemsize + 5) / 1e6
    missing = [len(source_features.missing()) for source_features in features]
    needed = sum(map(megabytes, features, missing))
    root = features[0].tower.root.expanduser()
    log.info(
        "image features: %s of %s are still to be computed; all of them take %.0f MB in %s",
        f"{sum(missing):,}",
        f"{sum(map(len, features)):,}",
        sum(map(megabytes, features, map(len, features))),
        root,
    )
    free = shutil.disk_usage(root).free / 1e6
    if needed > free:
        raise StorageError(
            f"the missing image features take {needed:.0f} MB, but {root} has {free:.0f} MB free; make room, set "
            "features.folder to another disk, or set features.dtype=float16"
        )
