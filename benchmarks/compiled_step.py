"""Memory and memory traffic of the training step as XLA compiles it for an H100. No GPU is needed, and nothing is run.

    pip install --no-deps jax-cuda12-plugin==V jax-cuda12-pjrt==V nvidia-cuda-nvcc-cu12    # V: the version of jax
    python benchmarks/compiled_step.py
    python benchmarks/compiled_step.py --batch 256 1024 --teacher_batch_norm batch ema --remat

The step is that of benchmarks/step.py with packed captions. Most of its kernels do little arithmetic: they take as long
as the memory needs to deliver what they read and to accept what they write. So a change of the towers can be judged
before it is timed. Each batch size and kind of teacher prints a JSON line:

    peak_mb      the arguments and what XLA plans to reserve for intermediate values
    traffic_gb   what the kernels read and write; an array counts once for each kernel that reads it, and cuDNN's and
                 cuBLAS's kernels, as those of XLA, count their operands and results
    traffic_ms   traffic_gb over the bandwidth that benchmarks/step.py measured on an H100, 2.945 TB/s: less than the
                 time of a step, in which products and convolutions are bound by arithmetic
    groups_gb    traffic_gb by tower (image, text, other), pass (teacher, student, backward) and kind of kernel
                 (library: convolutions and products; reduce; elementwise)
    kernels      their number

XLA chooses no algorithms by trial here, which a GPU would be needed for.
"""

import argparse
import collections
import functools
import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec
from step import TOWERS, configure, draw_batch, packed
from step_shapes import make_shapes

from zslflax.config import compute_dtype
from zslflax.distributed import AXIS
from zslflax.models.build import build_two_tower
from zslflax.training.step import train_step

BANDWIDTH = 2.945e12  # bytes/s, `rates_jax` of benchmarks/step.py on an NVIDIA H100 80GB HBM3
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  device_memory_size: 84942979072  memory_bandwidth: 3352320000000  l2_cache_size: 52428800
  threads_per_warp: 32  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448  shared_memory_per_core: 233472
  registers_per_block_limit: 65536  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
NO_KERNELS = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"}
COMPUTATION = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (\([^=]*?\)|\S+) ([\w-]+)\((.*)$")


def compile_step(args, batch_size: int, teacher_batch_norm: str) -> Any:
    """The compiled step; `args` as benchmarks/step.py's, which also need `remat`."""
    args.batch, args.teacher_batch_norm = batch_size, teacher_batch_norm
    config, batch = configure(args), packed(draw_batch(args))
    config.model.image.remat = config.model.text.remat = args.remat
    model = build_two_tower(config.model, dtype=compute_dtype(config), axis_name=AXIS)
    state, _, tx = make_shapes(config, model, config.model.text.max_tokens)
    topology = topologies.get_topology_desc("", "cuda", target_config=H100, topology="1x1x1")
    mesh, everywhere, split = jax.sharding.Mesh(np.array(topology.devices), AXIS), PartitionSpec(), PartitionSpec(AXIS)

    def shapes(tree: Any, spec: PartitionSpec) -> Any:
        sharding = NamedSharding(mesh, spec)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(x.dtype), sharding=sharding), tree)

    step = functools.partial(train_step, model=model, teacher_model=model, tx=tx, config=config)
    mapped = jax.shard_map(
        step, mesh=mesh, in_specs=(everywhere, everywhere, split), out_specs=everywhere, check_vma=False
    )
    traced = jax.jit(mapped, donate_argnums=0).trace(shapes(state, everywhere), {}, shapes(batch, split))
    return traced.lower(lowering_platforms=("cuda",)).compile()


def kernels(text: str) -> Iterator[tuple[str, str, float]]:
    """The kernels of a compiled program, from its text: name, path in the traced function, bytes read and written."""
    computations: dict[str, list[tuple[str, str, str, str]]] = {}
    entry = ""
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if match := COMPUTATION.match(line):
            current = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif match := INSTRUCTION.match(line):
            current.append(match.groups())

    def visit(name: str, runs: int) -> Iterator[tuple[str, str, float]]:
        sizes = {result: size(shape) for result, shape, _, _ in computations[name]}
        for result, _, kind, rest in computations[name]:
            if kind in ("while", "call"):
                trips = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', rest)
                body = re.search(r"(?:body|to_apply)=%([^,\s]+)", rest)
                yield from visit(body[1], runs * (int(trips[1]) if trips else 1)) if body else ()
            elif kind not in NO_KERNELS:
                operands = set(re.findall(r"%([^,\s)]+)", rest.partition("), ")[0]))
                path = re.search(r'op_name="([^"]*)"', rest)
                total = sizes[result] + sum(sizes.get(operand, 0) for operand in operands)
                yield (result, path[1] if path else "", runs * total)

    return visit(entry, 1)


def size(shape: str) -> int:
    """Bytes of an array or of a tuple of arrays.

    >>> size("(bf16[4,3]{1,0}, f32[])")
    28
    """
    arrays = re.findall(r"(\w+)\[([\d,]*)\]", shape)
    return sum(BYTES.get(dtype, 0) * int(np.prod([int(n) for n in dims.split(",") if n])) for dtype, dims in arrays)


def group(name: str, path: str) -> str:
    """Tower, pass and kind of a kernel."""
    tower = "image" if "image" in path else "text" if "text" in path else "other"
    way = "backward" if "transpose(" in path else "student" if "jvp(" in path or tower == "other" else "teacher"
    library = name.startswith(("cudnn", "cublas", "gemm", "custom-call"))
    return f"{tower} {way} {'library' if library else 'reduce' if 'reduce' in name else 'elementwise'}"


def measure(args, batch_size: int, teacher_batch_norm: str) -> dict[str, Any]:
    """One line of the output."""
    compiled = compile_step(args, batch_size, teacher_batch_norm)
    memory, found = compiled.memory_analysis(), list(kernels(compiled.as_text()))
    groups: collections.Counter[str] = collections.Counter()
    for name, path, traffic in found:
        groups[group(name, path)] += traffic
    total, sizes = (
        sum(groups.values()),
        {"tower": args.tower, "batch": batch_size, "teacher_batch_norm": teacher_batch_norm},
    )
    return {"benchmark": "compiled_step", "device": "NVIDIA H100 80GB HBM3", **sizes, "remat": args.remat} | {
        "peak_mb": round((memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e6),
        "traffic_gb": round(total / 1e9, 1),
        "traffic_ms": round(1e3 * total / BANDWIDTH, 1),
        "kernels": len(found),
        "groups_gb": {name: round(x / 1e9, 1) for name, x in groups.most_common() if x >= 1e8},
        "jax": jax.__version__,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1024])
    parser.add_argument("--teacher_batch_norm", nargs="+", choices=("batch", "ema"), default=["batch"])
    parser.add_argument("--tower", default="resnet50", choices=TOWERS)
    parser.add_argument("--remat", action="store_true", help="in both towers")
    parser.add_argument("--image", type=int, default=224, help="side in pixels")
    parser.add_argument("--layers", type=int, default=12, help="of the text tower")
    parser.add_argument("--width", type=int, default=768, help="of the text tower")
    args = parser.parse_args()
    args.dtype = "bfloat16"
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # the plugin would look for CUDA's driver
    # Without trials there is no configuration of Triton's products; cuBLAS's need none.
    flags = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    jax.default_backend = lambda: "gpu"  # the towers choose the form for a GPU
    for batch_size, teacher_batch_norm in list(itertools.product(args.batch, args.teacher_batch_norm)):
        print(json.dumps(measure(args, batch_size, teacher_batch_norm)), flush=True)


if __name__ == "__main__":
    main()
