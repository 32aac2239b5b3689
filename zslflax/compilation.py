"""Keeps compiled programs on disk, so that the next process does not compile them."""

import errno
import logging
import os
import warnings

import jax

from zslflax.errors import UserError
from zslflax.files import expand_user
from zslflax.saving import storage_errors

log = logging.getLogger("zslflax")

COMPILATION_CACHE = "~/.cache/zslflax/xla"  # the default folder


def keep_compiled(folder: str) -> None:
    """Keeps compiled programs in a folder, or warns that this is not possible; another process finds them there.

    Args:
        folder: is made where it is missing.
    """
    try:
        path = expand_user(folder)
        with storage_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except UserError as error:
        log.warning("compiled programs are not kept: %s", error)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    # A start compiles a hundred small functions; jax would keep only those that take more than a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # On a full disk, or where another process has written them in part, it would say so for each of them.
    warnings.filterwarnings("ignore", "Error (reading|writing) persistent compilation cache entry")
