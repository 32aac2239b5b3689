"""Memory of a training step on one device, with micro-batches and rematerialised towers. Nothing is run.

    python benchmarks/step_memory.py                                    # 256 pairs, all at once and 64 at a time
    python benchmarks/step_memory.py --remat --micro_batch 0 64 16
    python benchmarks/step_memory.py --residuals-only                   # without compiling: takes seconds

The step is that of configs/r50_declutr.py with padded captions. Each micro-batch prints one JSON line:

    residuals_mb  what the towers' forward passes of a micro-batch keep for the gradient: activations, and the
                  parameters that are needed with them
    xla_temp_mb   memory that XLA plans to reserve for intermediate values of the compiled step; a plan for a CPU undoes
                  `remat`, because the compiler merges equal computations
    tflop         of the step's products, with those that are computed again
"""

import argparse
import json

import jax
from step_shapes import SHAPE, load_config, make_shapes

from zslflax.config import compute_dtype
from zslflax.distributed import AXIS
from zslflax.models.build import build_two_tower
from zslflax.training.forward import embed
from zslflax.training.step import TrainStep

MB = 1e6


def residual_bytes(model, state, batch, pairs: int) -> int:
    """What the forward passes of some pairs keep for the gradient."""

    def residuals(params, batch_stats, batch):
        apply = lambda params: embed(
            model,
            {"params": params, "batch_stats": batch_stats},
            batch,
            {},
            train=("image", "text"),
            rngs={"dropout": jax.random.key(0)},
        )
        return jax.vjp(apply, params, has_aux=True)[1]

    mapped = jax.vmap(residuals, (None, None, 0), axis_name=AXIS)  # over the one device
    micro_batch = {name: SHAPE((1, pairs, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    vjp_fn = jax.eval_shape(mapped, state.params, state.batch_stats, micro_batch)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vjp_fn))


def measure(batch_size: int, micro_batch: int, remat: bool, compile_step: bool) -> dict:
    """One line of the output."""
    config = load_config()
    config.batch_size, config.micro_batch = batch_size, micro_batch
    config.model.image.remat = config.model.text.remat = remat
    model = build_two_tower(config.model, dtype=compute_dtype(config), axis_name=AXIS)
    state, batch, tx = make_shapes(config, model, config.model.text.max_tokens)
    step = TrainStep({}, model=model, teacher_model=model, tx=tx, config=config)
    lowered = step.shared.mapped.lower(state, {}, {name: SHAPE((1, *x.shape), x.dtype) for name, x in batch.items()})
    line = {"benchmark": "step_memory", "batch": batch_size, "micro_batch": micro_batch, "remat": remat}
    line |= {"tflop": float(f"{step.flops / 1e12:.4g}")}
    line |= {"residuals_mb": round(residual_bytes(model, state, batch, micro_batch or batch_size) / MB)}
    if compile_step:
        line |= {"xla_temp_mb": round(lowered.compile().memory_analysis().temp_size_in_bytes / MB)}
    return line | {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="pairs on the device")
    parser.add_argument("--micro_batch", type=int, nargs="+", default=[0, 64], help="pairs at a time; 0: all")
    parser.add_argument("--remat", action="store_true", help="in both towers")
    parser.add_argument("--residuals-only", action="store_true", help="compile nothing")
    args = parser.parse_args()
    for micro_batch in args.micro_batch:
        print(json.dumps(measure(args.batch, micro_batch, args.remat, not args.residuals_only)), flush=True)


if __name__ == "__main__":
    main()
