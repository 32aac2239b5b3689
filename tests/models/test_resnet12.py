"""ResNet-12 against PyTorch, and what DropBlock drops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from zslflax.models import build
from zslflax.models.resnet12 import ResNet12, drop_block


@pytest.mark.parametrize("size", [32, 37])
def test_the_features_equal_pytorch(require, size):
    torch = require("torch")
    nn, functional = torch.nn, torch.nn.functional
    widths = (4, 6, 8, 10)
    model = ResNet12(widths)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, size, size, 3)).astype(np.float32)
    variables = jax.tree.map(
        lambda leaf: rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32),
        jax.eval_shape(model.init, jax.random.key(0), x),
    )
    arrays = {name: torch.tensor(value) for name, value in flatten_dict(variables, sep="/").items()}

    def conv(y, name):
        kernel = arrays[f"params/{name}/kernel"].permute(3, 2, 0, 1)
        return functional.conv2d(y, kernel / 20, padding=kernel.shape[-1] // 2)

    def norm(y, name):
        mean, var = (arrays[f"batch_stats/{name}/{field}"] for field in ("mean", "var"))
        return functional.batch_norm(y, mean, var, arrays[f"params/{name}/scale"], arrays[f"params/{name}/bias"])

    for name in arrays:  # smaller weights keep the numbers small
        if name.endswith("kernel"):
            variables["params"][name.split("/")[1]][name.split("/")[2]]["kernel"] /= 20
    y, leaky = torch.tensor(x).permute(0, 3, 1, 2), nn.LeakyReLU(0.1)
    for i in range(1, 5):
        out = y
        for j in (1, 2, 3):
            out = norm(conv(out, f"layer{i}/conv{j}"), f"layer{i}/bn{j}")
            out = leaky(out) if j < 3 else out
        y = leaky(out + norm(conv(y, f"layer{i}/downsample_conv"), f"layer{i}/downsample_bn"))
        y = nn.MaxPool2d(2)(y)
    expected = y.mean((2, 3)).numpy()
    np.testing.assert_allclose(model.apply(variables, x), expected, rtol=2e-4)


def test_its_size_and_width():
    model = build.image_tower("resnet12", jnp.float32, None, remat=False)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 84, 84, 3)))
    assert sum(x.size for x in jax.tree.leaves(shapes["params"])) == 12_424_320  # the published 12.4 million
    assert jax.eval_shape(model.apply, shapes, jnp.zeros((2, 84, 84, 3))).shape == (2, 640)


@pytest.mark.parametrize(("side", "block"), [(10, 5), (5, 5), (4, 2), (2, 2)])
def test_drop_block_drops_squares_of_the_expected_share(side, block):
    x = jnp.ones((64, side, side, 32))
    y = np.asarray(drop_block(x, jax.random.key(0), 0.1, block))
    kept = y > 0
    # A square is dropped with this probability, at each place; overlaps make the share a little less than the rate.
    places = (side - block + 1) ** 2
    probability = 0.1 * side**2 / (block**2 * places)
    covering = np.array([[min(i, block - 1, side - 1 - i, side - block) + 1 for i in range(side)]])
    expected = np.mean((1 - probability) ** (covering * covering.T))
    assert np.mean(kept) == pytest.approx(expected, abs=0.01) and 0.9 <= expected < 0.93
    np.testing.assert_allclose(y.mean(), 1.0, rtol=1e-5)
    # What is dropped consists of whole squares: each dropped element lies in one.
    dropped = ~kept
    whole = np.lib.stride_tricks.sliding_window_view(dropped, (block, block), axis=(1, 2)).all(axis=(-2, -1))
    covered = np.zeros_like(dropped)
    for i in range(block):
        for j in range(block):
            covered[:, i : i + whole.shape[1], j : j + whole.shape[2]] |= whole
    np.testing.assert_array_equal(covered, dropped)


def test_it_drops_in_training_alone():
    model, x = ResNet12((4, 4, 4, 4)), jnp.ones((2, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    train = jax.jit(
        lambda key: model.apply(variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key})[0]
    )
    first, again, other = (train(jax.random.key(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(model.apply(variables, x), model.apply(variables, x))
