"""The exact GELU compared with PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np

from zslflax.models.transformer import gelu


def test_values_and_gradients_are_those_of_pytorch(require):
    torch = require("torch")
    x = np.linspace(-9, 9, 2001, dtype=np.float32)
    y, gradient = jax.vjp(gelu, jnp.asarray(x))
    original = torch.tensor(x, requires_grad=True)
    wanted = torch.nn.functional.gelu(original)
    wanted.sum().backward()
    np.testing.assert_allclose(y, wanted.detach(), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(gradient(jnp.ones_like(y))[0], original.grad, rtol=1e-6, atol=1e-6)


def test_in_bfloat16_it_is_rounded_once_and_keeps_its_input_alone():
    x = jnp.linspace(-6, 6, 999).astype(jnp.bfloat16)
    y, gradient = jax.vjp(gelu, x)
    wanted, wanted_gradient = jax.vjp(gelu, x.astype(jnp.float32))
    np.testing.assert_array_equal(y, wanted.astype(jnp.bfloat16))
    np.testing.assert_array_equal(
        gradient(jnp.ones_like(y))[0], wanted_gradient(jnp.ones_like(wanted))[0].astype(jnp.bfloat16)
    )
    assert [kept.dtype for kept in jax.tree.leaves(gradient)] == [jnp.bfloat16]
