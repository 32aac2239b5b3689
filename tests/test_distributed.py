"""Arrays on devices, and the compilation cache. tests/training/test_processes.py tests several processes."""

import os
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from tests.testing.configs import ROOT
from zslflax import distributed
from zslflax.errors import UserError


def test_batches_are_on_the_devices_before_they_are_used():
    drawn = []

    def source():
        for i in range(4):
            drawn.append(i)
            yield {"image": np.full(8, i), "errors": ("none",)}

    with distributed.prefetch_to_devices(source(), size=2) as batches:
        arrays, errors = next(batches)
        deadline = time.monotonic() + 30
        while len(drawn) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert drawn == [0, 1, 2]  # two wait on the devices
        assert errors == ("none",)
        assert len(arrays["image"].sharding.device_set) == 4 and arrays["image"].shape == (4, 2)
        assert [int(arrays["image"][0, 0]) for arrays, _ in batches] == [1, 2, 3]


def test_one_process_is_alone(tmp_path):
    assert distributed.is_main() and not distributed.is_multi_process()
    assert distributed.all_hosts(True) and not distributed.all_hosts(False)
    assert distributed.gather_json({"a": [1, "b"]}) == [{"a": [1, "b"]}]
    distributed.check_same_on_hosts("the number of samples", 3)


def test_processes_on_the_same_cores_of_one_machine_are_counted(monkeypatch):
    assert distributed.local_processes() == 1

    def gather(value):
        machine, cores = value
        return [value, [machine, cores], [machine, [10_000]], ["another machine", cores]]

    monkeypatch.setattr(distributed, "gather_json", gather)
    assert distributed.local_processes() == 2


def test_processes_that_differ_are_told_so(monkeypatch):
    monkeypatch.setattr(distributed, "gather_json", lambda value: [value, value + 1])
    with pytest.raises(UserError, match=r"the processes differ in the number of samples: \[3, 4\]; they must see"):
        distributed.check_same_on_hosts("the number of samples", 3)


@pytest.mark.parametrize(
    "address, count, process",
    [
        ("10.0.0.1", "2", "0"),
        ("10.0.0.1:80", "", "0"),
        ("10.0.0.1:80", "two", "0"),
        ("10.0.0.1:80", "2", "2"),
        ("h:1", "2", "-1"),
    ],
)
def test_variables_that_describe_no_process_are_refused(monkeypatch, address, count, process):
    names = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": process}
    for name, value in names.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"a number of processes, and one from 0 below it; found .*ID='{process}'"):
        distributed.read_process_variables()
    monkeypatch.setattr(distributed.os, "environ", names | dict(zip(names, ("h.example:80", "2", "1"))))
    assert distributed.read_process_variables() == ("h.example:80", 2, 1)


def count_devices(chosen, before="", paths=()):
    """The number of devices that a new process has after `initialize` was asked for two.

    Args:
        chosen: environment variables that say which devices there are.
        before: statements before it.
        paths: folders to import from first.
    """
    chooses = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS", "JAX_PLATFORMS")
    environment = {name: value for name, value in os.environ.items() if name not in chooses} | chosen
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, paths), str(ROOT), os.environ.get("PYTHONPATH", "")])
    program = f"import jax; {before}from zslflax import distributed; distributed.initialize('', 2); "
    command = [sys.executable, "-c", program + "print(jax.device_count())"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(
    "chosen, devices",
    [({}, 2), ({"JAX_NUM_CPU_DEVICES": "3"}, 3), ({"XLA_FLAGS": "--xla_force_host_platform_device_count=1"}, 1)],
)
def test_a_cpu_is_divided_unless_the_environment_chooses(chosen, devices):
    assert count_devices({"JAX_PLATFORMS": "cpu"} | chosen) == devices


def test_jax_keeps_the_devices_that_it_has_started_with():
    """As where a config file counts the devices."""
    assert count_devices({"JAX_PLATFORMS": "cpu"}, before="jax.device_count(); ") == 1


def test_devices_of_a_cpu_wait_for_each_other_and_order_their_collectives(monkeypatch):
    monkeypatch.setattr(distributed.jax, "config", types.SimpleNamespace(jax_num_cpu_devices=2))
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_collective_call_terminate_timeout_seconds=7")
    distributed.divide_cpu(1)
    assert os.environ["XLA_FLAGS"].split() == [
        "--xla_cpu_collective_call_terminate_timeout_seconds=7",
        "--xla_cpu_enable_concurrency_optimized_scheduler=false",
    ]
    monkeypatch.delenv("XLA_FLAGS")
    monkeypatch.setattr(distributed.jax.config, "jax_num_cpu_devices", -1)
    distributed.divide_cpu(1)
    assert "XLA_FLAGS" not in os.environ


def test_a_cpu_beside_gpus_is_not_divided(tmp_path):
    (tmp_path / "jax_plugins").mkdir()  # the namespace of the libraries of GPUs
    assert count_devices({}, paths=[tmp_path]) == 1
    assert count_devices({"JAX_PLATFORMS": "cpu"}, paths=[tmp_path]) == 2


def test_no_more_devices_are_chosen_than_batches_divide_among():
    assert [distributed.choose_cpu_devices(cores, 128, 512) for cores in (0.5, 1, 2, 3, 64)] == [1, 1, 2, 2, 4]
    assert distributed.choose_cpu_devices(4, 9, 512) == 1
