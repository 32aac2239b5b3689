"""A folder of images with files of the same names beside them that hold their captions and labels."""

import collections
import dataclasses
import itertools
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from zslflax.data.images import IMAGE_EXTENSIONS, BadSample, is_clutter
from zslflax.data.sources.base import Annotations, Record, SourceOptions
from zslflax.data.sources.image_files import (
    PackedNames,
    fingerprint_of_files,
    format_examples,
    read_image_file,
    starts_like_image,
)
from zslflax.data.sources.sample_files import captions_in_json, parse_captions_and_labels, parse_json
from zslflax.errors import UserError
from zslflax.files import read_bytes

log = logging.getLogger("zslflax")

IMAGE, TEXT, JSON, LABEL, TEXTS = range(5)  # columns of `FolderIndex.files`
ANNOTATIONS = {"txt": TEXT, "json": JSON, "cls": LABEL, "txt.json": TEXTS}
MAX_SIZE = 1 << 20  # bytes of a file beside an image
PROBED_JSON = 100  # files in which captions are looked for


@dataclasses.dataclass(frozen=True)
class FolderIndex:
    """The files of a folder that belong to images: n images.

    Attributes:
        keys: n, sorted: the images' paths in the folder without their extensions.
        extensions: the spellings of extensions that occur.
        files: int16 [n, 5], the index in `extensions` of an image's own extension and of those of the files beside it;
            -1: there is no such file.
        without_image: the keys of annotations without an image.
        same_key: images of the same key as others, which are preferred for their extension.
        others: how many other files there are, by extension.
    """

    keys: list[str]
    extensions: list[str]
    files: np.ndarray
    without_image: list[str]
    same_key: int
    others: dict[str, int]


class CaptionedFolder:
    """The images below a folder that have captions or labels beside them, or all of them; a `Source`.

    The files are those of a tar shard, unpacked: the captions of KEY.jpg are in KEY.txt, KEY.txt.json or KEY.json, its
    labels in KEY.cls or KEY.json (`zslflax.data.sources.webdataset`). They are read when a sample is.

    Args:
        folder: of the images; they may be in folders below it.
        index: of the folder.
        options: whether captions are required or images alone are enough, and whether each line of KEY.txt is one.

    Attributes:
        excluded: `no_caption`, images with no such file beside them; `no_image`, captions without an image;
            `same_key`, further images of one key.

    Raises:
        UserError: there are no images with captions; the message says what was found instead.
    """

    classes: list[str] | None = None
    negatives: list[tuple[int, ...]] | None = None

    def __init__(self, folder: Path, index: FolderIndex, options: SourceOptions):
        annotated = np.any(index.files[:, TEXT:] >= 0, axis=1) | options.images_alone
        self.folder, self.captions_per_line, self.extensions = str(folder), options.captions_per_line, index.extensions
        self.keys, self.files = PackedNames(itertools.compress(index.keys, annotated.tolist())), index.files[annotated]
        if not len(self) or (options.require_captions and not self.has_captions()):
            raise UserError(
                f"none of the {len(index.keys)} images in {folder} has a caption: expected a file of the same name "
                f"beside it, KEY.txt, or KEY.json with a field caption or captions; found: {describe_files(index)}"
            )
        bare = list(itertools.compress(index.keys, (~annotated).tolist()))
        counts = {"no_caption": len(bare), "no_image": len(index.without_image), "same_key": index.same_key}
        self.excluded = {reason: count for reason, count in counts.items() if count}
        for count, problem, examples in (
            (len(bare), f"of {len(index.keys)} images have no caption beside them and are left out", bare),
            (len(index.without_image), "captions have no image beside them", index.without_image),
            (index.same_key, "images have the name of another image, with another extension, and are left out", []),
        ):
            if count:
                log.warning("%s: %d %s%s", folder, count, problem, format_examples(examples))
        if index.others:
            log.info("%s: other files: %s", folder, describe_counts(index.others))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> Record:
        return Record(image=read_image_file(self.path(index, IMAGE)), **self.read_annotations(index))

    def path(self, index: int, column: int) -> str:
        """The path of an image or of a file beside it."""
        return join_extension(os.path.join(self.folder, self.keys[index]), self.extensions[self.files[index, column]])

    def read_annotations(self, index: int) -> Annotations:
        """Reads the files beside an image."""
        name = self.path(index, IMAGE)
        try:
            text, fields, label, texts = (self.read_file(index, column) for column in (TEXT, JSON, LABEL, TEXTS))
            captions, labels = parse_captions_and_labels(text, fields, label, texts, self.captions_per_line)
        except BadSample as error:
            error.name = name
            raise
        return Annotations(text=captions, label=labels, name=name)

    def read_file(self, index: int, column: int) -> bytes | None:
        """The contents of a file beside an image; None if there is none."""
        if self.files[index, column] < 0:
            return None
        path = self.path(index, column)
        try:
            return read_bytes(Path(path), MAX_SIZE)
        except UserError as error:
            raise BadSample(f"the file beside it cannot be read: {str(error).replace(path, 'it')}") from error

    def has_captions(self) -> bool:
        """Whether any image has a file of texts, or any of the first JSON files has a caption."""
        if (self.files[:, [TEXT, TEXTS]] >= 0).any():
            return True
        for index in np.flatnonzero(self.files[:, JSON] >= 0)[:PROBED_JSON]:
            try:
                if captions_in_json(parse_json(self.read_file(int(index), JSON) or b"")):
                    return True
            except BadSample:
                pass
        return False

    def fingerprint(self) -> str:
        """Of the images' paths in the folder, their sizes and modification times."""
        return fingerprint_of_files((self.path(index, IMAGE) for index in range(len(self))), self.folder)

    def names(self) -> Iterator[str]:
        """Yields the paths of all images."""
        return (self.path(index, IMAGE) for index in range(len(self)))


