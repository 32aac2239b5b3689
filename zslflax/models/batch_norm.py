"""Batch normalisation (Ioffe and Szegedy 2015, arXiv 1502.03167) with few passes over memory.

Its arithmetic takes no time on a GPU; reading and writing its arrays takes about half of a ResNet's training step.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

EPSILON = 1e-5  # added to the variance, as in PyTorch
MOMENTUM = 0.9  # of the running averages; PyTorch calls this 0.1

Statistics = tuple[jax.Array, jax.Array]  # mean and variance of each channel, fp32 [c]


def batch_norm(dtype: Any, axis_name: str | None, train: bool, epsilon: float = EPSILON) -> Callable[..., "BatchNorm"]:
    """Creates the batch normalisations of a tower, from the name of each; arguments as of `BatchNorm`."""
    return partial(BatchNorm, dtype, axis_name, train, epsilon)


class BatchNorm(nn.Module):
    """Normalises each channel: y = (x − mean) / √(variance + epsilon) · scale + bias. Computes in fp32.

    Attributes:
        dtype: of the result.
        axis_name: the mapped axis over which training synchronises batch statistics; None for no synchronisation.
        train: whether to normalise by the statistics of the batch, which then also update the running averages.
        epsilon: added to the variance.
    """

    dtype: Any
    axis_name: str | None
    train: bool
    epsilon: float = EPSILON

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., c] → [..., c]. With variables of `fold_batch_norms`, only adds the bias that they hold."""
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        if not self.is_initializing() and not self.has_variable("params", "scale"):
            return x + bias.astype(self.dtype)
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        mean = self.variable("batch_stats", "mean", jnp.zeros, x.shape[-1:])
        var = self.variable("batch_stats", "var", jnp.ones, x.shape[-1:])
        if not self.train:
            return normalise(x, (mean.value, var.value), scale, bias, self.epsilon).astype(self.dtype)
        y, batch_stats = normalise_by_batch(x, scale, bias, self.epsilon, self.axis_name)
        for average, value in zip((mean, var), batch_stats):
            average.value = MOMENTUM * average.value + (1 - MOMENTUM) * value
        return y.astype(self.dtype)


def normalise(x: jax.Array, statistics: Statistics, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """(x − mean) / √(variance + epsilon) · scale + bias, fp32 [..., c]."""
    mean, var = statistics
    return (x - mean) * (jax.lax.rsqrt(var + epsilon) * scale) + bias


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalise_by_batch(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis_name: str | None
) -> tuple[jax.Array, Statistics]:
    """`normalise` by the statistics of x itself, over all devices.

    With x̂ = (x − mean) / √(variance + epsilon), means over all elements of a channel, and dy the gradient by y,

        dx = scale / √(variance + epsilon) · (dy − mean(dy) − x̂ · mean(dy · x̂))

    which reads x and dy once for the two means and once for dx, and needs nothing else of the forward pass.
    Differentiating the forward pass step by step reads and writes more.

    Args:
        x: [..., c].
        scale, bias: fp32 [c].
        epsilon: added to the variance.
        axis_name: the mapped axis over which the statistics are averaged, or None.

    Returns:
        y [..., c], of the type of x; and the statistics, which have no gradient.
    """
    return forward(x, scale, bias, epsilon, axis_name)[0]


def forward(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, axis_name: str | None
) -> tuple[tuple[jax.Array, Statistics], tuple[jax.Array, jax.Array, Statistics]]:
    """The result of `normalise_by_batch`, and what `backward` needs."""
    wide = x.astype(jnp.float32)
    mean, mean_square = average_devices(channel_mean(wide), channel_mean(wide * wide), axis_name)
    statistics = mean, jnp.maximum(mean_square - mean * mean, 0.0)
    y = normalise(wide, statistics, scale, bias, epsilon).astype(x.dtype)
    return (y, statistics), (x, scale, statistics)


def backward(
    epsilon: float,
    axis_name: str | None,
    saved: tuple[jax.Array, jax.Array, Statistics],
    gradients: tuple[jax.Array, Statistics],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients by x, scale and bias; those by scale and bias are of this device's elements alone."""
    x, scale, (mean, var) = saved
    dy, inverse = gradients[0].astype(jnp.float32), jax.lax.rsqrt(var + epsilon)
    normalised, count = (x.astype(jnp.float32) - mean) * inverse, x.size // x.shape[-1]
    own_mean, own_product = channel_mean(dy), channel_mean(dy * normalised)
    dy_mean, dy_product = average_devices(own_mean, own_product, axis_name)
    dx = scale * inverse * (dy - dy_mean - normalised * dy_product)
    return dx.astype(x.dtype), own_product * count, own_mean * count


def channel_mean(x: jax.Array) -> jax.Array:
    """The mean over all axes but the last: [..., c] → [c]."""
    return jnp.mean(x, axis=range(x.ndim - 1))


def average_devices(x: jax.Array, y: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
    """Averages two arrays of one shape over the devices of a mapped axis, by one all-reduce."""
    if not axis_name:
        return x, y
    x, y = jax.lax.pmean(jnp.stack([x, y]), axis_name)
    return x, y


normalise_by_batch.defvjp(forward, backward)


def fold_batch_norms(variables: Mapping[str, Any], epsilon: float = EPSILON) -> dict[str, Any]:
    """Variables of a tower with which it computes the same, normalising by running statistics, but in fewer passes.

    The kernel of each convolution takes over the factor of the normalisation that follows it,

        kernel' = kernel · scale / √(variance + epsilon)    bias' = bias − mean · scale / √(variance + epsilon)

    and the normalisation only adds bias'. A GPU then computes a convolution, bias' and a ReLU in one pass.

    A convolution without bias and its normalisation are known by their names: "conv1" and "bn1", or "conv" and
    "conv_bn". Normalisations that follow no convolution stay as they are.

    Args:
        variables: {"params", "batch_stats"} of a tower; those of a tower without batch normalisation stay.
        epsilon: added to the variance.
    """
    return {**variables, "params": fold_scope(variables["params"], variables.get("batch_stats", {}), epsilon)}


def fold_scope(params: Mapping[str, Any], batch_stats: Mapping[str, Any], epsilon: float) -> dict[str, Any]:
    """`fold_batch_norms` of the parameters and statistics of one module."""
    folded = dict(params)
    for name, stats in batch_stats.items():
        if "mean" not in stats:
            folded[name] = fold_scope(params[name], stats, epsilon)
    for conv in (name for name in params if "conv" in name):
        for norm in {conv.replace("conv", "bn"), f"{conv}_bn"} & set(batch_stats):
            mean, var = batch_stats[norm]["mean"], batch_stats[norm]["var"]
            factor = params[norm]["scale"] * jax.lax.rsqrt(var + epsilon)
            folded[conv] = {"kernel": params[conv]["kernel"] * factor}
            folded[norm] = {"bias": params[norm]["bias"] - mean * factor}
    return folded
