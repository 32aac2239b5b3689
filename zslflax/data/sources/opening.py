"""Opens a data source by its specification, such as "train/{00000..00099}.tar" or "tfds:NAME/SPLIT"."""

from pathlib import Path

from zslflax.data.sources import labelled, shapes
from zslflax.data.sources.tfds import TfdsSource
from zslflax.data.sources.webdataset import WebDataset
from zslflax.errors import UserError


def open_source(spec: str, data_config, split: str):
    """Opens a source of raw records.

    Args:
        spec: "shapes", the built-in procedural source; "tfds:NAME/SPLIT"; of labelled images without captions
            "folder:FOLDER", "csv:FILE", "open_images:FOLDER,LABELS.csv" and "ml_images:FOLDER,LIST.txt", see
            `zslflax.data.sources.labelled`; or else the pattern of tar shards.
        data_config: the config's field `data`, for `tfds_dir` and `scenes`.
        split: "train" or "test", of "shapes"; others say it in their spec, and need captions for "train".

    Returns:
        A source: `len(source)` records, where `source[i]` is a dict of `image` (encoded bytes, or uint8
        [height, width, 3]), `text` (a tuple of captions), `label` (a tuple of true classes) and `name`
        ("SHARD:KEY"), or raises `BadSample`, if possible with the sample's name as its attribute `name`.
        It may have these attributes, or None in their place: `classes`, the ids that labels count;
        `negatives`, n tuples of the classes that an image is known not to show; and `excluded`, how many of
        its images or annotations it left out, by reason.
    """
    if split not in ("train", "test"):
        raise UserError(f"split is {split!r}, expected 'train' or 'test'")
    openers = {"shapes": open_shapes, "tfds": open_tfds} | dict.fromkeys(labelled.READERS, open_labelled)
    prefix = spec.partition(":")[0]
    return openers.get(prefix, open_shards)(spec, data_config, split)


def open_shapes(spec: str, data_config, split: str):
    """The built-in source, written where it is missing."""
    c = data_config.shapes
    root = Path(c.root).expanduser()
    written = shapes.ensure(root, train=c.train, test=c.test, size=c.size, noise=c.noise, seed=c.seed)
    return WebDataset({"train": written.train, "test": written.test}[split])


def open_tfds(spec: str, data_config, split: str):
    """A dataset of tensorflow_datasets: "tfds:coco_captions/train", "tfds:NAME/CONFIG:VERSION/SPLIT"."""
    name, _, part = spec.removeprefix("tfds:").rpartition("/")
    if not (spec.startswith("tfds:") and name and part):
        raise UserError(f"the source {spec!r} is not of the form tfds:NAME/SPLIT, such as tfds:coco_captions/train")
    return TfdsSource(name, part, data_dir=data_config.tfds_dir or None, require_captions=split == "train")


def open_labelled(spec: str, data_config, split: str):
    """Labelled images in the format that the prefix names."""
    reader, _, where = spec.partition(":")
    if split == "train":
        raise UserError(f"the source {spec!r} has labels and no captions, which training needs")
    return labelled.READERS[reader](where)


def open_shards(spec: str, data_config, split: str):
    """Tar shards, in img2dataset's layout."""
    return WebDataset(spec, require_captions=split == "train")
