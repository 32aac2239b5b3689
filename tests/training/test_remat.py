"""Rematerialised towers have the same parameters, outputs and gradients, and need less memory."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from zslflax.models.bert import Bert, BertConfig
from zslflax.models.resnet import ResNet
from zslflax.models.vit import ViT

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(16, 16, 16, 3)).astype(np.float32)
TEXT = RNG.integers(0, 40, (16, 24), dtype=np.int32)
MASK = np.arange(24) < RNG.integers(1, 25, (16, 1))
TOWERS = {
    "resnet": (ResNet((2,), False, stem_width=4, small=True), (IMAGES,)),
    "vit": (ViT(4, 16, 2, 2), (IMAGES,)),
    "bert": (Bert(BertConfig(40, 16, 2, 2, 64, 24, dropout=0.3)), (TEXT, MASK)),
}


@pytest.mark.parametrize("name", TOWERS)
def test_remat_changes_no_result_and_keeps_less_for_the_gradient(name):
    tower, inputs = TOWERS[name]
    remat = dataclasses.replace(tower, remat=True)
    variables = jax.jit(tower.init)(jax.random.key(0), *inputs)

    def forward(model, params):
        rngs = {"dropout": jax.random.key(1)}
        return model.apply({**variables, "params": params}, *inputs, train=True, mutable=["batch_stats"], rngs=rngs)

    def forward_and_backward(model):
        """Features, the batch statistics after them, and a gradient by all parameters."""
        features, vjp_fn, updated = jax.vjp(partial(forward, model), variables["params"], has_aux=True)
        return features, updated, vjp_fn(features**2)

    def residual_bytes(model):
        """Bytes that the forward pass keeps for the gradient."""
        vjp_of = lambda params: jax.vjp(partial(forward, model), params, has_aux=True)[1]
        vjp_fn = jax.eval_shape(vjp_of, variables["params"])
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(vjp_fn))

    assert jax.eval_shape(remat.init, jax.random.key(0), *inputs) == jax.eval_shape(lambda: variables)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())
    jax.tree.map(close, *(jax.jit(partial(forward_and_backward, model))() for model in (tower, remat)))
    # The residuals are counted because a compiler for CPUs may undo remat.
    assert residual_bytes(remat) < 0.6 * residual_bytes(tower)
