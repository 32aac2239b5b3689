"""Labelled images: the sources of the readers of datasets, and folders and tars by class."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from zslflax.data.images import is_clutter
from zslflax.data.sources.base import Annotations, Record
from zslflax.data.sources.image_files import (
    existing_keys,
    find_images,
    fingerprint_of_files,
    format_examples,
    read_image_file,
    sorted_by_id,
)
from zslflax.data.sources.webdataset import WebDataset
from zslflax.errors import MissingFileError, UserError
from zslflax.files import local_path

log = logging.getLogger("zslflax")


class LabelledImages:
    """Image files with labels or captions, a `Source`.

    Args:
        paths: of n images.
        labels: n tuples of the indices of the true classes.
        captions: n tuples of captions, or None: there are none.
        classes: ids of the classes, or None: labels are indices into a list that others have.
        negatives: n tuples of the classes that are known not to be on the image, or None.
        excluded: how many images or annotations were left out, by reason.
        class_names: of the classes, where their ids are codes; or None.
    """

    def __init__(
        self,
        paths: Iterable[str | Path],
        labels: Iterable[tuple[int, ...]],
        classes: list[str] | None = None,
        negatives: Sequence[tuple[int, ...]] | None = None,
        excluded: Mapping[str, int] | None = None,
        *,
        captions: Sequence[tuple[str, ...]] | None = None,
        class_names: list[str] | None = None,
    ):
        self.captions, self.class_names = captions, class_names
        self.paths, self.labels, self.classes = list(map(str, paths)), list(labels), classes
        self.negatives, self.excluded = negatives, dict(excluded or {})

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Record:
        return Record(image=read_image_file(self.paths[index]), **self.read_annotations(index))

    def read_annotations(self, index: int) -> Annotations:
        """The labels and captions of an image; reads no file."""
        text = self.captions[index] if self.captions is not None else ()
        return Annotations(text=text, label=self.labels[index], name=self.paths[index])

    def fingerprint(self) -> str:
        """Of the paths, sizes and modification times of all images."""
        return fingerprint_of_files(self.paths)

    def names(self) -> Iterator[str]:
        """Yields the paths of all images."""
        return iter(self.paths)


class ClassTars:
    """Tars that each hold the images of one class (n01440764.tar, …), a `Source`.

    Args:
        shards: of all tars that can be read.
        tars: all of them, in the order of the classes.
        class_names: of the classes, where their ids are codes; or None.

    Attributes:
        classes: the tars' names without .tar.
    """

    negatives: list[tuple[int, ...]] | None = None

    def __init__(self, shards: WebDataset, tars: Sequence[Path], class_names: list[str] | None = None):
        self.shards, self.excluded, self.class_names = shards, shards.excluded, class_names
        self.classes: list[str] | None = [tar.stem for tar in tars]
        class_of_tar = {str(tar): label for label, tar in enumerate(tars)}
        self.labels = [class_of_tar[path] for path in self.shards.paths]  # a tar that cannot be read is left out

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, index: int) -> Record:
        record = self.shards[index]
        record["label"] = (self.labels[self.shards.shard_of(index)],)
        return record

    def read_annotations(self, index: int) -> Annotations:
        """The class of an image; reads no image."""
        annotations = self.shards.read_annotations(index)
        annotations["label"] = (self.labels[self.shards.shard_of(index)],)
        return annotations

    def fingerprint(self) -> str:
        """Of the tars."""
        return self.shards.fingerprint()

    def names(self) -> Iterator[str]:
        """Yields the names of all records."""
        return self.shards.names()


def read_class_folders(folder: Path) -> LabelledImages:
    """Reads a subfolder of images for each class, named by its id; the classes are in the order of ids.

    Raises:
        UserError: there are no subfolders, or none of them has an image.
    """
    entries = {entry.name: entry for entry in folder.iterdir() if entry.is_dir() and not is_clutter(entry.name)}
    subfolders = sorted_by_id(entries)
    class_paths = [find_images(subfolder) for subfolder in subfolders]
    if empty := [subfolder.name for subfolder, paths in zip(subfolders, class_paths) if not paths]:
        log.warning("%d classes of %s have no image%s", len(empty), folder, format_examples(empty))
    images = [path for paths in class_paths for path in paths]
    if not images:
        raise UserError(f"none of the {len(subfolders)} subfolders of {folder} has an image")
    labels = [(label,) for label, paths in enumerate(class_paths) for _ in paths]
    return LabelledImages(images, labels, [subfolder.name for subfolder in subfolders])


def existing_labelled_images(
    root: Path, pairs: Sequence[tuple[str, int]], classes: list[str], class_names: list[str] | None = None
) -> LabelledImages:
    """The images of a folder that exist, with a label each."""
    paths = {path: root / path for path, _ in pairs}
    present = set(existing_keys(paths, str(root)))
    kept = [(path, label) for path, label in pairs if path in present]
    return LabelledImages(
        [paths[path] for path, _ in kept],
        [(label,) for _, label in kept],
        classes,
        excluded={"missing_images": len(paths) - len(present)} if len(present) < len(paths) else {},
        class_names=class_names,
    )


def existing_folder_and_file(spec: str, form: str) -> tuple[Path, Path]:
    """The two paths in "FOLDER,FILE", which must exist.

    Args:
        spec: to parse.
        form: of the whole specification, for messages.
    """
    parts = [local_path(part, "the source") for part in spec.split(",")]
    if len(parts) != 2:
        raise UserError(f"expected {form}, found {spec!r}")
    if not parts[0].is_dir():
        raise MissingFileError(f"{parts[0]} is not a folder; expected {form}")
    if not parts[1].is_file():
        raise MissingFileError(f"there is no file {parts[1]}; expected {form}")
    return parts[0], parts[1]
