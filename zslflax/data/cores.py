"""The cores that this process may use, and how many worker processes and threads that load data suit them."""

import os
from pathlib import Path

NO_WORKERS = -1  # value of data.workers
MIN_CORES = 8  # from which on threads of one process, which share Python's lock, are slower than workers
MAX_WORKERS = 64  # chosen automatically; the main process hands on as much as they decode


def choose_workers(workers: int, threads: int, cores: float) -> tuple[int, int]:
    """How many worker processes load data (0: threads of this process do), and how many threads each has.

    On few cores, threads load as fast as workers and start at once. On many cores, the threads of one process wait for
    each other's hold of Python's lock. There, workers of one thread each take all cores but an eighth, which the main
    process has for the step.

    >>> [choose_workers(0, 0, cores) for cores in (2, 8, 16, 64, 208)]
    [(0, 3), (7, 1), (14, 1), (56, 1), (64, 1)]
    >>> choose_workers(-1, 0, cores=16)
    (0, 17)

    Args:
        workers: as asked for; 0: automatic, `NO_WORKERS`: none.
        threads: as asked for, in each worker; 0: one in each worker, or one more than cores without workers.
        cores: that this process may use.
    """
    if workers == 0 and cores >= MIN_CORES:
        workers = min(int(cores) - int(cores) // 8, MAX_WORKERS)
    return (workers, threads or 1) if workers > 0 else (0, choose_threads(threads, cores))


def choose_threads(threads: int, cores: float = 0.0) -> int:
    """How many threads of this process load data: as asked for; 0: one more than cores.

    Args:
        threads: as asked for.
        cores: that this process may use; 0: `available_cores()`.
    """
    return threads or int(cores or available_cores()) + 1  # each further thread contends for Python's lock


def available_cores() -> float:
    """The cores that this process may use, by its affinity (as SLURM sets it) and its container's limit of CPU time."""
    affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if affinity else os.cpu_count() or 1
    return min(cores, cpu_time_limit(Path("/sys/fs/cgroup")))


def cpu_time_limit(folder: Path) -> float:
    """The limit of CPU time of a control group, in cores; infinity where there is none.

    Args:
        folder: where the control groups are mounted, of version 2 or 1.
    """
    for quota_and_period in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            quota, period = " ".join((folder / name).read_text() for name in quota_and_period).split()
            if int(quota) > 0:
                return int(quota) / int(period)
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return float("inf")
