"""A table whose rows have an image, or the path or address of one, with captions and labels."""

import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zslflax.data import storage
from zslflax.data.addresses import is_remote, without_credentials
from zslflax.data.images import MAX_FILE_BYTES, BadSample
from zslflax.data.sources.arrow_files import ArrowTable
from zslflax.data.sources.base import Annotations, Record, SourceOptions, file_version, hash_values
from zslflax.data.sources.image_files import format_examples, read_image_file, report_missing, sorted_by_id
from zslflax.data.sources.table_columns import Columns, class_names, is_text, item_type
from zslflax.errors import MissingFileError, MissingLibraryError, UserError

log = logging.getLogger("zslflax")

FETCHED = ("https://", "http://", "gs://", "s3://", "hf://", "az://", "abfs://")  # tables may come from strangers
MAX_FETCH_SECONDS = 10.0  # after which an image at an address is not tried again


class TableSource:
    """The rows of a table, a `Source`.

    Args:
        table: the rows.
        columns: that hold images, captions and labels. Labels that are texts are ids of classes; the classes are all
            that occur, in their order. Numbers are indices of classes; those below 0 mean unlabelled.
        name: of the table, for the names of its records and for messages.
        folder: to which the paths of images are relative.
        options: whether rows without a caption are left out, and limits of the time that reads from servers take.

    Attributes:
        rows: which n rows of the table are records: all of them, or int64 [n].
        excluded: `missing_images`, rows whose image files do not exist; `no_caption`, rows without a caption.

    Raises:
        UserError: no row is left; the message says why.
    """

    negatives: list[tuple[int, ...]] | None = None

    def __init__(
        self,
        table: ArrowTable,
        columns: Columns,
        *,
        name: str,
        folder: Path,
        options: SourceOptions,
    ):
        self.table, self.columns, self.name, self.folder, self.limits = (
            table,
            columns,
            name,
            str(folder),
            options.limits,
        )
        self.rows: np.ndarray | range = range(len(table))
        self.excluded: dict[str, int] = {}
        if not len(table):
            raise MissingFileError(f"there are no annotations of images in {name}: it has no rows")
        self.has_references = is_text(table.table.schema.field(columns.image).type)  # paths or addresses
        self.classes, self.label_of_id = self.read_classes()
        if options.require_captions:
            self.leave_out_rows_without_caption()
        self.versions = self.check_image_files() if self.has_references else ""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Record:
        row = int(self.rows[index])
        name = self.record_name(row)
        try:
            image = self.read_image(row)
        except BadSample as error:
            error.name = name
            raise
        return Record(image=image, **self.read_annotations(index))

    def read_annotations(self, index: int) -> Annotations:
        """The captions and labels of a row; reads no image."""
        row = int(self.rows[index])
        texts = [text for path in self.columns.captions for text in leaves(self.table.value(path[0], row), path[1:])]
        captions = tuple(stripped for text in texts if (stripped := str(text).strip()))
        return Annotations(text=captions, label=self.labels(row), name=self.record_name(row))

    def read_image(self, row: int) -> bytes:
        """The encoded image of a row."""
        value = self.table.value(self.columns.image, row)
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value.get("path")
        if isinstance(value, bytes):
            return value
        if not value:
            raise BadSample("it has no image")
        if is_remote(value):
            return self.fetch_image(value)
        return read_image_file(os.path.join(self.folder, value))

    def fetch_image(self, address: str) -> bytes:
        """The image at an address. Dead addresses are usual, so that any failure makes a bad sample."""
        if not address.startswith(FETCHED):
            raise BadSample(f"its address begins with {address.partition('://')[0]}://, which is not fetched")
        limits = dataclasses.replace(self.limits, total=min(self.limits.total, MAX_FETCH_SECONDS))
        try:
            return storage.read_file(address, MAX_FILE_BYTES, limits)
        except MissingLibraryError:
            raise
        except UserError as error:
            reason = str(error).replace(without_credentials(address), "").strip()
            raise BadSample(f"its address cannot be fetched: {reason}") from error

    def labels(self, row: int) -> tuple[int, ...]:
        """The indices of the classes of a row."""
        if not self.columns.label:
            return ()
        values = leaves(self.table.value(self.columns.label, row), ())
        labels = (self.label_of_id[value] if isinstance(value, str) else int(value) for value in values if value != "")
        return tuple(dict.fromkeys(label for label in labels if label >= 0))

    def read_classes(self) -> tuple[list[str] | None, dict[str, int]]:
        """The ids of the classes, and the label of each id where the table has ids instead of labels."""
        if not self.columns.label:
            return None, {}
        from pyarrow import compute, types

        column = self.table.table.column(self.columns.label)
        while item_type(column.type) != column.type:
            column = compute.list_flatten(column)
        if types.is_integer(column.type):
            return class_names(self.table.table.schema, self.columns.label), {}
        ids = [i for i in compute.unique(column).to_pylist() if i]
        classes = sorted_by_id({i: i for i in ids})
        return classes, {i: label for label, i in enumerate(classes)}

    def leave_out_rows_without_caption(self) -> None:
        """Leaves out the rows that have no caption, counts and logs them."""
        kept = np.zeros(len(self.rows), bool)
        for path in self.columns.captions:
            kept |= has_text(self.table.table.column(path[0]))
        if missing := len(kept) - int(kept.sum()):
            examples = format_examples([self.record_name(int(row)) for row in np.flatnonzero(~kept)[:5]])
            log.warning("%s: %d of %d rows have no caption and are left out%s", self.name, missing, len(kept), examples)
            self.excluded["no_caption"] = missing
            self.rows = np.flatnonzero(kept)
        if not len(self.rows):
            raise UserError(f"{self.name} has no caption in any of its {len(kept)} rows")

    def check_image_files(self) -> str:
        """Leaves out the rows whose image files do not exist. Returns a digest of the versions of the others."""
        versions: list[tuple[int, ...]] = []
        addresses = 0
        missing: list[str] = []
        kept = np.ones(len(self.rows), bool)
        chunks = self.table.table.column(self.columns.image).chunks
        references = np.concatenate([np.asarray(chunk.to_pylist(), object) for chunk in chunks])
        for i, reference in enumerate(references[self.rows]):
            reference = reference or ""
            addresses += is_remote(reference)
            version = (0, 0) if is_remote(reference) else file_version(os.path.join(self.folder, reference))
            if reference and version[0] >= 0:
                versions.append(version)
            else:
                kept[i] = False
                missing.append(reference)
        report_missing(len(missing), len(kept), missing, f"{self.folder or '.'}, the folder of {self.name}")
        if addresses:
            log.warning(
                "%s: %d images are at addresses, from which each visit fetches them anew; img2dataset copies them into "
                "tar shards once: img2dataset --url_list=FILE --url_col=COLUMN --caption_col=COLUMN "
                "--output_format=webdataset --output_folder=shards",
                *(self.name, addresses),
            )
        if missing:
            self.excluded["missing_images"] = len(missing)
            self.rows = np.asarray(self.rows)[kept]
        return hash_values(versions)

    def record_name(self, row: int) -> str:
        """The path or address of a row's image, or else TABLE:ROW."""
        value = self.table.value(self.columns.image, row) if self.has_references else None
        if not value:
            return f"{self.name}:{row}"
        return without_credentials(value) if is_remote(value) else os.path.join(self.folder, value)

    def fingerprint(self) -> str:
        """Of the table, which of its rows are records, and the versions of their image files."""
        digest = hash_values(list(map(int, self.rows))) if len(self.rows) < len(self.table) else ""
        return hash_values("table", self.table.identity, self.columns.image, digest, self.versions)

    def names(self) -> Iterator[str]:
        """Yields the names of all records in order."""
        return (self.record_name(int(row)) for row in self.rows)


def has_text(column: Any) -> np.ndarray:
    """Which rows of a column of texts, or lists, hold anything but blanks, bool [n]."""
    from pyarrow import compute

    if item_type(column.type) != column.type:
        lengths = compute.list_value_length(column)
    elif is_text(column.type):
        lengths = compute.utf8_length(compute.utf8_trim_whitespace(column))
    else:
        return np.asarray(compute.is_valid(column))
    return np.asarray(compute.fill_null(compute.greater(lengths, 0), False))


def leaves(value: Any, path: tuple[str, ...]) -> list[Any]:
    """The values at a path in a nested value, through lists; without None.

    >>> leaves([{"raw": "a cat"}, {"raw": "a pet"}], ("raw",))
    ['a cat', 'a pet']
    """
    if isinstance(value, list):
        return [leaf for item in value for leaf in leaves(item, path)]
    if path and isinstance(value, dict):
        return leaves(value.get(path[0]), path[1:])
    return [] if value is None else [value]
