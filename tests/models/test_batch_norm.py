"""Batch normalisation compared with Flax's and PyTorch's, and folded into the convolutions of every kind of tower."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.networks import perturb
from zslflax.models.batch_norm import BatchNorm, batch_norm, fold_batch_norms
from zslflax.models.fastvit import FastViT
from zslflax.models.fastvit import Variant as FastViTVariant
from zslflax.models.mobilenet import MobileNet, Stage, Variant
from zslflax.models.resnet import ResNet
from zslflax.models.resnet12 import ResNet12

AXIS = "data"
SHAPE = (8, 5, 6, 7)


def arrays():
    """x [8, 5, 6, 7] whose channels differ in mean and variance, scale, bias, and the gradient by the result."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=SHAPE) * rng.uniform(0.5, 3.0, 7) + rng.normal(size=7)
    return tuple(np.float32(a) for a in (x, rng.uniform(0.5, 2.0, 7), rng.normal(size=7), rng.normal(size=SHAPE)))


def variables_of(scale, bias):
    stats = {"mean": jnp.full(7, 0.3), "var": jnp.full(7, 1.7)}
    return {"params": {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}, "batch_stats": stats}


def values_and_gradients(norm, x, scale, bias, dy):
    """y, the statistics after it, and the gradients of ⟨y, dy⟩ by the parameters and by x."""

    def product(params, x):
        variables = {**variables_of(scale, bias), "params": params}
        y, updated = norm.apply(variables, x, mutable=["batch_stats"])
        return jnp.sum(y * dy), (y, updated["batch_stats"])

    gradients, outputs = jax.grad(product, (0, 1), has_aux=True)(variables_of(scale, bias)["params"], x)
    return *outputs, *gradients


def test_values_gradients_and_averages_are_those_of_flax():
    found = jax.jit(lambda *a: values_and_gradients(batch_norm(jnp.float32, None, train=True)(), *a))(*arrays())
    flax_norm = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=1e-5)
    wanted = jax.jit(lambda *a: values_and_gradients(flax_norm, *a))(*arrays())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max()), found, wanted)


def test_values_and_gradients_are_those_of_pytorch(require):
    torch = require("torch")
    x, scale, bias, dy = arrays()
    y, _, by_params, by_x = values_and_gradients(batch_norm(jnp.float32, None, train=True, epsilon=1e-3)(), *arrays())
    inputs = [torch.tensor(a, requires_grad=True) for a in (x.transpose(0, 3, 1, 2), scale, bias)]
    wanted = torch.nn.functional.batch_norm(inputs[0], None, None, *inputs[1:], training=True, eps=1e-3)
    wanted.backward(torch.tensor(dy.transpose(0, 3, 1, 2)))
    to_jax = lambda a: a.detach().numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(y, to_jax(wanted), rtol=0, atol=1e-5)
    np.testing.assert_allclose(by_x, to_jax(inputs[0].grad), rtol=0, atol=1e-5)
    np.testing.assert_allclose(by_params["scale"], inputs[1].grad, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(by_params["bias"], inputs[2].grad, rtol=1e-5, atol=1e-5)


def test_four_devices_compute_what_one_does():
    x, scale, bias, dy = arrays()
    whole = values_and_gradients(batch_norm(jnp.float32, None, train=True)(), x, scale, bias, dy)
    split = lambda a: a.reshape(4, 2, *SHAPE[1:])
    mapped = jax.pmap(
        lambda x, dy: values_and_gradients(batch_norm(jnp.float32, AXIS, train=True)(), x, scale, bias, dy), AXIS
    )
    y, stats, by_params, by_x = mapped(split(x), split(dy))
    stats, by_params = jax.tree.map(lambda a: a[0], stats), jax.tree.map(lambda a: a.sum(axis=0), by_params)
    found = y.reshape(SHAPE), stats, by_params, by_x.reshape(SHAPE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * np.abs(b).max()), found, whole)


def test_a_constant_channel_has_finite_gradients():
    x, scale, bias, dy = arrays()
    x[..., 2] = 3.25
    found = values_and_gradients(batch_norm(jnp.float32, None, train=True)(), x, scale, bias, dy)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    np.testing.assert_allclose(found[0][..., 2], bias[2], atol=1e-3)  # the rounding of the mean / √epsilon


def test_bfloat16_arrays_have_float32_statistics():
    x, scale, bias, dy = arrays()
    norm = batch_norm(jnp.bfloat16, None, train=True)()
    y, stats, by_params, by_x = values_and_gradients(norm, jnp.bfloat16(x), scale, bias, jnp.bfloat16(dy))
    assert y.dtype == by_x.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((stats, by_params))} == {jnp.dtype("float32")}
    exact = batch_norm(jnp.float32, None, train=True)()
    wanted = values_and_gradients(exact, np.float32(jnp.bfloat16(x)), scale, bias, np.float32(jnp.bfloat16(dy)))
    np.testing.assert_allclose(np.float32(y), wanted[0], rtol=2**-8, atol=1e-6)  # one rounding
    np.testing.assert_allclose(np.float32(by_x), wanted[3], rtol=2**-8, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), by_params, wanted[2])


FASTVIT = FastViTVariant((1, 1), (16, 32), 2, 1, activated=True, squeezed=True)
MOBILENET = Variant((Stage(1, 3, 1, 1, 8), Stage(2, 3, 2, 4, 8)), 1e-3, False)
TOWERS = {  # a tower, and its normalisations that follow no convolution
    "resnet": (ResNet((1, 1), True, stem_width=4), set()),
    "basic blocks": (ResNet((2, 1), False, stem_width=4, small=True), set()),
    "resnet-d": (ResNet((1, 1), True, stem_width=4, deep=True), set()),
    "clip": (ResNet((1, 1), True, stem_width=4, deep=True, heads=2), set()),
    "resnet12": (ResNet12((4, 8)), set()),
    "mobilenet": (MobileNet(MOBILENET), set()),
    "fastvit": (FastViT(FASTVIT), {"skip_bn", "mixer_bn", "norm"}),
}


@pytest.mark.parametrize("name", TOWERS)
def test_folded_variables_give_the_same_features_with_fewer_normalisations(name):
    tower, others = TOWERS[name]
    image = jax.random.normal(jax.random.key(2), (2, 32, 32, 3))
    variables = perturb(jax.jit(tower.init)(jax.random.key(0), image))
    folded = fold_batch_norms(variables, getattr(tower, "epsilon", 1e-5))
    wanted, found = (jax.jit(tower.apply)(v, image) for v in (variables, folded))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())
    paths = jax.tree_util.tree_flatten_with_path(folded["params"])[0]
    scaled = {path[-2].key for path, _ in paths if path[-1].key == "scale"}
    assert {module for module in scaled if "layer_scale" not in module} == others


def test_variables_without_batch_norms_stay():
    variables = {"params": {"conv": {"kernel": jnp.ones((1, 1, 2, 2))}, "bn": {"scale": jnp.ones(2)}}}
    assert fold_batch_norms(variables) == variables


def test_the_names_of_variables_are_those_of_flax():
    x = jnp.zeros((1, 2))
    ours = jax.eval_shape(BatchNorm(jnp.float32, None, train=False).init, jax.random.key(0), x)
    flaxs = jax.eval_shape(nn.BatchNorm(use_running_average=True).init, jax.random.key(0), x)
    assert ours == flaxs
