"""Webdataset tar shards in img2dataset's layout (KEY.jpg, KEY.txt, KEY.json), read in place in any order."""

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from zslflax.data import storage
from zslflax.data.images import IMAGE_EXTENSIONS, BadSample
from zslflax.data.sources.base import Annotations, Record, hash_values
from zslflax.data.sources.shard_patterns import expand_patterns
from zslflax.data.sources.tar_format import SPARSE
from zslflax.data.sources.tar_index import TarIndex, load_indexes
from zslflax.errors import UserError

IMAGE, TEXT, JSON, LABEL = range(4)  # columns of `WebDataset.offsets` and `sizes`
MAX_SIZE = 1 << 28, 1 << 20, 1 << 20, 1 << 20  # bytes of a member, by column; `images.MAX_PIXELS` need fewer
PROBED_JSON = 100  # JSON members in which captions are looked for


class WebDataset:
    """The records of tar shards, a `Source`.

    Every key with an image is a sample, in the order of the shards. Its caption is KEY.txt, or else the field
    `caption` of KEY.json, or none. Its labels are the whole numbers in KEY.cls, separated by blanks or commas, or
    else in the field `label` or `labels` of KEY.json.

    Args:
        shards: one pattern or several: braces ("train/{00000..00331}.tar", "{a,b}.tar") and globs. Addresses
            (gs://, s3://, https://) are read by range requests, one for each sample; over HTTP there are no globs.
        image_keys: extensions of images; the first one that a sample has counts.
        text_key: extension of captions.
        label_key: extension of labels.
        require_captions: whether shards without any caption are an error.

    Attributes:
        paths: of the shards that can be read.

    Raises:
        MissingFileError: names the shards that are missing, or the pattern that no file matches.
        UserError: shards are not tar files, unless it is only one in twenty, which is logged; there are no images or
            no captions: the message says what was found instead.
    """

    classes: list[str] | None = None
    negatives: list[tuple[int, ...]] | None = None
    excluded: dict[str, int] = {}

    def __init__(
        self,
        shards: str | Sequence[str],
        *,
        image_keys: Sequence[str] = IMAGE_EXTENSIONS,
        text_key: str = "txt",
        label_key: str = "cls",
        require_captions: bool = False,
    ):
        loaded = load_indexes(expand_patterns(shards))
        self.paths, indexes = [path for path, _ in loaded], [index for _, index in loaded]
        columns = tuple(image_keys), (text_key,), ("json",), (label_key,)
        self.keys, offsets, sizes = zip(*(select_members(index, columns) for index in indexes), strict=True)
        self.fingerprints = [cast(storage.Fingerprint, tuple(index.fingerprint.tolist())) for index in indexes]
        self.starts = np.cumsum([0, *map(len, self.keys)])  # the position of each shard's first sample
        self.offsets, self.sizes = np.concatenate(offsets), np.concatenate(sizes)  # int64 [n, 4]; -1: no such member
        described = f"the {len(self.paths)} shards ({storage.without_credentials(self.paths[0])}, …)"
        if not len(self):
            raise UserError(
                f"none of {described} has an image: expected members KEY.EXTENSION with one of "
                f"{', '.join(image_keys)}; found: {count_extensions(indexes)}"
            )
        if require_captions and not self.has_captions():
            raise UserError(
                f"{described} have no captions: expected KEY.{text_key}, or KEY.json with a field caption; "
                f"found: {count_extensions(indexes)}{self.describe_json_fields()}"
            )

    def __len__(self) -> int:
        return len(self.sizes)

    def shard_of(self, index: int) -> int:
        """The position in `paths` of the shard that has the sample."""
        return int(np.searchsorted(self.starts, index, "right")) - 1

    def __getitem__(self, index: int) -> Record:
        shard = self.shard_of(index)
        name = self.sample_name(shard, index)
        try:
            image, text, fields, label = self.read_members(shard, index)
            captions, labels = parse_captions_and_labels(text, fields, label)
        except BadSample as error:
            error.name = name
            raise
        assert image is not None
        return Record(image=image, text=captions, label=labels, name=name)

    def read_annotations(self, index: int) -> Annotations:
        """Reads a sample's text, JSON and label, and not its image."""
        shard = self.shard_of(index)
        name = self.sample_name(shard, index)
        try:
            _, text, fields, label = self.read_members(shard, index, (TEXT, JSON, LABEL))
            captions, labels = parse_captions_and_labels(text, fields, label)
        except BadSample as error:
            error.name = name
            raise
        return Annotations(text=captions, label=labels, name=name)

    def fingerprint(self) -> str:
        """Of the shards' names, sizes and versions, and of where the images are in them.

        A moved folder keeps its fingerprint; the same file at another address does not.
        """
        digest = hashlib.sha256(np.ascontiguousarray(self.offsets[:, IMAGE]).tobytes())
        digest.update(np.ascontiguousarray(self.sizes[:, IMAGE]).tobytes())
        names = [path if storage.is_remote(path) else Path(path).name for path in self.paths]
        shards = list(zip(map(storage.without_credentials, names), self.fingerprints, map(len, self.keys)))
        return hash_values("shards", shards, digest.hexdigest())

    def sample_name(self, shard: int, index: int) -> str:
        """SHARD:KEY."""
        key = self.keys[shard][index - self.starts[shard]]
        return f"{storage.without_credentials(self.paths[shard])}:{key.decode(errors='replace')}"

    def names(self) -> Iterator[str]:
        """Yields the records' names in order, without reading the records."""
        for shard, (start, stop) in enumerate(itertools.pairwise(self.starts.tolist())):
            yield from (self.sample_name(shard, index) for index in range(start, stop))

    def read_members(
        self, shard: int, index: int, columns: Sequence[int] = (IMAGE, TEXT, JSON, LABEL)
    ) -> list[bytes | None]:
        """The contents of a sample's image, text, JSON and label; None for what it lacks or `columns` leave out.

        Raises:
            BadSample: a member is sparse, larger than `MAX_SIZE`, or cut off by the end of the shard.
        """
        offsets, sizes = self.offsets[index].tolist(), self.sizes[index].tolist()
        present = [column for column in columns if sizes[column] >= 0]
        spans = [(offsets[column], sizes[column]) for column in present]
        for column, (offset, size) in zip(present, spans, strict=True):
            if offset == SPARSE:
                raise BadSample("one of its files is stored sparse, which cannot be read in place")
            if size > MAX_SIZE[column]:
                raise BadSample(f"one of its files has more than the {MAX_SIZE[column]:,} bytes allowed")
        contents: list[bytes | None] = [None] * len(sizes)
        members = storage.read_spans(self.paths[shard], self.fingerprints[shard], spans)
        for column, data in zip(present, members, strict=True):
            if len(data) < sizes[column]:
                raise BadSample("the shard ends before the end of this sample")
            contents[column] = data
        return contents

    def has_captions(self) -> bool:
        """Whether any sample has a text file, or any of the first JSON files has a caption."""
        if (self.sizes[:, TEXT] >= 0).any():
            return True
        return any(isinstance(fields.get("caption"), str) for fields in self.probe_json())

    def describe_json_fields(self) -> str:
        """The names of the fields in the first JSON files, for an error message."""
        fields = list(dict.fromkeys(itertools.chain.from_iterable(self.probe_json())))
        return f"; fields of KEY.json: {', '.join(fields)}" if fields else ""

    def probe_json(self) -> Iterator[dict[str, Any]]:
        """Yields the contents of the readable ones among the first JSON files."""
        for index in np.flatnonzero(self.sizes[:, JSON] >= 0)[:PROBED_JSON]:
            try:
                yield self.read_json(int(index))
            except BadSample:
                pass

    def read_json(self, index: int) -> dict[str, Any]:
        """The fields in a sample's JSON file; {} if it has none.

        Raises:
            BadSample: the file cannot be read.
        """
        data = self.read_members(self.shard_of(index), index)[JSON]
        return {} if data is None else parse_json(data)


