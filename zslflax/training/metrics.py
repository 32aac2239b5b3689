"""Metrics of a run: progress, metrics.jsonl, TensorBoard, throughput, profiler traces, and unreadable samples."""

import collections
import json
import logging
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from zslflax.errors import UserError
from zslflax.progress import progress_bar
from zslflax.saving import storage_errors, write_text
from zslflax.training.events import Events
from zslflax.training.wandb_run import WandbRun

log = logging.getLogger("zslflax")

COUNTERS = ("nonfinite_steps", "failed_step")  # metrics of the whole run so far, of which the last value counts
TRACE_ERRORS = (OSError, RuntimeError, ValueError)  # of jax's profiler and the files that it reads again
MEASURED = ("pairs_per_second", "waiting_for_data", "flops_per_second", "mfu")  # metrics of time: no two runs agree


class Reporter:
    """Writes a run's metrics to metrics.jsonl and to TensorBoard events, and shows its progress.

    A run needs metrics.jsonl, and can do without the events.

    Args:
        workdir: the folder of the files. metrics.jsonl has one JSON object a line, with its `step`.
        step: the step at which the run starts. Later lines, of a run that was killed, are removed.
        steps: the step at which the run ends.
        active: False for processes that report nothing.
        wandb: also gets the metrics and the figures of predictions.

    Raises:
        StorageError: metrics.jsonl cannot be written; also from the methods.
    """

    def __init__(self, workdir: Path, step: int, steps: int, active: bool = True, wandb: WandbRun | None = None):
        self.active, self.wandb = active, wandb
        if not active:
            return
        self.path = workdir / "metrics.jsonl"
        remove_lines_after(self.path, step)
        with storage_errors(self.path):
            self.file = open(self.path, "a", buffering=1, encoding="utf-8")
        self.events = Events(workdir, step)
        self.bar = progress_bar(initial=step, total=steps, unit="step", smoothing=0.1)
        self.next_log_time = 0.0

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of a step. Values that are not finite become null, and no point of a curve."""
        if not self.active:
            return
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        with storage_errors(self.path):
            self.file.write(json.dumps({"step": step, **finite}) + "\n")
        self.events.write(step, {name: value for name, value in finite.items() if value is not None})
        if self.wandb is not None:
            self.wandb.log(step, finite)

    def write_figures(self, step: int) -> None:
        """Shows the figures that an evaluation has drawn, WORKDIR/predictions/STEP*.png, in TensorBoard.

        A figure that cannot be read is left out with a warning.
        """
        if not self.active:
            return
        folder = self.path.parent / "predictions"
        for path in [folder / f"{step}.png", *sorted(folder.glob(f"{step}-*.png"))]:
            if not path.is_file():
                continue
            name = "predictions" + path.stem.removeprefix(str(step)).replace("-", "/", 1)
            try:
                with Image.open(path) as image:
                    pixels = np.asarray(image.convert("RGB"))
            except OSError as error:
                log.warning("%s cannot be read, and is not shown: %s", path, error)
                continue
            self.events.write_image(step, name, pixels)
            if self.wandb is not None:
                self.wandb.log_figure(step, name, path)

    def step(self, step: int) -> None:
        """Moves the progress bar; call it after each step."""
        if self.active:
            self.bar.update(step - self.bar.n)

    def progress(self, step: int, loss: float, pairs_per_second: float) -> None:
        """Updates the progress bar. Where standard error is not a terminal, logs a line at most every ten seconds."""
        if not self.active:
            return
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix_str(f"loss {loss:.3f}, {pairs_per_second:,.0f} pairs/s", refresh=False)
        if self.bar.disable and time.monotonic() >= self.next_log_time:
            self.next_log_time = time.monotonic() + 10.0
            log.info("step %d/%d  loss %.3f  %s pairs/s", step, self.bar.total, loss, f"{pairs_per_second:,.0f}")

    def close(self) -> None:
        """Closes the files."""
        if self.active:
            self.bar.close()
            self.events.close()
            with storage_errors(self.path):
                self.file.close()
            if self.wandb is not None:
                self.wandb.finish()


def remove_lines_after(path: Path, step: int) -> None:
    """Keeps the lines of metrics.jsonl up to a step, so that a resumed run writes each step once.

    Lines that cannot be read, such as a part of one that a kill left, are dropped.

    Raises:
        StorageError: the file cannot be read or written.
    """
    if not path.exists():
        return
    with storage_errors(path):
        lines = path.read_bytes().splitlines(keepends=True)
    steps = [step_of_line(line) for line in lines]
    kept = [line for line, line_step in zip(lines, steps) if line_step is not None and line_step <= step]
    if unreadable := steps.count(None):
        log.warning("%s: %d lines could not be read and are dropped", path, unreadable)
    if len(kept) < len(lines):
        write_text(path, b"".join(kept).decode())


def step_of_line(line: bytes) -> int | None:
    """The step of a line of metrics.jsonl, or None if it is not a whole line of UTF-8, JSON, an object with a step."""
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    step = value.get("step") if isinstance(value, dict) else None
    return step if type(step) is int and line.endswith(b"\n") else None


class Profile:
    """Writes a profiler trace of some steps, on this process's devices and threads. Other steps are not slowed down.

    A trace that cannot be written is given up with a warning.

    Args:
        steps: the first and the last step of the trace, or None for no trace. A run that resumes between them begins
            the trace there.
        folder: the trace is written to a subfolder that is named after the time.
    """

    def __init__(self, steps: tuple[int, int] | None, folder: Path):
        self.first, self.last = steps or (0, 0)
        self.folder, self.running = folder, False
        self.annotation: jax.profiler.StepTraceAnnotation | None = None

    def before(self, step: int, state: Any) -> None:
        """Call it before each step. Starts the trace once the devices have computed `state`."""
        if not self.first <= step <= self.last:
            return
        if not self.running:
            jax.block_until_ready(state)
            try:
                jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            except TRACE_ERRORS as error:
                self._give_up(error)
                return
            self.running = True
        self.annotation = jax.profiler.StepTraceAnnotation("train_step", step_num=step)
        self.annotation.__enter__()

    def after(self, step: int, metrics: Any) -> None:
        """Call it after each step. Ends the trace once the devices have computed the last step's `metrics`."""
        if not self.running:
            return
        self._end_step()
        if step == self.last:
            jax.block_until_ready(metrics)
            self.close()

    def close(self) -> None:
        """Ends a trace that is in progress, as when a run stops or fails."""
        if not self.running:
            return
        self._end_step()
        self.running = False
        try:
            jax.profiler.stop_trace()
        except TRACE_ERRORS as error:
            self._give_up(error)
            return
        log.info(
            "a trace of steps %d to %d is in %s. To see it: pip install xprof && xprof --logdir=%s; or open its "
            "perfetto_trace.json.gz at https://ui.perfetto.dev",
            self.first,
            self.last,
            self.folder,
            self.folder,
        )

    def _give_up(self, error: Exception) -> None:
        """Warns that there is no trace, and starts no other."""
        self.first, self.last = 0, 0
        log.warning("there is no trace in %s, and the run goes on without: %s", self.folder, error)

    def _end_step(self) -> None:
        """Ends the annotation of a step that has not ended."""
        if self.annotation is not None:
            self.annotation.__exit__(None, None, None)
            self.annotation = None


