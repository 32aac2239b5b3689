"""The layers between a tower and the joint space: a linear one, a perceptron, or none."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from zslflax.config import default_config
from zslflax.errors import UserError
from zslflax.models.build import build_two_tower
from zslflax.training.forward import embed

INPUTS = (
    np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8),
    np.arange(18, dtype=np.int32).reshape(3, 6),
    np.ones((3, 6), bool),
)


def model_config(image="linear", text="linear", embed_dim=16, **projection):
    config = default_config().model
    config.embed_dim, config.image.name, config.image.size = embed_dim, "vit_nano4", 8
    config.image.projection, config.text.projection, config.text.max_tokens = image, text, 6
    config.text.scratch = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 40}
    config.text.dropout = 0.0
    config.projection.update(projection)
    return config


def build(**changes):
    model = build_two_tower(model_config(**changes))
    return model, jax.jit(model.init)(jax.random.key(0), *INPUTS)


def apply(model, variables, *args, method):
    return jax.jit(functools.partial(model.apply, method=method))(variables, *args)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_without_a_projection_an_embedding_is_the_normalised_feature():
    model, variables = build(text="none")
    assert set(variables["params"]["text"]) == {"tower"}
    assert set(variables["params"]["image"]) == {"tower", "projection"}
    features = np.asarray(apply(model, variables, *INPUTS[1:], method="text_features"))
    embeddings = apply(model, variables, *INPUTS[1:], method="encode_text")
    np.testing.assert_allclose(embeddings, unit(features), atol=1e-6)
    model, variables = build(image="none", embed_dim=128)
    assert set(variables["params"]["image"]) == {"tower"}
    features = np.asarray(apply(model, variables, INPUTS[0], method="image_features"))
    np.testing.assert_allclose(apply(model, variables, INPUTS[0], method="encode_image"), unit(features), atol=1e-6)


def test_a_perceptron_has_a_gelu_between_two_layers():
    model, variables = build(image="mlp", text="mlp", hidden=24)
    for modality, width in (("image", 128), ("text", 16)):
        p = jax.tree.map(np.asarray, variables["params"][modality]["projection"])
        assert p["fc1"]["kernel"].shape == (width, 24) and p["fc2"]["kernel"].shape == (24, 16)
        features = np.random.default_rng(1).normal(size=(3, width)).astype(np.float32)
        x = features @ p["fc1"]["kernel"] + p["fc1"]["bias"]
        x = x * (1 + erf(x / np.sqrt(2))) / 2
        expected = unit(x @ p["fc2"]["kernel"] + p["fc2"]["bias"])
        np.testing.assert_allclose(apply(model, variables, features, method=f"project_{modality}"), expected, atol=1e-6)


def test_the_perceptrons_dropout_acts_in_training_only():
    model, variables = build(image="mlp", text="mlp", hidden=24, dropout=0.5)
    variables = {**variables, "batch_stats": {}}
    batch = dict(zip(("image", "text", "text_mask"), INPUTS))
    run = jax.jit(
        lambda train, rngs: embed(model, variables, batch, {}, train=train, rngs=rngs)[0], static_argnames="train"
    )
    dropped = [run(("image", "text"), {"dropout": jax.random.key(seed)}) for seed in (0, 0, 1)]
    plain = run((), None)
    for modality in ("image", "text"):
        first, again, other, without = (getattr(x, modality) for x in (*dropped, plain))
        np.testing.assert_array_equal(first, again)
        assert np.abs(first - other).max() > 1e-2 and np.abs(first - without).max() > 1e-2
        args = INPUTS[:1] if modality == "image" else INPUTS[1:]
        np.testing.assert_allclose(without, apply(model, variables, *args, method=f"encode_{modality}"), atol=1e-6)


def test_another_width_needs_a_projection():
    with pytest.raises(UserError, match="text tower is 16 wide and model.embed_dim is 12; set model.embed_dim=16 or"):
        build_two_tower(model_config(text="none", embed_dim=12))
    with pytest.raises(
        UserError, match="image tower is 128 wide and model.embed_dim is 16; set model.embed_dim=128 or"
    ):
        build_two_tower(model_config(image="none"))


def test_another_kind_is_refused():
    with pytest.raises(
        UserError, match="model.image.projection is 'conv'; expected linear, linear_no_bias, mlp or none"
    ):
        build_two_tower(model_config(image="conv"))


def test_projections_compute_in_float32_whatever_the_towers_do():
    model = build_two_tower(model_config(image="mlp", text="mlp"), dtype=jnp.bfloat16)
    variables = jax.jit(model.init)(jax.random.key(0), *INPUTS)
    features = apply(model, variables, INPUTS[0], method="image_features")
    single = build_two_tower(model_config(image="mlp", text="mlp"))
    project = lambda model: apply(model, variables, features, method="project_image")
    np.testing.assert_array_equal(project(model), project(single))