def select_members(index: TarIndex, columns: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The samples of a shard that have an image.

    Args:
        index: of the shard.
        columns: for each column, its extensions; the first one that a sample has counts.

    Returns:
        Keys, bytes [n]; offsets and sizes, int64 [n, columns], -1 where a sample has no such member.
    """
    offsets = np.full((len(index.keys), len(columns)), -1, np.int64)
    sizes = np.full_like(offsets, -1)
    numbers = {extension: number for number, extension in enumerate(index.extensions.tolist())}
    for column, extensions in enumerate(columns):
        for extension in reversed(extensions):
            members = index.extension == numbers.get(extension.lower(), -1)
            offsets[index.sample[members], column] = index.offset[members]
            sizes[index.sample[members], column] = index.size[members]
    with_image = sizes[:, IMAGE] >= 0
    return index.keys[with_image], offsets[with_image], sizes[with_image]


def count_extensions(indexes: Sequence[TarIndex]) -> str:
    """How many members have each extension, for an error message: "3 × jpg, 3 × txt"."""
    counts: Counter[str] = Counter()
    for index in indexes:
        of_extension = np.bincount(index.extension, minlength=len(index.extensions)).tolist()
        counts.update(dict(zip(index.extensions.tolist(), of_extension, strict=True)))
    return ", ".join(f"{count} × {extension}" for extension, count in counts.most_common(20)) or "nothing"


def parse_captions_and_labels(
    text: bytes | None, fields: bytes | None, label: bytes | None
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The captions and the labels in a sample's text, JSON and label files.

    >>> parse_captions_and_labels(b"a cat", b'{"caption": "a dog", "label": 3}', None)
    (('a cat',), (3,))

    Raises:
        BadSample: the JSON or the labels are damaged. Labels in JSON that are not whole numbers are ignored.
    """
    captions = () if text is None else (text.decode(errors="replace").strip(),)
    labels = () if label is None else parse_labels(label)
    # Most captions come from text files, and most JSON has no labels: parse JSON only if it is needed.
    if fields is not None and (not captions or (label is None and b'"label' in fields)):
        parsed = parse_json(fields)
        if not captions and isinstance(parsed.get("caption"), str):
            captions = (parsed["caption"].strip(),)
        if label is None:
            value = parsed.get("label", parsed.get("labels", ()))
            values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
            labels = values if all(type(c) is int for c in values) else ()
    return captions, tuple(dict.fromkeys(labels))


def parse_json(data: bytes) -> dict[str, Any]:
    """The fields of a sample's JSON file.

    Raises:
        BadSample: the file does not hold a JSON object.
    """
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:  # RecursionError: a thousand brackets
        raise BadSample(f"its JSON is damaged: {error}") from error
    if not isinstance(fields, dict):
        raise BadSample(f"its JSON is a {type(fields).__name__}, expected an object")
    return fields


def parse_labels(data: bytes) -> tuple[int, ...]:
    """The whole numbers in a sample's label file.

    >>> parse_labels(b"7, 8")
    (7, 8)
    """
    try:
        return tuple(map(int, data.replace(b",", b" ").split()))
    except ValueError:
        raise BadSample(f"its label is {data[:40]!r}, expected whole numbers") from None