def average(metrics: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The mean of each metric over steps, as `train/NAME`; of `COUNTERS` the last value. Waits for the devices.

    Values that are not finite, of steps that were skipped, are left out; so are steps without the metric, from before a
    resume with another config. A metric without any value is NaN.

    >>> average([{"loss": 3.0, "nonfinite_steps": 0}, {"loss": 1.0, "nonfinite_steps": 1}])
    {'train/loss': 2.0, 'train/nonfinite_steps': 1}
    """
    host = jax.device_get(list(metrics))
    means = {}
    for name, last in host[-1].items():
        values = np.array([step[name] for step in host if name in step])
        finite = values[np.isfinite(values)]
        means[f"train/{name}"] = int(last) if name in COUNTERS else float(np.mean(finite)) if len(finite) else np.nan
    return means


class BadSampleCounter:
    """Counts unreadable samples, logs the first few, and stops a run that has too many.

    Args:
        max_fraction: the share of samples that may be unreadable.
    """

    MIN_SAMPLES = 1_000  # before the share is compared with the limit
    MAX_LOGGED = 5

    def __init__(self, max_fraction: float):
        self.max_fraction, self.total, self.bad = max_fraction, 0, 0
        self.by_shard: collections.Counter[str] = collections.Counter()

    def count(self, errors: Iterable[tuple[str, str]], samples: int) -> None:
        """Counts a batch.

        Args:
            errors: (name, message) of each unreadable sample, where the name is "SHARD:KEY" or a path.
            samples: the number of samples in the batch, with the unreadable ones.

        Raises:
            UserError: too many samples are unreadable; names the shards that have the most.
        """
        self.total += samples
        before = self.bad
        for name, message in errors:
            self.bad += 1
            self.by_shard[name.rpartition(":")[0]] += 1
            if self.bad <= self.MAX_LOGGED:
                log.warning("unreadable sample %s: %s", name, message)
        enough = self.bad > before and self.total >= self.MIN_SAMPLES
        if enough and self.bad > self.max_fraction * self.total:
            worst = "\n  ".join(f"{shard}: {count}" for shard, count in self.by_shard.most_common(10))
            raise UserError(
                f"{self.bad} of {self.total} samples could not be read, more than data.max_bad_fraction = "
                f"{self.max_fraction}; the shards with the most of them:\n  {worst}"
            )
