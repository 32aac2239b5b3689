"""The update against PyTorch's optimisers; freezing, learning rate multipliers and patterns."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zslflax.config import default_config
from zslflax.errors import UserError
from zslflax.models.partition import partition
from zslflax.training.optimizer import build_optimizer, frozen_towers, match_patterns, parameter_paths, schedule

SHAPES = {"kernel": (3, 2), "bias": (2,)}


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    leaf = lambda: {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
    towers = {m: {"tower": {"layer_0": leaf(), "layer_1": leaf()}, "projection": leaf()} for m in ("image", "text")}
    return {**towers, "objective": {"log_logit_scale": jnp.float32(3.9)}}


def config_with(**fields):
    c = default_config()
    c.optimizer.no_decay = (".*bias", "objective")
    for name, value in fields.items():
        if name == "freeze":
            c.freeze = value
        else:
            c.optimizer[name] = value
    return c


def run(c, params, steps=5, total=10):
    """Trains on fixed random gradients; returns the trained parameters after each step."""
    tx = build_optimizer(c, params, total)
    trained, _ = partition(params, frozen_towers(params, c.freeze))
    opt_state, history = tx.init(trained), []
    for step in range(steps):
        rng = np.random.default_rng(step)
        grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), trained)
        updates, opt_state = tx.update(grads, opt_state, trained)
        trained = optax.apply_updates(trained, updates)
        history.append(trained)
    return history


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_agrees_with_torch(require, params, name):
    torch = require("torch")
    c = config_with(name=name, learning_rate=0.1, weight_decay=0.3, momentum=0.9, clip_norm=2.0, warmup_steps=2)
    ours = run(c, params)[-1]

    leaves, treedef = jax.tree.flatten(params)
    names = jax.tree.leaves(parameter_paths(params))
    tensors = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in leaves]
    groups = [
        {"params": [t for t, n in zip(tensors, names) if n.endswith("kernel")], "weight_decay": 0.3},
        {"params": [t for t, n in zip(tensors, names) if not n.endswith("kernel")], "weight_decay": 0.0},
    ]
    optimizers = {
        "sgd": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        "adamw": lambda: torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.98), eps=1e-6),
    }
    theirs = optimizers[name]()
    for step in range(5):
        rng = np.random.default_rng(step)
        for t in tensors:
            t.grad = torch.tensor(np.asarray(rng.normal(size=t.shape), np.float32))
        torch.nn.utils.clip_grad_norm_(tensors, 2.0)
        for group in theirs.param_groups:  # 2 steps of warm-up from 0, then half a cosine over the 8 that are left
            group["lr"] = 0.1 * (step / 2 if step < 2 else 0.5 * (1 + np.cos(np.pi * (step - 2) / 8)))
        theirs.step()
    expected = treedef.unflatten([t.detach().numpy() for t in tensors])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), ours, expected)


def moved(before, after):
    return {p: bool(np.any(x != y)) for p, x, y in zip(*map(jax.tree.leaves, (parameter_paths(after), before, after)))}


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_parameters_are_frozen_forever_or_until_a_step(params, name):
    freeze = (("text/tower", -1), ("image/tower/layer_0", 3), ("image/tower/layer_1/bias", -1))
    c = config_with(name=name, learning_rate=0.1, weight_decay=0.1, freeze=freeze)
    history = run(c, params)
    assert "tower" not in history[0]["text"]  # frozen whole: neither gradient nor optimiser state
    after_three = moved(partition(params, ("text",))[0], history[2])
    assert {p for p, m in after_three.items() if not m} == {
        "image/tower/layer_0/kernel", "image/tower/layer_0/bias", "image/tower/layer_1/bias",
    }  # fmt: skip
    after_four = moved(partition(params, ("text",))[0], history[3])
    assert {p for p, m in after_four.items() if not m} == {"image/tower/layer_1/bias"}


def test_a_thawed_parameter_starts_without_momentum(params):
    """A parameter that is frozen until step 3 moves from then on as with a new optimiser."""
    frozen = run(
        config_with(learning_rate=0.1, momentum=0.9, freeze=(("image/tower", 3),)), params, steps=4, total=10**9
    )
    step_3 = np.random.default_rng(3)
    gradients = jax.tree.map(lambda x: step_3.normal(size=x.shape).astype(np.float32), params)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, params["image"]["tower"], gradients["image"]["tower"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), frozen[3]["image"]["tower"], expected)


def test_lr_multipliers_scale_the_update(params):
    plain = run(config_with(learning_rate=0.1), params, steps=1)[0]
    multipliers = ((".*/tower", 0.25), ("image", 0.5))
    scaled = run(config_with(learning_rate=0.1, lr_multipliers=multipliers), params, steps=1)[0]
    change = lambda after: jax.tree.map(lambda new, old: new - old, after, params)
    ratio = jax.tree.map(lambda a, b: float(jnp.mean(a / b)), change(scaled), change(plain))
    expected = match_patterns(params, multipliers, 1.0, "optimizer.lr_multipliers")
    assert expected["image"] == {
        "tower": {layer: {"kernel": 0.25, "bias": 0.25} for layer in ("layer_0", "layer_1")},
        "projection": {"kernel": 0.5, "bias": 0.5},
    }
    jax.tree.map(lambda value, wanted: np.testing.assert_allclose(value, wanted, rtol=1e-3), ratio, expected)


def test_a_pattern_that_matches_nothing_is_refused(params):
    with pytest.raises(UserError, match=r"freeze: no parameter matches 'image/towr'.*image/projection"):
        frozen_towers(params, (("image/towr", -1),))
    with pytest.raises(UserError, match="not a regular expression"):
        frozen_towers(params, (("image/(", -1),))


def test_learning_rate_warms_up_and_falls_by_a_cosine():
    c = config_with(learning_rate=2.0, warmup_steps=10)
    rate = schedule(c.optimizer, 110)
    values = [float(rate(step)) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(values, [0.0, 1.0, 2.0, 1.0, 0.0], atol=1e-6)
