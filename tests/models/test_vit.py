"""Vision transformers compared with Hugging Face's PyTorch model, with weights in its own names and in timm's."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.networks import random_images, randomise
from tests.testing.training import make_config
from zslflax.errors import UserError
from zslflax.models.build import build_classifier, build_two_tower
from zslflax.models.import_weights.load import load_image_tower, load_variables
from zslflax.models.import_weights.positions import resize_positions
from zslflax.models.import_weights.transformer_layouts import HF_VIT, TIMM_VIT
from zslflax.models.vit import VITS, ViT, interpolate_positions, kept_patches

PATCH, WIDTH, DEPTH, HEADS = 8, 32, 3, 4
PARAMETERS = {  # of timm's models for 224 pixels without their classifier of 1,000 classes
    "vit_ti16": 5_717_416 - 193_000,
    "vit_s16": 22_050_664 - 385_000,
    "vit_b16": 86_567_656 - 769_000,
    "vit_b32": 88_224_232 - 769_000,
}


def reference(require, folder, size, eps=1e-6):
    """A small ViT of `transformers`, saved in `folder`; all its parameters are random."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        patch_size=PATCH,
        image_size=size,
        layer_norm_eps=eps,
    )
    model = randomise(transformers.ViTForImageClassification(config))
    model.save_pretrained(folder)
    return model


def features(model, images, **kwargs):
    """The class token that the original computes of NHWC images, after the last norm."""
    import torch

    with torch.no_grad():
        outputs = model.vit(torch.tensor(images.transpose(0, 3, 1, 2)), **kwargs)
    return outputs.last_hidden_state[:, 0].numpy()


def small(**kwargs):
    return ViT(PATCH, WIDTH, DEPTH, HEADS, **kwargs)


def shapes(model, size):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


def load_vit(folder, size):
    resize = lambda table, layout: resize_positions(table, size // PATCH)
    return load_variables(folder, shapes(small(), size), (TIMM_VIT, HF_VIT), {("position",): resize})


def assert_agree(ours, original):
    assert original.std(axis=0).max() > 0.05, "the output of the original hardly depends on the image"
    np.testing.assert_allclose(ours, original, rtol=0, atol=1e-4)


@pytest.mark.parametrize("eps", [1e-6, 1e-12])
def test_agrees_with_transformers(require, tmp_path, eps):
    original = reference(require, tmp_path, 32, eps)
    images = random_images(3, 32)
    variables = load_vit(tmp_path, 32)
    assert_agree(jax.jit(small(eps=eps).apply)(variables, images), features(original, images))


def timm_weights(torch, original):
    """The weights of a model of `transformers` under timm's names."""
    names = {
        r"vit\.embeddings\.cls_token": "cls_token",
        r"vit\.embeddings\.position_embeddings": "pos_embed",
        r"vit\.embeddings\.patch_embeddings\.projection": "patch_embed.proj",
        r"vit\.encoder\.layer\.": "blocks.",
        r"layernorm_before": "norm1",
        r"layernorm_after": "norm2",
        r"vit\.layernorm": "norm",
        r"attention\.output\.dense": "attn.proj",
        r"intermediate\.dense": "mlp.fc1",
        r"output\.dense": "mlp.fc2",
        r"classifier": "head",
    }
    weights = {}
    published = original_names(original)
    for name, value in published.items():
        for old, new in names.items():
            name = re.sub(old, new, name)
        weights[name] = value
    for i in range(DEPTH):
        for leaf in ("weight", "bias"):
            parts = [weights.pop(f"blocks.{i}.attention.attention.{x}.{leaf}") for x in ("query", "key", "value")]
            weights[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat(parts)
    return weights


def original_names(original):
    """The weights under the names that save_pretrained writes, which may differ from those of the classes."""
    import tempfile

    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        original.save_pretrained(folder)
        return load_file(f"{folder}/model.safetensors")


def timm_names(depth):
    block = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    modules = [
        "patch_embed.proj",
        *(f"blocks.{i}.{part}" for i in range(depth) for part in block),
        "norm",
        "head",
    ]
    return {
        "cls_token",
        "pos_embed",
        *(f"{module}.{leaf}" for module in modules for leaf in ("weight", "bias")),
    }


def test_weights_in_timms_names_agree_with_transformers(require, tmp_path):
    original = reference(require, tmp_path / "hf", 32)
    weights = timm_weights(require("torch"), original)
    assert weights.keys() == timm_names(DEPTH)
    (tmp_path / "timm").mkdir()
    require("safetensors.torch").save_file(weights, tmp_path / "timm" / "model.safetensors")
    images = random_images(3, 32)
    assert_agree(jax.jit(small().apply)(load_vit(tmp_path / "timm", 32), images), features(original, images))


def test_vit_ti16_agrees_with_transformers(require, tmp_path):
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        layer_norm_eps=1e-6,
    )
    original = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        original.vit.embeddings.position_embeddings.normal_()
        original.vit.embeddings.cls_token.normal_()
    original.save_pretrained(tmp_path)
    model = ViT(*VITS["vit_ti16"])
    variables = load_image_tower(tmp_path, "vit_ti16", shapes(model, 224), 224)
    images = random_images(1, 224)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images), features(original, images), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (14, 24), (7, 4), (14, 7), (5, 1)])
