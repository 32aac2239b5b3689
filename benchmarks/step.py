"""Pairs per second of the whole training step, compared with the same step in PyTorch, on one GPU.

    python benchmarks/step.py                                                      # batches of 256 … 4,096
    python benchmarks/step.py --batch 1024 --rounds 1 --contenders zslflax torch_compiled
    python benchmarks/step.py --batch 1024 --rounds 1 --tower vit_b16              # ViT-B/16 and AdamW
    python benchmarks/step.py --batch 1024 --rounds 1 --teacher_batch_norm ema     # running statistics, folded
    python benchmarks/step.py --batch 8 --image 64 --layers 2 --dtype float32      # a quick check on a CPU

The step: ResNet-50, or ViT-B/16, and a BERT with random weights, an EMA teacher of both (its batch normalisation uses
the batch's statistics; its texts have no dropout), self-distillation, SGD with momentum or, for the ViT, AdamW. Towers
are in bf16, embeddings and losses in fp32. The batch is on the device already: the input pipeline has its own
benchmark. Captions have lengths like CC3M's, as benchmarks/packing.py draws them (mean 12, standard deviation 6, at
most 60 tokens).

    zslflax                   zslflax.training.step.train_step as `train` runs it, captions packed into rows of 128
                              tokens
    zslflax_padded            the same with captions padded to 60 tokens
    torch                     benchmarks/step_torch.py: channels-last, SDPA, autocast, fused SGD; padded to 60 tokens
    torch_compiled            the same with torch.compile around both forward passes and the loss
    torch_longest[_compiled]  the two, padded to the longest caption of the batch instead

This project's step also computes its metrics and leaves out non-finite updates; PyTorch's does neither. A test checks
that both have the same loss, student and teacher after a step (tests/benchmarks/test_step.py).

Each measurement runs in a process of its own and prints a JSON line; the rounds go through the contenders in turn:

    pairs_per_second, step_ms   of `--steps` steps, after some to warm up, with no waiting in between
    first_s                     the first step; its compiled functions are kept for the later rounds
    peak_mb                     largest memory that the device's allocator gave since the process began, trials of
                                algorithms included; on a CPU the resident memory, libraries included
    matrix_ms, memory_ms        the step's FLOPs over the measured matrix rate, its bytes over the measured bandwidth
    of_floor, of_sum            the larger of the two, and their sum, over step_ms

A contender that runs out of memory, or fails otherwise, prints the reason, and larger batches are not tried. The line
after each batch has the medians so far and their ratios to the best of PyTorch's. The matrix rate (8,192³, in the
towers' type) and the bandwidth (a copy, bytes read and written) are the better of the two libraries', measured first.

FLOPs: 4 × (forward passes of student and teacher, gradients by inputs and by weights) 2 × (4.09e9 (ViT: 17e9) × (size /
224)² per image + 12 · layers · width² per token), without padding; products of embeddings and attention, 1% (ViT: 4%),
are left out.
Bytes: 7 × (student's and teacher's values written and read, the student's read again, their gradients written and read)
the size of a number × (11.1e6 (ViT: 16.5e6) × (size / 224)² per image + 9 · layers · width per token), the outputs of
convolutions and dense layers, as if everything else were fused into them; and 32 (AdamW: 40) per parameter: it, its
moments and its average read and written, its gradient written and read, in fp32.

It needs jax, flax, optax, safetensors and ml_collections (a pure Python wheel), and for PyTorch's step torch,
transformers and timm or torchvision; no tokenizer, image codec or data library.
"""

import argparse
import functools
import itertools
import json
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np
from packing import draw_lengths

from zslflax import distributed
from zslflax.config import compute_dtype, default_config
from zslflax.data.packing import COUNTED_CAPTIONS, pack_batches, rows_needed
from zslflax.distributed import AXIS
from zslflax.losses.contrastive import init_params
from zslflax.models.build import build_two_tower
from zslflax.training.optimizer import build_optimizer
from zslflax.training.step import TrainStep
from zslflax.training.train_state import create_train_state

