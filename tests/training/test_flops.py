"""Counts of floating-point operations, against XLA's."""

import jax
import jax.numpy as jnp

from zslflax.models.bert import Bert, BertConfig
from zslflax.models.resnet import ResNet
from zslflax.models.vit import ViT
from zslflax.training import flops


def count(function, *arguments):
    return flops.count(jax.make_jaxpr(function)(*arguments).jaxpr)


def test_products_are_counted_as_xla_does_and_loops_as_often_as_they_run():
    x, w = jnp.ones((5, 7)), jnp.ones((7, 7))
    product = lambda w, x: x @ w
    assert count(product, w, x) == {"float32": jax.jit(product).lower(w, x).compile().cost_analysis()["flops"]}
    looped = lambda w, x: jax.lax.scan(lambda x, _: (x @ w, None), x, length=6)[0]
    assert count(looped, w, x) == {"float32": 6 * 2 * 5 * 7 * 7}
    rematerialised = jax.grad(lambda w, x: jnp.sum(jax.checkpoint(lambda w: jnp.sin(x @ w) @ w)(w)))
    plain = jax.grad(lambda w, x: jnp.sum(jnp.sin(x @ w) @ w))
    assert count(plain, w, x)["float32"] < count(rematerialised, w, x)["float32"]  # the hardware computes it again


def test_towers_compute_in_bfloat16():
    """All products except those with the softmax's fp32 gradient, whose share is smaller in large towers."""
    image, text = jnp.zeros((2, 32, 32, 3)), jnp.zeros((2, 16), jnp.int32)
    towers = [
        (ResNet((1, 1), True, jnp.bfloat16), (image,)),
        (ViT(4, 64, 2, 4, jnp.bfloat16), (image,)),
        (Bert(BertConfig(layers=2, width=64, heads=4, hidden=256), jnp.bfloat16), (text, text == 0)),
    ]
    for model, inputs in towers:
        variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
        loss = lambda params, rest: jnp.sum(model.apply({**rest, "params": params}, *inputs))
        rest = {name: tree for name, tree in variables.items() if name != "params"}
        counts = count(jax.grad(loss), variables["params"], rest)
        assert counts["bfloat16"] > 0.9 * counts.total()


def test_utilisation_is_known_for_known_devices_only():
    assert flops.rates(989e12, 2.0, "NVIDIA H100 80GB HBM3") == {"flops_per_second": 494.5e12, "mfu": 0.5}
    assert flops.rates(1e9, 2.0, "cpu") == {"flops_per_second": 0.5e9}
