"""Depthwise convolutions: the method of CPUs against that of accelerators."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from zslflax.models.depthwise import (
    DepthwiseConv,
    grouped_convolution,
    sum_of_shifts,
    sum_with_grouped_gradient,
)
from zslflax.models.mobilenet import paddings


@pytest.mark.parametrize("tensorflow", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_the_sum_of_shifts_is_the_grouped_convolution_of_accelerators(kernel, stride, tensorflow):
    rng = np.random.default_rng(0)
    for sides in ((8, 11), (7, 6)):
        x = rng.normal(size=(2, *sides, 5)).astype(np.float32)
        weight = rng.normal(size=(kernel, kernel, 1, 5)).astype(np.float32)
        args = x, weight, stride, paddings(x, kernel, stride, tensorflow)
        expected = grouped_convolution(*args)
        np.testing.assert_allclose(sum_of_shifts(*args), expected, atol=1e-5)
        if tensorflow:
            same = functools.partial(jax.lax.conv_general_dilated, feature_group_count=5)
            same = same(x, weight, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            np.testing.assert_allclose(expected, same, atol=1e-5)


def test_a_depthwise_convolution_is_flax_convolution_with_groups():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 8, 9, 6)), jnp.float32)
    ours = DepthwiseConv(kernel=7, stride=1, padding=[(3, 3), (3, 3)], use_bias=True, dtype=jnp.float32)
    flax_layer = nn.Conv(6, (7, 7), padding=3, feature_group_count=6)
    params = flax_layer.init(jax.random.key(0), x)
    params = jax.tree.map(lambda value: jnp.asarray(rng.normal(size=value.shape), jnp.float32), params)
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x)) == jax.tree.map(jnp.shape, params)
    np.testing.assert_allclose(ours.apply(params, x), flax_layer.apply(params, x), atol=2e-5)


def test_the_gradient_of_a_large_kernel_has_no_shifts():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 8, 9, 6)).astype(np.float32), rng.normal(size=(7, 7, 1, 6)).astype(np.float32)
    weights_of_output = jnp.asarray(rng.normal(size=(2, 8, 9, 6)), jnp.float32)
    loss = lambda method, *args: jnp.sum(weights_of_output * method(*args, 1, ((3, 3), (3, 3))))
    ours, shifted, grouped = (
        jax.grad(functools.partial(loss, method), (0, 1))(x, weight)
        for method in (sum_with_grouped_gradient, sum_of_shifts, grouped_convolution)
    )
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), ours, shifted)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), ours, grouped)
    layer = DepthwiseConv(kernel=7, stride=1, padding=[(3, 3), (3, 3)], use_bias=False, dtype=jnp.float32)
    program = jax.make_jaxpr(jax.grad(lambda x: layer.apply({"params": {"kernel": weight}}, x).sum()))(x)
    assert "conv_general_dilated[" in str(program) and str(program).count("pad[") < 5