TOKENS, ROW = 60, 128
WARM_UP = 3  # steps
TOWERS = {  # for an image of 224 pixels
    "resnet50": {"macs": 4.09e9, "outputs": 11.1e6, "parameters": 23.5e6, "optimizer": "sgd"},
    "vit_b16": {"macs": 16.9e9, "outputs": 16.5e6, "parameters": 85.8e6, "optimizer": "adamw"},
}
OPTIMIZER_BYTES = {"sgd": 32, "adamw": 40}  # that an update of a parameter reads and writes
OPTIONS = ("tower", "teacher_batch_norm", "image", "layers", "width", "dtype", "steps")
OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|MemoryError|can't allocate memory|out of memory", re.IGNORECASE)


def configure(args):
    """The default config, which is the paper's objective and optimiser, with these sizes."""
    c = default_config()
    c.batch_size, c.compute_dtype, c.steps = args.batch, args.dtype, 1_000_000  # a constant learning rate
    c.model.image.size, c.model.text.max_tokens = args.image, TOKENS
    c.model.text.scratch.update(layers=args.layers, width=args.width, heads=args.width // 64)
    c.model.image.name, c.teacher.batch_norm = args.tower, args.teacher_batch_norm
    c.optimizer.name = TOWERS[args.tower]["optimizer"]
    return c


def caption_lengths(captions: int, seed: int = 0) -> np.ndarray:
    """Numbers of tokens, int [captions]; the same for every contender."""
    return draw_lengths(np.random.default_rng(seed), captions, TOKENS)


def draw_batch(args) -> dict[str, np.ndarray]:
    """A batch as the input pipeline yields it."""
    rng = np.random.default_rng(0)
    mask = np.arange(TOKENS) < caption_lengths(args.batch)[:, None]
    return {
        "image": rng.integers(0, 256, (args.batch, args.image, args.image, 3), dtype=np.uint8),
        "text": np.where(mask, rng.integers(1_000, 30_000, mask.shape), 0).astype(np.int32),
        "text_mask": mask,
        "valid": np.ones(args.batch, bool),
    }


def packed(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same batch with its captions packed into the number of rows that training would choose."""
    counts = np.bincount(caption_lengths(COUNTED_CAPTIONS, seed=1), minlength=TOKENS + 1)
    devices = jax.local_device_count()
    rows = rows_needed(counts, len(batch["valid"]) // devices, ROW)
    return next(pack_batches(iter([dict(batch)]), rows, ROW, devices))


class Step:
    """This project's step from given variables, built as the training loop builds it. A call returns the loss."""

    def __init__(self, config, model, variables, batch):
        params = {**variables["params"], "objective": init_params(config.objective)}
        tx = build_optimizer(config, params, config.steps)
        variables = {"params": params, "batch_stats": variables.get("batch_stats", {})}
        self.state = distributed.replicate(create_train_state(variables, tx, ema=True, frozen=()))
        self.train_step = TrainStep({}, model=model, teacher_model=model, tx=tx, config=config)
        ((self.batch, _),) = distributed.prefetch_to_devices(iter([batch]))

    def __call__(self) -> jax.Array:
        self.state, metrics = self.train_step(self.state, self.batch)
        return metrics["loss"]


def run_zslflax(args, pack: bool) -> dict:
    config, batch = configure(args), draw_batch(args)
    model = build_two_tower(config.model, dtype=compute_dtype(config), axis_name=AXIS)
    example = [batch[name][:1] for name in ("image", "text", "text_mask")]
    batch = packed(batch) if pack else batch
    tokens = {"rows": batch["text"].shape[0], "row": batch["text"].shape[1]}
    device = jax.devices()[0]
    measured = timed(Step(config, model, jax.jit(model.init)(jax.random.key(0), *example), batch), args)
    stats = device.memory_stats() or {}
    measured |= {"peak_mb": peak_mb(stats.get("peak_bytes_in_use"))} | tokens
    return measured | {"device": device.device_kind, "jax": jax.__version__, "flax": flax.__version__}


def run_torch(args, compiled: bool, longest: bool) -> dict:
    import step_torch
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.benchmark = True
    config, batch = configure(args), draw_batch(args)
    image, width, library = step_torch.image_tower(args.tower)
    text = step_torch.bert(config.model.text)
    student = step_torch.TwoTower(image, width, text, config, bf16=args.dtype == "bfloat16").to(device)
    width = int(batch["text_mask"].sum(axis=1).max()) if longest else TOKENS
    inputs = step_torch.from_numpy(batch["image"], batch["text"][:, :width], batch["text_mask"][:, :width], device)
    step = step_torch.Distillation(student, config, compiled)
    measured = timed(functools.partial(step, *inputs), args)
    on_gpu = device == "cuda"
    measured |= {"peak_mb": peak_mb(torch.cuda.max_memory_allocated() if on_gpu else None)}
    measured |= {"rows": args.batch, "row": width, "device": torch.cuda.get_device_name() if on_gpu else "cpu"}
    return measured | {"torch": torch.__version__, "transformers": transformers.__version__, args.tower: library}


def timed(step, args) -> dict:
    """The rates of a function that takes a step and returns its loss on the device."""
    start = time.perf_counter()
    float(step())
    first = time.perf_counter() - start
    for _ in range(WARM_UP):
        loss = step()
    float(loss)
    start = time.perf_counter()
    for _ in range(args.steps):
        loss = step()
    loss = float(loss)
    seconds = (time.perf_counter() - start) / args.steps
    rates = {"pairs_per_second": args.batch / seconds, "step_ms": 1e3 * seconds, "first_s": first}
    return {name: float(f"{value:.4g}") for name, value in rates.items()} | {"loss": round(loss, 4)}


def peak_mb(of_device: int | None) -> int:
    """The device's peak in MB, or this process's largest resident memory."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kB on Linux
    return round((of_device or resident) / 1e6)


def rates_jax(args) -> dict:
    on_cpu = jax.default_backend() == "cpu"
    n, size = (2048, 2**26) if on_cpu else (8192, 2**28)
    a, b = jax.random.normal(jax.random.key(0), (2, n, n), args.dtype)
    x = jnp.zeros(size, jnp.float32)
    product, copy = jax.jit(jnp.matmul), jax.jit(jnp.negative)
    return library_rates(lambda: product(a, b), lambda: copy(x), jax.block_until_ready, n, size)


def rates_torch(args) -> dict:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    n, size = (2048, 2**26) if device == "cpu" else (8192, 2**28)
    a, b = torch.randn(2, n, n, dtype=getattr(torch, args.dtype), device=device)
    x, y = torch.zeros(2, size, device=device)
    wait = (lambda _: None) if device == "cpu" else (lambda _: torch.cuda.synchronize())
    return library_rates(lambda: torch.matmul(a, b), lambda: y.copy_(x), wait, n, size)


def library_rates(product, copy, wait, n: int, size: int) -> dict:
    """FLOP/s of an n³ matrix product and bytes/s of a copy of fp32 [size]: the best of three times ten."""

    def seconds(function):
        wait(function())
        times = []
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(10):
                result = function()
            wait(result)
            times.append((time.perf_counter() - start) / 10)
        return min(times)

    rates = {"matrix_rate": 2 * n**3 / seconds(product), "bandwidth": 2 * 4 * size / seconds(copy)}
    return {name: float(f"{rate:.4g}") for name, rate in rates.items()}


def floor(args, batch: int, rates: dict) -> dict:
    """The milliseconds of a step's products and memory traffic at the measured rates; see the module."""
    images, tokens = batch * (args.image / 224) ** 2, int(caption_lengths(batch).sum())
    layers, w, tower = args.layers, args.width, TOWERS[args.tower]
    flops = 4 * 2 * (images * tower["macs"] + tokens * 12 * layers * w**2)
    outputs = images * tower["outputs"] + tokens * 9 * layers * w
    parameters = tower["parameters"] + 12 * layers * w**2 + 31_036 * w  # 30,522 words, 512 positions, 2 types
    moved = 7 * jnp.dtype(args.dtype).itemsize * outputs + OPTIMIZER_BYTES[tower["optimizer"]] * parameters
    return {"matrix_ms": 1e3 * flops / rates["matrix_rate"], "memory_ms": 1e3 * moved / rates["bandwidth"]}


CONTENDERS = {
    "torch": functools.partial(run_torch, compiled=False, longest=False),
    "torch_compiled": functools.partial(run_torch, compiled=True, longest=False),
    "torch_longest": functools.partial(run_torch, compiled=False, longest=True),
    "torch_longest_compiled": functools.partial(run_torch, compiled=True, longest=True),
    "zslflax": functools.partial(run_zslflax, pack=True),
    "zslflax_padded": functools.partial(run_zslflax, pack=False),
}
RATES = {"rates_jax": rates_jax, "rates_torch": rates_torch}


def in_own_process(name: str, batch: int, args, cache: Path) -> dict:
    """The results of a contender or of a rate, or the reason why there are none."""
    command = [sys.executable, __file__, f"--only={name}", f"--batch={batch}"]
    command += [f"--{option}={getattr(args, option)}" for option in OPTIONS]
    environment = {"CUDA_VISIBLE_DEVICES": "0", "XLA_CLIENT_MEM_FRACTION": "0.95"} | os.environ
    environment |= {"JAX_COMPILATION_CACHE_DIR": f"{cache}/jax", "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch"}
    if "torch" in name:
        environment["JAX_PLATFORMS"] = "cpu"  # or jax would reserve the memory
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode == 0:
        return json.loads(process.stdout.splitlines()[-1])
    if process.returncode == -signal.SIGKILL or OUT_OF_MEMORY.search(process.stderr):
        return {"failed": "out of memory"}
    sys.stderr.write(process.stderr)
    return {"failed": process.stderr.strip().rpartition("\n")[2]}


def summary(rates: dict[int, dict[str, list[dict]]]) -> dict:
    """The medians of each batch and contender, and their ratios to the best of PyTorch's."""
    table = {}
    for batch, lines in rates.items():
        medians = {
            name: {key: statistics.median(line[key] for line in of_name) for key in ("pairs_per_second", "of_floor")}
            for name, of_name in lines.items()
            if of_name
        }
        best = max((row["pairs_per_second"] for name, row in medians.items() if "torch" in name), default=None)
        for row in medians.values():
            row["ratio"] = best and round(row["pairs_per_second"] / best, 3)
        table[batch] = medians
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", nargs="+", type=int, default=(256, 512, 1024, 2048, 4096), help="pairs")
    parser.add_argument("--tower", default="resnet50", choices=TOWERS)
    parser.add_argument("--teacher_batch_norm", default="batch", choices=("batch", "ema"), help="of a resnet50")
    parser.add_argument("--image", type=int, default=224, help="pixels")
    parser.add_argument("--layers", type=int, default=12, help="of the text tower")
    parser.add_argument("--width", type=int, default=768, help="of the text tower, a multiple of 64")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the towers")
    parser.add_argument("--steps", type=int, default=20, help="in each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--only", choices=CONTENDERS | RATES, help="measure one in this process")
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in OPTIONS}
    common = {"benchmark": "step"} | sizes | {"processor": platform.machine(), "python": platform.python_version()}
    if args.only:
        (args.batch,) = args.batch
        print(json.dumps((CONTENDERS | RATES)[args.only](args)))
        return
    with tempfile.TemporaryDirectory() as cache:
        measured = [in_own_process(name, 1, args, cache) for name in RATES]
        rates = {key: max(line[key] for line in measured if key in line) for key in ("matrix_rate", "bandwidth")}
        print(json.dumps(common | {"name": "rates"} | dict(zip(RATES, measured))), flush=True)
        results, given_up = {}, set()
        for batch in sorted(args.batch):
            results[batch] = {name: [] for name in args.contenders}
            limits = floor(args, batch, rates)
            for _, name in itertools.product(range(args.rounds), args.contenders):
                if name in given_up:
                    continue
                line = in_own_process(name, batch, args, cache)
                if "failed" in line:
                    given_up.add(name)
                else:
                    line |= {key: float(f"{value:.4g}") for key, value in limits.items()}
                    line["of_floor"] = round(max(limits.values()) / line["step_ms"], 3)
                    line["of_sum"] = round(sum(limits.values()) / line["step_ms"], 3)
                    results[batch][name].append(line)
                print(json.dumps(common | {"name": name, "batch": batch} | line), flush=True)
            print(json.dumps(common | {"name": "medians", "batches": summary(results)}), flush=True)


if __name__ == "__main__":
    main()
