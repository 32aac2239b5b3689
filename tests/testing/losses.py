"""Helpers for tests of the losses: objective configs, embeddings, and losses with gradients on several devices."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from zslflax.config import default_config, set_objective
from zslflax.losses import contrastive
from zslflax.losses.contrastive import needs_teacher
from zslflax.losses.pairs import Embeddings, PairIds

STEP = jnp.int32(3)


def objective_config(name: str, **fields: Any) -> ml_collections.FrozenConfigDict:
    """The `objective` section of a config; frozen, so that it is hashable."""
    config = default_config()
    set_objective(config, name)
    config.objective.update(fields)
    return ml_collections.FrozenConfigDict(config.objective)


def normalise(x: np.ndarray) -> np.ndarray:
    """The rows of a matrix as unit vectors, fp32."""
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def distinct_params(config: ml_collections.FrozenConfigDict, width: int = 0, teacher_width: int = 0) -> dict[str, Any]:
    """An objective's initial parameters, with different scales for the hard and the soft term."""
    params = contrastive.init_params(config, jax.random.key(3), width, teacher_width)
    scales = (name for name in params if name.endswith("logit_scale"))
    return params | {name: params[name] - 0.3 * i for i, name in enumerate(scales)}


def losses_and_gradients(config, params, student, teacher, valid, ids=None):
    """One device's `pair_losses`; the mean loss's gradients by the parameters and by this device's embeddings."""
    weight = valid.astype(jnp.float32)
    weight /= jnp.maximum(jax.lax.psum(weight.sum(), "data"), 1.0)

    def loss(params, student):
        losses = contrastive.pair_losses(config, params, student, teacher, valid, ids, step=STEP, axis_name="data")
        return jnp.sum(losses["loss"] * weight), losses

    (params_grads, emb_grads), losses = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, student)
    return losses, jax.lax.psum(params_grads, "data"), emb_grads


@functools.cache
def mapped(config, devices, arguments):
    function = functools.partial(losses_and_gradients, config)
    axes = {"in_axes": (None, *[0] * arguments), "out_axes": (0, None, 0)}
    return jax.pmap(function, "data", **axes, devices=jax.devices()[:devices])


def run_objective(
    config: ml_collections.FrozenConfigDict,
    student: Embeddings,
    teacher: Embeddings | None,
    valid: np.ndarray,
    devices: int = 1,
    ids: PairIds | None = None,
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], Embeddings]:
    """Computes an objective's losses and gradients of a global batch on several devices.

    Returns:
        The losses of all pairs [n], the gradients of the mean loss by `distinct_params`, and by the student's
        embeddings; NumPy.
    """
    teacher = teacher if needs_teacher(config) else None
    params = distinct_params(config, student.image.shape[1], teacher.image.shape[1] if teacher else 0)
    split = lambda tree: jax.tree.map(lambda x: jnp.asarray(x).reshape(devices, -1, *x.shape[1:]), tree)
    inputs = split((student, teacher, np.asarray(valid)) + ((ids,) if ids else ()))
    losses, params_grads, emb_grads = mapped(config, devices, len(inputs))(params, *inputs)
    losses, emb_grads = jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), (losses, emb_grads))
    return losses, jax.tree.map(np.asarray, params_grads), emb_grads


def of_valid(results, valid: np.ndarray):
    """The results of `run_objective` with the losses of the valid pairs alone."""
    losses, *gradients = results
    return {name: x[valid] for name, x in losses.items()}, *gradients


def assert_equal(ours: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    """Compares trees up to a share of each array's largest value, or of 1 where that is smaller.

    The rounding error of a sum follows the size of its terms, not of their sum.
    """
    assert jax.tree.structure(ours) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(b).max(initial=0.0)))
