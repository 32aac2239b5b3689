"""What a run leaves in its workdir, and how a test acts on a run in progress."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from zslflax import checkpoint
from zslflax.data import pipeline
from zslflax.training.metrics import MEASURED
from zslflax.training.stopwatch import Stopwatch
from zslflax.training.train_state import TrainState


def read_metrics(workdir: Path, measured: bool = False) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without the metrics that measure time unless `measured`."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if measured or not k.endswith(MEASURED)} for line in found]


def read_state(workdir: Path, step: int) -> dict[str, Any]:
    """All attributes of a saved state, as NumPy arrays."""
    return checkpoint.restore_parts(workdir, step, tuple(TrainState.__dataclass_fields__))


def assert_same_bits(a: Any, b: Any) -> None:
    """Asserts that two trees have equal arrays."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_same_run(expected: Path, workdir: Path) -> None:
    """Asserts that two workdirs have the same metrics and the same bits in the checkpoints that both have."""
    assert read_metrics(expected) == read_metrics(workdir)
    steps = [checkpoint.complete_steps(folder) for folder in (expected, workdir)]
    assert steps[0][-1] == steps[1][-1]
    for step in set(steps[0]) & set(steps[1]):  # a run that was stopped has one more, and lacks an older one
        assert_same_bits(read_state(expected, step), read_state(workdir, step))


def act_at_batch(monkeypatch: pytest.MonkeyPatch, step: int, action: Callable[[], Any]) -> None:
    """Calls `action` when the loop asks for the batch before that of a step. The step before is then still to be taken.

    An exception of the action comes out of the loop as one of the pipeline.
    """
    train_batches, next_batch, taken = pipeline.train_batches, Stopwatch.next, 0

    def starting(*args, start_step=0, **kwargs):
        nonlocal taken
        taken = start_step
        return train_batches(*args, start_step=start_step, **kwargs)

    def acting(self, *args):
        nonlocal taken
        taken += 1
        if taken == max(step - 1, 1):
            action()
        return next_batch(self, *args)

    monkeypatch.setattr(pipeline, "train_batches", starting)
    monkeypatch.setattr(Stopwatch, "next", acting)
