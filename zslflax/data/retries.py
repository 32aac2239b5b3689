"""Repeats reads that fail for a moment, within limits, and sums up the repetitions in the log."""

import collections
import dataclasses
import errno
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from zslflax.data.addresses import hide_credentials, without_credentials
from zslflax.errors import MissingFileError, StorageError, UserError

log = logging.getLogger("zslflax")
T = TypeVar("T")

ATTEMPTS = 6  # at a read
FIRST_WAIT = 0.5  # seconds before the second attempt; it doubles with each attempt: 15 s in all
LOG_EVERY = 60  # seconds between two messages about the retries in one folder
TRANSIENT_ERRNOS = {getattr(errno, name) for name in "EIO EAGAIN EBUSY ESTALE ETIMEDOUT ENOTCONN EHOSTDOWN".split()}
TRANSIENT_STATUSES = {408, 425, 429}  # of HTTP, besides 500 and above: timeout, too early, too many requests

retry_counts: collections.Counter[str] = collections.Counter()  # retries in this process, by folder or bucket
_logged: dict[str, tuple[float, int]] = {}  # by folder: when its retries were last logged, and how many there were
_lock = threading.Lock()


@dataclasses.dataclass(frozen=True)
class ReadLimits:
    """How long a read of a remote file may take.

    Attributes:
        request: seconds until one request must be complete.
        total: seconds after which a read is not tried again.
    """

    request: float = 60.0
    total: float = 300.0


DEFAULT_LIMITS = ReadLimits()


def with_retries(
    path: str, action: Callable[[], T], limits: ReadLimits = DEFAULT_LIMITS, recover: Callable[[], None] | None = None
) -> T:
    """The result of an action on a file, which is repeated after transient errors.

    There are at most `ATTEMPTS` attempts, with waits that double, and none begins after `limits.total` seconds.

    Args:
        path: of the file, for messages.
        action: what is tried.
        limits: of its time.
        recover: called before each further attempt.

    Raises:
        MissingFileError: the file does not exist.
        StorageError: of the last attempt, or an error that is not transient, such as a lack of permission.
    """
    name, started = without_credentials(path), time.monotonic()
    for attempt in itertools.count(1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            if not is_transient(error):
                raise user_error(name, error) from error
            reason = describe_error(error)
            wait = FIRST_WAIT * 2 ** (attempt - 1) * (0.5 + random.random())  # random, so that threads spread out
            elapsed = time.monotonic() - started
            if attempt == ATTEMPTS or elapsed + wait > limits.total:
                raise StorageError(
                    f"{name} cannot be read, after {attempt} attempts in {elapsed:.0f} s: {reason}"
                ) from error
            log_retry(name, reason, attempt, limits)
            time.sleep(wait)
            if recover is not None:
                recover()
    raise AssertionError("unreachable")


def log_retry(name: str, reason: str, attempt: int, limits: ReadLimits) -> None:
    """Counts a retry, and logs it unless a retry in the same folder was logged less than `LOG_EVERY` seconds ago."""
    folder, now = name.rpartition("/")[0], time.monotonic()
    with _lock:
        retry_counts[folder] += 1
        count = retry_counts[folder]
        last, logged = _logged.get(folder, (-LOG_EVERY, 0))
        if now - last < LOG_EVERY:
            return
        _logged[folder] = now, count
    log.warning(
        "%s: %s; attempt %d of %d within %g s (retries in %s: %d more, %d in all; said at most every %g s)",
        *(name, reason, attempt + 1, ATTEMPTS, limits.total, folder, count - logged, count, LOG_EVERY),
    )


def reset_retry_log() -> None:
    """Forgets all counted retries."""
    with _lock:
        retry_counts.clear()
        _logged.clear()


def user_error(name: str, error: Exception) -> Exception:
    """The UserError for an error that is not transient; the error itself if the storage did not raise it."""
    status = http_status(error) or http_status(error.__cause__)  # fsspec raises FileNotFoundError for every failure
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return StorageError(f"{name} cannot be read: {error.strerror}; raise the limit with ulimit -n")
    if status == 404 or (isinstance(error, FileNotFoundError) and not status):
        return MissingFileError(f"there is no file {name}")
    if isinstance(error, OSError) or status:
        cause = error.__cause__ if status and not http_status(error) and error.__cause__ else error
        return StorageError(f"{name} cannot be read: {describe_error(cause)}{advice(status)}")
    return error


def advice(status: int | None) -> str:
    """What to do about an HTTP status."""
    if status in (401, 403, 407):
        return "; the server wants other credentials: check the address's user, token or signature"
    return ""


def is_transient(error: BaseException) -> bool:
    """Whether it is worth trying again: a failed connection, a timeout, a temporary failure of a server or disk."""
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        return is_transient(error.__cause__)  # fsspec raises FileNotFoundError for every failure over HTTP
    if status := http_status(error):
        return status >= 500 or status in TRANSIENT_STATUSES
    if is_certificate_error(error):
        return False
    if isinstance(error, (ConnectionError, TimeoutError)):
        return True
    if isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS:
        return True
    return type(error).__module__.partition(".")[0] == "aiohttp" and not isinstance(error, ValueError)


def is_certificate_error(error: BaseException) -> bool:
    """Whether a server's certificate is not accepted, or the server does not speak TLS."""
    return "SSL" in type(error).__name__ or "Certificate" in type(error).__name__


def http_status(error: BaseException | None) -> int | None:
    """The HTTP status of an error of aiohttp or gcsfs, which call it differently."""
    status = getattr(error, "status", getattr(error, "code", None))
    return status if isinstance(status, int) and status >= 400 else None


def describe_error(error: BaseException) -> str:
    """An error in one line, without the address."""
    if status := http_status(error):
        return f"HTTP {status} {getattr(error, 'message', '')}"  # the error's own text has the address in it
    return f"{type(error).__name__}: {hide_credentials(str(error))}" if str(error) else type(error).__name__
