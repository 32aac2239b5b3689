"""A convolution of each channel by itself, by the method that is fast on the device."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Padding = list[tuple[int, int]]  # zeros before and after each side of an image


def grouped_convolution(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """Convolves each channel of x [b, h, w, c] with its own kernel [k, k, 1, c]."""
    axes, groups = ("NHWC", "HWIO", "NHWC"), x.shape[-1]
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=axes, feature_group_count=groups
    )


def sum_of_shifts(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """Computes `grouped_convolution` as the sum of k² shifted and scaled inputs, which XLA fuses into one loop.

    The sum is fp32.
    """
    k, dtype = kernel.shape[0], x.dtype
    x = jnp.pad(x, ((0, 0), *padding, (0, 0))).astype(jnp.float32)
    height, width = ((side - k) // stride * stride + 1 for side in x.shape[1:3])
    shifts = (
        x[:, i : i + height : stride, j : j + width : stride] * kernel[i, j, 0] for i in range(k) for j in range(k)
    )
    return functools.reduce(jnp.add, shifts).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def sum_with_grouped_gradient(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    """Computes `sum_of_shifts` with the gradient of `grouped_convolution`."""
    return sum_of_shifts(x, kernel, stride, padding)


def forward(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> tuple[jax.Array, Any]:
    """Returns the output and what the gradient needs, as `jax.custom_vjp` defines it."""
    return sum_of_shifts(x, kernel, stride, padding), (x, kernel)


def backward(stride: int, padding: Padding, inputs: Any, gradient: jax.Array) -> Any:
    """Returns the gradients of x and of the kernel."""
    _, vjp = jax.vjp(lambda x, kernel: grouped_convolution(x, kernel, stride, padding), *inputs)
    return vjp(gradient)


sum_with_grouped_gradient.defvjp(forward, backward)


class DepthwiseConv(nn.Module):
    """A convolution of each channel with its own kernel.

    Attributes:
        kernel: side of the kernel in pixels.
        stride: 2 halves the resolution.
        padding: zeros around the image.
        use_bias: whether a bias is added.
        dtype: of the computation; parameters are fp32.
    """

    kernel: int
    stride: int
    padding: Padding
    use_bias: bool
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, h, w, c] → [b, h / stride, w / stride, c]."""
        # In the shape (k, k, 1, c) the fan-in is the k² inputs of an output.
        init = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
        kernel = self.param("kernel", init, (self.kernel, self.kernel, 1, x.shape[-1])).astype(self.dtype)
        y = self.convolve(x.astype(self.dtype), kernel)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, x.shape[-1:]).astype(self.dtype)
        return y

    def convolve(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """Maps x likewise, without the bias. On CPUs XLA's grouped convolution is many times slower than the sum."""
        if jax.default_backend() != "cpu":
            return grouped_convolution(x, kernel, self.stride, self.padding)
        # The gradient of 49 shifts takes XLA seconds to compile for each layer, and longer than the convolution's.
        method = sum_of_shifts if self.kernel <= 5 else sum_with_grouped_gradient
        return method(x, kernel, self.stride, self.padding)
