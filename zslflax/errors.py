"""Errors that a user can fix. All other exceptions are programming errors and keep their traceback."""

import difflib
from collections.abc import Iterable


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


def nearest_names(name: str, choices: Iterable[str], count: int = 1, cutoff: float = 0.0) -> str:
    """The `count` choices that are most similar to a name, separated by commas, for error messages.

    >>> nearest_names("lerning_rate", ["batch_size", "learning_rate", "steps"])
    'learning_rate'
    >>> nearest_names("vit_b61", ["resnet50", "vit_s16", "vit_b16"], count=2)
    'vit_b16, vit_s16'

    Choices whose similarity, from 0 to 1, is below `cutoff` are left out.
    """
    return ", ".join(difflib.get_close_matches(str(name), list(choices), n=count, cutoff=cutoff))
