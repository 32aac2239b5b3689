"""The teacher's average: its direction, its warm-up, and what it shares with the student."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from zslflax.training import train_state


@pytest.fixture
def params():
    leaf = lambda x: {"kernel": jnp.full((2,), x, jnp.float32)}
    tower = lambda x: {"tower": leaf(x), "projection": leaf(x + 1)}
    return {"image": tower(1.0), "text": tower(3.0), "objective": {"log_logit_scale": jnp.float32(3.9)}}


def test_the_teacher_moves_towards_the_student_and_not_the_reverse():
    teacher, student = {"w": jnp.float32(10.0)}, {"w": jnp.float32(0.0)}
    moved = train_state.update_ema(teacher, student, 0.9, jnp.int32(1_000_000))
    assert float(moved["w"]) == pytest.approx(9.0)  # 0.9 · 10 + 0.1 · 0; swapped it would be 1
    assert float(student["w"]) == 0.0


@pytest.mark.parametrize("k, decay", [(1, 2 / 11), (10, 11 / 20), (90, 0.91), (8_980, 8_981 / 8_990), (10**6, 0.999)])
def test_warm_up(k, decay):
    moved = train_state.update_ema(jnp.float32(1.0), jnp.float32(0.0), 0.999, jnp.int32(k))
    assert float(moved) == pytest.approx(decay, rel=1e-5)


def test_against_a_written_out_average():
    rng = np.random.default_rng(0)
    average = expected = np.float64(0.5)
    for k, value in enumerate(rng.normal(size=50), start=1):
        d = min(0.95, (1 + k) / (10 + k))
        expected = d * expected + (1 - d) * value
        average = train_state.update_ema(jnp.float32(average), jnp.float32(value), 0.95, jnp.int32(k))
    assert float(average) == pytest.approx(expected, rel=1e-5)


def test_a_frozen_tower_has_no_average_and_is_the_students(params):
    tx = optax.sgd(0.1, momentum=0.9)
    state = train_state.create({"params": params, "batch_stats": {}}, tx, ema=True, frozen=("text",))
    assert set(state.teacher_params["text"]) == {"projection"} and set(state.teacher_params["image"]) == {
        "tower",
        "projection",
    }
    state = state.replace(teacher_params=jax.tree.map(lambda x: x * 0, state.teacher_params))
    variables = train_state.teacher_variables(state)["params"]
    assert (
        float(variables["text"]["tower"]["kernel"][0]) == 3.0 and float(variables["image"]["tower"]["kernel"][0]) == 0.0
    )
    assert jax.tree.structure(variables) == jax.tree.structure(params)


def test_the_teachers_batch_statistics(params):
    variables = {"params": params, "batch_stats": {"image": {"tower": {"mean": jnp.ones(2)}}}}
    state = train_state.create(variables, optax.sgd(0.1), ema=True, frozen=())
    state = state.replace(teacher_batch_stats=jax.tree.map(lambda x: x * 5, state.teacher_batch_stats))
    mean = lambda choice: float(
        train_state.teacher_variables(state, choice)["batch_stats"]["image"]["tower"]["mean"][0]
    )
    assert mean("ema") == 5.0 and mean("student") == 1.0


def test_a_teacher_keeps_its_towers_but_those_that_are_the_students(params):
    teacher = {"params": {m: params[m] for m in ("image", "text")}, "batch_stats": {}}
    assert "tower" not in train_state.without_shared(teacher, params, ("image", "text"))["params"]["text"]
    assert (
        "tower" in train_state.without_shared(teacher, params, ("image",))["params"]["text"]
    )  # the student's will move
    other = {**params, "text": {**params["text"], "tower": {"kernel": jnp.full((2,), 3.001, jnp.float32)}}}
    assert "tower" in train_state.without_shared(teacher, other, ("image", "text"))["params"]["text"]
    assert train_state.without_shared({}, params, ("text",)) == {}
