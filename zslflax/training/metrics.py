"""Progress on the terminal, metrics.jsonl, TensorBoard events, throughput, traces, and unreadable samples."""

import collections
import json
import logging
import math
import sys
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

from zslflax.errors import UserError
from zslflax.training import flops

log = logging.getLogger("zslflax")

COUNTS = ("nonfinite_steps", "failed_step")  # metrics that count through the whole run
# Those that measure time, which no two runs share; they end in:
MEASURED = ("pairs_per_second", "waiting_for_data", "flops_per_second", "mfu")


class Reporter:
    """Writes metrics of a run to `workdir`, one JSON object a line with its `step`, and shows how far the run is.

    Args:
        workdir: where metrics.jsonl and the TensorBoard events go.
        step: the step that the run starts from; lines of later steps, from a run that was killed, are dropped.
        steps: the step at which it ends.
        active: False for the processes that report nothing.
    """

    def __init__(self, workdir: Path, step: int, steps: int, active: bool = True):
        self.active = active
        if not active:
            return
        self.path = workdir / "metrics.jsonl"
        _drop_after(self.path, step)
        self.file = open(self.path, "a", buffering=1)
        self.tensorboard = tensorboard_writer(workdir, step)
        self.bar = tqdm(
            initial=step, total=steps, unit="step", disable=not sys.stderr.isatty(), dynamic_ncols=True, smoothing=0.1
        )
        self.next_line = 0.0

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends one line to metrics.jsonl and one point to each TensorBoard curve; non-finite values become null."""
        if not self.active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.file.write(json.dumps({"step": step, **finite}) + "\n")
        for name, value in finite.items():
            if value is not None:
                self.tensorboard.add_scalar(name.replace("@", "_at_"), value, step)

    def progress(self, step: int, loss: float, pairs_per_second: float) -> None:
        """Moves the progress line; where standard error is no terminal, logs a line every ten seconds or so."""
        if not self.active:
            return
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {pairs_per_second:,.0f} pairs/s", refresh=False)
        if self.bar.disable and time.monotonic() >= self.next_line:
            self.next_line = time.monotonic() + 10.0
            log.info("step %d/%d  loss %.3f  %s pairs/s", step, self.bar.total, loss, f"{pairs_per_second:,.0f}")

    def close(self) -> None:
        if self.active:
            self.bar.close()
            self.tensorboard.close()
            self.file.close()


def _drop_after(path: Path, step: int) -> None:
    """Keeps the whole lines of steps up to `step`, so that a resumed run has each step once."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (json.JSONDecodeError, KeyError):
            continue  # cut off in mid-line by a kill
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(kept))
    partial.replace(path)


def tensorboard_writer(workdir: Path, step: int):
    """A writer of TensorBoard events, which hides those of later steps.

    tensorboardX imports PyTorch where it is installed, to know its tensors: seconds and memory for nothing here.
    """
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        from tensorboardX import SummaryWriter
    finally:
        if hidden:
            del sys.modules["torch"]
    return SummaryWriter(str(workdir), purge_step=step + 1)


class Stopwatch:
    """Rates since the last `lap`, of steps of so many pairs each."""

    def __init__(self, pairs: int):
        self.pairs = pairs
        self.start()

    def start(self) -> None:
        self.started, self.waited, self.steps = time.perf_counter(), 0.0, 0

    def next(self, batches):
        """The next step's item of an iterator, the wait for it counted."""
        before = time.perf_counter()
        item = next(batches)
        self.waited += time.perf_counter() - before
        self.steps += 1
        return item

    def lap(self, step_flops: int) -> dict[str, float]:
        """Pairs per second; the share of the time spent waiting for data; and what `flops.rates` has, of one device.

        Args:
            step_flops: what one device does in a step.
        """
        elapsed = max(time.perf_counter() - self.started, 1e-9)
        speed = {"pairs_per_second": self.steps * self.pairs / elapsed, "waiting_for_data": self.waited / elapsed}
        speed |= flops.rates(self.steps * step_flops, elapsed, jax.local_devices()[0].device_kind)
        self.start()
        return {f"train/{name}": value for name, value in speed.items()}


class Profile:
    """Writes a trace of some steps, of this process's devices and threads; no other step is slower for it.

    Args:
        steps: the first and the last of them, or None for none; a run that goes on in between begins there.
        folder: where it goes, in a folder named after the time.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self.first, self.last = steps or (0, 0)
        self.folder, self.running = folder, False

    def before(self, step: int, state) -> None:
        """Starts the trace where `step` is the first to be traced; waits for the devices, so that none is in progress."""
        if not self.first <= step <= self.last:
            return
        if not self.running:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self.running = True
        self.annotation = jax.profiler.StepTraceAnnotation("train_step", step_num=step)
        self.annotation.__enter__()

    def after(self, step: int, metrics) -> None:
        """Ends the trace after the last traced step, once the devices have finished it."""
        if not self.running:
            return
        self.annotation.__exit__(None, None, None)
        if step == self.last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends the trace if one is running: also where the run stops or fails in the middle of it."""
        if not self.running:
            return
        self.running = False
        jax.profiler.stop_trace()
        log.info(
            "a trace of steps %d to %d is in %s. To see it: pip install xprof && xprof --logdir=%s; or open its "
            "perfetto_trace.json.gz at https://ui.perfetto.dev",
            self.first,
            self.last,
            self.folder,
            self.folder,
        )


def average(metrics: list[dict]) -> dict[str, float]:
    """The means of the steps' metrics, as `train/NAME`; this waits for the devices.

    What was not finite in a step that was dropped is left out, and steps that lack a metric: those before a resume with
    another config. Of the counts of bad steps, the last value.
    """
    host = jax.device_get(metrics)
    means = {}
    for name, last in host[-1].items():
        values = np.array([of_step[name] for of_step in host if name in of_step])
        finite = values[np.isfinite(values)]
        means[f"train/{name}"] = int(last) if name in COUNTS else float(np.mean(finite)) if len(finite) else np.nan
    return means


class BadSampleCounter:
    """Counts the samples that could not be read, names the first few, and stops a run that has too many.

    Args:
        limit: the share of samples that may be bad.
    """

    ENOUGH = 1_000  # samples, before a share means something

    def __init__(self, limit: float):
        self.limit, self.seen, self.bad, self.shards = limit, 0, 0, collections.Counter()

    def count(self, errors, samples: int) -> None:
        self.seen += samples
        for name, message in errors:
            self.bad += 1
            self.shards[name.rpartition(":")[0]] += 1
            if self.bad <= 5:
                log.warning("unreadable sample %s: %s", name, message)
        if errors and self.seen >= self.ENOUGH and self.bad > self.limit * self.seen:
            worst = "\n  ".join(f"{shard}: {count}" for shard, count in self.shards.most_common(10))
            raise UserError(
                f"{self.bad} of {self.seen} samples could not be read, more than data.max_bad_fraction = {self.limit}; "
                f"the shards with the most of them:\n  {worst}"
            )
