"""The feature term of CLIP-KD against PyTorch, where it vanishes, and where it is switched off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.losses import assert_equal, normalise, objective_config, run_objective
from zslflax.losses.contrastive import OBJECTIVES, init_params
from zslflax.losses.feature_distillation import feature_loss, init_heads
from zslflax.losses.pairs import Embeddings

N, D, WIDE = 6, 5, 7


def embeddings(seed: int, width: int) -> Embeddings:
    rng = np.random.default_rng(seed)
    return Embeddings(*(jnp.asarray(normalise(rng.standard_normal((N, width)))) for _ in range(2)))


@pytest.mark.parametrize("width", [D, WIDE])
def test_loss_and_gradients_equal_pytorch(require, width):
    """As the authors' code computes it: `mse_loss` of the normalised outputs of `nn.Linear`, added over modalities."""
    torch = require("torch")
    student, teacher = embeddings(0, D), embeddings(1, width)
    params = {"feature_heads": init_heads(jax.random.key(0), D, width)} if width != D else {}
    loss = lambda params, student: feature_loss(params, student, teacher).mean()
    found, (head_grads, grads) = jax.value_and_grad(loss, argnums=(0, 1))(params, student)

    tensor = lambda x: torch.tensor(np.asarray(x), requires_grad=True)
    inputs, heads, expected = list(map(tensor, student)), jax.tree.map(tensor, params), 0.0
    for modality, x, target in zip(Embeddings._fields, inputs, teacher):
        if heads:
            head = heads["feature_heads"][modality]
            x = torch.nn.functional.normalize(torch.nn.functional.linear(x, head["kernel"].T, head["bias"]), dim=1)
        expected = expected + torch.nn.functional.mse_loss(x, torch.tensor(np.asarray(target)))
    expected.backward()
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    assert_equal(list(grads), [x.grad.numpy() for x in inputs])
    assert_equal(head_grads, jax.tree.map(lambda x: x.grad.numpy(), heads))


def test_it_is_zero_for_the_teachers_own_embeddings():
    own = embeddings(0, D)
    np.testing.assert_array_equal(feature_loss({}, own, own), 0.0)


def test_unit_vectors_have_a_distance_of_their_angle():
    """‖v − ṽ‖² = 2 − 2 cos: between 0 and 4, divided by the number of elements."""
    student, teacher = embeddings(0, D), embeddings(1, D)
    cosines = sum(np.sum(np.asarray(x) * np.asarray(y), axis=1) for x, y in zip(student, teacher))
    np.testing.assert_allclose(feature_loss({}, student, teacher), (4.0 - 2.0 * cosines) / D, rtol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_without_weight_an_objective_has_neither_the_loss_nor_the_layers(name):
    config = objective_config(name)
    scalars = init_params(config)
    assert init_params(config, jax.random.key(0), D, WIDE) == scalars and "feature_heads" not in scalars
    student, teacher, valid = embeddings(0, D), embeddings(1, WIDE), np.ones(N, bool)
    plain, _, plain_grads = run_objective(config, student, teacher, valid)
    with_term, _, grads = run_objective(objective_config(name, feature_weight=2.0), student, teacher, valid)
    assert with_term.keys() - plain.keys() == {"feature_loss"}
    np.testing.assert_allclose(with_term["loss"], plain["loss"] + 2.0 * with_term["feature_loss"], rtol=1e-6)
    assert np.abs(grads.image - plain_grads.image).max() > 1e-3


def test_layers_exist_only_where_the_widths_differ():
    config = objective_config("info_nce", feature_weight=1.0)
    assert init_params(config, jax.random.key(0), D, D).keys() == {"log_logit_scale"}
    heads = init_params(config, jax.random.key(0), D, WIDE)["feature_heads"]
    shapes = jax.tree.map(jnp.shape, heads)
    assert shapes == {m: {"kernel": (D, WIDE), "bias": (WIDE,)} for m in ("image", "text")}
    assert not np.array_equal(heads["image"]["kernel"], heads["text"]["kernel"])
