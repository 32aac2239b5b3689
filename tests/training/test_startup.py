"""The log of a start: its phases, and the age of the process."""

import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from zslflax.training import loop, startup
from zslflax.training.setup import log_setup
from zslflax.training.startup import StartupTimes


def test_phases_are_measured_and_logged_in_one_line(monkeypatch, caplog):
    clock = iter([0.0, 0.0, 1.5, 2.0, 4.0, 10.0, 10.5, 11.0])
    monkeypatch.setattr(startup.time, "perf_counter", lambda: next(clock))
    caplog.set_level("INFO", "zslflax")
    times = StartupTimes(import_seconds=3.0)
    for name in ("opening", "compiling", "opening"):
        with times.phase(name):
            pass
    times.report()
    assert caplog.messages == [
        "the first step ended after 14.0 s: importing 3.0, opening 2.0, compiling 2.0, other 7.0"
    ]


def test_the_age_of_a_process_begins_with_its_start():
    program = "import time; time.sleep(0.5); from zslflax.training.startup import process_age; print(process_age())"
    start = time.monotonic()
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert 0.45 < float(output) < time.monotonic() - start + 0.1


def test_a_run_logs_the_times_of_its_start(tiny_config, tmp_path, caplog):
    tiny_config.steps, tiny_config.eval.sets.test.data = 2, ""
    caplog.set_level("INFO", "zslflax")
    loop.train(tiny_config, tmp_path)
    (line,) = [message for message in caplog.messages if message.startswith("the first step ended after")]
    phases = re.findall(r"([a-z][a-z ]+) [\d.]+(?:,|$)", line.partition(": ")[2])
    assert phases == [
        "importing",
        "opening the data",
        "building the state",
        "the first batch",
        "compiling and the first step",
        "other",
    ]
    before = caplog.messages.index("compiling the train step; this can take minutes the first time")
    assert before < caplog.messages.index(line)


@pytest.mark.parametrize(
    ("steps", "batch_size", "samples", "logged"),
    [
        (1000, 128, 20_000, "6.4"),
        (562, 512, 24_000, "12.0"),
        (10_000, 512, 4_000, "1,280.0"),
        (2, 128, 20_000, "0.013"),
    ],
)
def test_the_passes_over_the_data_are_logged(tiny_config, caplog, steps, batch_size, samples, logged):
    tiny_config.steps, tiny_config.batch_size = steps, batch_size
    caplog.set_level("INFO", "zslflax")
    tower = {"tower": {"kernel": np.zeros((2, 2))}}
    state = SimpleNamespace(params={"image": tower, "text": tower}, frozen_params={})
    log_setup(tiny_config, state, [range(samples // 2), range(samples // 2)])
    assert caplog.messages[-1].startswith(f"{samples:,} samples, batches of {batch_size} on ")
    assert caplog.messages[-1].endswith(f", {steps} steps = {logged} passes")
