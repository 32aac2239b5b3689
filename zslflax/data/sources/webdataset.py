"""Webdataset tar shards in img2dataset's layout (KEY.jpg, KEY.txt, KEY.json), read in place in any order."""

import hashlib
import itertools
import logging
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np

from zslflax.data import storage
from zslflax.data.addresses import is_remote, without_credentials
from zslflax.data.images import IMAGE_EXTENSIONS, BadSample
from zslflax.data.remote_files import Fingerprint
from zslflax.data.retries import DEFAULT_LIMITS, ReadLimits
from zslflax.data.sources.base import Annotations, Record, hash_values
from zslflax.data.sources.index_file import TarIndex
from zslflax.data.sources.sample_files import captions_in_json, parse_captions_and_labels, parse_json
from zslflax.data.sources.shard_patterns import expand_patterns
from zslflax.data.sources.tar_format import BLOCK, SPARSE
from zslflax.data.sources.tar_index import discard_index, load_indexes
from zslflax.errors import UserError

log = logging.getLogger("zslflax")

IMAGE, TEXT, JSON, LABEL, TEXTS = range(5)  # columns of `WebDataset.offsets` and `sizes`
MAX_SIZE = 1 << 28, *[1 << 20] * 4  # bytes of a member, by column; `images.MAX_PIXELS` need fewer
PROBED_JSON = 100  # JSON members in which captions are looked for


