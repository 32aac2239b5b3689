"""Time of the text tower per pair: captions packed into rows of 128 tokens, compared with captions padded to 60.

    python benchmarks/packing.py                                  # 12 layers, 768 wide, 64 pairs on a device
    python benchmarks/packing.py --pairs 1024 --dtype bfloat16    # on an accelerator

The lengths of the captions follow CC3M's: a gamma distribution of mean 12 and standard deviation 6, clipped to 3 … 60.
The number of rows is the one that training would choose. Both forms run in turn in one process. Each pass, forward and
forward_backward (the gradient by all parameters), prints one JSON line:

    padded_ms, packed_ms  median time of a pair
    time_ratio            packed / padded, the median over the turns
    token_ratio           tokens in the packed rows / tokens in the padded rows
    flops_ratio           the same ratio of the operations that XLA counts
    filled                share of the packed rows that is not padding
    pack_ms               median time of a pair that the host takes for packing
"""

import argparse
import json
import os
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from zslflax.data.packing import COUNTED_CAPTIONS, pack, rows_needed
from zslflax.models.bert import Bert, BertConfig


def draw_lengths(rng, n: int, longest: int) -> np.ndarray:
    """Token counts int64 [n]."""
    return np.clip(np.rint(rng.gamma(4.0, 3.0, n)), 3, longest).astype(np.int64)


def passes(model, texts: int):
    """By pass: its function of padded inputs and its function of packed inputs, each of (variables, *inputs)."""

    def padded(variables, *inputs):
        return model.apply(variables, *inputs)

    def packed(variables, *inputs):
        return model.apply(variables, *inputs, texts, method="packed")

    def gradient(forward):
        return jax.grad(lambda variables, *inputs: jnp.sum(forward(variables, *inputs) ** 2))

    return {"forward": (padded, packed), "forward_backward": (gradient(padded), gradient(packed))}


def seconds(function, *args) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    return time.perf_counter() - start


def measure(args) -> None:
    rng = np.random.default_rng(0)
    counts = np.bincount(draw_lengths(rng, COUNTED_CAPTIONS, args.tokens), minlength=args.tokens + 1)
    rows = rows_needed(counts, args.pairs, args.row)
    lengths = draw_lengths(rng, args.pairs, args.tokens)
    mask = np.arange(args.tokens) < lengths[:, None]
    text = np.where(mask, rng.integers(1_000, 30_000, mask.shape), 0).astype(np.int32)
    packing_times = [seconds(pack, text, mask, rows, args.row) for _ in range(20)]
    packed = pack(text, mask, rows, args.row)

    sizes = {"layers": args.layers, "width": args.width, "heads": args.width // 64, "hidden": 4 * args.width}
    model = Bert(BertConfig(**sizes), args.dtype)
    variables = jax.jit(model.init)(jax.random.key(0), text[:1], mask[:1])
    inputs = jax.device_put(((text, mask), tuple(packed[name] for name in ("text", "text_segment", "text_position"))))
    device = jax.devices()[0]
    for name, functions in passes(model, args.pairs).items():
        compiled = [jax.jit(f).lower(variables, *x).compile() for f, x in zip(functions, inputs)]
        turns = [[seconds(f, variables, *x) for f, x in zip(compiled, inputs)] for _ in range(args.turns + 1)]
        times = np.array(turns[1:])  # the first turn warms up
        flops = [f.cost_analysis()["flops"] for f in compiled]
        per_pair = 1e3 * np.median(times, axis=0) / args.pairs
        line = {"benchmark": "packing", "pass": name, "layers": args.layers, "width": args.width}
        line |= {"dtype": args.dtype, "pairs": args.pairs, "max_tokens": args.tokens}
        line |= {"row": args.row, "rows": rows, "truncated": int(packed["text_truncated"].sum())}
        line |= {"mean_tokens": round(float(lengths.mean()), 2)}
        line |= {"padded_ms": float(f"{per_pair[0]:.4g}"), "packed_ms": float(f"{per_pair[1]:.4g}")}
        line |= {"time_ratio": round(float(np.median(times[:, 1] / times[:, 0])), 3)}
        line |= {"token_ratio": round(rows * args.row / text.size, 3)}
        line |= {"flops_ratio": round(flops[1] / flops[0], 3)}
        line |= {"filled": round(float(lengths.sum()) / (rows * args.row), 3)}
        line |= {"pack_ms": float(f"{1e3 * np.median(packing_times) / args.pairs:.3g}"), "turns": args.turns}
        line |= {"device": device.device_kind, "processor": platform.machine(), "cores": os.cpu_count()}
        line |= {"jax": jax.__version__, "python": platform.python_version()}
        print(json.dumps(line), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768, help="a multiple of 64, the width of a head")
    parser.add_argument("--pairs", type=int, default=64, help="of one device")
    parser.add_argument("--tokens", type=int, default=60, help="that captions are padded to")
    parser.add_argument("--row", type=int, default=128, help="tokens in a packed row")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--turns", type=int, default=5)
    measure(parser.parse_args())


if __name__ == "__main__":
    main()
