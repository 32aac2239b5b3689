"""Models how a step's time grows with the batch size on two large machines, from its arithmetic and collectives.

    python benchmarks/scaling.py [--tokens 60] [--utilisation 0.3] [--teacher_batch_norm batch]

The step of configs/r50_declutr.py is traced for each machine and batch size. Nothing is run, and the devices need not
exist: products, convolutions and collectives are counted in the code. Their times follow from a model with the peak
rates, bandwidths and utilisations below. Each machine and batch size prints one JSON line; per device and step,

    tower_tflop, fp32_tflop    in bf16 (the towers) and in fp32 (the objective, and small parts of the towers)
    gradient_mb                all-reduced
    embedding_mb               gathered embeddings, and their reduced and scattered gradients; of all devices together
    normalisation_mb           all-reduced by batch normalisation, in `normalisations` all-reduces
    tower_ms … step_ms         the time of each, and their sum: no overlap is assumed
    efficiency                 tower_ms / step_ms
"""

import argparse
import collections
import functools
import json
import math
import re
from typing import NamedTuple

import jax
from jax.extend.core import jaxprs_in_params
from jax.sharding import AbstractMesh, PartitionSpec
from ml_collections import ConfigDict
from step_shapes import load_config, make_shapes

from zslflax.config import compute_dtype
from zslflax.distributed import AXIS
from zslflax.models.build import build_two_tower
from zslflax.training import flops
from zslflax.training.step import train_step

REDUCE, GATHER = ("psum", "pmax", "pmin"), ("all_gather", "reduce_scatter")


class Level(NamedTuple):
    """A level of the interconnect: groups of `size` members, each of which sends `bandwidth` bytes/s."""

    size: int
    bandwidth: float


class Machine(NamedTuple):
    """The peak FLOP/s of each device in `bf16` and `fp32`, and the interconnect, from the inside outwards."""

    bf16: float
    fp32: float
    levels: tuple[Level, ...]
    latency: float  # seconds of a small all-reduce over all devices


MACHINES = {
    # cloud.google.com/tpu/docs/v5e: 197 TFLOP/s bf16, 400 GB/s of interconnect per chip in both directions of
    # 4 links, which rings along both axes of the torus use at once: 200 GB/s sent. An fp32 product is six of
    # bf16 (Precision.HIGHEST). 1 µs a hop, assumed; there and back, half way round two axes of 16 chips: 32.
    "v5e-256": Machine(197e12, 197e12 / 6, (Level(256, 200e9),), 32e-6),
    # NVIDIA's data sheets, H100 SXM: 989 TFLOP/s bf16 without sparsity, 67 TFLOP/s fp32, NVLink 900 GB/s in
    # both directions; DGX H100: a 400 Gbit/s adapter for each of a node's 8 GPUs. 40 µs is assumed.
    "64xH100": Machine(989e12, 67e12, (Level(8, 450e9), Level(8, 50e9)), 40e-6),
}
BANDWIDTH_UTILISATION = 0.8  # of the links' rates, by large messages
FP32_UTILISATION = 0.5  # of the fp32 peak


class Cost:
    """The cost of one device in one step.

    `total` counts FLOPs by the operands' type ("bfloat16", "float32"); bytes by their use: "gradient" and
    "normalisation" (all-reduced), and "embedding" (gathered, or reduced and scattered; of all devices together); and
    "normalisations", the all-reduces of batch normalisation, each of which waits for the previous one.
    """

    def __init__(self):
        self.total = collections.Counter()

    def add(self, jaxpr, runs: int = 1) -> "Cost":
        """Adds a jaxpr and its inner jaxprs; a scan's body counts as often as it runs."""
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            if name in ("dot_general", "conv_general_dilated"):
                self.total[str(eqn.invars[0].aval.dtype)] += runs * flops.product_flops(eqn)
            elif name in REDUCE + GATHER:
                whole = eqn.outvars if name == "all_gather" else eqn.invars
                normalising = re.search(r"\bbn\d|_bn\b", str(eqn.source_info.name_stack))
                kind = "embedding" if name in GATHER else "normalisation" if normalising else "gradient"
                self.total[kind] += runs * sum(v.aval.size * v.aval.dtype.itemsize for v in whole)
                self.total["normalisations"] += runs * (kind == "normalisation")
            for inner in jaxprs_in_params(eqn.params):
                self.add(inner, runs * (eqn.params["length"] if name == "scan" else 1))
        return self


