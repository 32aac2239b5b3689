"""The cost that benchmarks/scaling.py counts in a step, against published figures and arithmetic."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from tests.testing.benchmarks import imported
from zslflax.models.resnet import RESNETS, ResNet

IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


@pytest.fixture(scope="module")
def scaling():
    """The benchmark as a module; it imports another file of its folder."""
    with imported("scaling") as (scaling,):
        yield scaling


@pytest.fixture(scope="module")
def cost(scaling):
    """(function, *arguments, devices) → the cost of one device; all devices have the same arguments."""
    return lambda *inputs, devices=1: scaling.Cost().add(make_jaxpr(*inputs, devices=devices)).total


def make_jaxpr(function, *arguments, devices):
    mapped = jax.shard_map(
        function,
        mesh=AbstractMesh((devices,), ("data",)),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return jax.make_jaxpr(mapped)(*arguments).jaxpr


def test_resnet50_has_the_published_number_of_multiplications(cost):
    model = ResNet(*RESNETS["resnet50"])
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGE)
    total = cost(model.apply, variables, IMAGE)
    assert total["float32"] / 2 == pytest.approx(4.09e9, rel=0.002)  # torchvision's table


def test_a_gradient_costs_twice_the_forward_pass_also_with_strides_and_in_loops(cost):
    def forward(kernel, x):
        convolve = lambda x, _: (jax.lax.conv_transpose(strided(kernel, x), kernel, (2, 2), "SAME"), None)
        return jnp.sum(jax.lax.scan(convolve, x, length=3)[0])

    def strided(kernel, x):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    kernel, x = jnp.zeros((3, 3, 8, 8)), jnp.zeros((2, 16, 16, 8))
    once = 2 * (2 * 8 * 8 * 8) * (3 * 3 * 8)  # 2 · outputs · window
    assert cost(strided, kernel, x)["float32"] == once
    assert cost(forward, kernel, x)["float32"] == 6 * once
    assert cost(jax.grad(forward, argnums=(0, 1)), kernel, x)["float32"] == 18 * once


def test_bytes_of_collectives_are_those_of_all_devices(cost):
    def step(x):
        gathered = jax.lax.all_gather(x, "data", tiled=True)
        back = jax.lax.psum_scatter(gathered, "data", tiled=True)
        return jax.lax.scan(lambda c, _: (jax.lax.psum(c, "data"), None), back, length=5)[0]

    total = cost(step, jnp.zeros((4, 3)), devices=8)
    assert total["embedding"] == 2 * 8 * 4 * 3 * 4 and total["gradient"] == 5 * 4 * 3 * 4


def test_batch_normalisation_communicates_in_the_forward_and_in_the_backward_pass(cost):
    model = ResNet(*RESNETS["resnet18"], axis_name="data")
    variables = jax.eval_shape(model.init, jax.random.key(0), IMAGE)

    def loss(params, batch_stats, x):
        variables = {"params": params, "batch_stats": batch_stats}
        return jnp.sum(model.apply(variables, x, train=True, mutable=["batch_stats"])[0])

    total = cost(jax.grad(loss), variables["params"], variables["batch_stats"], IMAGE, devices=4)
    assert total["normalisations"] == 2 * (1 + 16 + 3)  # the stem, two in each of 8 blocks, 3 shortcuts
    channels = 64 + 4 * 64 + (4 + 1) * (128 + 256 + 512)
    assert total["normalisation"] == 2 * channels * 2 * 4  # mean and mean square, fp32


def test_an_all_reduce_takes_as_long_as_on_rings(scaling):
    ring = scaling.Machine(1.0, 1.0, (scaling.Level(4, 100.0),), 0.0)
    assert scaling.reduce_seconds(ring, 1000.0) == pytest.approx(2 * 3 / 4 * 1000 / 100 / 0.8)
    two = scaling.Machine(1.0, 1.0, (scaling.Level(4, 100.0), scaling.Level(2, 10.0)), 0.0)
    inside, between = 2 * 3 / 4 * 1000 / 100, 2 * 1 / 2 * 250 / 10
    assert scaling.reduce_seconds(two, 1000.0) == pytest.approx((inside + between) / 0.8)
