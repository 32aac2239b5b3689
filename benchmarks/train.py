"""Pairs per second of the command, beside its step alone and its input pipeline alone.

    python benchmarks/train.py --batch=1024                                   # on a GPU
    python benchmarks/train.py --batch=256 --device_ms=1000 --steps=60        # without one: only the host's side
    python benchmarks/train.py --batch=8 --image=64 --layers=1 --steps=12     # on a CPU, to see that it runs

    run         `python -m zslflax.main --config=configs/r50_declutr.py` on JPEG shards with packed captions: the second
                half of its steps, with three reports and a checkpoint in it (the first half has the first checkpoint,
                which loads and compiles what saves it)
    step        the same run's train step, again and again on one batch that lies on the devices
    pipeline    the same run's batches on the devices, again and again without a step

The towers have random weights; captions and images are those of benchmarks/pipeline.py. With `--device_ms` a device
that only takes so long for a step stands in for the step: it takes the batches, and its metrics are ready when it is
done. The towers are then tiny, because nothing computes them.

Each measurement has a process of its own, and each round goes through all of them. Each prints a JSON line; the last
line has the medians and `of_step`, the rate of the run over that of the step. `of_slower` is the rate of the run over
that of the slower of step and pipeline. `waiting_for_data` is the run's own metric.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from json_lines import read_lines
from pipeline import machine, write_shards, write_tokenizer

import zslflax.main
from zslflax import checkpoint, distributed
from zslflax.training import setup
from zslflax.training.train_state import TrainState

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "r50_declutr.py"
WARM_UP = 3  # steps
SIZES = ("batch", "image", "layers", "width", "steps", "device_ms", "workers", "threads")


def overrides(args, folder: Path) -> dict[str, Any]:
    """The fields in which a run differs from configs/r50_declutr.py, without pretrained weights."""
    fields = {
        "steps": args.steps,
        "batch_size": args.batch,
        "log_every": args.steps // 6,
        "checkpoint.every": args.steps // 6 * 2,
        "eval.every": args.steps,
        "data.train": f"('{args.shards}',)",
        "data.workers": args.workers,
        "data.threads": args.threads,
        "model.image.pretrained": "",
        "model.image.size": args.image,
        "model.text.pretrained": "",
        "model.text.tokenizer": str(folder),
        "model.text.scratch.layers": args.layers,
        "model.text.scratch.width": args.width,
        "model.text.scratch.heads": max(args.width // 64, 1),
    }
    if args.device_ms:
        fields |= {"model.image.name": "resnet_nano", "model.text.scratch.layers": 1, "model.text.scratch.width": 64}
        fields |= {"model.text.scratch.heads": 1}
    return fields


def run_command(args, workdir: Path) -> dict:
    """What metrics.jsonl says of a run of the command in this process."""
    fields = [f"--config.{name}={value}" for name, value in overrides(args, workdir.parent).items()]
    sys.argv = ["zslflax", f"--config={CONFIG}", f"--workdir={workdir}", *fields]
    start = time.perf_counter()
    try:
        zslflax.main.main()
    except SystemExit as end:
        if end.code:
            raise
    lines = read_lines(workdir / "metrics.jsonl")[3:6]
    rate = statistics.harmonic_mean([line["train/pairs_per_second"] for line in lines])  # each has as many steps
    waiting = statistics.mean(line["train/waiting_for_data"] for line in lines)
    return {"pairs_per_second": rate, "waiting_for_data": waiting, "whole_s": time.perf_counter() - start}


def run_step(args, workdir: Path) -> dict:
    """Takes steps on one batch."""
    with open_run(args, workdir) as run:
        batch, _ = next(run.batches)
        run.batches.close()
        state, metrics = run.state, None
        for i in range(WARM_UP + args.steps):
            if i == WARM_UP:
                jax.block_until_ready(metrics)
                start = time.perf_counter()
            state, metrics = run.train_step(state, batch)
        jax.block_until_ready(metrics)
    return {"pairs_per_second": args.batch * args.steps / (time.perf_counter() - start)}


def run_pipeline(args, workdir: Path) -> dict:
    """Takes batches and drops them."""
    with open_run(args, workdir) as run:
        for i in range(WARM_UP + args.steps):
            if i == WARM_UP:
                start = time.perf_counter()
            jax.block_until_ready(next(run.batches))
        seconds = time.perf_counter() - start
    return {"pairs_per_second": args.batch * args.steps / seconds}


class open_run:
    """A context manager: the run that the command would start, and the end of its pipeline."""

    def __init__(self, args, workdir: Path):
        fields = [f"--config.{name}={value}" for name, value in overrides(args, workdir.parent).items()]
        sys.argv = ["zslflax", f"--config={CONFIG}", *fields]
        flags.FLAGS(sys.argv)
        self.config, self.workdir = zslflax.main.CONFIG.value, workdir
        workdir.mkdir()

    def __enter__(self) -> setup.Run:
        distributed.initialize(self.config.compilation_cache)
        self.checkpoints = checkpoint.open_manager(self.workdir, "")
        self.run = setup.set_up(self.config, self.workdir, self.checkpoints.__enter__())
        return self.run

    def __exit__(self, *error) -> None:
        self.run.batches.close()
        self.run.reporter.close()
        self.checkpoints.__exit__(*error)


@dataclasses.dataclass
class Pending:
    """A metric that a device will have computed at a time, as far as the training loop looks at it."""

    value: float
    ready_at: float

    def is_ready(self) -> bool:
        return time.perf_counter() >= self.ready_at

    def block_until_ready(self) -> "Pending":
        time.sleep(max(self.ready_at - time.perf_counter(), 0.0))
        return self

    def __array__(self, *_, **__) -> np.ndarray:
        self.block_until_ready()
        return np.asarray(self.value, np.float32)


class StandInStep:
    """Stands for `TrainStep`: a device that takes a fixed time for each step, one after another.

    Args:
        seconds: of a step.
    """

    flops = 0

    def __init__(self, seconds: float):
        self.seconds, self.free_at = seconds, 0.0

    def __call__(self, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, Pending]]:
        self.free_at = max(self.free_at, time.perf_counter()) + self.seconds
        metrics = {"loss": 1.0, "pairs": float(batch["valid"].size), "nonfinite_steps": 0, "failed_step": -1}
        state = state.replace(step=state.step + 1)
        return state, {name: Pending(value, self.free_at) for name, value in metrics.items()}


MEASUREMENTS = {"run": run_command, "step": run_step, "pipeline": run_pipeline}


def in_own_process(name: str, args) -> dict:
    options = [f"--{size}={getattr(args, size)}" for size in SIZES]
    line = subprocess.run(
        [sys.executable, __file__, f"--only={name}", f"--shards={args.shards}", *options],
        check=True,
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(ROOT)} | os.environ,
    ).stdout
    return json.loads(line.splitlines()[-1])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1024, help="pairs, at most 16,384 without --shards")
    parser.add_argument("--image", type=int, default=224, help="pixels")
    parser.add_argument("--layers", type=int, default=12, help="of the text tower")
    parser.add_argument("--width", type=int, default=768, help="of the text tower; a multiple of 64")
    parser.add_argument("--steps", type=int, default=120, help="in each measurement; a multiple of 6")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device_ms", type=float, default=0.0, help="a device that takes so long in the step's place")
    parser.add_argument("--workers", type=int, default=0, help="config.data.workers")
    parser.add_argument("--threads", type=int, default=0, help="config.data.threads")
    parser.add_argument("--shards", help="pattern of existing shards")
    parser.add_argument("--only", choices=MEASUREMENTS, help="measures one, in this process")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    common = {"benchmark": "train"} | {size: getattr(args, size) for size in SIZES}
    with tempfile.TemporaryDirectory() as folder:
        if args.only:
            write_tokenizer(Path(folder))
            if args.device_ms:
                setup.TrainStep = lambda *_, **__: StandInStep(args.device_ms / 1e3)  # type: ignore[assignment,misc]
            measured = MEASUREMENTS[args.only](args, Path(folder) / "run")
            device = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
            print(json.dumps({name: float(f"{value:.4g}") for name, value in measured.items()} | device))
            return
        args.shards = args.shards or write_shards(Path(folder))
        rates: dict[str, list[float]] = {name: [] for name in MEASUREMENTS}
        for _, name in itertools.product(range(args.rounds), MEASUREMENTS):
            line = in_own_process(name, args)
            rates[name].append(line["pairs_per_second"])
            print(json.dumps(common | {"name": name} | line | machine()), flush=True)
        medians = {name: statistics.median(values) for name, values in rates.items()}
        ratios = {"of_step": medians["run"] / medians["step"]}
        ratios["of_slower"] = medians["run"] / min(medians["step"], medians["pipeline"])
        rounded = {name: round(ratio, 3) for name, ratio in ratios.items()}
        print(json.dumps(common | {"medians": medians} | rounded | machine()))


if __name__ == "__main__":
    main()
