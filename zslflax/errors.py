"""Errors that a user can fix. All other exceptions are programming errors and keep their traceback."""

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator


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

    def __init__(self, error: Exception, advice: str):
        found = str(error).partition("\n")[0][:300].removeprefix("RESOURCE_EXHAUSTED: ").rstrip(". ")
        super().__init__(f"a device's memory does not suffice ({found}): {advice}")


def is_out_of_memory(error: Exception) -> bool:
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


def nearest_names(name: str, choices: Iterable[str], count: int = 1, cutoff: float = 0.0) -> str:
    """The `count` choices that are most similar to a name, separated by commas, for error messages.

    >>> nearest_names("lerning_rate", ["batch_size", "learning_rate", "steps"])
    'learning_rate'
    >>> nearest_names("vit_b61", ["resnet50", "vit_s16", "vit_b16"], count=2)
    'vit_b16, vit_s16'

    Choices whose similarity, from 0 to 1, is below `cutoff` are left out.
    """
    return ", ".join(difflib.get_close_matches(str(name), list(choices), n=count, cutoff=cutoff))
