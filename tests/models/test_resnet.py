"""ResNets compared with Hugging Face's PyTorch models, and their batch statistics over several devices."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.networks import random_images, randomise_batch_norm
from zslflax.models.import_weights.layouts import HF_RESNET, TORCHVISION_RESNET
from zslflax.models.import_weights.load import load_image_tower, load_variables
from zslflax.models.resnet import KAIMING, RESNETS, ResNet, StemConv, add_relu

PARAMETERS = {  # of torchvision's models without their classifier of 1,000 classes
    "resnet18": 11_689_512 - 513_000,
    "resnet34": 21_797_672 - 513_000,
    "resnet50": 25_557_032 - 2_049_000,
    "resnet101": 44_549_160 - 2_049_000,
}


def reference(require, folder, rng_seed=0, **config):
    """A ResNet of `transformers` with random weights and batch statistics, saved in `folder`."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(rng_seed)
    model = transformers.ResNetForImageClassification(transformers.ResNetConfig(**config)).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            last = re.search(r"layer\.\d\.normalization", name) is not None
            randomise_batch_norm(module, weight=(0.2, 0.8) if last else (0.5, 1.5))
    model.save_pretrained(folder)
    return model


def features(model, images):
    """The pooled features that the original computes of NHWC images."""
    import torch

    with torch.no_grad():
        return model.resnet(torch.tensor(images.transpose(0, 3, 1, 2))).pooler_output.flatten(1).numpy()


def shapes(model, size=32):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


def assert_agree(ours, original):
    assert original.std() > 0.05, "the output of the original is nearly constant: the comparison would mean nothing"
    np.testing.assert_allclose(ours, original, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_relu_of_a_sum_has_the_gradients_of_flax(dtype):
    x, y, gradient = np.round(np.random.default_rng(0).normal(size=(3, 500))).astype(dtype)  # many sums are 0
    assert (x + y == 0).sum() > 50
    found, wanted = (jax.vjp(function, x, y) for function in (add_relu, lambda x, y: nn.relu(x + y)))
    np.testing.assert_array_equal(found[0], wanted[0])
    jax.tree.map(np.testing.assert_array_equal, found[1](gradient), wanted[1](gradient))


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 46), (7, 31)])
def test_the_stem_on_pixels_as_channels_is_the_convolution_of_flax(height, width):
    """With the same parameters, forward and backward; odd sides show how each side is padded."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, height, width, 3)), jnp.float32)
    plain = nn.Conv(16, (7, 7), (2, 2), ((3, 3), (3, 3)), use_bias=False, kernel_init=KAIMING)
    variables = plain.init(jax.random.key(0), x)
    weights = np.random.default_rng(1).normal(size=plain.apply(variables, x).shape)

    def value_and_gradients(module):
        return jax.jit(jax.grad(lambda v, x: jnp.sum(weights * module.apply(v, x)), argnums=(0, 1)))(variables, x)

    for pixels_as_channels in (False, True):
        stem = StemConv(16, jnp.float32, pixels_as_channels)
        jax.tree.map(np.testing.assert_array_equal, stem.init(jax.random.key(0), x), variables)
        output = jax.jit(stem.apply)(variables, x)
        np.testing.assert_allclose(output, plain.apply(variables, x), rtol=0, atol=3e-6)
        for ours, theirs in zip(
            jax.tree.leaves(value_and_gradients(stem)), jax.tree.leaves(value_and_gradients(plain))
        ):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6 * np.abs(theirs).max() * 10)


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("size", [64, 47])  # an odd size shows how each side is padded
def test_agrees_with_transformers(require, tmp_path, bottleneck, size):
    stem, expansion = 8, 4 if bottleneck else 1
    original = reference(
        require,
        tmp_path,
        embedding_size=stem,
        hidden_sizes=[stem * expansion * 2**i for i in range(4)],
        depths=[2, 1, 3, 2],
        layer_type="bottleneck" if bottleneck else "basic",
    )
    model = ResNet((2, 1, 3, 2), bottleneck, stem_width=stem)
    variables = load_variables(tmp_path, shapes(model), (TORCHVISION_RESNET, HF_RESNET))
    images = random_images(2, size)
    assert_agree(jax.jit(model.apply)(variables, images), features(original, images))


def test_resnet50_agrees_with_transformers(require, tmp_path):
    original = reference(require, tmp_path)  # the defaults of the configuration are those of ResNet-50
    model = ResNet(*RESNETS["resnet50"])
    variables = load_image_tower(tmp_path, "resnet50", shapes(model), 64)
    images = random_images(1, 64)
    assert_agree(jax.jit(model.apply)(variables, images), features(original, images))


def torchvision_name(name):
    """Converts a name of `transformers` to torchvision's."""
    name = re.sub(r"^resnet\.embedder\.embedder\.convolution", "conv1", name)
    name = re.sub(r"^resnet\.embedder\.embedder\.normalization", "bn1", name)
    name = re.sub(r"^classifier\.1", "fc", name)
    block = re.fullmatch(r"resnet\.encoder\.stages\.(\d)\.layers\.(\d+)\.(.*)", name)
    if not block:
        return name
    stage, index, rest = block.groups()
    rest = rest.replace("shortcut.convolution", "downsample.0").replace("shortcut.normalization", "downsample.1")
    rest = re.sub(r"layer\.(\d)\.convolution", lambda m: f"conv{int(m[1]) + 1}", rest)
    rest = re.sub(r"layer\.(\d)\.normalization", lambda m: f"bn{int(m[1]) + 1}", rest)
    return f"layer{int(stage) + 1}.{index}.{rest}"


