"""Rotary positions of patches, against transformers and loops, and what rotations leave alone."""

import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.networks import random_images, randomise
from tests.testing.runs import read_metrics
from zslflax.config_checks import validate
from zslflax.models.import_weights import timm_towers
from zslflax.models.import_weights.architecture import read_architecture
from zslflax.models.import_weights.image_architecture import vit_architecture
from zslflax.models.import_weights.load import load_image_tower, load_variables
from zslflax.models.import_weights.transformer_layouts import dinov3_layouts
from zslflax.models.vit import DINOV3, DINOV3_ROTARY, Rotary, ViT
from zslflax.training.loop import train

PATCH, WIDTH, DEPTH, HEADS = 8, 32, 2, 2
ROTARY = {"eva02": Rotary(span=16.0), "pe": Rotary(span=24.0, anchor=1.0), "dinov3": DINOV3_ROTARY}


def small(**fields):
    return ViT(PATCH, WIDTH, DEPTH, HEADS, **{"table": False, "rotary": DINOV3_ROTARY} | fields)


def random_variables(model, images):
    """Variables whose rotations matter: the attentions and the layer scales are large."""
    variables = jax.jit(model.init)(jax.random.key(0), images)
    return jax.tree.map(lambda x: x + 0.3 * jax.random.normal(jax.random.key(x.size), x.shape), variables)


def rotation_of_blocks(model, variables, images, **kwargs):
    """What the first block gets: its tokens, and cosines and sines."""
    found = []

    def record(next_method, args, kwargs, context):
        if context.module.name == "block_0" and context.method_name == "__call__":
            found.append(args)
        return next_method(*args, **kwargs)

    with nn.intercept_methods(record):
        model.apply(variables, images, **kwargs)
    return found[0]


