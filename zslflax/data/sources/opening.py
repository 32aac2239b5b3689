"""Opens a data source by its specification, such as "train/{00000..00099}.tar", a folder or "tfds:NAME/SPLIT"."""

import os
from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from zslflax.data.addresses import is_remote
from zslflax.data.retries import ReadLimits
from zslflax.data.sources import ready_sets, shapes
from zslflax.data.sources.base import Source, SourceOptions
from zslflax.data.sources.folders import open_folder, open_shards
from zslflax.data.sources.hf_datasets import open_hf_dataset
from zslflax.data.sources.shard_patterns import expand_patterns
from zslflax.data.sources.table_columns import ChosenColumns, split_columns
from zslflax.data.sources.table_files import open_csv, open_parquet
from zslflax.data.sources.tfds import TfdsSource
from zslflax.data.sources.webdataset import WebDataset
from zslflax.errors import UserError
from zslflax.files import check_local, expand_user, local_path

LABELLED = ready_sets.READERS
TEXT_ENDINGS = (".csv", ".tsv", ".tab")


def open_source(
    spec: str, data_config: ConfigDict, split: str, captions: bool = True, images_alone: bool = False
) -> Source:
    """Opens a data source.

    Args:
        spec: a folder, which is opened as what it holds (`zslflax.data.sources.folders`); a pattern of tar shards; a
            table, "FILE.csv", "FILE.tsv" or a pattern of parquet files, where "#image=COLUMN,caption=COLUMN" may follow
            (`zslflax.data.sources.table_columns`); "hf_dataset:NAME/CONFIG:SPLIT"; "tfds:NAME/SPLIT"; "shapes", the
            built-in procedural source; or a published test set, such as "open_images:FOLDER" or "food101:FOLDER"
            (`zslflax.data.sources.ready_sets`). Prefixes say what a path is whose name does not: "folder:", "csv:",
            "tsv:", "parquet:".
        data_config: the config's field `data`, for `tfds_dir`, `captions_per_line`, the timeouts and `shapes`.
        split: "train" or "test". For "shapes" it selects the data; other specs name their data, and must have
            captions for "train".
        captions: whether "train" needs captions.
        images_alone: whether a folder's images need no labels either, and no subfolders by class.

    Raises:
        UserError: there is no such source, or it cannot serve the split.
    """
    if split not in ("train", "test"):
        raise UserError(f"split is {split!r}, expected 'train' or 'test'")
    options = SourceOptions(
        require_captions=captions and split == "train",
        images_alone=images_alone,
        captions_per_line=data_config.captions_per_line,
        limits=ReadLimits(data_config.request_timeout, data_config.read_timeout),
    )
    prefix, colon, location = spec.partition(":")
    if not colon or location.startswith("//"):
        prefix, location = "", spec  # a path, or an address
    if prefix == "shapes" or spec == "shapes":
        return open_shapes(data_config, split)
    if prefix == "tfds":
        return open_tfds(location, data_config, options)
    if prefix in LABELLED:
        return open_labelled(prefix, location, options)
    if prefix in PREFIXES:
        return PREFIXES[prefix](*split_columns(location), options)
    return open_plain(spec, options)


def open_plain(spec: str, options: SourceOptions) -> Source:
    """A source without a prefix: a folder, a table by its file's extension, or else a pattern of tar shards."""
    location, chosen = spec, ChosenColumns()
    table = spec.rpartition("#")[0]
    if table.lower().endswith((*TEXT_ENDINGS, ".parquet")) or os.path.isdir(table):
        location, chosen = split_columns(spec)
    if not is_remote(spec) and os.path.isdir(expand_user(location)):
        return open_local_folder(location, chosen, options)
    if location.lower().endswith(TEXT_ENDINGS):
        return open_csv(location, chosen, options)
    if location.lower().endswith(".parquet"):
        return open_parquet_pattern(location, chosen, options)
    return open_shards(spec, options)


def open_shapes(data_config: ConfigDict, split: str) -> Source:
    """The built-in source; its shards are written where they are missing."""
    c = data_config.shapes
    shards = shapes.ensure_shards(
        expand_user(c.root), train=c.train, test=c.test, size=c.size, noise=c.noise, seed=c.seed
    )
    return WebDataset({"train": shards.train, "test": shards.test}[split])


def open_tfds(location: str, data_config: ConfigDict, options: SourceOptions) -> Source:
    """A dataset of tensorflow_datasets: "coco_captions/train", "NAME/CONFIG:VERSION/SPLIT"."""
    name, _, tfds_split = location.rpartition("/")
    if not (name and tfds_split):
        raise UserError(f"the source 'tfds:{location}' is not of the form tfds:NAME/SPLIT, as tfds:coco_captions/train")
    folder = data_config.tfds_dir or None
    return TfdsSource(name, tfds_split, data_dir=folder, require_captions=options.require_captions)


def open_labelled(prefix: str, location: str, options: SourceOptions) -> Source:
    """Labelled images in the format that the prefix names."""
    if options.require_captions:
        raise UserError(f"the source '{prefix}:{location}' is a test set, and training needs pairs")
    return LABELLED[prefix](location)


def open_local_folder(location: str, chosen: ChosenColumns, options: SourceOptions) -> Source:
    """A folder, as what it holds."""
    return open_folder(local_path(location, "the source"), chosen, options)


def open_parquet_pattern(location: str, chosen: ChosenColumns, options: SourceOptions) -> Source:
    """The parquet files that a pattern with braces and globs matches."""
    check_local(location, "the source")
    return open_parquet([Path(path) for path in expand_patterns(location, options.limits)], chosen, options)


PREFIXES: dict[str, Callable[[str, ChosenColumns, SourceOptions], Source]] = {
    "folder": open_local_folder,
    "csv": open_csv,
    "tsv": open_csv,
    "parquet": open_parquet_pattern,
    "hf_dataset": open_hf_dataset,
}