def test_positions_are_resized_as_in_timm(require, old, new):
    torch = require("torch")
    table = np.random.default_rng(0).normal(size=(1, 1 + old**2, 6)).astype(np.float32)
    grid = torch.tensor(table[:, 1:].reshape(1, old, old, 6)).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
    resized = resize_positions(table, new)
    np.testing.assert_array_equal(resized[:, 0], table[:, 0])
    grid = resized[:, 1:].reshape(1, new, new, 6).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(grid, wanted.numpy(), rtol=1e-6, atol=2e-6)


def test_positions_of_the_same_size_are_unchanged():
    table = np.random.default_rng(0).normal(size=(1, 17, 6)).astype(np.float32)
    assert resize_positions(table, 4) is table


@pytest.mark.parametrize(("old", "new"), [(37, 16), (4, 7), (7, 4), (5, 1)])
def test_positions_without_antialiasing_are_resized_as_in_pytorch(require, old, new):
    torch = require("torch")
    table = np.random.default_rng(0).normal(size=(1, 1 + old**2, 6)).astype(np.float32)
    grid = torch.tensor(table[:, 1:].reshape(1, old, old, 6)).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, (new, new), mode="bicubic", align_corners=False)
    grid = resize_positions(table, new, antialias=False)[:, 1:].reshape(1, new, new, 6).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(grid, wanted.numpy(), rtol=1e-6, atol=2e-6)


def test_a_class_token_without_a_position_gets_zeros():
    table = np.random.default_rng(0).normal(size=(1, 16, 6)).astype(np.float32)
    resized = resize_positions(table, 4)
    np.testing.assert_array_equal(resized, np.concatenate([np.zeros((1, 1, 6)), table], axis=1))


def test_positions_that_form_no_square_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 15, 6\).*square"):
        resize_positions(np.zeros((1, 15, 6), np.float32), 4)


def test_another_resolution_agrees_with_transformers_on_smooth_positions(require, tmp_path):
    # transformers interpolates with another cubic kernel (a = −0.75, no antialiasing). On linear ramps the two differ
    # only at the edges of the grid.
    torch = require("torch")
    original = reference(require, tmp_path, 64)
    ramp = torch.arange(8.0) - 3.5
    with torch.no_grad():
        directions = torch.randn(2, WIDTH) * 0.05
        grid = ramp[:, None, None] * directions[0] + ramp[None, :, None] * directions[1]
        original.vit.embeddings.position_embeddings[0, 1:] = grid.reshape(64, WIDTH)
    original.save_pretrained(tmp_path)
    images = random_images(3, 96)
    variables = load_vit(tmp_path, 96)
    theirs = features(original, images, interpolate_pos_encoding=True)
    apply = jax.jit(small().apply)
    np.testing.assert_allclose(apply(variables, images), theirs, atol=2e-3)
    grid = variables["params"]["position"][:, 1:].reshape(1, 12, 12, WIDTH).swapaxes(1, 2).reshape(1, 144, WIDTH)
    variables["params"]["position"][:, 1:] = grid
    assert np.abs(apply(variables, images) - theirs).max() > 1e-2  # transposed positions would be noticed


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_number_of_parameters_is_the_published_one(name):
    params = shapes(ViT(*VITS[name]), 224)["params"]
    assert sum(x.size for x in jax.tree.leaves(params)) == PARAMETERS[name]


