"""Errors that a user can fix. All other exceptions keep their traceback."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something that the user can fix: the message says what was expected, what was found and what to change.

    Commands print its message as one line, without a traceback.
    """


class MissingFileError(UserError, FileNotFoundError):
    """A file or folder that the user named does not exist."""


class FolderExistsError(UserError, FileExistsError):
    """A folder that must be new exists and is not empty."""


class StorageError(UserError, OSError):
    """A file cannot be read or written: no space, no permission, a network failure."""


class MissingLibraryError(UserError, ImportError):
    """An optional library that the user's choice needs is not installed."""


class NonFiniteError(UserError, FloatingPointError):
    """The loss, a gradient or an update is not finite."""


def nearest_names(name: str, choices: Iterable[str], count: int = 1) -> str:
    """The `count` choices most similar to a name, joined by commas, for error messages.

    >>> nearest_names("lerning_rate", ["batch_size", "learning_rate", "steps"])
    'learning_rate'
    """
    return ", ".join(difflib.get_close_matches(str(name), list(choices), n=count, cutoff=0.0))
