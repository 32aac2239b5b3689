"""Runs that are asked to stop, killed, or started twice, as processes of their own."""

import fcntl
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import CACHE
from zslflax import checkpoint

spec = importlib.util.spec_from_file_location("kills", Path(__file__).parents[1] / "benchmarks" / "kills.py")
kills = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kills)

STEPS = 24


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run leaves that nobody disturbed."""
    run = kills.Run(tmp_path_factory.mktemp("whole") / "run", STEPS, CACHE)
    run.finish(300)
    return run.left()


@pytest.fixture
def run(tmp_path):
    return kills.Run(tmp_path / "run", STEPS, CACHE)


def test_runs_that_are_killed_go_on_to_the_same_bits(run, whole):
    rng = random.Random(0)
    for kind in ("scenes", "save"):
        assert kills.kill_once(run, kind, rng, 300)[1], (run.folder / "log").read_text()
    run.finish(300)
    assert kills.differences(whole, run.left()) == []


def until(condition, process, seconds=300.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_well_and_the_next_start_goes_on_there(run, whole, number):
    process = run.start()
    until(lambda: run.seen("step") > 2, process)
    process.send_signal(number)
    before = time.monotonic()
    assert process.wait(120) == 0
    log = (run.folder / "log").read_text()
    assert f"{number.name}: saving after this step" in log and "the same command goes on" in log
    assert ("once more stops at once" in log) == (number == signal.SIGINT)
    step = checkpoint.available(run.workdir)[-1]
    assert f"stopped and saved at step {step} of {STEPS}" in log
    run.finish(300)
    assert f"resuming from step {step}" in (run.folder / "log").read_text()
    assert kills.differences(whole, run.left()) == []


def test_a_second_process_in_the_same_workdir_is_refused(run):
    run.workdir.mkdir()
    with open(run.workdir / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert run.start().wait(300) == 1
    assert "another process is training in" in (run.folder / "log").read_text()
    assert [path.name for path in run.workdir.iterdir()] == ["lock"]
