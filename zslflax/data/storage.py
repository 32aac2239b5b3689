"""Reads parts of files: local ones, and remote ones (gs://, s3://, https://, …) through fsspec."""

import collections
import errno
import functools
import hashlib
import io
import itertools
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO, TypeVar, cast

from zslflax.errors import MissingFileError, MissingLibraryError, StorageError, UserError

log = logging.getLogger("zslflax")
T = TypeVar("T")

ATTEMPTS = 6  # at reading
FIRST_WAIT = 0.5  # seconds before the second attempt; it doubles with each attempt: 15 s in all
TIMEOUT = 30  # seconds without a byte after which an HTTP request fails
READ_AHEAD = 4 << 20  # bytes in one request when a remote file is read from its beginning
MERGE_GAP = 64 << 10  # bytes between two spans of a remote file that are cheaper to fetch than another request
FINGERPRINT_VERSION = 2  # raise it when fingerprints are computed in another way
TRANSIENT_ERRNOS = {getattr(errno, name) for name in "EIO EAGAIN EBUSY ESTALE ETIMEDOUT ENOTCONN EHOSTDOWN".split()}
TRANSIENT_STATUSES = {408, 425, 429}  # of HTTP, besides 500 and above: timeout, too early, too many requests
VERSION_KEYS = "ETag etag Last-Modified LastModified last_modified updated mtime generation Content-MD5".split()

retry_counts: collections.Counter[str] = collections.Counter()  # retries in this process, by folder or bucket
_retry_lock = threading.Lock()

Fingerprint = tuple[int, int, int]  # FINGERPRINT_VERSION, size in bytes, modification time or a hash of the version


def is_remote(path: str) -> bool:
    """Whether a path is an address.

    >>> is_remote("gs://bucket/00000.tar"), is_remote("shards/00000.tar")
    (True, False)
    """
    return "://" in path


def without_credentials(path: str) -> str:
    """A path for messages, without the signature that an address may carry.

    >>> without_credentials("https://example.org/00000.tar?signature=secret")
    'https://example.org/00000.tar'
    """
    return path.partition("?")[0] if is_remote(path) else path


class LocalFile:
    """A local file that several threads may read at once. It is closed when nothing refers to it any more."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self.fingerprint = fingerprint_of_status(os.fstat(self.descriptor))

    def read_spans(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each span (offset, size); fewer where the file ends before."""
        contents = []
        for offset, size in spans:
            size = max(0, min(size, self.fingerprint[1] - offset))  # never allocates more than the file has
            contents.append(os.pread(self.descriptor, size, offset))
            if len(contents[-1]) < size:
                raise OSError(errno.EIO, f"expected {size} bytes, got {len(contents[-1])}")
        return contents


class RemoteFile:
    """A remote file that several threads may read at once, by range requests.

    Raises:
        FileNotFoundError, PermissionError: from the storage.
        UserError: the server does not tell the file's size, or, when reading, ignores the range.
    """

    def __init__(self, path: str):
        self.name = without_credentials(path)
        self.system, self.path = open_file_system(path)
        info = self.system.info(self.path)
        if info.get("size") is None:
            raise UserError(f"the server of {self.name} does not tell its size, which reading in place needs")
        version = repr([info[key] for key in VERSION_KEYS if key in info]).encode()
        digest = hashlib.sha256(version).digest()
        self.fingerprint = FINGERPRINT_VERSION, int(info["size"]), int.from_bytes(digest[:7], "big")

    def read_spans(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each span (offset, size); fewer where the file ends before. Near spans share a request."""
        contents, file_size = [b""] * len(spans), self.fingerprint[1]
        nonempty = (i for i, (offset, size) in enumerate(spans) if size and offset < file_size)
        remaining = sorted(nonempty, key=spans.__getitem__)
        while remaining:
            group = [remaining.pop(0)]
            start, stop = spans[group[0]][0], sum(spans[group[0]])
            while remaining and spans[remaining[0]][0] <= stop + MERGE_GAP:
                group.append(remaining.pop(0))
                stop = max(stop, sum(spans[group[-1]]))
            data = self.fetch(start, min(stop, file_size))
            for i in group:
                offset, size = spans[i]
                contents[i] = data[offset - start : offset - start + size]
        return contents

    def fetch(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), by one request."""
        data = self.system.cat_file(self.path, start=start, end=stop)
        if len(data) > stop - start:
            raise UserError(no_ranges_message(self.name))
        if len(data) < stop - start:
            raise ConnectionError(f"expected {stop - start} bytes, got {len(data)}")
        return data

    def check_ranges(self) -> None:
        """Raises a UserError if the server ignores ranges, without downloading the whole file to find out."""
        if self.fingerprint[1] < 2 or not is_http(self.path):
            return
        with self.system.open(self.path, size=self.fingerprint[1], block_size=1, cache_type="none") as file:
            file.seek(1)
            try:
                file.read(1)
            except ValueError as error:  # fsspec's, which looks only at the headers of the response
                raise UserError(no_ranges_message(self.name)) from error


class RemoteStream(io.RawIOBase):
    """A remote file as a raw binary stream. The buffer of a BufferedReader around it is the read-ahead."""

    def __init__(self, path: str, fingerprint: Fingerprint):
        self.path, self.fingerprint, self.position = path, fingerprint, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.fingerprint[1]}[whence]
        self.position = start + offset
        return self.position

    def readinto(self, buffer: Any) -> int:
        (data,) = read_spans(self.path, self.fingerprint, [(self.position, len(buffer))])
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def open_stream(path: str, fingerprint: Fingerprint) -> BinaryIO:
    """Opens a file to be read from its beginning to its end, in steps.

    Raises:
        UserError: the file is on a server that does not serve parts of files.
    """
    if not is_remote(path):
        return open(path, "rb", buffering=1 << 16)
    with_retries(path, lambda: cast(RemoteFile, open_file(path, fingerprint)).check_ranges())
    return io.BufferedReader(RemoteStream(path, fingerprint), READ_AHEAD)


