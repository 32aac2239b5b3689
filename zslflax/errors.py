"""Errors that a user can fix. All other exceptions are programming errors and keep their traceback."""

import contextlib
import difflib
import errno
import re
from collections.abc import Iterable, Iterator

# Errors of the machine, which a user can fix wherever they come from: permissions, full or read-only disks, limits.
MACHINE_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ESTALE),
    *(errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTCONN),
)


class UserError(ValueError):
    """Something that the user can fix. The message says what was expected, what was found and what to change.

    Commands print the message without a traceback (`zslflax.cli.exit_on_error`).
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist."""


class FolderExistsError(UserError, FileExistsError):
    """A folder that must be new exists and is not empty."""


class StorageError(UserError, OSError):
    """A file cannot be read or written: no space, no permission, or a network failure."""


class MissingLibraryError(UserError, ImportError):
    """An optional library that the user's choice needs is not installed."""


class NonFiniteError(UserError, FloatingPointError):
    """The loss, the gradient or the update of a step is not finite."""


class DeviceMemoryError(UserError, MemoryError):
    """What was to be computed does not fit into the memory of a device.

    Args:
        error: what jax raised; its first line says how much memory was asked for.
        advice: what to change.
    """

    def __init__(self, error: BaseException, advice: str):
        found = str(error).partition("\n")[0][:300].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(". ")
        super().__init__(f"a device's memory does not suffice ({found}): {advice}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception is jax's for a device whose memory does not suffice: a JaxRuntimeError, or a ValueError.

    >>> is_out_of_memory(ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 1073741824 bytes."))
    True

    TensorStore's error for a full disk has the same status, and a path.

    >>> is_out_of_memory(ValueError('RESOURCE_EXHAUSTED: Error writing "step/0" to "/out of memory/": No space left'))
    False
    """
    return bool(re.search(r"RESOURCE_EXHAUSTED: [^\"/]*(out of memory|allocat)", str(error), re.IGNORECASE))


@contextlib.contextmanager
def device_memory_errors(advice: str) -> Iterator[None]:
    """Turns jax's error for a device whose memory does not suffice into a `DeviceMemoryError` with advice."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise DeviceMemoryError(error, advice) from error


def explain_machine_error(error: BaseException) -> str:
    """The message for an error of the machine: of a disk, its memory or a device's, or a limit. Empty for other errors.

    >>> explain_machine_error(OSError(errno.ENOSPC, "No space left on device", "a.npy"))
    "[Errno 28] No space left on device: 'a.npy'"
    >>> explain_machine_error(MemoryError("Unable to allocate 9 GiB for an array"))
    "the machine's memory does not suffice (Unable to allocate 9 GiB for an array): end other programs that use it, \
or allow this one more (ulimit -v, the limit of its job or container)"
    >>> explain_machine_error(RuntimeError("can't start new thread"))
    "the system gives no further thread or process (can't start new thread): raise ulimit -u, ulimit -v or the limits \
of the job or container"
    >>> explain_machine_error(RuntimeError("another"))
    ''
    """
    if is_out_of_memory(error):
        return str(DeviceMemoryError(error, "end other programs that use it, or choose a smaller model or batch"))
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, MemoryError) or number == errno.ENOMEM:
        found = str(error) or "MemoryError"
        return (
            f"the machine's memory does not suffice ({found}): end other programs that use it, or allow this one more "
            "(ulimit -v, the limit of its job or container)"
        )
    if number == errno.EAGAIN or str(error).startswith("can't start new thread"):
        return (
            f"the system gives no further thread or process ({error}): raise ulimit -u, ulimit -v or the limits of the "
            "job or container"
        )
    return str(error) if number in MACHINE_ERRORS else ""


def nearest_names(name: str, choices: Iterable[str], count: int = 1, cutoff: float = 0.0) -> str:
    """The `count` choices that are most similar to a name, separated by commas, for error messages.

    >>> nearest_names("lerning_rate", ["batch_size", "learning_rate", "steps"])
    'learning_rate'
    >>> nearest_names("vit_b61", ["resnet50", "vit_s16", "vit_b16"], count=2)
    'vit_b16, vit_s16'

    Choices whose similarity, from 0 to 1, is below `cutoff` are left out.
    """
    return ", ".join(difflib.get_close_matches(str(name), list(choices), n=count, cutoff=cutoff))
