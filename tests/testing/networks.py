"""Networks of PyTorch whose every weight and statistic matters to their output, and what compares ours with them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zslflax.models.build import image_tower
from zslflax.models.import_weights.load import load_image_tower


def randomise(model: Any, vectors: float = 0.3) -> Any:
    """Adds normal noise to all parameters of a torch.nn.Module, and returns it in evaluation mode.

    Args:
        model: the noise is 0.15 for its matrices and 0.3 for its convolutions. Seed torch before it is built.
        vectors: standard deviation for its biases and scales.
    """
    import torch

    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * (0.15 if value.ndim == 2 else 0.3 if value.ndim > 2 else vectors))
    return model.eval()


def perturb(variables: Any) -> Any:
    """Adds uniform noise of at most 0.3 to all variables of a tower, whose scales and statistics then all matter."""
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return tree.unflatten([x + 0.3 * jax.random.uniform(key, x.shape) for x, key in zip(leaves, keys)])


def random_images(b: int, height: int, width: int = 0, seed: int = 0) -> np.ndarray:
    """Normalised pixels fp32 [b, height, width or height, 3]."""
    return np.random.default_rng(seed).normal(size=(b, height, width or height, 3)).astype(np.float32)


def load_and_apply(folder: Path, name: str, images: np.ndarray, pool: str = "") -> jax.Array:
    """The outputs of the image tower called `name` with the published weights in a folder."""
    model = image_tower(name, jnp.float32, None, False, pool)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images[:1])
    return jax.jit(model.apply)(load_image_tower(folder, name, shapes, images.shape[1]), images)


def randomise_batch_norm(module: Any, weight: tuple[float, float] = (0.5, 1.5), bias: float = 0.1) -> None:
    """Draws the statistics and the parameters of a batch normalisation.

    Args:
        module: a torch.nn.BatchNorm2d.
        weight: bounds of its scales, which are uniform.
        bias: standard deviation of its biases.
    """
    module.running_mean.normal_(0, 0.2)
    module.running_var.uniform_(0.5, 2)
    module.weight.data.uniform_(*weight)
    module.bias.data.normal_(0, bias)
