"""Measures the time from SIGTERM to the end of a run, in one process and in two.

    python benchmarks/stops.py --times=5

The run is that of kills.py. After a step one of its processes is sent SIGTERM. The run finishes the step, saves, and
exits with status 0. Then it is started again. Prints one JSON line.
"""

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from kills import Run, start_until


def seconds_to_stop(run: Run, processes: int) -> float:
    """Starts the run, asks the last of its processes to stop after a step, and returns how long that took.

    Raises:
        RuntimeError: the run failed.
    """
    process = start_until(run, "step", 3600)
    if process.poll() is not None:
        raise RuntimeError(f"the run ended with status {process.returncode}:\n{run.log.read_text()[-3000:]}")
    pid = process.pid
    if processes > 1:
        children = subprocess.check_output(["pgrep", "-P", str(process.pid), "-f", "zslflax.main"], text=True)
        pid = int(children.split()[-1])
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    status, seconds = process.wait(3600), time.monotonic() - began
    run.expect_status(status, 0)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="for one process, and as many for two")
    options = parser.parse_args()
    report = {}
    with tempfile.TemporaryDirectory(prefix="stops-") as folder:
        for processes in (1, 2):
            run = Run(Path(folder) / str(processes), 1_000_000, Path(folder) / "xla", processes)
            times = [seconds_to_stop(run, processes) for _ in range(options.times)]
            report[f"seconds, {processes} process(es)"] = sorted(round(seconds, 2) for seconds in times)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
