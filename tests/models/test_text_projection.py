"""A text tower may have no projection where it is as wide as the joint space."""

import jax
import numpy as np
import pytest

from zslflax.config import default_config
from zslflax.errors import UserError
from zslflax.models.build import build_two_tower


def model_config(embed_dim: int):
    config = default_config().model
    config.embed_dim, config.image.name, config.image.size = embed_dim, "vit_nano4", 8
    config.text.projection, config.text.max_tokens = False, 6
    config.text.scratch = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 40}
    return config


def test_without_a_projection_the_text_embedding_is_the_normalised_feature():
    model = build_two_tower(model_config(embed_dim=16))
    image, text = np.zeros((2, 8, 8, 3), np.uint8), np.arange(12, dtype=np.int32).reshape(2, 6)
    mask = np.ones((2, 6), bool)
    variables = jax.jit(model.init)(jax.random.key(0), image, text, mask)
    assert set(variables["params"]["text"]) == {"tower"}
    assert set(variables["params"]["image"]) == {"tower", "projection"}
    features = np.asarray(model.apply(variables, text, mask, method="text_features"))
    expected = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(model.apply(variables, text, mask, method="encode_text"), expected, atol=1e-6)


def test_another_width_needs_a_projection():
    with pytest.raises(UserError, match="text tower is 16 wide and model.embed_dim is 12; set model.embed_dim=16 or"):
        build_two_tower(model_config(embed_dim=12))
