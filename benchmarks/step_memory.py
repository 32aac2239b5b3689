"""Memory of a training step on one device against micro-batches and rematerialised towers; nothing is run.

    python benchmarks/step_memory.py                                    # 256 pairs, whole and 64 at a time
    python benchmarks/step_memory.py --remat --micro_batch 0 64 16
    python benchmarks/step_memory.py --kept-only                        # without compiling: in seconds

The step is that of configs/r50_declutr.py, of padded captions. One JSON line for each micro-batch:

    kept_mb      what the towers' forward passes leave for the gradient, of the pairs that are embedded at a time:
                 activations, and the parameters that are needed with them
    xla_temp_mb  what XLA's own plan of the compiled step reserves for intermediate values; a plan for a CPU undoes
                 `remat`, by finding the same values twice
    tflop        of the step's products, those that are made once more included
"""

import argparse
import functools
import json
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp

from zslflax.config import compute_dtype
from zslflax.losses import contrastive
from zslflax.models.build import build
from zslflax.training import optimizer, train_state
from zslflax.training.step import AXIS, TrainStep, embed

CONFIG = Path(__file__).parent.parent / "configs" / "r50_declutr.py"
MB, SHAPE = 1e6, jax.ShapeDtypeStruct


def shapes(config, model):
    """The state and a device's batch, as shapes, and the optimiser."""
    n, size, tokens = config.batch_size, config.model.image.size, config.model.text.max_tokens
    batch = {"image": SHAPE((n, size, size, 3), jnp.uint8), "text": SHAPE((n, tokens), jnp.int32)}
    batch |= {"text_mask": SHAPE((n, tokens), jnp.bool_)}
    variables = jax.eval_shape(model.init, jax.random.key(0), *batch.values())
    params = {**variables["params"], "objective": contrastive.init_params(config.objective)}
    variables = {"params": params, "batch_stats": variables["batch_stats"]}
    tx = optimizer.build(config, params, config.steps)
    state = jax.eval_shape(functools.partial(train_state.create, tx=tx, ema=True, frozen=()), variables)
    return state, batch | {"valid": SHAPE((n,), jnp.bool_)}, tx


def kept_bytes(model, state, batch, pairs: int) -> int:
    """What the forward passes of so many pairs leave for the gradient."""

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
    few = {name: SHAPE((1, pairs, *x.shape[1:]), x.dtype) for name, x in batch.items()}
    kept = jax.eval_shape(mapped, state.params, state.batch_stats, few)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


def measure(batch_size: int, micro_batch: int, remat: bool, compiling: bool) -> dict:
    """One line of the output."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.model.text.pretrained = ""  # its sizes without its weights: 12 layers, 768 wide, 30,522 words
    config.batch_size, config.micro_batch = batch_size, micro_batch
    config.model.image.remat = config.model.text.remat = remat
    model = build(config.model, dtype=compute_dtype(config), axis_name=AXIS)
    state, batch, tx = shapes(config, model)
    step = TrainStep({}, model=model, tx=tx, config=config, frozen=())
    lowered = step.mapped.lower(state, {}, {name: SHAPE((1, *x.shape), x.dtype) for name, x in batch.items()})
    line = {"benchmark": "step_memory", "batch": batch_size, "micro_batch": micro_batch, "remat": remat}
    line |= {"tflop": float(f"{step.flops / 1e12:.4g}")}
    line |= {"kept_mb": round(kept_bytes(model, state, batch, micro_batch or batch_size) / MB)}
    if compiling:
        line |= {"xla_temp_mb": round(lowered.compile().memory_analysis().temp_size_in_bytes / MB)}
    return line | {"device": jax.devices()[0].device_kind, "jax": jax.__version__}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256, help="pairs on the device")
    parser.add_argument("--micro_batch", type=int, nargs="+", default=[0, 64], help="at a time; 0: all")
    parser.add_argument("--remat", action="store_true", help="in both towers")
    parser.add_argument("--kept-only", action="store_true", help="compile nothing")
    args = parser.parse_args()
    for micro_batch in args.micro_batch:
        print(json.dumps(measure(args.batch, micro_batch, args.remat, not args.kept_only)), flush=True)


if __name__ == "__main__":
    main()
