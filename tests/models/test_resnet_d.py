"""ResNet-D compared with a PyTorch network of the paper's parts, in timm's names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.networks import randomise_batch_norm
from zslflax.models.import_weights.layouts import TIMM_RESNET_D
from zslflax.models.import_weights.load import load_image_tower, load_variables
from zslflax.models.resnet import RESNET_DS, ResNet

STAGES = (1, 2, 1)
PARAMETERS = {  # of torchvision's ResNets without their classifier, and 19,232 more in the stem
    "resnet18d": 11_689_512 - 513_000 + 19_232,
    "resnet34d": 21_797_672 - 513_000 + 19_232,
    "resnet50d": 25_557_032 - 2_049_000 + 19_232,
    "resnet101d": 44_549_160 - 2_049_000 + 19_232,
}


def reference(torch):
    """A bottleneck ResNet-D with a stem of 16 channels and random weights; its modules have timm's names."""
    nn = torch.nn
    conv = lambda i, o, k, s=1: nn.Conv2d(i, o, k, s, k // 2, bias=False)

    class Bottleneck(nn.Module):
        def __init__(self, channels, width, stride):
            super().__init__()
            self.conv1, self.bn1 = conv(channels, width, 1), nn.BatchNorm2d(width)
            self.conv2, self.bn2 = conv(width, width, 3, stride), nn.BatchNorm2d(width)
            self.conv3, self.bn3 = conv(width, 4 * width, 1), nn.BatchNorm2d(4 * width)
            pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()
            shortcut = nn.Sequential(pool, conv(channels, 4 * width, 1), nn.BatchNorm2d(4 * width))
            self.downsample = shortcut if channels != 4 * width else nn.Identity()

        def forward(self, x):
            y = self.bn1(self.conv1(x)).relu()
            y = self.bn2(self.conv2(y)).relu()
            return (self.bn3(self.conv3(y)) + self.downsample(x)).relu()

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            relu = nn.ReLU()
            self.conv1 = nn.Sequential(
                *(conv(3, 8, 3, 2), nn.BatchNorm2d(8), relu),
                *(conv(8, 8, 3), nn.BatchNorm2d(8), relu, conv(8, 16, 3)),
            )
            self.bn1, channels = nn.BatchNorm2d(16), 16
            for i, blocks in enumerate(STAGES):
                layer = []
                for j in range(blocks):
                    layer.append(Bottleneck(channels, 16 * 2**i, 2 if i and not j else 1))
                    channels = 64 * 2**i
                setattr(self, f"layer{i + 1}", nn.Sequential(*layer))

        def forward(self, x):
            x = nn.functional.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1)
            for i in range(len(STAGES)):
                x = getattr(self, f"layer{i + 1}")(x)
            return x.mean((2, 3))

    torch.manual_seed(0)
    network = Network().eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            randomise_batch_norm(module)
    return network


def shapes(model, size=32):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


@pytest.mark.parametrize("size", [64, 70])  # the sides of 70 pixels become odd within the network
def test_agrees_with_the_network_in_pytorch(require, tmp_path, size):
    torch = require("torch")
    original = reference(torch)
    require("safetensors.torch").save_file(original.state_dict(), tmp_path / "model.safetensors")
    model = ResNet(STAGES, True, stem_width=16, deep=True)
    variables = load_variables(tmp_path, shapes(model), (TIMM_RESNET_D,))
    images = np.random.default_rng(0).normal(size=(3, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = original(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    assert wanted.std() > 0.05
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_number_of_parameters_is_that_of_the_paper(name):
    params = shapes(ResNet(*RESNET_DS[name], deep=True))["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == PARAMETERS[name]


def test_the_plain_resnet_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "resnet50"}')
    with pytest.raises(ValueError, match="architecture 'resnet50', but resnet50d here computes with 'resnet50d'"):
        load_image_tower(tmp_path, "resnet50d", {}, 224)
