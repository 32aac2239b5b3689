"""Reads parts of files: local ones, and remote ones (gs://, s3://, https://, …)."""

import errno
import functools
import io
import os
import resource
import stat
import weakref
from collections.abc import Sequence
from typing import Any, BinaryIO

from zslflax.data.addresses import is_http, is_remote, without_credentials
from zslflax.data.remote_files import (
    FINGERPRINT_VERSION,
    Fingerprint,
    HttpFile,
    RemoteFile,
    changed_message,
    read_whole,
)
from zslflax.data.retries import DEFAULT_LIMITS, ReadLimits, with_retries
from zslflax.errors import UserError

READ_AHEAD = 4 << 20  # bytes in one request when a remote file is read from its beginning


def max_open_files() -> int:
    """How many shards a process keeps open: a quarter of the files that it may have open, 256 at most."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 256 if soft == resource.RLIM_INFINITY else max(4, min(256, soft // 4))


class LocalFile:
    """A local file that several threads may read at once. It is closed when nothing refers to it any more.

    Raises:
        UserError: it is not a regular file; or, when reading, it has been changed since it was opened.
    """

    def __init__(self, path: str):
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for its writer
        weakref.finalize(self, os.close, self.descriptor)
        status = os.fstat(self.descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is not a regular file, which reading in place needs")
        self.fingerprint = fingerprint_of_status(status)

    def read_spans(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each span (offset, size); fewer where the file ends before."""
        contents = []
        for offset, size in spans:
            size = max(0, min(size, self.fingerprint[1] - offset))  # never allocates more than the file has
            contents.append(os.pread(self.descriptor, size, offset))
            if len(contents[-1]) < size:
                self.check_unchanged()
                raise OSError(errno.EIO, f"expected {size} bytes, got {len(contents[-1])}")
        self.check_unchanged()  # after the reads, so that a change during them is noticed as well
        return contents

    def check_unchanged(self) -> None:
        """Raises a UserError if the file has been written to since it was opened."""
        if fingerprint_of_status(os.fstat(self.descriptor)) != self.fingerprint:
            raise UserError(changed_message(self.path))


class RemoteStream(io.RawIOBase):
    """A remote file as a raw binary stream. The buffer of a BufferedReader around it is the read-ahead."""

    def __init__(self, path: str, fingerprint: Fingerprint, limits: ReadLimits):
        self.path, self.fingerprint, self.limits, self.position = path, fingerprint, limits, 0

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
        (data,) = read_spans(self.path, self.fingerprint, [(self.position, len(buffer))], self.limits)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


def open_stream(path: str, fingerprint: Fingerprint, limits: ReadLimits = DEFAULT_LIMITS) -> BinaryIO:
    """Opens a file to be read from its beginning to its end, in steps."""
    if not is_remote(path):
        return open(path, "rb", buffering=1 << 16)
    return io.BufferedReader(RemoteStream(path, fingerprint, limits), READ_AHEAD)


def fingerprint_of_status(status: os.stat_result) -> Fingerprint:
    return FINGERPRINT_VERSION, status.st_size, status.st_mtime_ns


def read_fingerprint(path: str, limits: ReadLimits = DEFAULT_LIMITS) -> Fingerprint:
    """What distinguishes versions of a file; for servers that tell no version, the size alone."""
    if is_remote(path):
        return with_retries(path, lambda: open_remote_file(path, limits).fingerprint, limits)
    return with_retries(path, lambda: fingerprint_of_status(os.stat(path)), limits)


def read_spans(
    path: str, fingerprint: Fingerprint, spans: Sequence[tuple[int, int]], limits: ReadLimits = DEFAULT_LIMITS
) -> list[bytes]:
    """The bytes of each span (offset, size) of a file; fewer where the file ends before.

    Transient errors are retried (`zslflax.data.retries.with_retries`).

    Raises:
        MissingFileError: the file does not exist.
        StorageError: of the last attempt, or an error that is not transient, such as a lack of permission.
        UserError: the file does not have this fingerprint: it has changed.
    """
    # A stale handle of a local file does not recover.
    recover = None if is_remote(path) else open_file.cache_clear
    return with_retries(path, lambda: open_file(path, fingerprint, limits).read_spans(spans), limits, recover)


def read_file(path: str, max_size: int, limits: ReadLimits = DEFAULT_LIMITS) -> bytes:
    """The contents of a whole remote file; transient errors are retried.

    Raises:
        MissingFileError: there is no such file.
        StorageError: of the last attempt, or an error that is not transient.
        UserError: the file has more than `max_size` bytes.
    """
    return with_retries(path, lambda: read_whole(path, max_size, limits), limits)


@functools.lru_cache(maxsize=max_open_files())
def open_file(path: str, fingerprint: Fingerprint, limits: ReadLimits = DEFAULT_LIMITS) -> LocalFile | RemoteFile:
    """Opens a file for reading.

    Raises:
        UserError: the file does not have this fingerprint: it has changed.
    """
    try:
        file = open_remote_file(path, limits) if is_remote(path) else LocalFile(path)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
        open_file.cache_clear()  # the limit of open files is below the size of this cache
        file = open_remote_file(path, limits) if is_remote(path) else LocalFile(path)
    if file.fingerprint != fingerprint:
        raise UserError(changed_message(without_credentials(path)))
    return file


def open_remote_file(path: str, limits: ReadLimits) -> RemoteFile:
    """Opens a remote file for reading."""
    return HttpFile(path, limits) if is_http(path) else RemoteFile(path, limits)
