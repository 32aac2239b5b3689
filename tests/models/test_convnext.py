"""ConvNeXt compared with Hugging Face's PyTorch model, with weights in its own names and in timm's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.open_clip import TIMM_CONVNEXT_NAMES
from tests.testing.published import rename
from zslflax.models.convnext import CONVNEXTS, ConvNeXt
from zslflax.models.import_weights.layouts import HF_CONVNEXT, TIMM_CONVNEXT
from zslflax.models.import_weights.load import load_image_tower, load_variables

DEPTHS, WIDTHS = (1, 2, 1, 1), (8, 16, 24, 32)
PARAMETERS = {  # of timm's models without their classifier of 1,000 classes
    "convnext_tiny": 28_589_128 - 769_000,
    "convnext_small": 50_223_688 - 769_000,
    "convnext_base": 88_591_464 - 1_025_000,
    "convnext_large": 197_767_336 - 1_537_000,
    "convnext_xlarge": 350_196_968 - 2_049_000,
    "convnext_xxlarge": 846_471_016 - 3_073_000,
}


def shapes(model, size=64):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


@pytest.mark.parametrize("names", ["hf", "timm"])
def test_agrees_with_transformers(require, tmp_path, names):
    torch, transformers = require("torch"), require("transformers")
    files = require("safetensors.torch")
    torch.manual_seed(0)
    config = transformers.ConvNextConfig(hidden_sizes=list(WIDTHS), depths=list(DEPTHS))
    original = transformers.ConvNextForImageClassification(config).eval()
    with torch.no_grad():
        for value in original.parameters():
            value.add_(torch.randn_like(value) * 0.2)
    original.save_pretrained(tmp_path)
    if names == "timm":
        renamed = rename(files.load_file(tmp_path / "model.safetensors"), TIMM_CONVNEXT_NAMES)
        assert not [name for name in renamed if "convnext" in name]
        files.save_file(renamed, tmp_path / "model.safetensors")
    model = ConvNeXt(DEPTHS, WIDTHS)
    variables = load_variables(tmp_path, shapes(model), (HF_CONVNEXT, TIMM_CONVNEXT))
    images = np.random.default_rng(0).normal(size=(3, 64, 70, 3)).astype(np.float32)
    with torch.no_grad():
        wanted = original.convnext(torch.tensor(images.transpose(0, 3, 1, 2))).pooler_output.numpy()
    assert wanted.std(axis=0).max() > 0.05
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_number_of_parameters_is_the_published_one(name):
    params = shapes(ConvNeXt(*CONVNEXTS[name]))["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == PARAMETERS[name]


def test_other_convnexts_are_refused_by_field(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "convnextv2_tiny"}')
    with pytest.raises(ValueError, match="architecture 'convnextv2_tiny', but convnext_tiny here computes with"):
        load_image_tower(tmp_path, "convnext_tiny", {}, 224)
