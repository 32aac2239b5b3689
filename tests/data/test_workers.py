"""Worker processes load the same chunks in the same order, and end with their parent."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from zslflax.data.workers import WorkerPool
from zslflax.errors import StorageError, UserError


class Squares:
    """Loads numbers: an array with rows of each number's square, and the number of the process.

    Args:
        width: of the arrays; or a function from a number to it.
        fails_at: the number that cannot be loaded.
        error: what is raised there.
    """

    def __init__(self, width=1_000, fails_at=None, error=None):
        self.width, self.fails_at, self.error = width, fails_at, error

    def __call__(self, numbers):
        if self.fails_at in numbers:
            raise self.error
        time.sleep(0.002 * (numbers[0] % 3))  # so that workers finish in another order
        width = self.width if isinstance(self.width, int) else self.width[numbers[0]]
        squares = np.array(numbers)[:, None] ** 2 * np.ones(width, int)
        return {"squares": squares, "process": os.getpid(), "text": [f"number {n}" for n in numbers]}


def chunks(count):
    return ([2 * i, 2 * i + 1] for i in range(count))


def load(pool):
    """Copies of the chunks of a pool, which is closed afterwards."""
    loaded = [chunk | {"squares": chunk["squares"].copy()} for chunk in pool]
    processes = [worker.process for worker in pool.workers]
    pool.close()
    assert all(process.poll() is not None for process in processes)
    return loaded


def running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(("processes", "threads"), [(1, 1), (3, 1), (2, 3)])
def test_chunks_come_in_order_from_all_workers(processes, threads):
    loaded = load(WorkerPool(Squares(), chunks(40), processes, threads))
    assert [chunk["text"] for chunk in loaded] == [[f"number {2 * i}", f"number {2 * i + 1}"] for i in range(40)]
    for i, chunk in enumerate(loaded):
        np.testing.assert_array_equal(chunk["squares"], [[(2 * i) ** 2] * 1_000, [(2 * i + 1) ** 2] * 1_000])
    assert len({chunk["process"] for chunk in loaded}) == processes
    assert os.getpid() not in {chunk["process"] for chunk in loaded}


def test_chunks_that_outgrow_their_slot_are_sent_whole():
    widths = {2 * i: 10 if i < 3 else 5_000 + i for i in range(8)}
    loaded = load(WorkerPool(Squares(widths), chunks(8), 2, 1))
    assert [chunk["squares"].shape[1] for chunk in loaded] == list(widths.values())
    assert all((chunk["squares"][1] == (2 * i + 1) ** 2).all() for i, chunk in enumerate(loaded))


def test_the_shared_memory_needs_no_room_in_dev_shm():
    before = set(os.listdir("/dev/shm"))
    pool = WorkerPool(Squares(), chunks(3), 1, 1)
    next(pool)
    assert os.readlink(f"/proc/self/fd/{pool.workers[0].memory_file}").startswith("/memfd:")
    assert set(os.listdir("/dev/shm")) - before == set()
    pool.close()


def test_a_pool_that_is_closed_early_leaves_no_process_and_no_open_file():
    pool = WorkerPool(Squares(), itertools.cycle(chunks(2)), 2, 1)
    chunk = next(pool)["squares"].copy()
    processes = [worker.process.pid for worker in pool.workers]
    assert all(map(running, processes))
    pool.close()
    assert not any(map(running, processes)) and chunk.shape == (2, 1_000)
    assert not [fd for fd in os.listdir("/proc/self/fd") if "zslflax-worker" in link_of(fd)]


def link_of(descriptor):
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:  # of the listing itself
        return ""


def test_an_error_is_raised_after_the_chunks_before_it_with_the_traceback_of_the_worker():
    pool = WorkerPool(Squares(fails_at=13, error=StorageError("the disk is gone")), chunks(40), 3, 1)
    assert [next(pool)["text"][0] for _ in range(6)] == [f"number {2 * i}" for i in range(6)]
    with pytest.raises(StorageError, match="the disk is gone") as caught:
        next(pool)
    assert "in __call__" in caught.value.__notes__[0]
    pool.close()


def test_a_loader_that_cannot_be_unpickled_gives_the_reason():
    class Unloadable:
        def __reduce__(self):
            return (int, ("no number",))

    pool = WorkerPool(Unloadable(), chunks(3), 2, 1)
    with pytest.raises(ValueError, match="no number"):
        next(pool)
    pool.close()


def test_a_killed_worker_is_an_error_that_says_what_to_change():
    for setting, advice in (("data.workers", "Set data.workers below 2, or to -1"), ("", "Start the command again$")):
        pool = WorkerPool(Squares(), itertools.cycle(chunks(2)), 2, 1, setting)
        next(pool)
        pool.workers[1].process.kill()
        with pytest.raises(UserError, match=f"killed by SIGKILL; .* memory .* {advice}"):
            for _ in pool:
                pass
        pool.close()


def test_signals_for_the_run_do_not_end_a_worker():
    pool = WorkerPool(Squares(), itertools.cycle(chunks(2)), 1, 1)
    next(pool)
    for number in (signal.SIGINT, signal.SIGTERM):
        pool.workers[0].process.send_signal(number)
    for _ in range(20):
        next(pool)
    pool.close()


SCRIPT = """
import itertools, os, time
import numpy as np
from zslflax.data.workers import WorkerPool

class Loader:  # of the main module, which is standard input and has no guard
    def __call__(self, numbers):
        return {"array": np.zeros(10), "process": os.getpid()}

pool = WorkerPool(Loader(), itertools.repeat([1]), 2, 1)
print(*{next(pool)["process"] for _ in range(12)}, flush=True)
time.sleep(600)
"""


def test_workers_end_when_their_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    parent.stdin.write(SCRIPT)
    parent.stdin.close()
    processes = [int(process) for process in parent.stdout.readline().split()]
    assert len(processes) == 2 and all(map(running, processes))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 20
    while any(map(running, processes)):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.05)


LIMITED = """
import resource, sys
from zslflax.data.workers import WorkerPool
resource.setrlimit(resource.RLIMIT_NOFILE, (20, int(sys.argv[1])))
pool = WorkerPool(len, iter([[1], [2, 3]] * 20), 8, 1)
print(sum(pool))
pool.close()
"""


def test_the_limit_of_open_files_is_raised_or_named():
    run = lambda hard: subprocess.run([sys.executable, "-c", LIMITED, str(hard)], capture_output=True, text=True)
    assert run(100).stdout.strip() == "60"
    assert "8 data workers need more open files than `ulimit -n` allows, 20" in run(20).stderr


def test_a_worker_imports_neither_jax_nor_grain():
    program = "import sys, zslflax.data.workers, zslflax.data.preprocess, zslflax.data.sources.webdataset; "
    program += "print({'jax', 'grain', 'flax', 'orbax'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "set()"
