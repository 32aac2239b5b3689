"""How far a long task is, on standard error: a bar in a terminal, or lines in the log."""

import logging
import os
import sys
import time
from typing import Any, TextIO

from tqdm import tqdm

log = logging.getLogger("zslflax")

UNKNOWN_SIZE = 80, 24  # columns and rows of a terminal that does not tell
LOG_SECONDS = 30.0  # between lines of progress, where standard error is not a terminal


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
