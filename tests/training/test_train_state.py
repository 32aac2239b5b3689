"""The train state: the teacher's average, its warm-up, and the towers that it shares with the student."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zslflax.models.partition import combine, partition
from zslflax.training.teacher import without_shared_towers
from zslflax.training.train_state import create_train_state, student_variables, teacher_variables, update_ema


@pytest.fixture
def params():
    leaf = lambda x: {"kernel": jnp.full((2,), x, jnp.float32)}
    side = lambda x: {"tower": leaf(x), "projection": leaf(x + 1)}
    return {"image": side(1.0), "text": side(3.0), "objective": {"log_logit_scale": jnp.float32(3.9)}}


def test_the_teacher_moves_towards_the_student_and_not_the_reverse():
    teacher, student = {"w": jnp.float32(10.0)}, {"w": jnp.float32(0.0)}
    moved = update_ema(teacher, student, 0.9, jnp.int32(1_000_000))
    assert float(moved["w"]) == pytest.approx(9.0)  # 0.9 · 10 + 0.1 · 0; with the two exchanged it would be 1
    assert float(student["w"]) == 0.0


@pytest.mark.parametrize("k, decay", [(1, 2 / 11), (10, 11 / 20), (90, 0.91), (8_980, 8_981 / 8_990), (10**6, 0.999)])
def test_decay_warms_up(k, decay):
    moved = update_ema(jnp.float32(1.0), jnp.float32(0.0), 0.999, jnp.int32(k))
    assert float(moved) == pytest.approx(decay, rel=1e-5)


def test_average_equals_one_in_float64():
    rng = np.random.default_rng(0)
    average = expected = np.float64(0.5)
    for k, value in enumerate(rng.normal(size=50), start=1):
        d = min(0.95, (1 + k) / (10 + k))
        expected = d * expected + (1 - d) * value
        average = update_ema(jnp.float32(average), jnp.float32(value), 0.95, jnp.int32(k))
    assert float(average) == pytest.approx(expected, rel=1e-5)


def test_a_frozen_tower_has_no_average_and_is_the_students(params):
    tx = optax.sgd(0.1, momentum=0.9)
    state = create_train_state({"params": params, "batch_stats": {}}, tx, ema=True, frozen=("text",))
    assert set(state.teacher_params["text"]) == {"projection"}
    assert set(state.teacher_params["image"]) == {"tower", "projection"}
    state = state.replace(teacher_params=jax.tree.map(lambda x: x * 0, state.teacher_params))
    variables = teacher_variables(state)["params"]
    assert float(variables["text"]["tower"]["kernel"][0]) == 3.0
    assert float(variables["image"]["tower"]["kernel"][0]) == 0.0
    towers = {modality: params[modality] for modality in ("image", "text")}
    assert jax.tree.structure(variables) == jax.tree.structure(towers)


def test_the_student_has_its_trained_and_its_frozen_parameters(params):
    state = create_train_state({"params": params, "batch_stats": {}}, optax.sgd(0.1), ema=False, frozen=("text",))
    assert set(state.params["text"]) == {"projection"} and set(state.frozen_params) == {"text"}
    jax.tree.map(np.testing.assert_array_equal, student_variables(state)["params"], params)


@pytest.mark.parametrize("frozen", [(), ("text",), ("image", "text")])
def test_combine_undoes_partition(params, frozen):
    trained, frozen_params = partition(params, frozen)
    assert set(frozen_params) == set(frozen) and not any("tower" in trained[modality] for modality in frozen)
    jax.tree.map(np.testing.assert_array_equal, combine(trained, frozen_params), params)


def test_batch_statistics_of_the_teacher_are_its_own_or_the_students(params):
    variables = {"params": params, "batch_stats": {"image": {"tower": {"mean": jnp.ones(2)}}}}
    state = create_train_state(variables, optax.sgd(0.1), ema=True, frozen=())
    state = state.replace(teacher_batch_stats=jax.tree.map(lambda x: x * 5, state.teacher_batch_stats))
    batch_stats = lambda batch_norm: teacher_variables(state, batch_norm=batch_norm)["batch_stats"]
    mean = lambda batch_norm: float(batch_stats(batch_norm)["image"]["tower"]["mean"][0])
    assert mean("ema") == 5.0 and mean("student") == 1.0


def test_a_fixed_teacher_replaces_the_average(params):
    fixed = {
        "params": jax.tree.map(lambda x: 2 * x, {modality: params[modality] for modality in ("image", "text")}),
        "batch_stats": {"image": {"tower": {"mean": jnp.full(2, 7.0)}}},
    }
    variables = {"params": params, "batch_stats": {"image": {"tower": {"mean": jnp.ones(2)}}}}
    state = create_train_state(variables, optax.sgd(0.1), ema=False, frozen=("text",))
    for batch_norm in ("batch", "ema", "student"):
        jax.tree.map(np.testing.assert_array_equal, teacher_variables(state, fixed, batch_norm), fixed)
    shared = without_shared_towers(
        {**fixed, "params": {**fixed["params"], "text": params["text"]}}, state.frozen_params
    )
    assert "tower" not in shared["params"]["text"]
    teacher = teacher_variables(state, shared)["params"]
    assert float(teacher["text"]["tower"]["kernel"][0]) == 3.0 and float(teacher["image"]["tower"]["kernel"][0]) == 2.0


def test_a_fixed_teacher_shares_only_frozen_towers_that_are_equal(params):
    teacher = {"params": {m: params[m] for m in ("image", "text")}, "batch_stats": {}}
    frozen = lambda *modalities: {m: {"tower": params[m]["tower"]} for m in modalities}
    assert "tower" not in without_shared_towers(teacher, frozen("image", "text"))["params"]["text"]
    # The student's text tower will be trained.
    assert "tower" in without_shared_towers(teacher, frozen("image"))["params"]["text"]
    other = {"text": {"tower": {"kernel": jnp.full((2,), 3.001, jnp.float32)}}}
    assert "tower" in without_shared_towers(teacher, other)["params"]["text"]
    assert without_shared_towers({}, frozen("text")) == {}
