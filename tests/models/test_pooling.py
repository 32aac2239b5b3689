"""Max pooling and its gradient compared with PyTorch's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zslflax.models.pooling import max_pool


@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 6), (5, 7), (2, 1), (1, 1)])
@pytest.mark.parametrize("ties", [False, True])
def test_maxima_and_gradients_are_those_of_pytorch(require, height, width, ties):
    """Also which of several equal maxima gets the gradient: the first."""
    torch = require("torch")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, height, width, 3)).astype(np.float32)
    x = np.round(x) if ties else x
    y, gradient = jax.vjp(max_pool, jnp.asarray(x))
    dy = rng.normal(size=y.shape).astype(np.float32)
    original = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    wanted = torch.nn.functional.max_pool2d(original, 3, 2, 1)
    wanted.backward(torch.tensor(dy.transpose(0, 3, 1, 2)))
    np.testing.assert_array_equal(y, wanted.detach().numpy().transpose(0, 2, 3, 1))
    np.testing.assert_allclose(gradient(dy)[0], original.grad.numpy().transpose(0, 2, 3, 1), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(max_pool(jnp.asarray(x)), y)  # without a gradient


def test_bfloat16_gradients_are_summed_in_float32():
    x = jnp.zeros((1, 4, 4, 1), jnp.bfloat16).at[0, 1, 1, 0].set(1)  # the maximum of all four windows
    y, gradient = jax.vjp(max_pool, x)
    assert y.dtype == jnp.bfloat16
    (dx,) = gradient(jnp.asarray([[1, 2**-8], [2**-8, 0]], jnp.bfloat16).reshape(1, 2, 2, 1))
    assert dx.dtype == jnp.bfloat16
    assert float(dx[0, 1, 1, 0]) == 1 + 2**-7  # 1 + 2⁻⁸ has no bfloat16: summed one by one, it stays 1
