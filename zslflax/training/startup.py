"""How long the parts of a start take, from the command to the end of the first step."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

log = logging.getLogger("zslflax")


class StartupTimes:
    """Measures phases, and logs them once.

    Args:
        import_seconds: what passed before, in which Python started and modules were imported.

    Attributes:
        seconds: of each phase.
    """

    def __init__(self, import_seconds: float):
        self.seconds = {"importing": import_seconds}
        self.started = time.perf_counter() - import_seconds

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measures the time inside the block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def report(self) -> None:
        """Logs one line, in which "other" is what no phase measured."""
        total = time.perf_counter() - self.started
        phases = self.seconds | {"other": total - sum(self.seconds.values())}
        described = ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items())
        log.info("the first step ended after %.1f s: %s", total, described)


def process_age() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    try:
        start_ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(uptime - start_ticks / os.sysconf("SC_CLK_TCK"), 0.0)