def fingerprint_of_status(status: os.stat_result) -> Fingerprint:
    return FINGERPRINT_VERSION, status.st_size, status.st_mtime_ns


def read_fingerprint(path: str) -> Fingerprint:
    """What distinguishes versions of a file; for servers that tell no version, the size alone."""
    if is_remote(path):
        return with_retries(path, lambda: RemoteFile(path).fingerprint)
    return with_retries(path, lambda: fingerprint_of_status(os.stat(path)))


def read_spans(path: str, fingerprint: Fingerprint, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of each span (offset, size) of a file; fewer where the file ends before.

    Transient errors are retried, at most `ATTEMPTS` attempts in all, with waits that double.

    Raises:
        MissingFileError: the file does not exist.
        StorageError: of the last attempt, or an error that is not transient, such as a lack of permission.
        UserError: the file does not have this fingerprint: it has changed.
    """
    return with_retries(path, lambda: open_file(path, fingerprint).read_spans(spans))


@functools.lru_cache(maxsize=256)  # open files in each process
def open_file(path: str, fingerprint: Fingerprint) -> LocalFile | RemoteFile:
    """Opens a file for reading.

    Raises:
        UserError: the file does not have this fingerprint: it has changed.
    """
    try:
        file = RemoteFile(path) if is_remote(path) else LocalFile(path)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        open_file.cache_clear()  # the limit of open files is below the size of this cache
        file = RemoteFile(path) if is_remote(path) else LocalFile(path)
    if file.fingerprint != fingerprint:
        raise UserError(f"the shard {without_credentials(path)} has been changed while it was in use; start again")
    return file


def open_file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it.

    Raises:
        MissingLibraryError: a library for this kind of address is not installed.
        UserError: there is no such kind of address.
    """
    try:
        import fsspec

        options = {}
        if is_http(path):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
            options = {"client_kwargs": {"timeout": timeout}}
        return fsspec.core.url_to_fs(path, **options)
    except ImportError as error:
        command = "pip install 'zslflax[remote]' (and gcsfs for gs://, s3fs for s3://)"
        raise MissingLibraryError(f"{without_credentials(path)} cannot be read: {error}; {command}") from error
    except ValueError as error:  # fsspec's, of an unknown protocol
        raise UserError(f"{without_credentials(path)} cannot be read: {error}") from error


def is_http(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def with_retries(path: str, action: Callable[[], T]) -> T:
    """The result of an action on a file, which is repeated after transient errors.

    Raises:
        MissingFileError, StorageError: as `read_spans`.
    """
    name = without_credentials(path)
    folder = name.rpartition("/")[0]
    for attempt in itertools.count(1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            if not is_transient(error):
                raise user_error(name, error) from error
            reason = describe_error(error)
            if attempt == ATTEMPTS:
                raise StorageError(f"{name} cannot be read, after {attempt} attempts: {reason}") from error
            wait = FIRST_WAIT * 2 ** (attempt - 1) * (0.5 + random.random())  # random, so that threads spread out
            with _retry_lock:
                retry_counts[folder] += 1
            log.warning(
                "%s: %s; attempt %d of %d in %.1f s (retry %d in %s)",
                *(name, reason, attempt + 1, ATTEMPTS, wait, retry_counts[folder], folder),
            )
            time.sleep(wait)
            if not is_remote(path):
                open_file.cache_clear()  # a stale handle does not recover
    raise AssertionError("unreachable")


def user_error(name: str, error: Exception) -> Exception:
    """The UserError for an error that is not transient; the error itself if the storage did not raise it."""
    if isinstance(error, FileNotFoundError):
        return MissingFileError(f"there is no file {name}")
    if isinstance(error, OSError) or http_status(error):
        return StorageError(f"{name} cannot be read: {describe_error(error)}")
    return error


def is_transient(error: BaseException) -> bool:
    """Whether it is worth trying again: a failed connection, a timeout, a temporary failure of a server or disk."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return is_transient(error.__cause__)  # fsspec raises FileNotFoundError for every failure over HTTP
    if status := http_status(error):
        return status >= 500 or status in TRANSIENT_STATUSES
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS:
        return True
    return type(error).__module__.partition(".")[0] == "aiohttp" and not isinstance(error, ValueError)


def http_status(error: BaseException) -> int | None:
    """The HTTP status of an error of aiohttp or gcsfs, which call it differently."""
    status = getattr(error, "status", getattr(error, "code", None))
    return status if isinstance(status, int) and status >= 400 else None


def describe_error(error: Exception) -> str:
    """An error in one line, without the address."""
    if status := http_status(error):
        return f"HTTP {status} {getattr(error, 'message', '')}"  # the error's own text has the address in it
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def no_ranges_message(name: str) -> str:
    return f"the server of {name} does not serve parts of files (range requests): copy the shards"
