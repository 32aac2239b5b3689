"""Each kind of image tower as ONNX: ONNX Runtime computes the same, from one file and by fast operations."""

import collections

import jax
import numpy as np
import pytest

from zslflax.inference import onnx_export
from zslflax.inference.onnx_export import export_function
from zslflax.models import fastvit
from zslflax.models.convnext import ConvNeXt
from zslflax.models.mobilenet import MobileNet, Stage, Variant
from zslflax.models.resnet import ResNet
from zslflax.models.resnet12 import ResNet12
from zslflax.models.vit import ViT

STAGES = (Stage(1, 3, 1, 1, 8), Stage(2, 5, 2, 2, 8))
TOWERS = {
    "resnet": ResNet((1, 1), bottleneck=False, stem_width=8),
    "resnet_small": ResNet((1, 1), bottleneck=True, stem_width=8, small=True),
    "resnet_d": ResNet((1, 1), bottleneck=True, stem_width=8, deep=True),
    "clip_resnet": ResNet((1, 1), bottleneck=True, stem_width=8, deep=True, heads=4),
    "resnet12": ResNet12((8, 8, 16, 16)),
    "mobilenet_v2": MobileNet(Variant(STAGES, 1e-5, tensorflow_padding=False)),
    "efficientnet_lite": MobileNet(Variant(STAGES, 1e-3, tensorflow_padding=True)),
    "convnext": ConvNeXt((1, 1), (8, 16)),
    "fastvit": fastvit.FastViT(fastvit.Variant((1, 1, 1), (16, 16, 32), 2, 1, activated=True, squeezed=True)),
    "vit": ViT(patch=8, width=16, depth=1, heads=2),
    "dinov2_reg": ViT(patch=8, width=16, depth=1, heads=2, layer_scale=True, registers=2),
    "siglip": ViT(patch=8, width=16, depth=1, heads=2, pool="map", class_token=False, hidden=24),
    "coca": ViT(patch=8, width=16, depth=1, heads=2, pool="query", pool_size=(4, 24), patch_bias=False, pre_norm=True),
}


def random_variables(tower, image):
    """Values that matter in every layer: scales and variances near 1, the rest normal by fan-in."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        if path[-1].key in ("scale", "var"):
            return rng.uniform(0.5, 1.5, x.shape).astype(np.float32)
        fan_in = np.prod(x.shape[:-1]) if x.ndim > 1 else 10
        return (rng.normal(size=x.shape) / np.sqrt(fan_in)).astype(np.float32)

    return jax.tree.map_with_path(draw, jax.eval_shape(tower.init, jax.random.key(0), image))


@pytest.mark.parametrize("name", TOWERS)
def test_onnx_runtime_computes_the_same_as_the_tower(require, tmp_path, name):
    require("jax2onnx")
    onnx = require("onnx")
    image = np.random.default_rng(1).normal(size=(3, 32, 32, 3)).astype(np.float32)
    variables = random_variables(TOWERS[name], image)
    path = tmp_path / "tower.onnx"
    export_function(lambda image: TOWERS[name].apply(variables, image), {"image": image}, "features", path)
    assert [file.name for file in tmp_path.iterdir()] == ["tower.onnx"]
    used = collections.Counter(node.op_type for node in onnx.load(path).graph.node)
    if isinstance(TOWERS[name], MobileNet):  # one operation each, and no sums of shifts
        assert used["Clip"] == 7 and not used["Max"] + used["Min"] + used["Slice"]
        assert used["Conv"] == 10
    if isinstance(TOWERS[name], ConvNeXt):
        assert used["Conv"] == 4


def test_weights_beyond_the_limit_of_a_file_are_in_a_second_one(require, tmp_path, monkeypatch):
    require("jax2onnx")
    image = np.random.default_rng(1).normal(size=(3, 32, 32, 3)).astype(np.float32)
    variables = random_variables(TOWERS["vit"], image)
    path, sizes = tmp_path / "tower.onnx", []
    monkeypatch.setattr(onnx_export, "MAX_WEIGHTS", 1_000)
    for _ in range(2):  # the second time over the first one's files
        export_function(lambda image: TOWERS["vit"].apply(variables, image), {"image": image}, "features", path)
        sizes.append({file.name: file.stat().st_size for file in tmp_path.iterdir()})
    assert sizes[0] == sizes[1] and sizes[0].keys() == {"tower.onnx", "tower.onnx.data"}
