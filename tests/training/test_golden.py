"""Losses of twenty steps of every objective, from a fixed seed: no change elsewhere may alter them unnoticed.

After an intended change of the mathematics, print new values with

    python -m tests.training.test_golden
"""

import numpy as np
import pytest

from tests.testing.training import MODEL, init_variables, make_batch, make_config, run_steps
from zslflax.losses.contrastive import OBJECTIVES

STEPS = 20
PINNED = (0, 4, 9, 19)  # steps
LOSSES = {
    "info_nce": [11.7696, 4.14026, 1.80735, 1.44244],
    "label_smoothing": [11.5064, 4.2071, 2.04703, 1.96514],
    "self_distillation": [10.9827, 4.15259, 2.00742, 1.65869],
    "otter": [11.4481, 4.82043, 2.38491, 2.2944],
    "sigmoid": [10.6864, 3.42542, 2.5254, 1.85872],
}


def train_losses(objective: str) -> list[float]:
    """The loss of each step, on three batches in turn; two pairs of the second are invalid."""
    config = make_config(
        objective,
        objective__image_image_weight=0.3,
        objective__soft_ramp_steps=5,
        optimizer__name="adamw",
        optimizer__learning_rate=0.01,
    )
    batches = [make_batch(0), make_batch(1, all_valid=False), make_batch(2)]
    history = run_steps(config, init_variables(MODEL), (batches[i % 3] for i in range(STEPS)), steps=STEPS)
    return [float(metrics["loss"]) for _, metrics in history]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_are_unchanged(objective):
    losses = train_losses(objective)
    np.testing.assert_allclose([losses[i] for i in PINNED], LOSSES[objective], rtol=1e-3)
    assert losses[18] < 0.5 * losses[0]  # the same batch, six turns later


if __name__ == "__main__":
    for name in OBJECTIVES:
        losses = train_losses(name)
        print(f'    "{name}": {[float(f"{losses[i]:.6g}") for i in PINNED]},')
