"""Webdataset tar shards, in img2dataset's layout (KEY.jpg, KEY.txt, KEY.json), read in place in any order."""

import glob
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from zslflax.data import storage
from zslflax.data.images import BadSample
from zslflax.data.sources.tar_format import UNREADABLE
from zslflax.data.sources.tar_index import SUFFIX, TarIndex, load_indices, raise_missing
from zslflax.errors import MissingFileError, UserError

IMAGE, TEXT, JSON, LABEL = range(4)  # columns of the tables of members
PROBED = 100  # samples whose JSON is looked at for captions
LARGEST = 1 << 28, 1 << 20, 1 << 20, 1 << 20  # bytes of a member, by column; `images.MAX_PIXELS` take fewer
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


class WebDataset:
    """Raw records of tar shards, as `zslflax.data.pipeline.open_source` describes them.

    Every key with an image is a sample, in the order of the shards. Its caption is KEY.txt, or else the field
    `caption` of KEY.json, or none; its labels are the whole numbers in KEY.cls, separated by blanks or
    commas, or else in the field `label` or `labels` of KEY.json. Threads may share it, and it can be pickled.

    Args:
        shards: a pattern or several: braces ("train/{00000..00331}.tar", "{a,b}.tar"), globs. Addresses
            (gs://, s3://, https://) are read by ranges, one for a sample; over HTTP there are no globs.
        image_keys: extensions of images; the first that a sample has counts.
        text_key: extension of captions.
        label_key: extension of labels.
        require_captions: whether shards without any caption are an error.

    Raises:
        FileNotFoundError: names the shards that are missing, or the pattern that fits no file.
        ValueError: shards that are no tar files, unless only one in twenty is, which is logged; no images, or
            no captions: says what was found instead.
    """

    classes, negatives, excluded = None, None, {}

    def __init__(
        self,
        shards: str | Sequence[str],
        *,
        image_keys: Sequence[str] = ("jpg", "jpeg", "png", "webp"),
        text_key: str = "txt",
        label_key: str = "cls",
        require_captions: bool = False,
    ):
        self.paths, indices = map(list, zip(*load_indices(expand(shards)), strict=True))
        wanted = tuple(image_keys), (text_key,), ("json",), (label_key,)
        self.keys, offsets, sizes = zip(*(tabulate(index, wanted) for index in indices), strict=True)
        self.stamps = [tuple(index.stamp.tolist()) for index in indices]
        self.starts = np.cumsum([0, *map(len, self.keys)])  # the number of each shard's first sample
        self.offsets, self.sizes = np.concatenate(offsets), np.concatenate(sizes)  # int64 [n, 4]; -1: none
        shown = f"the {len(self.paths)} shards ({storage.shown(self.paths[0])}, …)"
        if not len(self):
            raise UserError(
                f"none of {shown} has an image: expected members "
                f"KEY.EXTENSION with one of {', '.join(image_keys)}; found: {found(indices)}"
            )
        if require_captions and not self.has_captions():
            raise UserError(
                f"{shown} have no captions: expected KEY.{text_key}, or "
                f"KEY.json with a field caption; found: {found(indices)}{self.fields_of_json()}"
            )

    def __len__(self) -> int:
        return len(self.sizes)

    def shard_of(self, index: int) -> int:
        """Which of `paths` has the sample."""
        return int(np.searchsorted(self.starts, index, "right")) - 1

    def __getitem__(self, index: int) -> dict:
        shard = self.shard_of(index)
        try:
            image, text, described, label = self.read(shard, index)
            text, label = describe(text, described, label)
        except BadSample as error:
            error.name = self.name(shard, index)
            raise
        return {"image": image, "text": text, "label": label, "name": self.name(shard, index)}

    def name(self, shard: int, index: int) -> str:
        key = self.keys[shard][index - self.starts[shard]]
        return f"{storage.shown(self.paths[shard])}:{key.decode(errors='replace')}"

    def names(self) -> Iterator[str]:
        """Yields the records' names, in order, without reading them."""
        for shard, (start, stop) in enumerate(itertools.pairwise(self.starts.tolist())):
            yield from (self.name(shard, index) for index in range(start, stop))

    def read(self, shard: int, index: int) -> list[bytes | None]:
        """The contents of a sample's members: image, text, JSON, label; None for what it lacks."""
        offsets, sizes = self.offsets[index].tolist(), self.sizes[index].tolist()
        there = [column for column, size in enumerate(sizes) if size >= 0]
        spans = [(offsets[column], sizes[column]) for column in there]
        for column, (offset, size) in zip(there, spans, strict=True):
            if offset == UNREADABLE:
                raise BadSample("one of its files is stored sparse, which cannot be read in place")
            if size > LARGEST[column]:
                raise BadSample(f"one of its files has more than the {LARGEST[column]:,} bytes allowed")
        contents, read = [None] * len(sizes), storage.read(self.paths[shard], self.stamps[shard], spans)
        for column, data in zip(there, read, strict=True):
            if len(data) < sizes[column]:
                raise BadSample("the shard ends before the end of this sample")
            contents[column] = data
        return contents

    def has_captions(self) -> bool:
        """Whether any sample has a text file, or any of the first ones a caption in its JSON."""
        if (self.sizes[:, TEXT] >= 0).any():
            return True
        return any(isinstance(fields.get("caption"), str) for fields in self.probe_json())

    def fields_of_json(self) -> str:
        fields = list(dict.fromkeys(itertools.chain.from_iterable(self.probe_json())))
        return f"; fields of KEY.json: {', '.join(fields)}" if fields else ""

    def probe_json(self):
        """Yields the fields of the first JSON files that are readable."""
        for index in np.flatnonzero(self.sizes[:, JSON] >= 0)[:PROBED]:
            try:
                yield parse(self.read(self.shard_of(index), int(index))[JSON])
            except BadSample:
                pass


