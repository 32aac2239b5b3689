"""Memory and time of a loss with its gradients against the batch size, from whole matrices and in chunks of rows.

    python benchmarks/loss_memory.py                               # every objective, 1k … 16k
    python benchmarks/loss_memory.py --objectives self_distillation --forms chunks --sizes 32768
    python benchmarks/loss_memory.py --sizes 65536 --plan-only     # the memory that XLA plans, on any machine

One device holds the global batch. Each measurement runs in a process of its own and prints one JSON line:

    peak_mb      largest memory in use during the first call above what was in use before it (the inputs),
                 gradients included: resident memory of the process on a CPU (Linux), the allocator's on a GPU
    xla_temp_mb  memory that XLA plans to reserve for intermediate values of the compiled function
    seconds      median of the calls after the first: five, or as many as take half a second; the only call's where that
                 took longer than `--patience`

A function that XLA plans to need more than 0.8 of the free memory does not run: its line has the plan alone.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from zslflax.config import default_config, set_objective
from zslflax.losses import contrastive
from zslflax.losses.chunks import count_chunks
from zslflax.losses.contrastive import OBJECTIVES
from zslflax.losses.pairs import Embeddings

MB = 1e6
STEP = jnp.int32(0)


def loss_and_gradients(objective, params, student, teacher, valid):
    """The mean loss, and its gradients with respect to the parameters and the student's embeddings."""

    def loss(params, student):
        rows = contrastive.pair_losses(objective, params, student, teacher, valid, step=STEP, axis_name="data")
        means = jax.tree.map(jnp.mean, rows)
        return means["loss"], means

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, student)


def random_pairs(rng, n: int, width: int) -> Embeddings:
    """Unit embeddings [1, n, width] of images and texts, with pairs a little more similar than chance."""

    def unit(x):
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    image = rng.standard_normal((1, n, width), np.float32)
    return Embeddings(unit(image), unit(0.2 * image + rng.standard_normal(image.shape, np.float32)))


def memory_in_use(device) -> tuple[float, float]:
    """Memory in use now, and the largest since `reset_peak` (on a GPU since the process began), in MB."""
    if stats := device.memory_stats():
        return stats["bytes_in_use"] / MB, stats["peak_bytes_in_use"] / MB
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return tuple(int(fields[name].split()[0]) * 1024 / MB for name in ("VmRSS", "VmHWM"))


def reset_peak(device) -> None:
    """Resets the largest resident memory of this process to the current one."""
    if not device.memory_stats():
        with open("/proc/self/clear_refs", "w") as control:
            control.write("5")  # proc(5): resets VmHWM to VmRSS


def free_memory(device) -> float:
    """Memory that is still free, in MB."""
    if stats := device.memory_stats():
        return (stats["bytes_limit"] - stats["bytes_in_use"]) / MB
    with open("/proc/meminfo") as meminfo:
        fields = dict(line.split(":") for line in meminfo)
    return int(fields["MemAvailable"].split()[0]) * 1024 / MB


def measure(name: str, form: str, n: int, args: argparse.Namespace) -> dict:
    """One line of results; see the module."""
    config = default_config()
    set_objective(config, name)
    config.objective.max_similarities = {"whole": 0, "chunks": args.max_similarities}[form]
    chunks = count_chunks(n, n, config.objective.max_similarities)
    params = contrastive.init_params(config.objective)
    rng = np.random.default_rng(0)
    student, teacher = random_pairs(rng, n, args.width), random_pairs(rng, n, args.width)
    inputs = params, student, teacher if OBJECTIVES[name].needs_teacher else None, np.ones((1, n), bool)
    device = jax.devices()[0]
    step = jax.pmap(
        functools.partial(loss_and_gradients, config.objective),
        "data",
        in_axes=(None, 0, 0, 0),
        devices=[device],
    )
    compiled = step.lower(*inputs).compile()
    plan = compiled.memory_analysis().temp_size_in_bytes / MB
    line = {"benchmark": "loss_memory", "objective": name, "form": form, "batch": n, "width": args.width}
    line |= {"chunks": chunks, "xla_temp_mb": round(plan)}
    line |= {"device": device.device_kind, "processor": platform.machine(), "cores": os.cpu_count()}
    line |= {"jax": jax.__version__, "python": platform.python_version()}
    if args.plan_only or plan > 0.8 * free_memory(device):
        return line | {"peak_mb": None, "seconds": None, "loss": None}
    inputs = jax.block_until_ready(jax.device_put(inputs))
    reset_peak(device)
    before, _ = memory_in_use(device)
    seconds = []
    while not seconds or (sum(seconds) < args.patience and (len(seconds) < 6 or sum(seconds[1:]) < 0.5)):
        start = time.perf_counter()
        outputs = jax.block_until_ready(compiled(*inputs))
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            _, peak = memory_in_use(device)
    loss = float(outputs[0][0][0])
    median = float(np.median(seconds[1:] or seconds))
    return line | {"peak_mb": round(peak - before), "seconds": float(f"{median:.3g}"), "loss": round(loss, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objectives", nargs="+", default=tuple(OBJECTIVES), choices=OBJECTIVES)
    parser.add_argument("--forms", nargs="+", default=("whole", "chunks"), choices=("whole", "chunks"))
    parser.add_argument("--sizes", nargs="+", type=int, default=(1024, 2048, 4096, 8192, 16384), help="pairs")
    parser.add_argument("--width", type=int, default=768)
    default = default_config().objective.max_similarities
    parser.add_argument("--max_similarities", type=int, default=default, help="in a chunk")
    parser.add_argument("--patience", type=float, default=20.0, help="seconds for the calls of one measurement")
    parser.add_argument("--plan-only", action="store_true", help="compile without running")
    parser.add_argument("--one", action="store_true", help="measure the one given combination in this process")
    args = parser.parse_args()
    for n, name, form in itertools.product(args.sizes, args.objectives, args.forms):
        if args.one:
            print(json.dumps(measure(name, form, n, args)), flush=True)
            continue
        options = [f"--objectives={name}", f"--forms={form}", f"--sizes={n}", f"--width={args.width}"]
        options += [f"--max_similarities={args.max_similarities}", f"--patience={args.patience}"]
        options += ["--plan-only"] * args.plan_only
        subprocess.run([sys.executable, __file__, "--one", *options], check=True)


if __name__ == "__main__":
    main()
