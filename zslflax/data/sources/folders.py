"""Opens a folder as what it holds: images with captions, a folder or a tar for each class, shards, or a table."""

from collections.abc import Callable, Sequence
from pathlib import Path

from zslflax.data.images import is_clutter
from zslflax.data.sources.base import Source
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
from zslflax.data.sources.image_files import sorted_by_id
from zslflax.data.sources.labelled import ClassTars, read_class_folders
from zslflax.data.sources.webdataset import WebDataset
from zslflax.errors import MissingFileError, UserError

TAR_ENDINGS = (".tar", ".tar.gz", ".tgz")  # compressed ones are refused with the command that unpacks them

OpenShards = Callable[[list[str]], WebDataset]


def open_folder(folder: Path, open_shards: OpenShards, *, train: bool, captions_per_line: bool) -> Source:
    """Opens a folder that holds one of:

        images with captions beside them, at any depth (`CaptionedFolder`);
        tar shards, beside which other files, such as img2dataset's parquet, do not count;
        for evaluation: a subfolder, or a tar without captions and labels, for each class, named by its id.

    Raises:
        MissingFileError: there is no such folder.
        UserError: it holds none of them, or no captions although `train`; the message says what was found.
    """
    if not folder.is_dir():
        raise MissingFileError(f"{folder} is not a folder: expected one of images with captions, class folders or tars")
    entries = [entry for entry in folder.iterdir() if not is_clutter(entry.name)]
    tars = [entry for entry in entries if entry.name.endswith(TAR_ENDINGS)]
    subfolders = sorted(entry.name for entry in entries if entry.is_dir())
    if tars and subfolders and not train:
        raise UserError(
            f"expected subfolders or tars named by class in {folder}, found both: {subfolders[0]}, {min(tars).name}; "
            f"give '{folder}/*.tar' for the tars"
        )
    if tars:
        shards = open_shards(sorted(map(str, tars)))
        if train or shards.has_annotations():
            return shards
        return ClassTars(shards, sorted_by_id({tar.stem: tar for tar in tars}))
    index = index_folder(folder)
    if has_annotations(index):
        source = CaptionedFolder(folder, index, require_captions=train, captions_per_line=captions_per_line)
        if train or not subfolders or source.has_captions() or has_annotations(index, (LABEL,)):
            return source  # otherwise, JSON files that describe the images of class folders
    if not len(index.keys) and (deeper := sorted(str(path) for path in folder.glob("*/**/*.tar"))):
        return open_shards(deeper)
    if train or not subfolders:
        raise UserError(
            f"{folder} holds no captions: expected tar shards, or images with a file of the same name beside each, "
            f"KEY.txt, or KEY.json with a field caption{'' if train else '; or subfolders or tars named by class'}; "
            f"found: {describe_files(index)}"
        )
    return read_class_folders(folder)


def has_annotations(index: FolderIndex, columns: Sequence[int] = (TEXT, JSON, LABEL, TEXTS)) -> bool:
    """Whether any image has a file of one of these kinds beside it."""
    return bool((index.files[:, list(columns)] >= 0).any())
