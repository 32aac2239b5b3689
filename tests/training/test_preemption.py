"""Runs in processes of their own that are killed and asked to stop; benchmarks/kills.py does more of it."""

import importlib.util
import signal
import threading
import time

import pytest

from tests.testing.configs import COMPILATION_CACHE, ROOT
from zslflax.training.preemption import StopRequest

STEPS, TIMEOUT = 12, 600


@pytest.fixture
def kills():
    """benchmarks/kills.py as a module."""
    spec = importlib.util.spec_from_file_location("kills", ROOT / "benchmarks" / "kills.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_run_that_is_killed_twice_and_asked_to_stop_resumes_to_the_same_bits(kills, tmp_path):
    undisturbed = kills.Run(tmp_path / "undisturbed", STEPS, COMPILATION_CACHE)
    undisturbed.finish(TIMEOUT)
    run = kills.Run(tmp_path / "run", STEPS, COMPILATION_CACHE)
    for activity in ("data", "save"):
        assert kills.kill(run, kills.start_until(run, activity, TIMEOUT)), run.log.read_text()
    process = kills.start_until(run, "step", TIMEOUT)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT) == 0
    assert "SIGTERM: saving after this step, then stopping" in run.log.read_text()

    run.finish(TIMEOUT)
    assert kills.differences(undisturbed.results(), run.results()) == []


def test_a_signal_interrupts_what_is_interruptible_and_a_second_one_has_its_usual_effect():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.requested(1) and stop.run_interruptible(max, 1, 2) == 2
        threading.Timer(0.1, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
        assert stop.run_interruptible(time.sleep, 60) is None
        assert stop.requested(2) and stop.run_interruptible(max, 1, 2) is None
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_closed_terminal_asks_to_stop_unless_the_run_was_started_to_survive_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.requested(1)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with StopRequest() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.requested(1)
    finally:
        signal.signal(signal.SIGHUP, before)
