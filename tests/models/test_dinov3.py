"""DINOv3 compared with the PyTorch models of `transformers` and timm."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.networks import load_and_apply, random_images, randomise
from zslflax.errors import UserError
from zslflax.models.build import image_tower
from zslflax.models.vit import DINOV3, REGISTERS

SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8, "image_size": 40}
PARAMETERS = {  # of timm's models, whose queries and values have no biases
    "dinov3_s16": 21_586_944,
    "dinov3_s16_plus": 28_683_264,
    "dinov3_b16": 85_641_216,
    "dinov3_l16": 303_079_424,
    "dinov3_h16_plus": 840_509_440,
}


@pytest.fixture
def small(monkeypatch):
    """Makes two of the towers small."""
    for name in ("dinov3_s16", "dinov3_s16_plus"):
        monkeypatch.setitem(DINOV3, name, (8, 32, 3, 2))


def reference(require, folder, gated, **changes):
    """A small DINOv3 of `transformers`, saved in `folder`; all its parameters are random."""
    torch, transformers = require("torch"), require("transformers")
    own = {"use_gated_mlp": gated, "hidden_act": "silu" if gated else "gelu", "intermediate_size": 128}
    config = transformers.DINOv3ViTConfig(**SIZES | own | {"num_register_tokens": REGISTERS} | changes)
    torch.manual_seed(0)
    model = randomise(transformers.DINOv3ViTModel(config))
    model.save_pretrained(folder)
    return model


def pooled(tokens):
    """The output of each kind of pooling of tokens in the order class token, registers, patches."""
    cls, mean = tokens[:, 0], tokens[:, 1 + REGISTERS :].mean(1)
    return {"": cls, "mean": mean, "cls_mean": np.concatenate([cls, mean], axis=1)}


def assert_agree(ours, original):
    assert original.std(axis=0).max() > 0.05, "the output of the original hardly depends on the image"
    np.testing.assert_allclose(ours, original, rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(40,), (64,), (24, 56)])
@pytest.mark.parametrize("name", ["dinov3_s16", "dinov3_s16_plus"])
def test_agrees_with_transformers(require, tmp_path, small, name, size):
    original = reference(require, tmp_path, name.endswith("plus"))
    images = random_images(3, *size)
    torch = require("torch")
    with torch.no_grad():
        tokens = original(torch.tensor(images.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    for pool, expected in pooled(tokens).items():
        assert_agree(load_and_apply(tmp_path, name, images, pool), expected)


@pytest.mark.parametrize("biases", ["", "_qkvb"])
@pytest.mark.parametrize("name", ["dinov3_s16", "dinov3_s16_plus"])
def test_weights_in_timms_names_agree_with_timm(require, tmp_path, small, name, biases):
    torch = require("torch")
    # timm needs torchvision, of which PyPI has no wheel for the CPU build of PyTorch.
    timm = pytest.importorskip("timm", exc_type=ImportError)
    theirs = f"vit_small_{'plus_' if name.endswith('plus') else ''}patch16_dinov3{biases}"
    sizes = {"img_size": 40, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
    torch.manual_seed(0)
    original = randomise(timm.create_model(theirs, **sizes))
    require("safetensors.torch").save_file(original.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": theirs, "global_pool": "avg"}))
    for size in (40, 64):
        images = random_images(3, size)
        with torch.no_grad():
            tokens = original.forward_features(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
        for pool, expected in pooled(tokens).items():
            assert_agree(load_and_apply(tmp_path, name, images, pool), expected)


def test_weights_in_timms_names_without_biases_are_those_of_transformers_with_zeros(require, tmp_path, small):
    original, files = reference(require, tmp_path / "hf", False), require("safetensors.torch")
    torch = require("torch")
    weights = {}
    for name, value in files.load_file(tmp_path / "hf" / "model.safetensors").items():
        for old, new in (
            ("embeddings.patch_embeddings", "patch_embed.proj"),
            ("embeddings.cls_token", "cls_token"),
            ("embeddings.register_tokens", "reg_token"),
            ("layer.", "blocks."),
            ("attention.o_proj", "attn.proj"),
            ("mlp.up_proj", "mlp.fc1"),
            ("mlp.down_proj", "mlp.fc2"),
            ("layer_scale1.lambda1", "gamma_1"),
            ("layer_scale2.lambda1", "gamma_2"),
        ):
            name = name.replace(old, new)
        weights[name] = value
    weights.pop("embeddings.mask_token")
    for i in range(3):
        parts = [weights.pop(f"blocks.{i}.attention.{part}_proj.weight") for part in "qkv"]
        weights[f"blocks.{i}.attn.qkv.weight"] = torch.cat(parts)
        for part in "qv":
            weights.pop(f"blocks.{i}.attention.{part}_proj.bias")
    (tmp_path / "timm").mkdir()
    files.save_file(weights, tmp_path / "timm" / "model.safetensors")
    with torch.no_grad():
        for layer in original.model.layer:
            layer.attention.q_proj.bias.zero_()
            layer.attention.v_proj.bias.zero_()
        images = random_images(2, 40)
        expected = original(torch.tensor(images.transpose(0, 3, 1, 2))).pooler_output.numpy()
    assert_agree(load_and_apply(tmp_path / "timm", "dinov3_s16", images), expected)
    weights["blocks.0.attn.q_bias"] = torch.zeros(32)  # but not some of them alone
    files.save_file(weights, tmp_path / "timm" / "model.safetensors")
    with pytest.raises(UserError, match=r"not there \(5\): blocks.0.attn.v_bias, blocks.1.attn.q_bias"):
        load_and_apply(tmp_path / "timm", "dinov3_s16", images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 10.0}, "rope_theta 10.0, but dinov3_s16 here computes with 100.0"),
        ({"num_register_tokens": 2}, "num_register_tokens 2, but dinov3_s16 here computes with 4"),
        ({"key_bias": True}, "key_bias True, but dinov3_s16 here computes with False"),
        ({"use_gated_mlp": True}, "use_gated_mlp True, but dinov3_s16 here computes with False"),
    ],
)
def test_other_options_are_refused(require, tmp_path, small, change, message):
    reference(require, tmp_path, False, **change)
    with pytest.raises(UserError, match=message):
        load_and_apply(tmp_path, "dinov3_s16", random_images(1, 40))


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_number_of_parameters_is_the_published_one(name):
    model = image_tower(name, jnp.float32, None, False)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    biases = 2 * model.width * model.depth
    assert sum(x.size for x in jax.tree.leaves(params)) - biases == PARAMETERS[name]
