"""Twenty steps of every objective from a fixed seed: no change elsewhere may move the losses unnoticed.

Where the mathematics is meant to change, the numbers below are written anew:

    python tests/test_golden.py
"""

import functools

import jax
import numpy as np
import pytest

from tests.training.test_step import AXIS, MODEL, batch_of, config_of
from zslflax import distributed
from zslflax.losses import contrastive
from zslflax.losses.contrastive import OBJECTIVES
from zslflax.training import optimizer, train_state
from zslflax.training.step import train_step

STEPS = 20
SHOWN = (0, 4, 9, 19)  # steps whose losses are pinned
LOSSES = {
    "info_nce": [11.7696, 4.14026, 1.80735, 1.44244],
    "label_smoothing": [11.5064, 4.2071, 2.04703, 1.96514],
    "self_distillation": [10.9827, 4.15259, 2.00742, 1.65869],
    "otter": [11.4481, 4.82043, 2.38491, 2.2944],
    "sigmoid": [10.6864, 3.42542, 2.5254, 1.85872],
}


def losses(objective):
    """Of each step; three batches in turn, two pairs of the second unreadable."""
    c = config_of(
        objective,
        objective__image_image=0.3,
        objective__ramp_steps=5,
        optimizer__name="adamw",
        optimizer__learning_rate=0.01,
    )
    batches = [batch_of(0), batch_of(1, valid=False), batch_of(2)]
    inputs = (batches[0][name] for name in ("image", "text", "text_mask"))
    made = jax.jit(MODEL.init)(jax.random.key(0), *inputs)
    params = {**made["params"], "objective": contrastive.init_params(c.objective)}
    tx = optimizer.build(c, params, STEPS)
    state = train_state.create({"params": params, "batch_stats": made["batch_stats"]}, tx, ema=True, frozen=())
    step = functools.partial(train_step, model=MODEL, tx=tx, config=c, frozen=())
    step = jax.pmap(step, AXIS, in_axes=(None, None, 0), out_axes=(None, None), devices=jax.devices()[:1])
    state, history = distributed.replicate(state, 1), []
    for i in range(STEPS):
        state, metrics = step(state, {}, jax.tree.map(lambda x: x[None], batches[i % 3]))
        history.append(float(metrics["loss"]))
    return history


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_losses_are_those_of_before(objective):
    history = losses(objective)
    np.testing.assert_allclose([history[i] for i in SHOWN], LOSSES[objective], rtol=1e-3)
    assert history[18] < 0.5 * history[0]  # the same batch, six turns later


if __name__ == "__main__":
    for name in OBJECTIVES:
        print(f'    "{name}": {[float(f"{x:.6g}") for i, x in enumerate(losses(name)) if i in SHOWN]},')