def test_an_image_that_patches_do_not_fill_is_refused():
    with pytest.raises(ValueError, match="36 × 36 pixels: expected multiples of the patch's 8.*model.image.size"):
        shapes(small(), 36)


def test_the_mean_of_the_patches_is_taken_before_or_after_the_last_norm():
    images, weights = random_images(2, 32), {}
    variables = jax.jit(small(pool="mean").init)(jax.random.key(0), images)
    for name, x in variables["params"]["norm"].items():
        weights[name] = variables["params"]["norm"][name] = x + random_images(1, 1, WIDTH)[0, 0, :, 0]
    output, found = small(pool="mean", mean_first=True).apply(variables, images, capture_intermediates=True)
    [tokens] = found["intermediates"][f"block_{DEPTH - 1}"]["__call__"]
    normed = lambda x: (x - x.mean(-1, keepdims=True)) / x.std(-1, keepdims=True) * weights["scale"] + weights["bias"]
    np.testing.assert_allclose(output, normed(np.asarray(tokens)[:, 1:].mean(axis=1)), rtol=0, atol=1e-4)
    after = small(pool="mean").apply(variables, images)
    np.testing.assert_allclose(after, normed(np.asarray(tokens)[:, 1:]).mean(axis=1), rtol=0, atol=1e-4)
    assert np.abs(after - output).max() > 0.05
    both = small(pool="cls_mean", mean_first=True).apply(variables, images)
    np.testing.assert_allclose(both, np.concatenate([normed(np.asarray(tokens)[:, 0]), output], 1), rtol=0, atol=1e-4)


def test_a_query_of_another_width_attends_as_in_pytorch(require):
    torch = require("torch")
    torch.manual_seed(0)
    width, images = 12, random_images(3, 32)
    tower = small(pool="query", pool_size=(4, width), eps=1e-5)
    variables = jax.jit(tower.init)(jax.random.key(0), images)
    query, heads = (
        torch.randn(1, width),
        torch.nn.MultiheadAttention(width, 4, kdim=WIDTH, vdim=WIDTH, batch_first=True),
    )
    parts = torch.nn.ModuleList([heads, *(torch.nn.LayerNorm(w) for w in (width, WIDTH, width))])
    attention, query_norm, norm, last_norm = randomise(parts)
    array = lambda x: jnp.asarray(x.detach().numpy())
    of_norm = lambda module: {"scale": array(module.weight), "bias": array(module.bias)}
    names = {name: {"kernel": array(getattr(attention, f"{name}_proj_weight")).T} for name in "qkv"}
    out = {"kernel": array(attention.out_proj.weight).T, "bias": array(attention.out_proj.bias)}
    pool = {"query": array(query), "bias": array(attention.in_proj_bias), "out": out}
    pool |= names | {"query_norm": of_norm(query_norm), "norm": of_norm(norm)}
    params = variables["params"] | {"pool": pool, "norm": of_norm(last_norm)}
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, variables["params"])
    output, found = tower.apply({"params": params}, images, capture_intermediates=True)
    [tokens] = found["intermediates"][f"block_{DEPTH - 1}"]["__call__"]
    with torch.no_grad():
        keys = norm(torch.tensor(np.asarray(tokens)))
        expected = last_norm(attention(query_norm(query).expand(3, 1, width), keys, keys)[0][:, 0]).numpy()
    assert_agree(output, expected)


