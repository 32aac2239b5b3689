"""The state that a run starts from."""

import jax
import numpy as np
from safetensors.numpy import load_file

from tests.testing.configs import MINILM
from zslflax.inference.restore import build_model
from zslflax.models.import_weights.locate import locate
from zslflax.training.initial_state import create_state


def test_an_imported_tower_leaves_the_other_parameters_as_they_are_without_it(tiny_config):
    tiny_config.model.text.pretrained = MINILM
    model, _ = build_model(tiny_config)
    random, imported = (create_state(tiny_config, model, pretrained=pretrained)[0] for pretrained in (False, True))
    published = load_file(locate(MINILM) / "model.safetensors")["embeddings.word_embeddings.weight"]
    np.testing.assert_array_equal(imported.params["text"]["tower"]["word"]["embedding"], published)
    np.testing.assert_array_equal(imported.teacher_params["text"]["tower"]["word"]["embedding"], published)
    for state in (random, imported):
        for params in (state.params, state.teacher_params):
            del params["text"]["tower"]
    jax.tree.map(np.testing.assert_array_equal, random.params, imported.params)
    jax.tree.map(np.testing.assert_array_equal, random.teacher_params, imported.teacher_params)
