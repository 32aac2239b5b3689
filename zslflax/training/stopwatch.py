"""Throughput of a run, and the share of the time in which the devices wait for data."""

import logging
import time
from typing import Any

import jax

from zslflax.background import BackgroundIterator
from zslflax.training import flops

log = logging.getLogger("zslflax")

POLL_SECONDS = 0.001  # between two looks at whether the devices are done
MUCH_WAITING = 0.1  # share of the time, above which the log says what to change
READ_FASTER = (
    "batches came late. Each of these helps: more CPU cores; another number of data.workers than the start of the log "
    "says; more data.threads if the shards are remote, or local shards; images stored at the size that the crops need "
    "(img2dataset resizes them)"
)
COMPUTING_FEATURES = (
    "the features of the frozen towers are computed in the first pass over the data, and kept: later passes read them. "
    "With a features.folder, the command zslflax features computes them before the run"
)


class Stopwatch:
    """Measures throughput since the last `lap`.

    Args:
        pairs: the number of pairs in a step.
    """

    def __init__(self, pairs: int):
        self.pairs, self.laps = pairs, 0
        self.warned: set[str] = set()  # causes that the log has named
        self.start()

    def start(self) -> None:
        """Starts again from zero."""
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def next(self, batches: BackgroundIterator[Any], last_metrics: Any) -> Any:
        """The next batch. Counts a step, and the time in which the devices had nothing to do.

        That is the time from the end of the last step, or from this call if that is later, until the batch is there. A
        batch that comes while the devices are still busy is not late.

        Args:
            batches: on the devices.
            last_metrics: outputs of the last step, which are ready when the devices have taken it; None before the
                first step.
        """
        if not batches.wait(0.0):
            while not are_ready(last_metrics) and not batches.wait(POLL_SECONDS):
                pass
            idle_since = time.perf_counter()
            batches.wait()
            self.waited += time.perf_counter() - idle_since
        batch = next(batches)
        self.steps += 1
        return batch

    def lap(self, step_flops: int, computing_features: bool = False) -> dict[str, float]:
        """Pairs per second, the share of the time in which the devices waited for data, and `flops.rates` of a device.

        Logs once why the devices wait for data, and what to change. The first lap does not count: it has the start of
        the pipeline in it.

        Args:
            step_flops: floating-point operations of one device in a step.
            computing_features: whether features of frozen towers are computed for these batches.
        """
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        rates = {"pairs_per_second": self.steps * self.pairs / elapsed, "waiting_for_data": self.waited / elapsed}
        rates |= flops.rates(self.steps * step_flops, elapsed, jax.local_devices()[0].device_kind)
        self.laps += 1
        cause = COMPUTING_FEATURES if computing_features else READ_FASTER
        if self.laps > 1 and rates["waiting_for_data"] > MUCH_WAITING and cause not in self.warned:
            self.warned.add(cause)
            level, share = logging.INFO if computing_features else logging.WARNING, 100 * rates["waiting_for_data"]
            log.log(level, "the devices had nothing to do for %.0f%% of the time, because %s", share, cause)
        self.start()
        return {f"train/{name}": value for name, value in rates.items()}


def are_ready(outputs: Any) -> bool:
    """Whether the devices have computed all arrays of a tree; does not wait for them."""
    return all(output.is_ready() for output in jax.tree.leaves(outputs))
