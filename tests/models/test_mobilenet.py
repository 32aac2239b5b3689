"""MobileNetV2 and EfficientNet-Lite compared with PyTorch models, under all names in which they are published."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.networks import random_images, randomise_batch_norm
from zslflax.models.import_weights.load import load_image_tower
from zslflax.models.mobilenet import MOBILENETS, MobileNet, Stage, Variant

PARAMETERS = {  # of torchvision's and timm's models without their classifier of 1,000 classes
    "mobilenet_v2": 3_504_872 - 1_281_000,
    "efficientnet_lite0": 4_652_008 - 1_281_000,
    "efficientnet_lite1": 5_416_680 - 1_281_000,
    "efficientnet_lite2": 6_092_072 - 1_281_000,
    "efficientnet_lite3": 8_197_096 - 1_281_000,
    "efficientnet_lite4": 13_006_568 - 1_281_000,
}


def randomise(torch, model):
    """Gives batch normalisation statistics and weights that matter, and keeps the activations from vanishing."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            randomise_batch_norm(module, bias=0.2)
        if isinstance(module, torch.nn.Conv2d):
            fan_in = module.weight[0].numel()
            torch.nn.init.normal_(module.weight, 0, (1.5 / fan_in) ** 0.5)
    return model.eval()


def original_mobilenet(torch):
    """MobileNetV2 with torchvision's names: each convolution and its normalisation are a sequence in a sequence."""
    nn = torch.nn

    def conv_norm(inputs, outputs, kernel=1, stride=1, groups=1):
        conv = nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())

    class Block(nn.Module):
        def __init__(self, inputs, outputs, stride, expansion):
            super().__init__()
            self.shortcut, hidden = stride == 1 and inputs == outputs, inputs * expansion
            project = nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
            expand = [conv_norm(inputs, hidden)] if expansion > 1 else []
            self.conv = nn.Sequential(*expand, conv_norm(hidden, hidden, 3, stride, hidden), *project)

        def forward(self, x):
            return x + self.conv(x) if self.shortcut else self.conv(x)

    class Original(nn.Module):
        def __init__(self):
            super().__init__()
            layers, inputs = [conv_norm(3, 32, 3, 2)], 32
            # Table 2 of Sandler et al. 2018: expansion, channels, blocks, stride of the first block.
            for expansion, outputs, blocks, stride in (
                (1, 16, 1, 1),
                (6, 24, 2, 2),
                (6, 32, 3, 2),
                (6, 64, 4, 2),
                (6, 96, 3, 1),
                (6, 160, 3, 2),
                (6, 320, 1, 1),
            ):
                for i in range(blocks):
                    layers.append(Block(inputs, outputs, stride if i == 0 else 1, expansion))
                    inputs = outputs
            self.features = nn.Sequential(*layers, conv_norm(320, 1280))
            self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

        def forward(self, x):
            return self.features(x).mean((2, 3))

    torch.manual_seed(0)
    return randomise(torch, Original())


def original_efficientnet(require, name, size):
    """The model of the package efficientnet_lite_pytorch; its padding is that of images of `size` pixels."""
    torch, package = require("torch"), require("efficientnet_lite_pytorch")
    torch.manual_seed(0)
    name = name.replace("_", "-")
    return randomise(torch, package.EfficientNet.from_name(name, image_size=size))


def save(require, model, folder, rename=lambda name: name):
    folder.mkdir(parents=True, exist_ok=True)
    weights = {rename(name): value.contiguous() for name, value in model.state_dict().items()}
    require("safetensors.torch").save_file(weights, folder / "model.safetensors")


def to_torch(images):
    import torch

    return torch.tensor(images.transpose(0, 3, 1, 2))


def features_of(original, images):
    """The pooled features that the original computes of NHWC images."""
    import torch

    with torch.no_grad():
        x = to_torch(images)
        return (original.extract_features(x).mean((2, 3)) if hasattr(original, "_conv_stem") else original(x)).numpy()


def shapes(model, size=32):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


def load_and_apply(folder, name, images):
    model = MobileNet(MOBILENETS[name])
    variables = load_image_tower(folder, name, shapes(model), images.shape[1])
    return jax.jit(model.apply)(variables, images)


def assert_agree(ours, original):
    assert original.std(axis=0).max() > 0.02, "the output of the original hardly depends on the image"
    np.testing.assert_allclose(ours, original, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [64, 75])  # an odd size shows how each side is padded
def test_mobilenet_v2_agrees_with_the_original(require, tmp_path, size):
    original = original_mobilenet(require("torch"))
    save(require, original, tmp_path)
    images = random_images(2, size)
    assert_agree(load_and_apply(tmp_path, "mobilenet_v2", images), features_of(original, images))


