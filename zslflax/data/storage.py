"""Files to read by position: local ones, and remote ones (gs://, s3://, https://, …) through fsspec."""

import collections
import errno
import functools
import hashlib
import io
import logging
import os
import random
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from zslflax.errors import UserError

log = logging.getLogger("zslflax")

ATTEMPTS = 6  # of a read
FIRST_WAIT = 0.5  # seconds, before the second attempt; it doubles with each: 15 s in all
TIMEOUT = 30  # seconds without a byte, after which a request over HTTP counts as failed
READ_AHEAD = 4 << 20  # bytes of a remote file in one request, where it is read from its beginning on
GAP = 64 << 10  # bytes between two spans of a remote file that are cheaper to fetch than another request
FORMAT = 2  # of what is remembered about files; what was remembered in another form is made anew
PASSING = {getattr(errno, name) for name in "EIO EAGAIN EBUSY ESTALE ETIMEDOUT ENOTCONN EHOSTDOWN".split()}
PASSING_STATUS = {408, 425, 429}  # of HTTP, besides 500 and above: timeout, too early, too many requests
VERSIONS = "ETag etag Last-Modified LastModified last_modified updated mtime generation Content-MD5".split()

retries = collections.Counter()  # of reads in this process, by folder or bucket
_retries_lock = threading.Lock()

Stamp = tuple[int, int, int]  # FORMAT, bytes, and the time of modification or a hash of the version


def is_remote(path: str) -> bool:
    return "://" in path


def shown(path: str) -> str:
    """A path for messages: without the signature that an address may carry."""
    return path.partition("?")[0] if is_remote(path) else path


class LocalFile:
    """A file that several threads read at once, by position; closed when nobody refers to it any more."""

    def __init__(self, path: str):
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)
        self.stamp = stamp_of(os.fstat(self.descriptor))

    def read(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of every span (offset, size); fewer where the file ends before."""
        contents = []
        for at, size in spans:
            size = max(0, min(size, self.stamp[1] - at))  # no more is allocated than there can be
            contents.append(os.pread(self.descriptor, size, at))
            if len(contents[-1]) < size:
                raise OSError(errno.EIO, f"{size} bytes were asked for and {len(contents[-1])} came")
        return contents


class RemoteFile:
    """A file that several threads read at once, by range requests.

    Raises:
        FileNotFoundError, PermissionError: as the storage says.
        ValueError: the server does not say how large the file is, or, when reading, ignores the range.
    """

    def __init__(self, path: str):
        self.name, (self.system, self.path) = shown(path), file_system(path)
        info = self.system.info(self.path)
        if info.get("size") is None:
            raise UserError(f"the server of {self.name} does not say its size, which reading in place needs")
        version = repr([info[key] for key in VERSIONS if key in info]).encode()
        digest = hashlib.sha256(version).digest()
        self.stamp = FORMAT, int(info["size"]), int.from_bytes(digest[:7], "big")

    def read(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of every span (offset, size); fewer where the file ends. Near ones share a request."""
        contents, end = [b""] * len(spans), self.stamp[1]
        order = sorted((i for i, (at, size) in enumerate(spans) if size and at < end), key=spans.__getitem__)
        while order:
            group = [order.pop(0)]
            first, last = spans[group[0]][0], sum(spans[group[0]])
            while order and spans[order[0]][0] <= last + GAP:
                group.append(order.pop(0))
                last = max(last, sum(spans[group[-1]]))
            data = self.fetch(first, min(last, end))
            for i in group:
                at, size = spans[i]
                contents[i] = data[at - first : at - first + size]
        return contents

    def fetch(self, start: int, stop: int) -> bytes:
        data = self.system.cat_file(self.path, start=start, end=stop)
        if len(data) > stop - start:
            raise UserError(no_ranges(self.name))
        if len(data) < stop - start:
            raise ConnectionError(f"{stop - start} bytes were asked for and {len(data)} came")
        return data

    def check_ranges(self) -> None:
        """Raises ValueError if the server sends the whole file whatever is asked for, without fetching it."""
        if self.stamp[1] < 2 or not self.path.startswith(("http://", "https://")):
            return
        with self.system.open(self.path, size=self.stamp[1], block_size=1, cache_type="none") as file:
            file.seek(1)
            try:
                file.read(1)
            except ValueError as error:  # fsspec's word for it, which looks at the answer's header alone
                raise UserError(no_ranges(self.name)) from error


class RemoteStream(io.RawIOBase):
    """A remote file as an ordinary binary one, for a BufferedReader, whose buffer is the read-ahead."""

    def __init__(self, path: str, stamp: Stamp):
        self.path, self.stamp, self.at = path, stamp, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.stamp[1]}[whence] + offset
        return self.at

    def readinto(self, buffer) -> int:
        (data,) = read(self.path, self.stamp, [(self.at, len(buffer))])
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


