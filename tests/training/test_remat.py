"""Rematerialised towers: the same parameters, outputs and gradients, in less memory."""

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
def test_the_same_parameters_outputs_and_gradients_and_less_kept(name):
    plain, inputs = TOWERS[name]
    variables = jax.jit(plain.init)(jax.random.key(0), *inputs)

    def forward(model, params):
        given = {**variables, "params": params}
        rngs = {"dropout": jax.random.key(1)}
        return model.apply(given, *inputs, train=True, mutable=["batch_stats"], rngs=rngs)

    def differentiated(model):
        """Features, batch statistics after them, and a gradient by all parameters."""
        value, pull, updated = jax.vjp(partial(forward, model), variables["params"], has_aux=True)
        return value, updated, pull(value**2)

    def kept(model):
        """Bytes that the forward pass leaves for the gradient."""
        pull = jax.eval_shape(
            lambda params: jax.vjp(partial(forward, model), params, has_aux=True)[1], variables["params"]
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))

    remat = dataclasses.replace(plain, remat=True)
    assert jax.eval_shape(remat.init, jax.random.key(0), *inputs) == jax.eval_shape(lambda: variables)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(a).max())
    jax.tree.map(close, *(jax.jit(partial(differentiated, model))() for model in (plain, remat)))
    assert kept(remat) < 0.6 * kept(plain)  # a compiler for CPUs may keep as much all the same, and does
