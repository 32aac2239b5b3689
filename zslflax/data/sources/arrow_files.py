"""Tables in Arrow files, which are mapped into memory: random access without a copy, shared by all processes."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zslflax.data.sources.base import content_digest, file_version, hash_values
from zslflax.errors import MissingFileError, UserError
from zslflax.files import cache_folder
from zslflax.saving import storage_errors, write_atomically

if TYPE_CHECKING:
    import pyarrow as pa

FILE_START = b"ARROW1"  # of the file format, which the stream format lacks


class ArrowTable:
    """The rows of Arrow files with the same columns, in order.

    Threads may share a table. It is pickled as the paths of its files.

    Args:
        paths: of the files.
        originals: the files that they were made from; (): none.

    Attributes:
        identity: a digest of the contents, which is the same for copies of the files.
        table: a pyarrow.Table that refers to the mapped files.

    Raises:
        MissingFileError: there is no such file.
        UserError: a file is no Arrow file, or, when unpickled, is another file than before.
    """

    def __init__(self, paths: Sequence[Path], originals: Sequence[Path] = ()):
        self.paths, self.versions = list(paths), [file_version(str(path)) for path in paths]
        self.table = open_tables(self.paths)
        self.identity = hash_values([(path.name, content_digest(path)) for path in originals or paths])

    def __len__(self) -> int:
        return self.table.num_rows

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "table"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.table = open_tables(self.paths)
        if self.versions != [file_version(str(path)) for path in self.paths]:
            raise UserError(f"{self.paths[0].parent} was written anew while it was in use; start the command again")

    def value(self, column: str, row: int) -> Any:
        """A value as Python's type: bytes, str, int, list, dict or None."""
        return self.table.column(column)[row].as_py()


def open_tables(paths: Sequence[Path]) -> "pa.Table":
    """The rows of Arrow files, in the file or the stream format, as one table that refers to the mapped files."""
    import pyarrow as pa

    tables = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                start = file.read(len(FILE_START))
            open_format = pa.ipc.open_file if start == FILE_START else pa.ipc.open_stream
            tables.append(open_format(pa.memory_map(str(path))).read_all())
        except FileNotFoundError:
            raise MissingFileError(f"there is no file {path}") from None
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path} is no Arrow file, or is cut off or damaged: {error}") from error
    return pa.concat_tables(tables)


def cached_table(
    originals: Sequence[Path], schema: "pa.Schema", choice: Any, batches: Callable[[], Iterable[Any]]
) -> ArrowTable:
    """The copy of a table that is kept in the cache; it is written where it is missing, in place of earlier versions.

    Args:
        originals: the files that hold the table.
        schema: of the copy.
        choice: JSON values that say what of the table it has.
        batches: yields its record batches.

    Raises:
        StorageError: the cache cannot be written.
        UserError: there is no home folder.
    """
    import pyarrow as pa

    cache = cache_folder()
    if cache is None:
        raise UserError("tables are kept in ~/.cache/zslflax, but HOME is not set and this user has none; set HOME")
    paths = [str(path.resolve()) for path in originals]
    prefix, version = hash_values(paths, choice)[:24], hash_values(list(map(file_version, paths)))[:24]
    place = cache / "tables" / f"{prefix}-{version}.arrow"

    def write(path: Path) -> None:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for batch in batches():
                writer.write(batch)

    if not place.exists():
        with storage_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(place, write)
            for earlier in place.parent.glob(f"{prefix}-*.arrow"):
                if earlier != place:
                    earlier.unlink(missing_ok=True)
    return ArrowTable([place], originals)


@contextlib.contextmanager
def arrow_errors(path: Path) -> Iterator[None]:
    """Turns errors of pyarrow into a `UserError` that names the file."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise MissingFileError(f"there is no file {path}") from None
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