def expand(patterns: str | Sequence[str]) -> list[str]:
    """The files that patterns with braces and globs stand for, in order; remote ones may be missing.

    Raises:
        FileNotFoundError: names what is missing.
        ValueError: no pattern at all, a command, or a glob where files cannot be listed.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise UserError("no shards are given: expected a pattern such as train/{00000..00331}.tar")
    paths = []
    for pattern in patterns:
        if pattern.startswith("pipe:"):
            raise UserError(f"{pattern} is a command: shards are read in place, by path or address")
        remote = storage.is_remote(pattern)
        for name in expand_braces(pattern if remote else str(Path(pattern).expanduser())):
            paths += expand_remote_glob(name) if remote else expand_glob(name)
    missing = [path for path in paths if not (storage.is_remote(path) or Path(path).is_file())]
    raise_missing(missing, len(paths))
    return paths


def expand_glob(name: str) -> list[str]:
    if not any(c in name for c in "*?["):
        return [str(Path(name))]
    names = sorted(str(Path(n)) for n in glob.glob(name, recursive=True) if not n.endswith(SUFFIX))
    if not names:
        raise MissingFileError(f"no shard fits the pattern {name}")
    return names


def expand_remote_glob(name: str) -> list[str]:
    web = name.startswith(("http://", "https://"))  # where ? begins a query
    if not any(c in name for c in ("*[" if web else "*?[")):
        return [name]
    if web:
        raise UserError(f"{name} is a glob, but files cannot be listed over HTTP: use braces, {{000..331}}")
    system, path = storage.file_system(name)
    names = sorted(n for n in storage.retried(name, lambda: system.glob(path)) if not n.endswith(SUFFIX))
    if not names:
        raise MissingFileError(f"no shard fits the pattern {name}")
    return [system.unstrip_protocol(n) for n in names]


def expand_braces(pattern: str) -> list[str]:
    """Replaces "{a,b}" and "{000..331}" by each of their values, the rightmost the fastest."""
    match = BRACES.search(pattern)
    if not match:
        return [pattern]
    values = match[1].split(",")
    if bounds := RANGE.fullmatch(match[1]):
        first, last = int(bounds[1]), int(bounds[2])
        width = max(map(len, bounds.groups())) if any(re.match("0.", b) for b in bounds.groups()) else 0
        step = 1 if first <= last else -1
        values = [f"{number:0{width}}" for number in range(first, last + step, step)]
    rest = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + value + tail for value in values for tail in rest]


def tabulate(index: TarIndex, wanted: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The samples of a shard that have an image: keys bytes [n], offsets and sizes int64 [n, columns].

    Args:
        index: of the shard.
        wanted: for each column, the extensions that may fill it; the first that a sample has counts, -1: none.
    """
    offsets = np.full((len(index.keys), len(wanted)), -1, np.int64)
    sizes = np.full_like(offsets, -1)
    numbers = {extension: number for number, extension in enumerate(index.extensions.tolist())}
    for column, extensions in enumerate(wanted):
        for extension in reversed(extensions):
            rows = index.extension == numbers.get(extension.lower(), -1)
            offsets[index.sample[rows], column] = index.offset[rows]
            sizes[index.sample[rows], column] = index.size[rows]
    kept = sizes[:, IMAGE] >= 0
    return index.keys[kept], offsets[kept], sizes[kept]


def found(indices: Sequence[TarIndex]) -> str:
    """How many members of which extension there are."""
    counts = Counter()
    for index in indices:
        number = np.bincount(index.extension, minlength=len(index.extensions)).tolist()
        counts.update(dict(zip(index.extensions.tolist(), number, strict=True)))
    return ", ".join(f"{number} × {extension}" for extension, number in counts.most_common(20)) or "nothing"


def describe(text: bytes | None, described: bytes | None, label: bytes | None) -> tuple[tuple, tuple]:
    """Captions and labels out of a sample's text, JSON and label files.

    Raises:
        BadSample: JSON or labels that are damaged. Labels in JSON that are not numbers are none of ours.
    """
    captions = () if text is None else (text.decode(errors="replace").strip(),)
    labels = () if label is None else class_ids(label)
    # Most captions come from text files and most JSON has no labels: parse only what is needed.
    if described is not None and (not captions or (label is None and b'"label' in described)):
        fields = parse(described)
        if not captions and isinstance(fields.get("caption"), str):
            captions = (fields["caption"].strip(),)
        if label is None:
            value = fields.get("label", fields.get("labels", ()))
            labels = tuple(value) if isinstance(value, list) else (value,)
            labels = labels if all(type(c) is int for c in labels) else ()
    return captions, tuple(dict.fromkeys(labels))


def parse(data: bytes) -> dict:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:  # the latter of a thousand brackets
        raise BadSample(f"its JSON is damaged: {error}") from error
    if not isinstance(fields, dict):
        raise BadSample(f"its JSON is a {type(fields).__name__}, expected an object")
    return fields


def class_ids(data: bytes) -> tuple[int, ...]:
    try:
        return tuple(map(int, data.replace(b",", b" ").split()))
    except ValueError:
        raise BadSample(f"its label is {data[:40]!r}, expected whole numbers") from None