class WebDataset:
    """The records of tar shards, a `Source`.

    Every key with an image is a sample, in the order of the shards. Its captions are the JSON list in KEY.txt.json, or
    else KEY.txt, or else the field `caption` or `captions` of KEY.json, a text or a list of texts. Its labels are the
    whole numbers in KEY.cls, separated by blanks or commas, or else in the field `label` or `labels` of KEY.json.

    Args:
        shards: one pattern or several: braces ("train/{00000..00331}.tar", "{a,b}.tar") and globs. Addresses
            (gs://, s3://, https://) are read by range requests, one for each sample; over HTTP there are no globs.
        image_keys: extensions of images; the first one that a sample has counts.
        text_key: extension of captions.
        label_key: extension of labels.
        require_captions: whether shards without any caption are an error.
        captions_per_line: whether each line of KEY.txt is a caption of its own.
        limits: of the time that reads of remote shards take.

    Attributes:
        paths: of the shards that can be read.
        excluded: `no_image`, how many keys have no image, if there are any.

    Raises:
        MissingFileError: names the shards that are missing, or the pattern that no file matches.
        UserError: shards are not tar files, unless it is only one in twenty, which is logged; there are no images or
            no captions: the message says what was found instead.
    """

    classes: list[str] | None = None
    negatives: list[tuple[int, ...]] | None = None

    def __init__(
        self,
        shards: str | Sequence[str],
        *,
        image_keys: Sequence[str] = IMAGE_EXTENSIONS,
        text_key: str = "txt",
        label_key: str = "cls",
        require_captions: bool = False,
        captions_per_line: bool = False,
        limits: ReadLimits = DEFAULT_LIMITS,
    ):
        loaded = load_indexes(expand_patterns(shards, limits), limits)
        self.captions_per_line, self.limits = captions_per_line, limits
        self.paths, indexes = [path for path, _ in loaded], [index for _, index in loaded]
        columns = tuple(image_keys), (text_key,), ("json",), (label_key,), (f"{text_key}.json",)
        selected = (select_members(index, columns) for index in indexes)
        self.keys, offsets, sizes, headers = zip(*selected, strict=True)
        self.fingerprints = [cast(Fingerprint, tuple(index.fingerprint.tolist())) for index in indexes]
        self.starts = np.cumsum([0, *map(len, self.keys)])  # the position of each shard's first sample
        self.offsets, self.sizes = np.concatenate(offsets), np.concatenate(sizes)  # int64 [n, 5]; -1: no such member
        self.headers = np.concatenate(headers)  # uint32 [n, 5], CRC-32 of the members' headers
        described = f"the {len(self.paths)} shards ({without_credentials(self.paths[0])}, …)"
        if not len(self):
            raise UserError(
                f"none of {described} has an image: expected members KEY.EXTENSION with one of "
                f"{', '.join(image_keys)}; found: {count_extensions(indexes)}"
            )
        if require_captions and not self.has_captions():
            raise UserError(
                f"{described} have no captions: expected KEY.{text_key}, or KEY.json with a field caption or captions; "
                f"found: {count_extensions(indexes)}{self.describe_json_fields()}"
            )
        self.excluded = self.report_left_out(indexes)
        if require_captions:
            self.report_uncaptioned()

    def report_uncaptioned(self) -> None:
        """Logs how many samples have no file with a caption. They stay samples, which cannot be read."""
        bare = np.flatnonzero((self.sizes[:, [TEXT, JSON, TEXTS]] < 0).all(axis=1)).tolist()
        if bare:
            first = self.sample_name(self.shard_of(bare[0]), bare[0])
            log.warning("%d of %d images have no caption and are skipped; the first is %s", len(bare), len(self), first)

    def report_left_out(self, indexes: Sequence[TarIndex]) -> dict[str, int]:
        """Counts the keys without an image by reason, and logs them."""
        counts = [len(index.keys) - len(keys) for index, keys in zip(indexes, self.keys, strict=True)]
        if empty := [path for path, keys in zip(self.paths, self.keys, strict=True) if not len(keys)]:
            first = without_credentials(empty[0])
            log.warning("%d of %d shards have no image, the first is %s", len(empty), len(self.paths), first)
        if not sum(counts):
            return {}
        shard = int(np.flatnonzero(counts)[0])
        kept = set(self.keys[shard].tolist())
        number = next(i for i, key in enumerate(indexes[shard].keys.tolist()) if key not in kept)
        extensions = indexes[shard].extensions[indexes[shard].extension[indexes[shard].sample == number]]
        key = indexes[shard].keys[number].decode(errors="replace")
        log.warning(
            "%d of %d keys have no image that can be read and are left out; the first is %s in %s, with %s",
            *(sum(counts), sum(counts) + len(self), key, without_credentials(self.paths[shard])),
            ", ".join(extensions.tolist()),
        )
        return {"no_image": sum(counts)}

    def files(self) -> list[tuple[str, int, int, str]]:
        """Each shard's name, bytes and samples, and a digest of the names, sizes and times of the files in it.

        Unlike `fingerprint`, this is the same for copies of the shards, whatever their own times.
        """
        found = []
        for shard, (start, stop) in enumerate(itertools.pairwise(self.starts.tolist())):
            digest = hashlib.sha256()
            for array in (self.keys[shard], self.offsets[start:stop], self.sizes[start:stop], self.headers[start:stop]):
                digest.update(np.ascontiguousarray(array).tobytes())
            name = without_credentials(self.paths[shard]).rpartition("/")[2]
            found.append((name, self.fingerprints[shard][1], stop - start, digest.hexdigest()[:16]))
        return found

    def __len__(self) -> int:
        return len(self.sizes)

    def shard_of(self, index: int) -> int:
        """The position in `paths` of the shard that has the sample."""
        return int(np.searchsorted(self.starts, index, "right")) - 1

    def __getitem__(self, index: int) -> Record:
        image, annotations = self.read_sample(index, (IMAGE, TEXT, JSON, LABEL, TEXTS))
        assert image is not None
        return Record(image=image, **annotations)

    def read_annotations(self, index: int) -> Annotations:
        """Reads a sample's text, JSON and label, and not its image."""
        return self.read_sample(index, (TEXT, JSON, LABEL, TEXTS))[1]

    def read_sample(self, index: int, columns: Sequence[int]) -> tuple[bytes | None, Annotations]:
        """The image of a sample, None where `columns` leave it out, and its captions and labels.

        Raises:
            BadSample: as `read_members`, or the JSON or the labels are damaged; with the sample's name.
        """
        shard = self.shard_of(index)
        name = self.sample_name(shard, index)
        try:
            image, text, fields, label, texts = self.read_members(shard, index, columns)
            captions, labels = parse_captions_and_labels(text, fields, label, texts, self.captions_per_line)
        except BadSample as error:
            error.name = name
            raise
        return image, Annotations(text=captions, label=labels, name=name)

    def fingerprint(self) -> str:
        """Of the shards' names, sizes and versions, and of where the images are in them.

        A moved folder keeps its fingerprint; the same file at another address does not.
        """
        digest = hashlib.sha256(np.ascontiguousarray(self.offsets[:, IMAGE]).tobytes())
        digest.update(np.ascontiguousarray(self.sizes[:, IMAGE]).tobytes())
        names = [path if is_remote(path) else Path(path).name for path in self.paths]
        shards = list(zip(map(without_credentials, names), self.fingerprints, map(len, self.keys)))
        return hash_values("shards", shards, digest.hexdigest())

    def sample_name(self, shard: int, index: int) -> str:
        """SHARD:KEY."""
        key = self.keys[shard][index - self.starts[shard]]
        return f"{without_credentials(self.paths[shard])}:{key.decode(errors='replace')}"

    def names(self) -> Iterator[str]:
        """Yields the records' names in order, without reading the records."""
        for shard, (start, stop) in enumerate(itertools.pairwise(self.starts.tolist())):
            yield from (self.sample_name(shard, index) for index in range(start, stop))

    def read_members(self, shard: int, index: int, columns: Sequence[int]) -> list[bytes | None]:
        """The contents of a sample's image, text, JSON, label and list of texts.

        It is None for a member that the sample lacks or `columns` leave out. Each member is read with its header, which
        shows whether the shard is still the one that was indexed.

        Raises:
            BadSample: a member is sparse, larger than `MAX_SIZE`, or cut off by the end of the shard.
            UserError: the shard is another file than the one that was indexed.
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
        spans = [(offset - BLOCK, BLOCK + size) for offset, size in spans]
        members = storage.read_spans(self.paths[shard], self.fingerprints[shard], spans, self.limits)
        for column, data in zip(present, members, strict=True):
            if len(data) >= BLOCK and zlib.crc32(data[:BLOCK]) != self.headers[index, column]:
                self.raise_replaced(shard, index)
            if len(data) < BLOCK + sizes[column]:
                raise BadSample("the shard ends before the end of this sample")
            contents[column] = data[BLOCK:]
        return contents

    def raise_replaced(self, shard: int, index: int) -> NoReturn:
        """Raises the error for a shard in which a sample is not where its index says; removes the index."""
        discard_index(self.paths[shard])
        raise UserError(
            f"the shard {without_credentials(self.paths[shard])} is not the file that was indexed: it has no file of "
            f"the sample {self.sample_name(shard, index).rpartition(':')[2]} at the place where that was. It has been "
            "replaced; its index is removed, so that the next start makes a new one"
        )

    def has_captions(self) -> bool:
        """Whether any sample has a file of texts, or any of the first JSON files has a caption."""
        if (self.sizes[:, [TEXT, TEXTS]] >= 0).any():
            return True
        return any(captions_in_json(fields) for fields in self.probe_json())

    def has_annotations(self) -> bool:
        """Whether any sample has a file beside its image: captions, labels or JSON."""
        return bool((self.sizes[:, TEXT:] >= 0).any())

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
        data = self.read_members(self.shard_of(index), index, (JSON,))[JSON]
        return {} if data is None else parse_json(data)


def select_members(index: TarIndex, columns: Sequence[Sequence[str]]) -> tuple[np.ndarray, ...]:
    """The samples of a shard that have an image.

    Args:
        index: of the shard.
        columns: for each column, its extensions; the first one that a sample has counts.

    Returns:
        Keys, bytes [n]; offsets and sizes, int64 [n, columns], -1 where a sample has no such member; CRC-32 of their
        headers, uint32 [n, columns].
    """
    offsets = np.full((len(index.keys), len(columns)), -1, np.int64)
    sizes, headers = np.full_like(offsets, -1), np.zeros(offsets.shape, np.uint32)
    numbers = {extension: number for number, extension in enumerate(index.extensions.tolist())}
    for column, extensions in enumerate(columns):
        for extension in reversed(extensions):
            members = index.extension == numbers.get(extension.lower(), -1)
            offsets[index.sample[members], column] = index.offset[members]
            sizes[index.sample[members], column] = index.size[members]
            headers[index.sample[members], column] = index.header[members]
    with_image = sizes[:, IMAGE] >= 0
    return index.keys[with_image], offsets[with_image], sizes[with_image], headers[with_image]


def count_extensions(indexes: Sequence[TarIndex]) -> str:
    """How many members have each extension, for an error message: "3 × jpg, 3 × txt"."""
    counts: Counter[str] = Counter()
    for index in indexes:
        found = np.bincount(index.extension, minlength=len(index.extensions)).tolist()
        counts.update(dict(zip(index.extensions.tolist(), found, strict=True)))
    return ", ".join(f"{count} × {extension}" for extension, count in counts.most_common(20)) or "nothing"