def index_folder(folder: Path) -> FolderIndex:
    """Finds the images below a folder and the files beside them, without `images.CLUTTER`.

    A file beside a caption is also an image where its first bytes say so, under any extension or none.
    """
    rank = {extension: number for number, extension in enumerate(IMAGE_EXTENSIONS)}
    images: dict[str, str] = {}  # from a key to the extension of its image
    beside: dict[str, dict[int, str]] = collections.defaultdict(dict)  # from a key to extensions by column
    unnamed: dict[str, str] = {}  # from a key to the extension of a file of another kind
    others: collections.Counter[str] = collections.Counter()
    same_key = 0
    for path, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_clutter(name)]
        prefix = os.path.relpath(path, folder) + os.sep if path != str(folder) else ""
        for name in sorted(names):
            key, _, extension = name.rpartition(".")
            if is_clutter(name):
                continue
            if extension.lower() in rank and key:
                other = images.get(prefix + key)
                same_key += other is not None
                if other is None or rank[extension.lower()] < rank[other.lower()]:
                    images[prefix + key] = extension
                continue
            if key.lower().endswith(".txt") and extension.lower() == "json":
                key, extension = name[: -len(".txt.json")], name[-len("txt.json") :]
            if key and extension.lower() in ANNOTATIONS:
                beside[prefix + key][ANNOTATIONS[extension.lower()]] = extension
            else:
                others[extension.lower() if key else "no extension"] += 1
                unnamed[prefix + (key or name)] = extension if key else ""
    for key in unnamed.keys() & beside.keys() - images.keys():
        extension = unnamed[key]
        if starts_like_image(join_extension(os.path.join(folder, key), extension)):
            images[key] = extension
            others[extension.lower() or "no extension"] -= 1
    keys = sorted(images)
    numbers: dict[str, int] = {}
    files = np.full((len(keys), 5), -1, np.int16)
    for row, key in enumerate(keys):
        for column, extension in {IMAGE: images[key], **beside.get(key, {})}.items():
            files[row, column] = numbers.setdefault(extension, len(numbers))
    without_image = sorted(beside.keys() - images.keys())
    return FolderIndex(keys, list(numbers), files, without_image, same_key, dict(+others))


def join_extension(key: str, extension: str) -> str:
    """KEY.EXTENSION, or KEY alone where there is no extension."""
    return f"{key}.{extension}" if extension else key


def describe_files(index: FolderIndex) -> str:
    """How many files of each kind a folder has, for an error message."""
    counts: collections.Counter[str] = collections.Counter(index.others)
    for number, count in enumerate(np.bincount(index.files[index.files >= 0], minlength=len(index.extensions))):
        counts[index.extensions[number].lower()] += int(count)
    counts["txt, json or cls without an image"] += len(index.without_image)
    return describe_counts(+counts)


def describe_counts(counts: dict[str, int]) -> str:
    """The largest counts, for a message.

    >>> describe_counts({"txt": 1, "jpg": 3})
    '3 × jpg, 1 × txt'
    """
    shown = [f"{count} × {kind}" for kind, count in collections.Counter(counts).most_common(20)]
    return ", ".join(shown) or "nothing"
