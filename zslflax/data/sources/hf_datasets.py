"""Datasets of Hugging Face's library `datasets`: saved to disk, or by name. Their Arrow files are read in place."""

import re
from pathlib import Path

from zslflax.data.sources.arrow_files import ArrowTable
from zslflax.data.sources.base import SourceOptions
from zslflax.data.sources.table import TableSource
from zslflax.data.sources.table_columns import ChosenColumns, find_columns
from zslflax.errors import MissingFileError, MissingLibraryError, UserError
from zslflax.files import expand_user, read_json

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+){0,2}")
STATE_FILE, SPLITS_FILE = "state.json", "dataset_dict.json"  # of a saved dataset, and of saved splits


def open_hf_dataset(location: str, chosen: ChosenColumns, options: SourceOptions) -> TableSource:
    """Opens "FOLDER", which has a saved dataset, or "NAME:SPLIT", "USER/NAME:SPLIT" or "USER/NAME/CONFIG:SPLIT".

    A name is one of the Hub, which `datasets` downloads once, or a folder of files that it can load. Without a split it
    is "train" for training, and else "test".

    Raises:
        UserError: there is no such dataset, config or split.
        MissingLibraryError: `datasets` is not installed, and the dataset is not a saved one.
    """
    if is_saved(folder := expand_user(location)):
        return open_saved(folder, chosen, options)
    name, _, split = re.sub(r"\[.*\]$", "", location).partition(":")
    if split and location.endswith("]"):
        raise UserError(f"hf_dataset:{location} is a part of a split; give a whole split, hf_dataset:{name}:{split}")
    split = split or ("train" if options.require_captions else "test")
    paths = prepare(name, split)
    return open_arrow(paths, chosen, options, f"hf_dataset:{name}:{split}", paths[0].parent)


def is_saved(folder: Path) -> bool:
    """Whether a folder is what `save_to_disk` writes."""
    return (folder / STATE_FILE).is_file() or (folder / SPLITS_FILE).is_file()


def open_saved(folder: Path, chosen: ChosenColumns, options: SourceOptions) -> TableSource:
    """Opens what `save_to_disk` has written; of several splits, "train" for training, and else "test".

    Raises:
        UserError: the split is missing, or the files are damaged.
    """
    if (folder / SPLITS_FILE).is_file():
        splits = read_json(folder / SPLITS_FILE).get("splits", [])
        split = "train" if options.require_captions else "test"
        if split not in splits:
            raise UserError(
                f"{folder} has no split {split}, only {', '.join(splits)}; give {folder}/{(splits or ['SPLIT'])[0]}"
            )
        folder = folder / split
    state = read_json(folder / STATE_FILE)
    if state.get("_indices_data_files"):
        raise UserError(
            f"{folder} has the order of its rows in a file of its own; save it again with datasets 2 or later"
        )
    paths = [folder / file["filename"] for file in state.get("_data_files", [])]
    if not paths:
        raise UserError(f"{folder} has no data: {STATE_FILE} names no files")
    return open_arrow(paths, chosen, options, str(folder), folder)


def open_arrow(
    paths: list[Path], chosen: ChosenColumns, options: SourceOptions, name: str, folder: Path
) -> TableSource:
    """Opens the Arrow files of a dataset."""
    table = ArrowTable(paths)
    columns = find_columns(table.table.schema, chosen, name, require_captions=options.require_captions)
    return TableSource(table, columns, name=name, folder=folder, options=options)


def prepare(name: str, split: str) -> list[Path]:
    """The Arrow files of a split, which `datasets` downloads and converts once."""
    try:
        import datasets
    except ImportError as error:
        raise MissingLibraryError(
            f"hf_dataset:{name}:{split} needs the library datasets: pip install 'zslflax[datasets]'"
        ) from error
    folder, parts = expand_user(name), name.split("/")
    if not folder.is_dir() and not HUB_NAME.fullmatch(name):
        raise MissingFileError(f"hf_dataset:{name}:{split}: there is no folder {folder}; a name is USER/NAME or NAME")
    path, config = (str(folder), None) if folder.is_dir() else ("/".join(parts[:2]), "/".join(parts[2:]) or None)
    try:
        dataset = datasets.load_dataset(path, config, split=split)
    except (ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"hf_dataset:{name}:{split} cannot be loaded: {error}") from error
    return [Path(file["filename"]) for file in dataset.cache_files]
