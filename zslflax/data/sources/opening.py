"""Opens a data source by its specification, such as "train/{00000..00099}.tar", a folder or "tfds:NAME/SPLIT"."""

import functools
import os

from ml_collections import ConfigDict

from zslflax.data.addresses import is_remote
from zslflax.data.retries import ReadLimits
from zslflax.data.sources import labelled, shapes
from zslflax.data.sources.base import Source
from zslflax.data.sources.folders import open_folder
from zslflax.data.sources.tfds import TfdsSource
from zslflax.data.sources.webdataset import WebDataset
from zslflax.errors import UserError
from zslflax.files import expand_user, local_path


def open_source(spec: str, data_config: ConfigDict, split: str, captions: bool = True) -> Source:
    """Opens a data source.

    Args:
        spec: a folder, which is opened as what it holds (`zslflax.data.sources.folders`); a pattern of tar shards;
            "tfds:NAME/SPLIT"; "shapes", the built-in procedural source; or labelled images without captions,
            "open_images:FOLDER,LABELS.csv" or "ml_images:FOLDER,LIST.txt" (`zslflax.data.sources.labelled`). The prefix
            "folder:" may stand before a folder.
        data_config: the config's field `data`, for `tfds_dir`, `captions_per_line`, the timeouts and `shapes`.
        split: "train" or "test". For "shapes" it selects the data; other specs name their data, and must have
            captions for "train".
        captions: whether "train" needs captions.

    Raises:
        UserError: there is no such source, or it cannot serve the split.
    """
    if split not in ("train", "test"):
        raise UserError(f"split is {split!r}, expected 'train' or 'test'")
    captions = captions and split == "train"
    openers = {"shapes": open_shapes, "tfds": open_tfds, "folder": open_local_folder}
    openers |= dict.fromkeys(labelled.READERS, open_labelled)
    prefix, _, location = spec.partition(":")
    if prefix in openers and not location.startswith("//"):
        return openers[prefix](spec, data_config, split, captions)
    if not is_remote(spec) and os.path.isdir(expand_user(spec)):
        return open_local_folder(spec, data_config, split, captions)
    return open_shards(spec, data_config, split, captions)


def open_shapes(spec: str, data_config: ConfigDict, split: str, captions: bool) -> Source:
    """The built-in source; its shards are written where they are missing."""
    c = data_config.shapes
    shards = shapes.ensure_shards(
        expand_user(c.root), train=c.train, test=c.test, size=c.size, noise=c.noise, seed=c.seed
    )
    return WebDataset({"train": shards.train, "test": shards.test}[split])


def open_tfds(spec: str, data_config: ConfigDict, split: str, captions: bool) -> Source:
    """A dataset of tensorflow_datasets: "tfds:coco_captions/train", "tfds:NAME/CONFIG:VERSION/SPLIT"."""
    name, _, tfds_split = spec.removeprefix("tfds:").rpartition("/")
    if not (spec.startswith("tfds:") and name and tfds_split):
        raise UserError(f"the source {spec!r} is not of the form tfds:NAME/SPLIT, such as tfds:coco_captions/train")
    return TfdsSource(name, tfds_split, data_dir=data_config.tfds_dir or None, require_captions=captions)


def open_labelled(spec: str, data_config: ConfigDict, split: str, captions: bool) -> Source:
    """Labelled images in the format that the prefix of the specification names."""
    reader, _, location = spec.partition(":")
    if captions:
        raise UserError(f"the source {spec!r} has labels and no captions, which training needs")
    return labelled.READERS[reader](location)


def open_local_folder(spec: str, data_config: ConfigDict, split: str, captions: bool) -> Source:
    """A folder: "folder:FOLDER" or "FOLDER"."""
    return open_folder(
        local_path(spec.removeprefix("folder:"), "the source"),
        functools.partial(open_shards, data_config=data_config, split=split, captions=captions),
        train=captions,
        captions_per_line=data_config.captions_per_line,
    )


def open_shards(spec: str | list[str], data_config: ConfigDict, split: str, captions: bool) -> WebDataset:
    """Tar shards in img2dataset's layout."""
    return WebDataset(
        spec,
        require_captions=captions,
        captions_per_line=data_config.captions_per_line,
        limits=ReadLimits(data_config.request_timeout, data_config.read_timeout),
    )
