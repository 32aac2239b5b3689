"""Every objective on batches that nobody wants: losses and gradients stay finite, plain and streamed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses.test_contrastive import make
from zslflax.losses import contrastive
from zslflax.losses.contrastive import LOG_LOGIT_SCALE_RANGE, OBJECTIVES, SOFT_TARGETS, Embeddings

pytestmark = pytest.mark.usefixtures("strict_types")
SHAPES = [(1, 1), (2, 3), (8, 4)]  # pairs, width
FORMS = {"plain": 0, "streamed": 2}  # objective.max_similarities


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def batches(n, d):
    """By name: images, captions, and which pairs are readable."""
    rng = np.random.default_rng(n * 100 + d)
    v, t, every = unit(rng.normal(size=(n, d))), unit(rng.normal(size=(n, d))), np.ones(n, bool)
    same = np.broadcast_to(v[:1], v.shape)
    return {
        "any": (v, t, every),
        "identical": (same, same, every),
        "opposite": (same, -same, every),
        "each its caption": (v, v, every),
        "each far from its caption": (v, -v, every),
        "one readable": (v, t, np.arange(n) == n - 1),
        "none readable": (v, t, ~every),
    }


@functools.cache
def gradients(name, form, fields):
    objective = make(name, block=FORMS[form], **dict(fields))

    def local(params, student, teacher, valid):
        def loss(params, student):
            rows = contrastive.pair_losses(
                objective, params, student, teacher, valid, step=jnp.int32(9), axis_name="data"
            )
            weight = valid.astype(jnp.float32) / jnp.maximum(jnp.sum(valid.astype(jnp.float32)), 1.0)
            return jnp.sum(weight * rows["loss"]), rows

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, student)

    return jax.jit(jax.vmap(local, axis_name="data", in_axes=(None, 0, 0, 0)))


def check(objective, form, scale, d, n, **fields):
    params = contrastive.init_params(make(objective, **fields))
    params = {k: jnp.float32(scale) if k.endswith("log_scale") else v for k, v in params.items()}
    for name, (v, t, valid) in batches(n, d).items():
        taught = Embeddings(v[None], t[None]) if objective in SOFT_TARGETS else None
        student = Embeddings(v[None], t[None])
        (loss, rows), grads = gradients(objective, form, tuple(fields.items()))(params, student, taught, valid[None])
        for what, x in {"loss": loss, "rows": rows, "gradients": grads}.items():
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(x)), (name, what, n, d)
        if not valid.any():
            assert float(loss[0]) == 0 and not any(np.any(leaf) for leaf in jax.tree.leaves(grads))
        if n == 1 and objective in ("info_nce", "label_smoothing"):  # there is nothing to choose among
            assert float(loss[0]) == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_batch_gives_what_is_not_finite(objective, form):
    for n, d in SHAPES:
        check(objective, form, LOG_LOGIT_SCALE_RANGE[1], d, n)
    check(objective, form, LOG_LOGIT_SCALE_RANGE[0], 3, 2)


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
        ("sigmoid", {"bias": -1e4}),
        ("sigmoid", {"bias": 1e4}),
    ],
)
def test_no_temperature_does_either(objective, fields, form):
    check(objective, form, LOG_LOGIT_SCALE_RANGE[1], 4, 8, **fields)