@pytest.mark.parametrize("family", ROTARY)
def test_angles_are_those_of_a_loop_over_patches_and_frequencies(family):
    rows, columns, width = 3, 5, 16
    angles = np.zeros((rows * columns, width // 2))
    for row in range(rows):
        for column in range(columns):
            for axis, (i, n) in enumerate(((row, rows), (column, columns))):
                position = {
                    "eva02": i * 16 / n,
                    "pe": (i + 1) * 24 / n,
                    "dinov3": 2 * math.pi * (2 * (i + 0.5) / n - 1),
                }[family]
                for j in range(width // 4):
                    base = 100 if family == "dinov3" else 10_000
                    angles[row * columns + column, axis * width // 4 + j] = position / base ** (j / (width // 4))
    np.testing.assert_allclose(ROTARY[family].angles((rows, columns), width), angles, rtol=1e-5, atol=1e-5)


def test_without_a_class_token_only_differences_of_positions_matter():
    images = random_images(2, 24, 40)
    apply = lambda variables, rotary, **fields: jax.jit(small(rotary=rotary, **fields).apply)(variables, images)
    for class_token, pool in ((False, "mean"), (True, "cls")):
        fields = {"class_token": class_token, "pool": pool}
        variables = random_variables(small(**fields), images)
        first = apply(variables, DINOV3_ROTARY, **fields)
        shifted = apply(variables, DINOV3_ROTARY._replace(anchor=3.0), **fields)
        longer = apply(variables, DINOV3_ROTARY._replace(span=2.0), **fields)
        assert (np.abs(shifted - first).max() < 1e-4) is not class_token  # which is not turned
        assert np.abs(longer - first).max() > 1e-3


def test_angles_follow_the_patches_that_training_keeps():
    images = random_images(3, 32)
    model = small(registers=2, patch_drop=0.5)
    variables = random_variables(model, images)
    whole, (whole_cos, whole_sin) = rotation_of_blocks(model, variables, images)
    tokens, (cos, sin) = rotation_of_blocks(model, variables, images, train=True, rngs={"dropout": jax.random.key(1)})
    assert tokens.shape == (3, 3 + 8, WIDTH) and cos.shape == (3, 3 + 8, 1, WIDTH // HEADS // 2)
    assert (cos[:, :3] == 1).all() and (sin[:, :3] == 0).all()  # class token and registers
    for i in range(3):
        same = np.abs(whole[i, None, 3:] - tokens[i, 3:, None]).max(axis=-1) == 0  # (kept, patches)
        assert (same.sum(axis=1) == 1).all()
        kept = 3 + same.argmax(axis=1)
        np.testing.assert_array_equal(cos[i, 3:], whole_cos[0, kept])
        np.testing.assert_array_equal(sin[i, 3:], whole_sin[0, kept])


@pytest.mark.parametrize("fields", [{"key_bias": False}, {"gated": True, "activation": "silu", "inner_norm": True}])
def test_bfloat16_and_recomputed_activations_are_close_to_float32(fields):
    images = random_images(2, 24)
    model = small(layer_scale=True, registers=2, **fields)
    variables = random_variables(model, images)
    expected = jax.jit(model.apply)(variables, images)
    outputs = jax.jit(model.clone(dtype=jnp.bfloat16).apply)(variables, images)
    assert float(jnp.linalg.norm(outputs - expected) / jnp.linalg.norm(expected)) < 0.03
    loss = lambda model: jax.jit(jax.grad(lambda v: jnp.sum(jnp.sin(model.apply(v, images)))))(variables)
    near = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)
    grads = loss(model)
    jax.tree.map(near, loss(model.clone(remat=True)), grads)
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(grads["params"]["block_0"]))


def test_pe_core_agrees_with_the_image_tower_of_llama_4(require, monkeypatch, tmp_path):
    """It has the same blocks and rotations; here its patches are compared before PE-Core's attention pool."""
    torch, transformers = require("torch"), require("transformers")
    monkeypatch.setitem(timm_towers.EVA_SIZES, "vit_pe_core", {"base": (WIDTH, DEPTH, HEADS, 4 * WIDTH)})
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "image_size": 40}
    sizes |= {"intermediate_size": 4 * WIDTH, "patch_size": PATCH, "vision_output_dim": WIDTH}
    torch.manual_seed(0)
    original = transformers.models.llama4.modeling_llama4.Llama4VisionModel(transformers.Llama4VisionConfig(**sizes))
    original.vision_adapter = torch.nn.Identity()
    randomise(original)
    found = original.state_dict()
    weights = {
        "patch_embed.proj.weight": found["patch_embedding.linear.weight"].reshape(WIDTH, 3, PATCH, PATCH),
        "cls_token": found["class_embedding"][None, None],
        "pos_embed": found["positional_embedding_vlm"].roll(1, 0)[None],  # there, the class token is the last
    }
    for leaf in ("weight", "bias"):
        weights[f"norm_pre.{leaf}"], weights[f"norm.{leaf}"] = (found[f"layernorm_{x}.{leaf}"] for x in ("pre", "post"))
        for i in range(DEPTH):
            ours, theirs = f"blocks.{i}", f"model.layers.{i}"
            parts = [found[f"{theirs}.self_attn.{part}_proj.{leaf}"] for part in "qkv"]
            weights[f"{ours}.attn.qkv.{leaf}"] = torch.cat(parts)
            for new, old in (
                ("attn.proj", "self_attn.o_proj"),
                ("mlp.fc1", "mlp.fc1"),
                ("mlp.fc2", "mlp.fc2"),
                ("norm1", "input_layernorm"),
                ("norm2", "post_attention_layernorm"),
            ):
                weights[f"{ours}.{new}.{leaf}"] = found[f"{theirs}.{old}.{leaf}"]
    weights = {f"visual.trunk.{name}": x.contiguous() for name, x in weights.items()}
    require("safetensors.torch").save_file(weights, tmp_path / "open_clip_model.safetensors")
    vision = {"timm_model_name": f"vit_pe_core_base_patch{PATCH}_40", "timm_pool": "map", "timm_proj": None}
    model = {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    tower = ViT(**vit_architecture(read_architecture(tmp_path)) | {"pool": "mean"})
    images = random_images(3, 40)
    with torch.no_grad():
        tokens = original(torch.tensor(images.transpose(0, 3, 1, 2))).last_hidden_state
    expected = tokens.reshape(3, 25, WIDTH).mean(1).numpy()
    assert expected.std(axis=0).max() > 0.05
    shapes = jax.eval_shape(tower.init, jax.random.key(0), images)
    ours = jax.jit(tower.apply)(load_image_tower(tmp_path, "", shapes, 40), images)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_norms_before_the_last_layers_agree_with_pytorch(require, tmp_path):
    """As in EVA-02: layer norms are put before the last linear layers of transformers' DINOv3."""
    torch, transformers = require("torch"), require("transformers")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "image_size": 40}
    sizes |= {"intermediate_size": 72, "patch_size": PATCH, "use_gated_mlp": True, "hidden_act": "silu"}
    torch.manual_seed(0)
    original = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**sizes, num_register_tokens=2))
    for layer in original.model.layer:
        norm = lambda width: torch.nn.LayerNorm(width, eps=1e-5)
        layer.attention.o_proj = torch.nn.Sequential(norm(WIDTH), layer.attention.o_proj)
        layer.mlp.down_proj = torch.nn.Sequential(norm(72), layer.mlp.down_proj)
    randomise(original)
    weights = {}
    for name, value in original.state_dict().items():
        for last in ("o_proj", "down_proj"):
            name = name.replace(f"{last}.0", "norm").replace(f"{last}.1", last)
        weights[name.removeprefix("model.")] = value
    require("safetensors.torch").save_file(weights, tmp_path / "model.safetensors")
    fields = {"layer_scale": True, "registers": 2, "hidden": 72, "activation": "silu", "gated": True, "eps": 1e-5}
    tower, images = small(key_bias=False, inner_norm=True, **fields), random_images(3, 40)
    shapes = jax.eval_shape(tower.init, jax.random.key(0), images)
    with torch.no_grad():
        expected = original(torch.tensor(images.transpose(0, 3, 1, 2))).pooler_output.numpy()
    assert expected.std(axis=0).max() > 0.05
    ours = jax.jit(tower.apply)(load_variables(tmp_path, shapes, dinov3_layouts(gated=True)), images)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_a_run_trains_such_a_tower(monkeypatch, tiny_config, tmp_path):
    monkeypatch.setitem(DINOV3, "dinov3_s16_plus", (PATCH, WIDTH, DEPTH, HEADS))
    c = tiny_config
    c.model.image.update(name="dinov3_s16_plus", size=32, patch_drop=0.5, remat=True)
    c.steps = 1
    validate(c)
    train(c, tmp_path / "run")
    assert np.isfinite(read_metrics(tmp_path / "run")[-1]["train/loss"])
