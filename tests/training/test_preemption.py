"""Processes of their own that are killed and asked to stop; benchmarks/kills.py does more of it."""

import importlib.util
import signal
from pathlib import Path

from tests.conftest import CACHE

spec = importlib.util.spec_from_file_location("kills", Path(__file__).parents[2] / "benchmarks" / "kills.py")
kills = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kills)

STEPS, SECONDS = 12, 600


def test_a_run_that_is_killed_killed_again_and_asked_to_stop_goes_on_to_the_same_bits(tmp_path):
    whole = kills.Run(tmp_path / "whole", STEPS, CACHE)
    whole.finish(SECONDS)
    run = kills.Run(tmp_path / "run", STEPS, CACHE)
    for kind in ("shapes", "save"):
        assert kills.kill(run, kills.start_until(run, kind, SECONDS)), (run.folder / "log").read_text()
    process = kills.start_until(run, "step", SECONDS)
    process.send_signal(signal.SIGTERM)
    assert process.wait(SECONDS) == 0
    assert "SIGTERM: saving after this step, then stopping" in (run.folder / "log").read_text()

    run.finish(SECONDS)
    assert kills.differences(whole.left(), run.left()) == []
