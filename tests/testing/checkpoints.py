"""Small train states, and damage to checkpoints."""

import random
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from zslflax import checkpoint, distributed
from zslflax.training.train_state import TrainState, create_train_state


def state_at(step: int) -> TrainState:
    """A state that is the same whenever it is made for a step."""
    leaf = lambda seed: {"kernel": jax.random.normal(jax.random.key(seed), (4, 3))}
    params = {m: {"tower": leaf(i), "projection": leaf(i + 2)} for i, m in enumerate(("image", "text"))}
    params["objective"] = {"log_logit_scale": jnp.float32(step)}
    state = create_train_state({"params": params, "batch_stats": {}}, optax.adam(0.1), ema=True, frozen=())
    return distributed.replicate(state.replace(step=jnp.int32(step)))


def save_steps(folder: Path, steps: Iterable[int], best_metric: str = "", values: dict[int, float] | None = None):
    """Saves the states of some steps, with values of the metric "eval/hit"."""
    with checkpoint.open_manager(folder, best_metric) as manager:
        for step in steps:
            checkpoint.save(manager, state_at(step), None if values is None else {"eval/hit": values[step]})


def damage(path: Path, kind: str, bit: int | None = None) -> None:
    """Flips one bit of a file (a random one by default), truncates it to a half, or empties it."""
    data = bytearray(path.read_bytes())
    if kind == "flipped" and data:
        bit = random.Random(path.name).randrange(8 * len(data)) if bit is None else bit
        data[bit // 8] ^= 1 << bit % 8
    path.write_bytes({"flipped": data, "truncated": data[: len(data) // 2], "empty": b""}[kind])


def flip_arrays(folder: Path) -> None:
    """Flips a bit in the middle of every array file of a checkpoint."""
    for path in (folder / "state").rglob("d/*"):
        damage(path, "flipped", bit=8 * (path.stat().st_size // 2) + 2)
