"""Helpers for tests of the train step: a small two-tower model, batches, configs, and steps on several devices."""

import functools
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from zslflax import distributed
from zslflax.config import default_config, set_objective
from zslflax.distributed import AXIS
from zslflax.losses import contrastive
from zslflax.models.bert import Bert, BertConfig
from zslflax.models.two_tower import ProjectedTower, TwoTower
from zslflax.training.optimizer import build_optimizer, frozen_towers
from zslflax.training.step import train_step
from zslflax.training.train_state import TrainState, create_train_state

N, SIZE, TOKENS, STEPS = 8, 4, 6, 3  # pairs, pixels, tokens, length of the run
WIDTH = 12  # of the embeddings
BERT = BertConfig(vocab_size=40, width=16, layers=1, heads=2, hidden=32, positions=TOKENS, dropout=0.0)


class Perceptron(nn.Module):
    """An image tower with batch normalisation, which compiles faster than one with convolutions."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8)(x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=AXIS if train else None)(x)
        return nn.Dense(8)(nn.relu(x))


def make_two_tower(image: nn.Module | None = None, bert: BertConfig = BERT, width: int = WIDTH) -> TwoTower:
    """A two-tower model with a `Perceptron`, or another image tower."""
    image_side, text_side = (
        ProjectedTower(image or Perceptron(), nn.Dense(width)),
        ProjectedTower(Bert(bert), nn.Dense(width)),
    )
    return TwoTower(image_side, text_side, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


MODEL = make_two_tower()


def make_batch(seed: int, all_valid: bool = True) -> dict[str, np.ndarray]:
    """A random batch of N pairs, of which two are invalid unless `all_valid`."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, TOKENS + 1, (N, 1))
    valid = np.ones(N, bool)
    valid[[1, 6]] = all_valid
    return {
        "image": rng.integers(0, 256, (N, SIZE, SIZE, 3), dtype=np.uint8),
        "text": rng.integers(0, 40, (N, TOKENS), dtype=np.int32),
        "text_mask": np.arange(TOKENS) < lengths,
        "valid": valid,
    }


def init_variables(model: TwoTower, seed: int = 0) -> dict[str, Any]:
    """A model's initial {"params", "batch_stats"}, without the objective's parameters."""
    inputs = (make_batch(0)[name] for name in ("image", "text", "text_mask"))
    variables = jax.jit(model.init)(jax.random.key(seed), *inputs)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def make_config(objective: str = "self_distillation", **fields: Any) -> ConfigDict:
    """A config for small batches. `teacher__kind="none"` sets `teacher.kind`, and so on."""
    c = default_config()
    set_objective(c, objective)
    c.optimizer.learning_rate = 0.1
    c.objective.teacher_temperature = 0.1
    c.teacher.ema_decay = 0.9
    c.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return c


def make_state(
    config: ConfigDict,
    variables: dict[str, Any],
    model: TwoTower = MODEL,
    devices: int = 1,
    steps: int = STEPS,
    teacher_width: int = WIDTH,
) -> tuple[TrainState, dict[str, Any]]:
    """The state before the first step, replicated, and the keyword arguments of `train_step`."""
    objective_params = contrastive.init_params(config.objective, jax.random.key(2), WIDTH, teacher_width)
    params = {**variables["params"], "objective": objective_params}
    tx, frozen = build_optimizer(config, params, steps), frozen_towers(params, config.freeze)
    ema = config.teacher.kind == "ema"
    state = create_train_state({**variables, "params": params}, tx, ema=ema, frozen=frozen)
    return distributed.replicate(state, devices), dict(model=model, teacher_model=model, tx=tx, config=config)


def map_step(arguments: dict[str, Any], devices: int):
    """`train_step` with these keyword arguments, mapped over devices; it does not donate the state."""
    step = functools.partial(train_step, **arguments)
    return jax.pmap(step, AXIS, in_axes=(None, None, 0), out_axes=(None, None), devices=jax.devices()[:devices])


def split_batch(batch: dict[str, np.ndarray], devices: int) -> dict[str, np.ndarray]:
    """[n, …] → [devices, n / devices, …]."""
    return {name: x.reshape(devices, -1, *x.shape[1:]) for name, x in batch.items()}


def run_steps(
    config: ConfigDict,
    variables: dict[str, Any],
    batches: Iterable[dict[str, np.ndarray]],
    devices: int = 1,
    *,
    model: TwoTower = MODEL,
    steps: int = STEPS,
    fixed_teacher: dict[str, Any] | None = None,
    teacher_model: TwoTower | None = None,
) -> list[tuple[TrainState, dict[str, np.ndarray]]]:
    """Takes a step for each batch; returns the states after each and their metrics, on the host."""
    kernel = fixed_teacher["params"]["image"]["projection"]["kernel"] if fixed_teacher else np.empty((0, WIDTH))
    state, arguments = make_state(config, variables, model, devices, steps, kernel.shape[1])
    step = map_step(arguments | {"teacher_model": teacher_model or model}, devices)
    history = []
    for batch in batches:
        state, metrics = step(state, fixed_teacher or {}, split_batch(batch, devices))
        history.append(jax.device_get((state, metrics)))
    return history


def assert_close(a: Any, b: Any, atol: float) -> None:
    """Compares two trees with a relative tolerance of 1e-4 and an absolute one.

    The absolute one is never below the rounding of sums whose terms are as large as the array's largest element.
    """
    assert jax.tree.structure(a) == jax.tree.structure(b)
    rounding = lambda y: 8 * np.finfo(np.float32).eps * float(np.abs(y).max(initial=0.0))
    compare = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=max(atol, rounding(np.asarray(y))))
    jax.tree.map(compare, a, b)
