"""Throughput and waiting for data, against a clock and devices that the tests set."""

import pytest

from zslflax.training import stopwatch
from zslflax.training.stopwatch import Stopwatch


class World:
    """A clock, batches that arrive and a step that ends at given times. Waiting lets the time pass."""

    def __init__(self, batch_at, step_ends_at=0.0):
        self.time, self.batch_at, self.step_ends_at = 0.0, batch_at, step_ends_at

    def perf_counter(self):
        return self.time

    def is_ready(self):
        return self.time >= self.step_ends_at

    def wait(self, timeout=None):
        self.time = self.batch_at if timeout is None else min(self.time + timeout, max(self.batch_at, self.time))
        return self.time >= self.batch_at

    def __next__(self):
        assert self.time >= self.batch_at
        return "batch"


@pytest.mark.parametrize(
    ("batch_at", "step_ends_at", "idle"),
    [
        (0.0, 3.0, 0.0),  # the batch is there
        (2.0, 3.0, 0.0),  # it comes while the devices are busy
        (5.0, 3.0, 2.0),  # it comes after the step has ended
        (5.0, 0.0, 5.0),  # the step has ended before the batch was asked for
    ],
)
def test_only_the_time_in_which_the_devices_are_idle_counts(batch_at, step_ends_at, idle, monkeypatch):
    world = World(batch_at, step_ends_at)
    monkeypatch.setattr(stopwatch, "time", world)
    watch = Stopwatch(pairs=8)
    assert watch.next(world, world) == "batch"
    world.time = 10.0
    rates = watch.lap(step_flops=100)
    assert rates.pop("train/waiting_for_data") == pytest.approx(idle / 10, abs=2e-4)
    assert rates == {"train/pairs_per_second": 8 / 10, "train/flops_per_second": 100 / 10}
    assert watch.steps == 0 and watch.started == 10.0


def test_the_log_says_once_what_to_change_if_the_devices_wait(monkeypatch, caplog):
    world = World(batch_at=0.0)
    monkeypatch.setattr(stopwatch, "time", world)
    watch = Stopwatch(pairs=8)

    def lap(waited):
        world.batch_at = world.time + waited
        watch.next(world, None)
        world.time = watch.started + 10.0
        watch.lap(step_flops=0)

    lap(9.0)  # the first lap has the start of the pipeline in it
    lap(0.9)
    assert not caplog.records
    lap(2.5)
    lap(5.0)
    (record,) = caplog.records
    assert "nothing to do for 25% of the time" in record.getMessage() and "data.workers" in record.getMessage()


def test_the_log_names_the_features_while_they_are_computed(monkeypatch, caplog):
    world = World(batch_at=0.0)
    monkeypatch.setattr(stopwatch, "time", world)
    caplog.set_level("INFO", logger="zslflax")
    watch = Stopwatch(pairs=8)
    for computing in (True, True, True, False, False):
        world.batch_at = world.time + 5.0
        watch.next(world, None)
        world.time = watch.started + 10.0
        watch.lap(step_flops=0, computing_features=computing)
    features, pipeline = caplog.records
    assert features.levelname == "INFO" and "zslflax features" in features.getMessage()
    assert pipeline.levelname == "WARNING" and "data.workers" in pipeline.getMessage()
