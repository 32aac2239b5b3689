"""What all commands share: log lines on standard error, and user errors as one-line messages."""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator

import absl.logging
import jax
from tqdm import tqdm

from zslflax.errors import UserError

log = logging.getLogger("zslflax")


def start_logging() -> None:
    """Writes the package's log to standard error, one plain line per record; progress bars stay intact."""
    handler = logging.StreamHandler(_TqdmStream())
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    absl.logging.set_verbosity(absl.logging.WARNING)  # Orbax logs twenty lines per save


class _TqdmStream:
    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr, end="")

    def flush(self) -> None:
        sys.stderr.flush()


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Ends the program with a one-line message after a `UserError`, and with a traceback after any other error.

    In a multi-process run the process exits at once: a normal exit waits for the other processes, which in turn wait
    for this one's part of a step.
    """
    try:
        yield
    except Exception as error:
        expected = isinstance(error, UserError) and not os.environ.get("ZSLFLAX_TRACEBACK")
        message = (
            f"zslflax: {error}\n(ZSLFLAX_TRACEBACK=1 shows where it was raised)" if expected else traceback.format_exc()
        )
        if jax.distributed.is_initialized():
            print(message, file=sys.stderr, flush=True)
            os._exit(1)
        if expected:
            sys.exit(message)
        raise