def trace(config: ConfigDict, devices: int, tokens: int) -> Cost:
    """The cost of the config's training step on a number of devices, which need not exist."""
    model = build_two_tower(config.model, dtype=compute_dtype(config), axis_name=AXIS)
    state, batch, tx = make_shapes(config, model, tokens)
    step = jax.shard_map(
        functools.partial(train_step, model=model, teacher_model=model, tx=tx, config=config),
        mesh=AbstractMesh((devices,), (AXIS,)),
        in_specs=(PartitionSpec(), PartitionSpec(), PartitionSpec(AXIS)),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return Cost().add(jax.make_jaxpr(step)(state, {}, batch).jaxpr)


def reduce_seconds(machine: Machine, size: float) -> float:
    """The time of an all-reduce: at each level a device sends twice (g − 1) / g of its part from the level inside."""
    seconds = 0.0
    for level in machine.levels:
        seconds += 2 * (level.size - 1) / level.size * size / level.bandwidth
        size /= level.size
    return seconds / BANDWIDTH_UTILISATION


def devices_of(machine: Machine) -> int:
    return math.prod(level.size for level in machine.levels)


def times(machine: Machine, cost: Cost, utilisation: float) -> dict[str, float]:
    """The milliseconds of a step's parts. A gather or a reduce-scatter takes half as long as an all-reduce."""
    total = cost.total
    milliseconds = {
        "tower": total["bfloat16"] / (machine.bf16 * utilisation),
        "fp32": total["float32"] / (machine.fp32 * FP32_UTILISATION),
        "gradient": reduce_seconds(machine, total["gradient"]),
        "embedding": reduce_seconds(machine, total["embedding"]) / 2,
        "normalisation": total["normalisations"] * machine.latency,
    }
    return {f"{name}_ms": 1e3 * seconds for name, seconds in milliseconds.items()}


def measure(name: str, batch_size: int, tokens: int, utilisation: float, teacher_norm: str) -> dict:
    """One line of the output."""
    config = load_config()
    config.batch_size, config.teacher.batch_norm = batch_size, teacher_norm
    machine = MACHINES[name]
    cost = trace(config, devices_of(machine), tokens)
    parts = times(machine, cost, utilisation)
    step = sum(parts.values())
    line = {"machine": name, "batch": batch_size, "per_device": batch_size // devices_of(machine)}
    line |= {"tokens": tokens, "teacher_batch_norm": teacher_norm, "utilisation": utilisation}
    line |= {"tower_tflop": cost.total["bfloat16"] / 1e12, "fp32_tflop": cost.total["float32"] / 1e12}
    line |= {f"{name}_mb": cost.total[name] / 1e6 for name in ("gradient", "embedding", "normalisation")}
    line |= {"normalisations": cost.total["normalisations"]} | parts
    line |= {"step_ms": step, "pairs_per_second": 1e3 * batch_size / step}
    line |= {"efficiency": parts["tower_ms"] / step}
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in line.items()}


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--machine", choices=MACHINES, help="default: both")
    parser.add_argument("--batch", type=int, nargs="+", default=[4096, 8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--tokens", type=int, default=60, help="in a caption; CC3M's captions have 12 on average")
    parser.add_argument("--utilisation", type=float, default=0.3, help="share of the bf16 peak that the towers reach")
    parser.add_argument("--teacher_batch_norm", choices=("batch", "ema", "student"), default="batch")
    args = parser.parse_args()
    for name in [args.machine] if args.machine else MACHINES:
        for batch_size in args.batch:
            line = measure(name, batch_size, args.tokens, args.utilisation, args.teacher_batch_norm)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
