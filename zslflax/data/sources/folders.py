"""Opens a folder as what it holds: images with captions, a folder or a tar for each class, shards, or a table."""

import re
from collections.abc import Sequence
from pathlib import Path

from zslflax.data.images import is_clutter
from zslflax.data.sources.base import Source, SourceOptions
from zslflax.data.sources.captioned_folder import (
    JSON,
    LABEL,
    TEXT,
    TEXTS,
    CaptionedFolder,
    FolderIndex,
    describe_files,
    index_folder,
)
from zslflax.data.sources.hf_datasets import is_saved, open_saved
from zslflax.data.sources.image_files import sorted_by_id
from zslflax.data.sources.labelled import ClassTars, read_class_folders
from zslflax.data.sources.table_columns import ChosenColumns
from zslflax.data.sources.table_files import open_parquet
from zslflax.data.sources.webdataset import WebDataset
from zslflax.errors import MissingFileError, UserError

SPLITS = ("train", "test", "validation", "val")
TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")  # compressed ones are refused with the command that unpacks them


def open_folder(folder: Path, chosen: ChosenColumns, options: SourceOptions) -> Source:
    """Opens a folder that holds one of:

        a dataset that Hugging Face's `datasets` has saved;
        tar shards, beside which other files, such as img2dataset's parquet, do not count;
        images with captions beside them, at any depth (`CaptionedFolder`);
        parquet files;
        images alone, at any depth, where these are enough;
        for evaluation: a subfolder, or a tar without captions and labels, for each class, named by its id.

    Args:
        folder: to open.
        chosen: columns of a table, as `split_columns` returns them.
        options: of the source.

    Raises:
        MissingFileError: there is no such folder.
        UserError: it holds none of them, or no captions although they are required; the message says what was found.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a folder: expected one of images with captions, class folders or tars")
    train = options.require_captions
    if is_saved(folder):
        return open_saved(folder, chosen, options)
    entries = [entry for entry in folder.iterdir() if not is_clutter(entry.name)]
    tars = [entry for entry in entries if entry.name.endswith(TAR_ENDINGS)]
    subfolders = sorted(entry.name for entry in entries if entry.is_dir())
    if tars and subfolders and not train:
        raise UserError(
            f"expected subfolders or tars named by class in {folder}, found both: {subfolders[0]}, {min(tars).name}; "
            f"give '{folder}/*.tar' for the tars"
        )
    if tars:
        shards = open_shards(sorted(map(str, tars)), options)
        if train or shards.has_annotations():
            return shards
        return ClassTars(shards, sorted_by_id({tar.stem: tar for tar in tars}))
    index = index_folder(folder)
    if options.images_alone and index.keys:
        return CaptionedFolder(folder, index, options)
    if has_annotations(index):
        source = CaptionedFolder(folder, index, options)
        if train or not subfolders or source.has_captions() or has_annotations(index, (LABEL,)):
            return source  # otherwise, JSON files that describe the images of class folders
    if not len(index.keys) and "parquet" in index.others:
        return open_parquet(parquet_files(folder, "train" if train else "test"), chosen, options)
    if not len(index.keys) and "tar" in index.others:
        return open_shards(sorted(map(str, folder.rglob("*.tar"))), options)
    if train or not subfolders:
        raise UserError(
            f"{folder} holds no captions: expected tar shards, or images with a file of the same name beside each, "
            f"KEY.txt, or KEY.json with a field caption{'' if train else '; or subfolders or tars named by class'}; "
            f"found: {describe_files(index)}"
        )
    return read_class_folders(folder)


def open_shards(spec: str | list[str], options: SourceOptions) -> WebDataset:
    """Tar shards in img2dataset's layout."""
    return WebDataset(
        spec,
        require_captions=options.require_captions,
        captions_per_line=options.captions_per_line,
        limits=options.limits,
    )


def parquet_files(folder: Path, split: str) -> list[Path]:
    """The parquet files below a folder, sorted; of one split, where names begin with splits, as train-0-of-2.parquet.

    Raises:
        UserError: there are files of other splits and none of this one.
    """
    paths = sorted(path for path in folder.rglob("*.parquet") if not path.name.startswith("."))
    names = {path: re.split(r"[-_.]", path.name)[0] for path in paths}
    if not set(names.values()) & set(SPLITS):
        return paths
    if not (split_paths := [path for path in paths if names[path] == split]):
        raise UserError(
            f"{folder} has parquet files of {', '.join(sorted(set(names.values())))}, and none of {split}; give a "
            f"pattern of files, such as {paths[0].parent}/{names[paths[0]]}-*.parquet"
        )
    return split_paths


def has_annotations(index: FolderIndex, columns: Sequence[int] = (TEXT, JSON, LABEL, TEXTS)) -> bool:
    """Whether any image has a file of one of these kinds beside it."""
    return bool((index.files[:, list(columns)] >= 0).any())