def torchvision_names(blocks, bottleneck):
    """All names in the state_dict of a ResNet that torchvision publishes."""

    def norm(prefix):
        return [f"{prefix}.{x}" for x in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]

    names = ["conv1.weight", *norm("bn1"), "fc.weight", "fc.bias"]
    for stage, count in enumerate(blocks, 1):
        for block in range(count):
            prefix = f"layer{stage}.{block}"
            for conv in range(1, 4 if bottleneck else 3):
                names += [f"{prefix}.conv{conv}.weight", *norm(f"{prefix}.bn{conv}")]
            if block == 0 and (bottleneck or stage > 1):
                names += [f"{prefix}.downsample.0.weight", *norm(f"{prefix}.downsample.1")]
    return set(names)


def test_weights_in_torchvisions_names_agree_with_transformers(require, tmp_path):
    original = reference(
        require,
        tmp_path / "hf",
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[2, 2, 2, 2],
        layer_type="basic",
    )
    weights = {torchvision_name(k): v for k, v in original.state_dict().items()}
    assert weights.keys() == torchvision_names(*RESNETS["resnet18"])
    (tmp_path / "torchvision").mkdir()
    require("safetensors.torch").save_file(weights, tmp_path / "torchvision" / "model.safetensors")
    model = ResNet(*RESNETS["resnet18"])
    variables = load_image_tower(tmp_path / "torchvision", "resnet18", shapes(model), 32)
    images = random_images(2, 32)
    assert_agree(jax.jit(model.apply)(variables, images), features(original, images))


@pytest.mark.parametrize("name", RESNETS)
def test_the_number_of_parameters_is_the_published_one(name):
    params = shapes(ResNet(*RESNETS[name]))["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == PARAMETERS[name]


def tiny(**kwargs):
    return ResNet((1, 1), True, stem_width=4, **kwargs)


def test_four_devices_have_the_outputs_gradients_and_statistics_of_one_device():
    images = random_images(8, 16)
    variables = jax.jit(tiny().init)(jax.random.key(0), images)

    def run(model, images):
        def loss(params):
            inputs = {**variables, "params": params}
            outputs, updated = model.apply(inputs, images, train=True, mutable=["batch_stats"])
            return jnp.sum(jnp.sin(3 * outputs)), (outputs, updated["batch_stats"])

        grads, (outputs, stats) = jax.grad(loss, has_aux=True)(variables["params"])
        return outputs, stats, grads

    one = jax.jit(lambda x: run(tiny(), x))(images)
    four = jax.pmap(lambda x: run(tiny(axis_name="data"), x), "data")(images.reshape(4, 2, 16, 16, 3))
    # Of arrays with elements above 10, sums are rounded more coarsely.
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * max(np.abs(b).max(), 10.0), rtol=1e-4)
    near(four[0].reshape(one[0].shape), one[0])
    jax.tree.map(lambda many, one: [near(device, one) for device in many], four[1], one[1])
    jax.tree.map(lambda many, one: near(many.sum(0), one), four[2], one[2])


def test_running_statistics_move_a_tenth_of_the_way_to_those_of_the_batch():
    images = random_images(4, 16)
    variables = jax.jit(tiny().init)(jax.random.key(0), images)
    _, updated = jax.jit(lambda v, x: tiny().apply(v, x, train=True, mutable=["batch_stats"]))(variables, images)
    kernel = variables["params"]["conv1"]["kernel"]
    x = jax.lax.conv_general_dilated(
        images, kernel, (2, 2), ((3, 3), (3, 3)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    after = updated["batch_stats"]["bn1"]
    np.testing.assert_allclose(after["mean"], 0.1 * x.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(after["var"], 0.9 + 0.1 * x.var((0, 1, 2)), rtol=1e-5)


def test_bfloat16_is_close_to_float32_and_returns_float32():
    images = random_images(4, 32)
    variables = jax.jit(tiny().init)(jax.random.key(0), images)
    outputs = jax.jit(tiny(dtype=jnp.bfloat16).apply)(variables, images)
    assert outputs.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    expected = jax.jit(tiny().apply)(variables, images)
    assert float(jnp.linalg.norm(outputs - expected) / jnp.linalg.norm(expected)) < 0.02
