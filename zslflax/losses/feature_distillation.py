"""The feature term of CLIP-KD: the student's embeddings learn to be those of its teacher (arXiv 2307.12732)."""

import jax
import jax.numpy as jnp
import optax

from zslflax.losses.heads import Params, dense, init_dense
from zslflax.losses.pairs import Embeddings


def feature_loss(params: Params, student: Embeddings, teacher: Embeddings) -> jax.Array:
    """mean_k (v_k − ṽ_k)² + mean_k (t_k − t̃_k)² over the elements k of unit vectors: fp32 [b].

    Where the teacher's embeddings have another width, v and t stand for P v / ‖P v‖ and Q t / ‖Q t‖ with a learnt
    linear layer for each modality. The units are those of the authors' code, so that its weight, 2,000, means the same
    here. Its layers differ in one point: they take the student's embeddings before they are normalised.

    Args:
        params: of the objective, with "feature_heads" from `init_heads` where the widths differ.
        student: unit vectors [b, d].
        teacher: of the same pairs.
    """
    if "feature_heads" in params:
        student = Embeddings(*(project(params["feature_heads"][m], x) for m, x in student._asdict().items()))
    image, text = (jnp.mean((x - target) ** 2, axis=-1) for x, target in zip(student, teacher))
    return image + text


def project(head: Params, x: jax.Array) -> jax.Array:
    """A linear layer, whose output is scaled to length 1."""
    x = dense(head, x)
    return x / optax.safe_norm(x, 1e-6, axis=-1, keepdims=True)


def init_heads(key: jax.Array, width: int, teacher_width: int) -> Params:
    """The linear layers of both modalities, from embeddings of one width to those of another."""
    keys = zip(Embeddings._fields, jax.random.split(key))
    return {modality: init_dense(k, width, teacher_width) for modality, k in keys}
