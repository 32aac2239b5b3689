"""Opens a data source by its specification, such as "train/{00000..00099}.tar" or "tfds:NAME/SPLIT"."""

from ml_collections import ConfigDict

from zslflax.data.retries import ReadLimits
from zslflax.data.sources import labelled, shapes
from zslflax.data.sources.base import Source
from zslflax.data.sources.tfds import TfdsSource
from zslflax.data.sources.webdataset import WebDataset
from zslflax.errors import UserError
from zslflax.files import expand_user


def open_source(spec: str, data_config: ConfigDict, split: str, captions: bool = True) -> Source:
    """Opens a data source.

    Args:
        spec: "shapes", the built-in procedural source; "tfds:NAME/SPLIT"; labelled images without captions,
            "folder:FOLDER", "csv:FILE", "open_images:FOLDER,LABELS.csv" or "ml_images:FOLDER,LIST.txt"
            (`zslflax.data.sources.labelled`); or else a pattern of tar shards.
        data_config: the config's field `data`, for `tfds_dir` and `shapes`.
        split: "train" or "test". For "shapes" it selects the data; other specs name their data, and must have
            captions for "train".
        captions: whether "train" needs captions.

    Raises:
        UserError: there is no such source, or it cannot serve the split.
    """
    if split not in ("train", "test"):
        raise UserError(f"split is {split!r}, expected 'train' or 'test'")
    openers = {"shapes": open_shapes, "tfds": open_tfds} | dict.fromkeys(labelled.READERS, open_labelled)
    prefix = spec.partition(":")[0]
    return openers.get(prefix, open_shards)(spec, data_config, split, captions and split == "train")


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


def open_shards(spec: str, data_config: ConfigDict, split: str, captions: bool) -> Source:
    """Tar shards in img2dataset's layout."""
    return WebDataset(
        spec,
        require_captions=captions,
        captions_per_line=data_config.captions_per_line,
        limits=ReadLimits(data_config.request_timeout, data_config.read_timeout),
    )