@pytest.mark.parametrize(
    ("name", "size"),
    [("efficientnet_lite0", 64), ("efficientnet_lite0", 75), ("efficientnet_lite3", 64), ("efficientnet_lite4", 48)],
)
def test_efficientnet_lite_agrees_with_the_original(require, tmp_path, name, size):
    original = original_efficientnet(require, name, size)
    save(require, original, tmp_path)
    images = random_images(2, size)
    assert_agree(load_and_apply(tmp_path, name, images), features_of(original, images))


def flat_name(name):
    """Converts torchvision's name of a MobileNetV2's weight to that of a flat sequence."""
    block = re.fullmatch(r"features\.(\d+)\.conv\.(.+)\.(\w+)", name)
    if not block:
        return name
    names = {"0.0": 0, "0.1": 1, "1.0": 3, "1.1": 4, "2": 6, "3": 7}
    if block[1] == "1":
        names = {"0.0": 0, "0.1": 1, "1": 3, "2": 4}
    return f"features.{block[1]}.conv.{names[block[2]]}.{block[3]}"


def test_mobilenet_v2_in_a_flat_sequences_names_agrees_with_the_original(require, tmp_path):
    original = original_mobilenet(require("torch"))
    save(require, original, tmp_path, lambda name: "net." + flat_name(name))
    images = random_images(2, 64)
    assert_agree(load_and_apply(tmp_path, "mobilenet_v2", images), features_of(original, images))


@pytest.mark.parametrize(
    ("ours", "theirs"), [("mobilenet_v2", "mobilenetv2_100"), ("efficientnet_lite0", "tf_efficientnet_lite0")]
)
def test_weights_in_timms_names_agree_with_timm(require, tmp_path, ours, theirs):
    torch = require("torch")
    # timm needs torchvision, of which PyPI has no wheel for the CPU build of PyTorch.
    timm = pytest.importorskip("timm", exc_type=ImportError)
    torch.manual_seed(0)
    original = randomise(torch, timm.create_model(theirs, num_classes=0))
    save(require, original, tmp_path)
    images = random_images(2, 75)
    assert_agree(load_and_apply(tmp_path, ours, images), features_of(original, images))


@pytest.mark.parametrize("name", MOBILENETS)
def test_the_number_of_parameters_is_the_published_one(name):
    params = shapes(MobileNet(MOBILENETS[name]))["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == PARAMETERS[name]


TINY = Variant((Stage(1, 3, 1, 1, 8), Stage(1, 3, 2, 2, 8)), 1e-3, True)


def tiny(**kwargs):
    return MobileNet(TINY, **kwargs)


def loss_and_gradients(model, variables, images):
    """Outputs in training mode, new statistics, and the gradient of a function of the outputs."""

    def loss(params):
        inputs = {**variables, "params": params}
        outputs, updated = model.apply(inputs, images, train=True, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(3 * outputs)), (outputs, updated["batch_stats"])

    grads, (outputs, stats) = jax.grad(loss, has_aux=True)(variables["params"])
    return outputs, stats, grads


def test_four_devices_have_the_outputs_gradients_and_statistics_of_one_device():
    images = random_images(8, 16)
    variables = jax.jit(tiny().init)(jax.random.key(0), images)
    one = jax.jit(lambda x: loss_and_gradients(tiny(), variables, x))(images)
    many = jax.pmap(lambda x: loss_and_gradients(tiny(axis_name="data"), variables, x), "data")
    four = many(images.reshape(4, 2, 16, 16, 3))
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4, rtol=1e-3)
    near(four[0].reshape(one[0].shape), one[0])
    jax.tree.map(lambda many, one: [near(device, one) for device in many], four[1], one[1])
    jax.tree.map(lambda many, one: near(many.sum(0), one), four[2], one[2])


def test_recomputed_activations_change_neither_outputs_nor_gradients():
    images = random_images(4, 16)
    variables = jax.jit(tiny().init)(jax.random.key(0), images)
    stored, recomputed = (
        jax.jit(lambda x, remat=remat: loss_and_gradients(tiny(remat=remat), variables, x))(images)
        for remat in (False, True)
    )
    # Some gradients are sums that cancel: their rounding is that of the largest ones, which are about 700.
    atol = 1e-6 * max(np.abs(x).max() for x in jax.tree.leaves(stored))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4), recomputed, stored)


def test_bfloat16_is_close_to_float32_and_returns_float32():
    images = random_images(4, 32)
    variables = jax.jit(tiny().init)(jax.random.key(0), images)
    outputs = jax.jit(tiny(dtype=jnp.bfloat16).apply)(variables, images)
    assert outputs.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    expected = jax.jit(tiny().apply)(variables, images)
    assert float(jnp.linalg.norm(outputs - expected) / jnp.linalg.norm(expected)) < 0.02
