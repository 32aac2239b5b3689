"""The cores of a process, and the choice of workers and threads."""

import math
import os

import pytest

from zslflax.data import cores
from zslflax.data.cores import choose_workers, cpu_time_limit


@pytest.mark.parametrize(
    ("asked", "cores", "chosen"),
    [
        ((0, 0), 0.5, (0, 1)),
        ((0, 0), 2, (0, 3)),
        ((0, 0), 4, (0, 5)),
        ((0, 0), 8, (7, 1)),
        ((0, 0), 16, (14, 1)),
        ((0, 0), 64, (56, 1)),
        ((0, 0), 208, (64, 1)),
        ((0, 0), 208 / 8, (23, 1)),  # eight processes on one host
        ((0, 4), 16, (14, 4)),
        ((0, 32), 2, (0, 32)),
        ((-1, 0), 16, (0, 17)),
        ((3, 0), 2, (3, 1)),
        ((3, 2), 64, (3, 2)),
    ],
)
def test_the_choice_of_workers_and_threads(asked, cores, chosen):
    assert choose_workers(*asked, cores) == chosen


def test_the_limit_of_cpu_time_of_a_container(tmp_path):
    assert cpu_time_limit(tmp_path) == math.inf
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_time_limit(tmp_path) == math.inf
    (tmp_path / "cpu.max").write_text("350000 100000\n")
    assert cpu_time_limit(tmp_path) == 3.5
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    for quota, limit in (("-1", math.inf), ("200000", 2.0)):
        (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
        assert cpu_time_limit(tmp_path) == limit


def test_the_cores_of_a_process_follow_its_affinity(monkeypatch):
    monkeypatch.setattr(cores, "cpu_time_limit", lambda folder: math.inf)
    assert cores.available_cores() == len(os.sched_getaffinity(0))
    monkeypatch.setattr(cores, "cpu_time_limit", lambda folder: 0.5)
    assert cores.available_cores() == 0.5
