"""Processes of which one is killed or fails: the others end, and say which and that the same command goes on."""

import signal
import socket
import subprocess
import sys

import pytest

from tests.testing.configs import process_environment

RUN = """
import sys, time
from zslflax import cli, distributed, peers
from zslflax.errors import UserError
peers.POLL_SECONDS = float(sys.argv[1])
with cli.exit_on_error():
    distributed.initialize()
    print("connected", flush=True)
    if sys.stdin.readline() == "fail\\n":
        raise UserError("its own reason")
"""


@pytest.fixture
def start():
    """Starts connected processes; they end, each when it is told to."""
    processes = []

    def run(count, poll_seconds=0.2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for i in range(count):
            names = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": i}
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            environment = process_environment(**names)
            processes.append(
                subprocess.Popen([sys.executable, "-c", RUN, str(poll_seconds)], env=environment, text=True, **pipes)
            )
        for process in processes:
            assert process.stdout.readline() == "connected\n", process.communicate()
        return processes

    yield run
    for process in processes:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            pipe.close()


def errors_of(process):
    return process.stderr.read() if process.wait(60) is not None else ""


def test_the_others_name_a_process_that_was_killed(start):
    first, second, third = start(3)
    second.send_signal(signal.SIGKILL)
    for process in (first, third):
        errors = errors_of(process)
        assert process.returncode == 1
        assert "zslflax: process 1 of 3 has given no sign of life for 4 s: it was killed" in errors
        assert "This process ends too. The same command goes on from the newest checkpoint" in errors
        assert "was aborted by jax" not in errors and "stack trace" not in errors
    assert "zslflax: process 1 of 3 was killed, or was aborted by jax" in errors_of(second)


def test_a_process_says_so_before_the_loss_of_process_0_aborts_it(start):
    first, second = start(2)
    first.send_signal(signal.SIGKILL)
    assert "process 1 of 2 was killed, or was aborted by jax because it lost process 0" in errors_of(second)


@pytest.mark.parametrize("failing", [0, 1])
def test_the_others_have_the_reason_of_a_process_that_fails(start, failing):
    processes = start(2, poll_seconds=1.0)
    processes[failing].stdin.write("fail\n")
    processes[failing].stdin.flush()
    reason = f"zslflax: process {failing} of 2 has failed: zslflax: its own reason. This process ends too."
    assert reason in errors_of(processes[1 - failing])
    assert errors_of(processes[failing]) == "zslflax: its own reason\n"


def test_processes_that_end_in_order_say_nothing(start):
    processes = start(2, poll_seconds=2.0)  # a busy machine gives no sign of life for seconds
    for process in processes:
        process.stdin.close()
    for process in processes:
        assert process.wait(60) == 0 and "zslflax" not in process.stderr.read()
