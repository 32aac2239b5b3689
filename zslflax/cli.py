"""What all commands share: the log and progress on standard error, and user errors without a traceback."""

import contextlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, TextIO

import absl.logging
import jax
from tqdm import tqdm

from zslflax.errors import UserError

log = logging.getLogger("zslflax")

UNKNOWN_SIZE = 80, 24  # columns and rows of a terminal that does not tell
LOG_SECONDS = 30.0  # between lines of progress, where standard error is not a terminal


def start_logging() -> None:
    """Writes the package's log to standard error, one line per record, without breaking progress bars."""
    handler = logging.StreamHandler(_TqdmStream())
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    absl.logging.set_verbosity(absl.logging.WARNING)  # Orbax logs twenty lines for each checkpoint


class _TqdmStream:
    """A stream that clears the progress bars before it writes, and draws them again."""

    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr, end="")

    def flush(self) -> None:
        sys.stderr.flush()


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Ends the program with the message of a `UserError`, and with the traceback of any other exception.

    A reader that closes the pipe of standard output, such as `head`, ends the program quietly.

    With the environment variable ZSLFLAX_TRACEBACK=1, a `UserError` shows its traceback as well.

    In a multi-process run the process exits at once. A normal exit would wait for the other processes, which in turn
    wait for this one's part of a step.
    """
    try:
        yield
        sys.stdout.flush()  # an error of the last lines is raised here
    except BrokenPipeError:
        # Python flushes again when it ends, which would print the error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        message = None
        if isinstance(error, UserError) and not os.environ.get("ZSLFLAX_TRACEBACK"):
            message = f"zslflax: {error}"
        if jax.distributed.is_initialized():
            print(message or traceback.format_exc(), file=sys.stderr, flush=True)
            os._exit(1)
        if message:
            sys.exit(message)
        raise


def progress_bar(**options: Any) -> tqdm:
    """A bar of tqdm on standard error, as wide as the terminal at each time; none where that is no terminal.

    A terminal that does not know its width, as in some containers and editors, is taken to have `UNKNOWN_SIZE`.
    """
    columns, rows = terminal_size(sys.stderr)  # tqdm itself draws nothing where the size is 0
    bar = tqdm(disable=not sys.stderr.isatty(), ncols=columns, nrows=rows, **options)
    bar.dynamic_ncols = terminal_size
    return bar


def terminal_size(stream: TextIO) -> tuple[int, int]:
    """The columns and rows of the terminal that a stream writes to."""
    try:
        size = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError):  # it is no terminal
        return UNKNOWN_SIZE
    return size.columns or UNKNOWN_SIZE[0], size.lines or UNKNOWN_SIZE[1]


class Progress:
    """Shows how much of a long task is done and how long the rest takes: a bar, or lines in the log.

    Args:
        task: what is done.
        unit: of what is counted, in the plural.
        total: the count at the end.
    """

    def __init__(self, task: str, unit: str, total: int):
        self.task, self.unit, self.total, self.done = task, unit, total, 0
        self.start = time.monotonic()
        self.next_log_time = self.start + LOG_SECONDS
        self.bar = progress_bar(total=total, desc=task, unit=f" {unit}", delay=1, leave=False)

    def update(self, count: int) -> None:
        """Counts what was done since the last call."""
        self.done += count
        self.bar.update(count)
        if self.done >= self.total:
            self.bar.close()
        now = time.monotonic()
        if self.bar.disable and now >= self.next_log_time:
            self.next_log_time = now + LOG_SECONDS
            rate = self.done / (now - self.start)
            minutes = max(0, self.total - self.done) / rate / 60
            log.info(
                "%s: %s of %s, %.0f %s/s, %.1f min left",
                self.task,
                f"{self.done:,}",
                f"{self.total:,}",
                rate,
                self.unit,
                minutes,
            )
