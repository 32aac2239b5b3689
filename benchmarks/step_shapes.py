"""The shapes of the step of configs/r50_declutr.py, for benchmarks that trace or compile it without running it."""

import functools
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from zslflax.losses.contrastive import init_params
from zslflax.training.optimizer import build_optimizer
from zslflax.training.train_state import create_train_state

CONFIG = Path(__file__).parent.parent / "configs" / "r50_declutr.py"
SHAPE = jax.ShapeDtypeStruct


def load_config() -> ConfigDict:
    """The config, with the sizes of its text tower but without the weights: 12 layers, width 768, 30,522 words."""
    config = runpy.run_path(str(CONFIG))["get_config"]()
    config.model.text.pretrained = ""
    return config


def make_shapes(config: ConfigDict, model, tokens: int):
    """The shapes of the state and of a batch of padded captions, and the optimiser."""
    n, size = config.batch_size, config.model.image.size
    batch = {"image": SHAPE((n, size, size, 3), jnp.uint8), "text": SHAPE((n, tokens), jnp.int32)}
    batch |= {"text_mask": SHAPE((n, tokens), jnp.bool_)}
    variables = jax.eval_shape(model.init, jax.random.key(0), *batch.values())
    objective_params = jax.eval_shape(functools.partial(init_params, config.objective))
    params = {**variables["params"], "objective": objective_params}
    tx = build_optimizer(config, params, config.steps)
    create = functools.partial(create_train_state, tx=tx, ema=True, frozen=())
    state = jax.eval_shape(create, {"params": params, "batch_stats": variables.get("batch_stats", {})})
    return state, batch | {"valid": SHAPE((n,), jnp.bool_)}, tx