def test_bfloat16_is_close_to_float32():
    images = random_images(4, 32)
    variables = jax.jit(small().init)(jax.random.key(0), images)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    outputs = jax.jit(small(dtype=jnp.bfloat16).apply)(variables, images)
    expected = jax.jit(small().apply)(variables, images)
    assert outputs.dtype == jnp.float32
    assert float(jnp.linalg.norm(outputs - expected) / jnp.linalg.norm(expected)) < 0.02


def test_positions_are_interpolated_for_images_of_another_size():
    """As a model of that size with the published way to resize its table; the class token's stays."""
    large, images = random_images(2, 32), random_images(2, 16)
    variables, apply = jax.jit(small().init)(jax.random.key(0), large), jax.jit(small().apply)
    table = variables["params"]["position"]
    resized = {**variables["params"], "position": jnp.asarray(resize_positions(np.asarray(table), 2))}
    np.testing.assert_allclose(apply(variables, images), apply({"params": resized}, images), atol=1e-5)
    grads = jax.jit(jax.grad(lambda variables: jnp.sum(small().apply(variables, images)[:, 0])))(variables)
    assert np.all(np.abs(grads["params"]["position"]).max(axis=-1) > 0)  # of all patches of the larger image
    np.testing.assert_array_equal(interpolate_positions(table, (4, 4)), table)
    assert interpolate_positions(table, (2, 6)).shape == (1, 13, WIDTH)


def test_training_drops_a_share_of_the_patches_of_each_image_at_random():
    t, share = 16, 0.6
    kept = kept_patches(2, t, share, jax.random.key(0))
    assert kept.shape == (2, 7)  # 16 − ⌊9.6⌋
    for i in range(2):
        assert set(kept[i].tolist()) < set(range(t)) and (np.diff(kept[i]) > 0).all()
    assert (kept[0] != kept[1]).any()  # another draw for each image
    draws = [kept_patches(2, t, share, jax.random.key(i))[0] for i in range(400)]
    counts = np.bincount(np.concatenate(draws), minlength=t) / 400
    np.testing.assert_allclose(counts, 7 / 16, atol=0.1)  # 4 standard deviations


def test_dropped_patches_do_not_reach_the_output_and_evaluation_sees_all():
    images = random_images(2, 32)
    model, key = small(patch_drop=0.75), jax.random.key(1)
    variables = small().init(jax.random.key(0), images)
    apply = lambda images: model.apply(variables, images, train=True, rngs={"dropout": key})

    weights = np.random.default_rng(1).normal(
        size=(2, WIDTH)
    )  # a plain sum over the output of a layer norm is constant
    reached = np.abs(jax.grad(lambda x: jnp.sum(weights * apply(x)))(images)).sum(axis=-1)
    patches = reached.reshape(2, 4, PATCH, 4, PATCH).sum(axis=(2, 4)).reshape(2, 16)
    np.testing.assert_array_equal((patches > 0).sum(axis=1), [4, 4])
    np.testing.assert_array_equal(model.apply(variables, images), small().apply(variables, images))
    assert small(patch_drop=0.0).apply(variables, images, train=True).shape == (2, WIDTH)  # needs no random key


def test_only_a_vit_takes_the_field():
    config = make_config(model__image__name="vit_nano4", model__image__patch_drop=0.5)
    model = build_two_tower(config.model)
    assert model.image.tower.patch_drop == 0.5
    config.model.image.name = "resnet_nano"
    with pytest.raises(UserError, match="patch_drop is 0.5, but resnet_nano has no patches"):
        build_two_tower(config.model)


def test_a_classifier_takes_it_as_two_towers_do():
    config = make_config(model__image__name="vit_nano4", model__image__patch_drop=0.5, model__class_names=("a", "b"))
    assert build_classifier(config.model).image.tower.patch_drop == 0.5
    config.model.image.name = "resnet_nano"
    with pytest.raises(UserError, match="patch_drop is 0.5, but resnet_nano has no patches"):
        build_classifier(config.model)
