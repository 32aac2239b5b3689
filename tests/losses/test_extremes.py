"""Every objective on extreme batches and settings: losses and gradients stay finite, whole and in chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.losses import normalise, objective_config
from zslflax.losses import contrastive
from zslflax.losses.contrastive import LOG_LOGIT_SCALE_RANGE, OBJECTIVES
from zslflax.losses.pairs import Embeddings

pytestmark = pytest.mark.usefixtures("strict_types")
SHAPES = [(1, 1), (2, 3), (8, 4)]  # pairs, width
FORMS = {"whole": 0, "chunks": 2}  # objective.max_similarities


def batches(n, d):
    """By name: embeddings of images and of texts, and which pairs are valid."""
    rng = np.random.default_rng(n * 100 + d)
    v, t, every = normalise(rng.normal(size=(n, d))), normalise(rng.normal(size=(n, d))), np.ones(n, bool)
    same = np.broadcast_to(v[:1], v.shape)
    return {
        "random": (v, t, every),
        "identical": (same, same, every),
        "opposite": (same, -same, every),
        "each equal to its text": (v, v, every),
        "each opposite to its text": (v, -v, every),
        "one valid": (v, t, np.arange(n) == n - 1),
        "none valid": (v, t, ~every),
    }


@functools.cache
def gradients(name, form, fields):
    objective = objective_config(name, max_similarities=FORMS[form], **dict(fields))

    def local(params, student, teacher, valid):
        def loss(params, student):
            losses = contrastive.pair_losses(
                objective, params, student, teacher, valid, step=jnp.int32(9), axis_name="data"
            )
            weight = valid.astype(jnp.float32) / jnp.maximum(jnp.sum(valid.astype(jnp.float32)), 1.0)
            return jnp.sum(weight * losses["loss"]), losses

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, student)

    return jax.jit(jax.vmap(local, axis_name="data", in_axes=(None, 0, 0, 0)))


def assert_finite(objective, form, scale, d, n, **fields):
    params = contrastive.init_params(objective_config(objective, **fields))
    params = {k: jnp.float32(scale) if k.endswith("logit_scale") else v for k, v in params.items()}
    for name, (v, t, valid) in batches(n, d).items():
        student = Embeddings(v[None], t[None])
        teacher = student if OBJECTIVES[objective].needs_teacher else None
        (loss, losses), grads = gradients(objective, form, tuple(fields.items()))(params, student, teacher, valid[None])
        for what, x in {"loss": loss, "losses": losses, "gradients": grads}.items():
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(x)), (name, what, n, d)
        if not valid.any():
            assert float(loss[0]) == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
        if n == 1 and objective in ("info_nce", "label_smoothing"):  # a softmax over one column is 1
            assert float(loss[0]) == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_and_gradients_are_finite_for_every_batch(objective, form):
    for n, d in SHAPES:
        assert_finite(objective, form, LOG_LOGIT_SCALE_RANGE[1], d, n)
    assert_finite(objective, form, LOG_LOGIT_SCALE_RANGE[0], 3, 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "objective, fields",
    [
        # Similarities as logits of ten thousand, where exp overflows at 89.
        ("self_distillation", {"teacher_temperature": 1e-4, "image_image_weight": 1.0, "text_text_weight": 1.0}),
        ("self_distillation", {"teacher_temperature": 100.0, "remove_diagonal": True, "alpha": 0.0}),
        ("otter", {"sinkhorn_regulariser": 1e-4, "sinkhorn_iterations": 20}),
        ("otter", {"sinkhorn_regulariser": 100.0, "alpha": 0.0}),
        ("label_smoothing", {"smoothing": 0.999}),
        ("sigmoid", {"logit_bias": -1e4}),
        ("sigmoid", {"logit_bias": 1e4}),
    ],
)
def test_losses_and_gradients_are_finite_for_extreme_settings(objective, fields, form):
    assert_finite(objective, form, LOG_LOGIT_SCALE_RANGE[1], 4, 8, **fields)
