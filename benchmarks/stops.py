"""Measures the time from SIGTERM to the end of a run, of one process and of two.

    python benchmarks/stops.py --times=5

One process of the run that kills.py kills is sent SIGTERM after a step: the run ends that step, saves, and ends
with code 0; and is started again. One JSON line is printed.
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
    """Starts the run, and asks the last of its processes to stop.

    Raises:
        RuntimeError: it did not stop as it should.
    """
    process = start_until(run, "step", 3600)
    said = lambda: (run.folder / "log").read_text()[-3000:]
    if process.poll() is not None:
        raise RuntimeError(f"the run ended with code {process.returncode}:\n{said()}")
    asked = process.pid
    if processes > 1:
        children = subprocess.check_output(["pgrep", "-P", str(process.pid), "-f", "zslflax.main"], text=True)
        asked = int(children.split()[-1])
    began = time.monotonic()
    os.kill(asked, signal.SIGTERM)
    code, took = process.wait(3600), time.monotonic() - began
    if code:  # its last step is far away: 0 says that it has stopped
        raise RuntimeError(f"the run ended with code {code}:\n{said()}")
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5, help="of one process, and as many of two")
    options = parser.parse_args()
    report = {}
    with tempfile.TemporaryDirectory(prefix="stops-") as folder:
        for processes in (1, 2):
            run = Run(Path(folder) / str(processes), 1_000_000, Path(folder) / "xla", processes)
            times = [seconds_to_stop(run, processes) for _ in range(options.times)]
            report[f"seconds, {processes} process(es)"] = sorted(round(took, 2) for took in times)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
