"""DINOv2 with and without registers compared with the PyTorch models of `transformers` and timm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.networks import load_and_apply, random_images, randomise
from zslflax.config import default_config
from zslflax.errors import UserError
from zslflax.models.build import build_two_tower, image_tower
from zslflax.models.vit import DINOV2, ViT

PARAMETERS = {  # of timm's models, for images of 518 pixels
    "dinov2_s14": 22_056_192,
    "dinov2_b14": 86_579_712,
    "dinov2_l14": 304_367_616,
}


@pytest.fixture
def small(monkeypatch):
    """Makes dinov2_s14 small."""
    monkeypatch.setitem(DINOV2, "dinov2_s14", (14, 32, 3, 4))


def reference(require, folder, registers, **changes):
    """A small DINOv2 of `transformers` for 70 pixels, saved in `folder`; all its parameters are random."""
    torch, transformers = require("torch"), require("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 14, "image_size": 70}
    sizes |= changes
    torch.manual_seed(0)
    if registers:
        config = transformers.Dinov2WithRegistersConfig(num_register_tokens=4, **sizes)
        model = transformers.Dinov2WithRegistersForImageClassification(config)
    else:
        model = transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**sizes))
    randomise(model).save_pretrained(folder)
    return model.dinov2_with_registers if registers else model.dinov2


def tokens(model, images):
    """All tokens that the original computes of NHWC images, after the last norm."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(images.transpose(0, 3, 1, 2))).last_hidden_state.numpy()


def pooled(tokens, registers):
    """The output of each kind of pooling of tokens in the order class token, registers, patches."""
    cls, mean = tokens[:, 0], tokens[:, 1 + registers :].mean(1)
    return {"": cls, "cls": cls, "mean": mean, "cls_mean": np.concatenate([cls, mean], axis=1)}


def assert_agree(ours, original):
    assert original.std(axis=0).max() > 0.05, "the output of the original hardly depends on the image"
    np.testing.assert_allclose(ours, original, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [70, 98, 56])
@pytest.mark.parametrize("registers", [0, 4])
def test_agrees_with_transformers(require, tmp_path, small, registers, size):
    original = reference(require, tmp_path, registers)
    images = random_images(3, size)
    name = "dinov2_s14_reg" if registers else "dinov2_s14"
    assert_agree(load_and_apply(tmp_path, name, images), tokens(original, images)[:, 0])


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("pool", ["", "cls", "mean", "cls_mean"])
def test_each_pool_agrees_with_transformers(require, tmp_path, small, registers, pool):
    original = reference(require, tmp_path, registers)
    images = random_images(3, 70)
    name = "dinov2_s14_reg" if registers else "dinov2_s14"
    assert_agree(load_and_apply(tmp_path, name, images, pool), pooled(tokens(original, images), registers)[pool])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("dinov2_s14", "vit_small_patch14_dinov2"), ("dinov2_s14_reg", "vit_small_patch14_reg4_dinov2")],
)
@pytest.mark.parametrize("size", [70, 98])
def test_weights_in_timms_names_agree_with_timm(require, tmp_path, small, ours, theirs, size):
    torch = require("torch")
    # timm needs torchvision, of which PyPI has no wheel for the CPU build of PyTorch.
    timm = pytest.importorskip("timm", exc_type=ImportError)
    sizes = {"embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 0, "dynamic_img_size": True}
    torch.manual_seed(0)
    original = randomise(timm.create_model(theirs, img_size=70, **sizes))
    require("safetensors.torch").save_file(original.state_dict(), tmp_path / "model.safetensors")
    images = random_images(3, size)
    with torch.no_grad():
        wanted = original.forward_features(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
    for pool, expected in pooled(wanted, 4 if ours.endswith("_reg") else 0).items():
        assert_agree(load_and_apply(tmp_path, ours, images, pool), expected)


def test_swiglu_is_refused(require, tmp_path, small):
    reference(require, tmp_path, 0, use_swiglu_ffn=True)
    with pytest.raises(UserError, match="use_swiglu_ffn True, but dinov2_s14 here computes with False"):
        load_and_apply(tmp_path, "dinov2_s14", random_images(1, 70))


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_number_of_parameters_is_the_published_one(name):
    for suffix, registers in (("", 0), ("_reg", 4)):
        model = image_tower(name + suffix, jnp.float32, None, False)
        params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 518, 518, 3)))["params"]
        expected = PARAMETERS[name] + registers * model.width
        assert sum(x.size for x in jax.tree.leaves(params)) == expected


@pytest.mark.parametrize("pool", ["mean", "cls_mean"])
def test_bfloat16_and_recomputed_activations_are_close_to_float32(pool):
    images = random_images(4, 28)
    model = ViT(14, 32, 2, 4, layer_scale=True, registers=4, pool=pool)
    variables = jax.jit(model.init)(jax.random.key(0), images)
    trained = lambda path, x: jnp.full_like(x, 0.5) if "layer_scale" in jax.tree_util.keystr(path) else x
    variables = jax.tree_util.tree_map_with_path(trained, variables)  # at first, layer scales hide the blocks
    expected = jax.jit(model.apply)(variables, images)
    assert expected.shape == (4, 64 if pool == "cls_mean" else 32)
    outputs = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(variables, images)
    assert outputs.dtype == jnp.float32
    assert float(jnp.linalg.norm(outputs - expected) / jnp.linalg.norm(expected)) < 0.02
    loss = lambda model: jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(model.apply(v, images)))))(variables)
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
    jax.tree.map(near, loss(model.clone(remat=True)), loss(model))


def test_the_config_gives_the_pool_and_unknown_pools_are_refused(small):
    config = default_config().model
    config.image.name, config.image.size, config.image.pool = "dinov2_s14_reg", 28, "cls_mean"
    tower = build_two_tower(config).image.tower
    assert tower == ViT(14, 32, 3, 4, layer_scale=True, registers=4, pool="cls_mean")
    config.image.pool = "max"
    with pytest.raises(UserError, match="pool is 'max'; expected of dinov2_s14_reg \"\" or one of cls, mean"):
        build_two_tower(config)
    config.image.name, config.image.pool = "resnet50", "mean"
    with pytest.raises(UserError, match="model.image.pool is 'mean'; expected of resnet50 \"\": it has one way"):
        build_two_tower(config)