def open_stream(path: str, stamp: Stamp) -> io.BufferedReader:
    """Opens a file to be read from its beginning on, in steps.

    Raises:
        ValueError: it is on a server that does not serve parts of files.
    """
    if not is_remote(path):
        return open(path, "rb", buffering=1 << 16)
    retried(path, lambda: open_file(path, stamp).check_ranges())
    return io.BufferedReader(RemoteStream(path, stamp), READ_AHEAD)


def stamp_of(status: os.stat_result) -> Stamp:
    return FORMAT, status.st_size, status.st_mtime_ns


def read_stamp(path: str) -> Stamp:
    """What tells one version of a file from another; a server that names none has only the size for it."""
    if is_remote(path):
        return retried(path, lambda: RemoteFile(path).stamp)
    return retried(path, lambda: stamp_of(os.stat(path)))


def read(path: str, stamp: Stamp, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of every span (offset, size) of a file, fewer where it ends before.

    Errors that may pass are retried, with waits that double, at most `ATTEMPTS` times in all.

    Raises:
        OSError: of the last attempt, or one that does not pass: not found, no permission.
        ValueError: the file is not the one that the stamp is of.
    """
    return retried(path, lambda: open_file(path, stamp).read(spans))


@functools.lru_cache(maxsize=256)  # open at once, in each process
def open_file(path: str, stamp: Stamp) -> LocalFile | RemoteFile:
    """Opens a file for reading.

    Raises:
        ValueError: it is not the file that the stamp is of.
    """
    file = RemoteFile(path) if is_remote(path) else LocalFile(path)
    if file.stamp != stamp:
        raise UserError(f"the shard {shown(path)} has been changed while it was in use; start again")
    return file


def file_system(path: str):
    """fsspec's file system for an address, and the path in it.

    Raises:
        ImportError: a library for that kind of address is missing.
        ValueError: there is no such kind.
    """
    try:
        import fsspec

        options = {}
        if path.startswith(("http://", "https://")):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
            options = {"client_kwargs": {"timeout": timeout}}
        return fsspec.core.url_to_fs(path, **options)
    except ImportError as error:
        needed = "pip install 'zslflax[remote]' (for gs:// gcsfs and for s3:// s3fs as well)"
        raise ImportError(f"{shown(path)} cannot be read: {error}; {needed}") from error


def retried(path: str, action: Callable):
    """What an action returns, which is tried again after errors that may pass."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except Exception as error:
            if not may_pass(error):
                if status_of(error):
                    raise OSError(f"{shown(path)} cannot be read: {describe(error)}") from error
                raise
            if attempt == ATTEMPTS:
                tried = f"{shown(path)} cannot be read, after {attempt} attempts"
                raise OSError(f"{tried}: {describe(error)}") from error
            wait = FIRST_WAIT * 2 ** (attempt - 1) * (0.5 + random.random())  # apart from the other threads
            place = shown(path).rpartition("/")[0]
            with _retries_lock:
                retries[place] += 1
            log.warning(
                "%s: %s; attempt %d of %d in %.1f s (retry %d in %s)",
                *(shown(path), describe(error), attempt + 1, ATTEMPTS, wait, retries[place], place),
            )
            time.sleep(wait)
            if not is_remote(path):
                open_file.cache_clear()  # a stale handle does not recover


def may_pass(error: BaseException) -> bool:
    """Whether it is worth trying again: connections, timeouts, a server's or disk's trouble."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return may_pass(error.__cause__)  # fsspec calls everything so that went wrong over HTTP
    if status := status_of(error):
        return status >= 500 or status in PASSING_STATUS
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if isinstance(error, OSError) and error.errno in PASSING:
        return True
    return type(error).__module__.partition(".")[0] == "aiohttp" and not isinstance(error, ValueError)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error of aiohttp, or of gcsfs, stands for."""
    status = getattr(error, "status", getattr(error, "code", None))
    return status if isinstance(status, int) and status >= 400 else None


def describe(error: Exception) -> str:
    if status := status_of(error):
        return f"HTTP {status} {getattr(error, 'message', '')}"  # the whole text has the address in it
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def no_ranges(name: str) -> str:
    return f"the server of {name} does not serve parts of files (range requests): copy the shards"
