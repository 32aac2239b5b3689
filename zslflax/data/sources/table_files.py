"""CSV, TSV and parquet files as tables. A copy in the Arrow format is kept in the cache, for random access."""

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zslflax.data.addresses import is_remote
from zslflax.data.images import has_image_extension
from zslflax.data.sources.arrow_files import arrow_errors, cached_table
from zslflax.data.sources.base import SourceOptions
from zslflax.data.sources.table import TableSource
from zslflax.data.sources.table_columns import ChosenColumns, Columns, find_columns
from zslflax.errors import MissingFileError, UserError
from zslflax.files import iter_rows, local_path

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger("zslflax")

DELIMITERS = ("\t", ",", ";", "|")  # the first one in the header counts
BATCH_ROWS = 1024  # rows of a record batch of captions
BATCH_IMAGES = 64  # rows of a record batch with images in it
LARGE_FILE = 1 << 28  # bytes; copying more is logged


def open_csv(location: str, chosen: ChosenColumns, options: SourceOptions) -> TableSource:
    """Opens a CSV or TSV file with a header: an image, by path or address, and captions or labels in each row.

    Paths are relative to the file's folder. Rows with the same image are one record, with all their captions and
    labels. A field of labels may have several ids, separated by ";" if the column has any ";". Otherwise blanks
    separate them if each of them has a digit, as codes have; words with blanks between them are one id.

    Raises:
        MissingFileError: there is no such file, or none of its images exists.
        UserError: the file is not valid, or has no column of images or captions; the message lists its columns.
    """
    import pyarrow as pa

    file = local_path(location, "the source")
    if not file.is_file():
        raise MissingFileError(f"there is no file {file}")
    delimiter = find_delimiter(file)
    _, header = next(iter_rows(file, delimiter), (0, []))
    check_header(file, header)
    schema = pa.schema([(name, pa.string()) for name in header])
    columns = find_columns(schema, chosen, str(file), require_captions=options.require_captions)
    stored = pa.schema(
        [("image", pa.string()), ("caption", pa.list_(pa.string())), ("label", pa.list_(pa.string()))],
    )
    table = cached_table([file], stored, columns.names(), lambda: merge_rows(file, delimiter, header, columns, stored))
    kept = Columns("image", (("caption",),) if columns.captions else (), "label" if columns.label else "")
    return TableSource(table, kept, name=str(file), folder=file.parent, options=options)


def find_delimiter(file: Path) -> str:
    """The first of `DELIMITERS` that the first line has; a comma if it has none."""
    with open(file, "rb") as stream:
        first = stream.readline(1 << 20).decode(errors="replace")
    return next((delimiter for delimiter in DELIMITERS if delimiter in first), ",")


def check_header(file: Path, header: Sequence[str]) -> None:
    """Raises a UserError where the first line is not the names of columns, but a row."""
    if any(is_remote(field) or has_image_extension(field) for field in header):
        raise UserError(
            f"{file} has no line with the names of its columns; its first line is {', '.join(header)}. Put one before "
            f"it, such as: sed -i '1i image,caption' {file.name}"
        )
    if repeated := {name for name in header if header.count(name) > 1}:
        raise UserError(f"{file} has several columns called {', '.join(sorted(repeated))}")


def merge_rows(
    file: Path, delimiter: str, header: Sequence[str], columns: Columns, schema: "pa.Schema"
) -> Iterator["pa.RecordBatch"]:
    """Yields the rows of a CSV file by image: its path or address, its different captions, its different class ids."""
    import pyarrow as pa

    by_image: dict[str, tuple[dict[str, None], dict[str, None]]] = {}  # dicts as ordered sets
    image, captions = header.index(columns.image), [header.index(path[0]) for path in columns.captions]
    label = header.index(columns.label) if columns.label else -1
    for line, row in itertools.islice(iter_rows(file, delimiter), 1, None):
        if len(row) != len(header):
            raise UserError(f"{file}, line {line} has {len(row)} fields, the header {len(header)}")
        if not row[image]:
            raise UserError(f"{file}, line {line}: the path is empty")
        texts, labels = by_image.setdefault(row[image], ({}, {}))
        texts |= dict.fromkeys(row[i] for i in captions if row[i])
        if label >= 0 and row[label]:
            labels[row[label]] = None
    separator = labels_separator(file, [field for _, labels in by_image.values() for field in labels])
    items = iter(by_image.items())
    while batch := list(itertools.islice(items, BATCH_ROWS)):
        ids = [[i.strip() for field in labels for i in field.split(separator)] for _, (_, labels) in batch]
        values = [
            [name for name, _ in batch],
            [list(texts) for _, (texts, _) in batch],
            [list(dict.fromkeys(filter(None, row_ids))) for row_ids in ids],
        ]
        yield pa.RecordBatch.from_arrays([pa.array(v, f.type) for v, f in zip(values, schema)], schema=schema)


def labels_separator(file: Path, fields: Sequence[str]) -> str | None:
    """What separates the ids in the fields of a column of labels; None for blanks."""
    if any(";" in labels for labels in fields):
        return ";"
    several = [labels for labels in fields if len(labels.split()) > 1]
    words = [labels for labels in several if not all(any(map(str.isdigit, i)) for i in labels.split())]
    if not words:
        return None
    log.warning("%s: %r is one class, because it has words without digits; separate several by ;", file, words[0])
    return ";"


def open_parquet(paths: Sequence[Path], chosen: ChosenColumns, options: SourceOptions) -> TableSource:
    """Opens parquet files with the same columns: images, or their paths or addresses, with captions or labels.

    Paths are relative to the folder of the first file.

    Raises:
        MissingFileError: there is no such file.
        UserError: a file is not valid, or has no column of images or captions; the message lists its columns.
    """
    import pyarrow as pa
    from pyarrow import parquet

    name = (
        str(paths[0]) if len(paths) == 1 else os.path.join(os.path.commonpath([p.parent for p in paths]), "*.parquet")
    )
    with arrow_errors(paths[0]):
        schema = parquet.read_schema(paths[0])
    columns = find_columns(schema, chosen, name, require_captions=options.require_captions)
    stored = pa.schema([schema.field(column) for column in columns.names()], schema.metadata)
    total = sum(path.stat().st_size for path in paths)

    def batches() -> Iterator[Any]:
        if total > LARGE_FILE:
            log.info("%s: %.1f GB are copied into ~/.cache/zslflax/tables once, for random access", name, total / 1e9)
        for path in paths:
            with arrow_errors(path):
                for batch in parquet.ParquetFile(path).iter_batches(BATCH_IMAGES, columns=stored.names):
                    yield pa.RecordBatch.from_arrays([batch.column(column) for column in stored.names], schema=stored)

    table = cached_table(paths, stored, stored.names, batches)
    return TableSource(table, columns, name=name, folder=paths[0].parent, options=options)
