"""The train step: on several devices, against its equation, with frozen towers, and with non-finite values."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.training import (
    MODEL,
    STEPS,
    TOKENS,
    N,
    assert_close,
    init_variables,
    make_batch,
    make_config,
    make_state,
    make_two_tower,
    map_step,
    run_steps,
    split_batch,
)
from zslflax import distributed
from zslflax.data.packing import pack_batches
from zslflax.distributed import AXIS
from zslflax.losses import contrastive
from zslflax.losses.contrastive import OBJECTIVES
from zslflax.models.bert import BertConfig
from zslflax.training import flops
from zslflax.training.forward import tower_features
from zslflax.training.gradients import compute_gradients
from zslflax.training.step import TrainStep, train_step
from zslflax.training.teacher import without_shared_towers
from zslflax.training.train_state import student_variables

# For tests that need no other values, so that their step is compiled once.
COMMON = {
    "objective__image_image_weight": 0.3,
    "objective__text_text_weight": 0.2,
    "objective__soft_ramp_steps": 3,
}
FROZEN_TEXT = (("text/tower", -1),)


@pytest.fixture(scope="module")
def variables():
    return init_variables(MODEL)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_four_devices_do_what_one_does(variables, objective):
    batches = [make_batch(0), make_batch(1, all_valid=False)]
    one, four = (run_steps(make_config(objective, **COMMON), variables, batches, devices) for devices in (1, 4))
    for (state1, metrics1), (state4, metrics4) in zip(one, four):
        assert_close(metrics1, metrics4, atol=1e-5)
        assert_close(state1, state4, atol=1e-5)
    assert float(one[1][1]["pairs"]) == N - 2


def test_packed_captions_on_four_devices_make_the_update_of_padded_ones_on_one(variables):
    batches = [make_batch(0), make_batch(1, all_valid=False)]
    packed = pack_batches(map(dict, batches), rows=3, width=8, parts=4)
    for (wanted, wanted_metrics), (state, metrics) in zip(
        run_steps(make_config(**COMMON), variables, batches),
        run_steps(make_config(**COMMON), variables, packed, devices=4),
        strict=True,
    ):
        assert metrics.pop("truncated") == 0.0
        assert_close(metrics, wanted_metrics, atol=1e-5)
        assert_close(state, wanted, atol=1e-5)


def test_truncated_captions_of_all_devices_are_counted(variables):
    batch = make_batch(0)
    lengths = batch["text_mask"].sum(axis=1).reshape(4, 2)
    packed = pack_batches([dict(batch)], 1, 8, 4)
    ((_, metrics),) = run_steps(make_config("info_nce"), variables, packed, devices=4)
    # Of two captions in a row of eight, those are cut that exceed half of it or what the shorter one leaves.
    cut = lengths > np.maximum(4, 8 - lengths.min(axis=1, keepdims=True))
    assert metrics["truncated"] == cut.sum() > 0


@pytest.mark.parametrize("batch_norm", ["batch", "ema", "student"])
def test_update_is_that_of_the_papers_equation(variables, batch_norm):
    """α · InfoNCE + (1 − α) · cross-entropy with the teacher's softmax, written out for the whole batch at once."""
    c = make_config(objective__alpha=0.3, teacher__batch_norm=batch_norm)
    batches = [make_batch(0), make_batch(1)]
    (after_one, _), (after_two, metrics) = run_steps(c, variables, batches)
    batch = batches[1]

    def embed(params, batch_stats, train):
        images = (batch["image"],)
        apply = functools.partial(MODEL.apply, {"params": params, "batch_stats": batch_stats})
        if train:
            with_axis = lambda *x: apply(*x, True, method="encode_image", mutable=["batch_stats"])[0]
            v = jax.vmap(with_axis, axis_name=AXIS)(*(x[None] for x in images))[0]
        else:
            v = apply(*images, method="encode_image")
        return v, apply(batch["text"], batch["text_mask"], method="encode_text")

    embed = jax.jit(embed, static_argnames="train")
    own = {"batch": None, "ema": after_one.teacher_batch_stats, "student": after_one.batch_stats}[batch_norm]
    v, t = embed(after_one.teacher_params, own or after_one.batch_stats, train=own is None)
    soft = [jax.nn.softmax(s / 0.1, axis=-1) for s in (v @ t.T, t @ v.T)]

    def loss(params):
        towers = {m: params[m] for m in ("image", "text")}
        v, t = embed(towers, after_one.batch_stats, train=True)
        scale, soft_scale = (jnp.exp(params["objective"][f"log_{kind}logit_scale"]) for kind in ("", "soft_"))
        total = 0.0
        for s, targets in zip((v @ t.T, t @ v.T), soft):
            info_nce = -jnp.mean(jnp.diag(jax.nn.log_softmax(scale * s)))
            distillation = -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(soft_scale * s), axis=-1))
            total += 0.5 * (0.3 * info_nce + 0.7 * distillation)
        return total

    value, grads = jax.jit(jax.value_and_grad(loss))(after_one.params)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    rate = 0.1 * 0.5 * (1 + np.cos(np.pi * 1 / STEPS))  # of the second step
    initial = {**variables["params"], "objective": contrastive.init_params(c.objective)}
    trace = jax.tree.map(lambda old, first: (old - first) / 0.1, initial, after_one.params)
    expected = jax.tree.map(lambda p, g, m: p - rate * (g + 0.9 * m), after_one.params, grads, trace)
    assert_close(after_two.params, expected, atol=2e-5)


def test_teacher_is_the_moving_average_of_the_students(variables):
    c = make_config(**COMMON)  # the warm-up is far below its decay of 0.9
    history = run_steps(c, variables, [make_batch(i) for i in range(2)])
    for part in ("params", "batch_stats"):
        average = {m: variables["params"][m] for m in ("image", "text")} if part == "params" else variables[part]
        for k, (state, _) in enumerate(history, start=1):
            student = {m: state.params[m] for m in ("image", "text")} if part == "params" else state.batch_stats
            d = (1 + k) / (10 + k)
            average = jax.tree.map(lambda a, s: d * a + (1 - d) * s, average, student)
        assert_close(getattr(history[-1][0], f"teacher_{part}"), average, atol=1e-6)


def test_the_average_of_batch_statistics_begins_anew_where_the_size_of_images_changes(variables):
    c = make_config(**COMMON, model__image__schedule=((3, 1),))
    (first, _), (second, _) = run_steps(c, variables, [make_batch(i) for i in range(2)])
    d = 2 / 11  # of a first update; that of the parameters has 3 / 12
    expected = jax.tree.map(lambda a, s: d * a + (1 - d) * s, first.teacher_batch_stats, second.batch_stats)
    assert_close(second.teacher_batch_stats, expected, atol=1e-6)
    plain, _ = run_steps(make_config(**COMMON), variables, [make_batch(i) for i in range(2)])[1]
    assert_close(second.teacher_params, plain.teacher_params, atol=1e-6)


def test_a_frozen_tower_stays_and_its_output_can_stand_in_for_the_text(variables):
    c = make_config(freeze=FROZEN_TEXT, optimizer__weight_decay=0.1)
    batches = [make_batch(i) for i in range(2)]
    features = jax.jit(functools.partial(MODEL.apply, variables, method="text_features"))
    with_features = [
        {"image": b["image"], "valid": b["valid"], "text_features": np.asarray(features(b["text"], b["text_mask"]))}
        for b in batches
    ]
    from_text, from_features = run_steps(c, variables, batches), run_steps(c, variables, with_features)
    state = from_text[-1][0]
    before, after = variables["params"]["text"], student_variables(state)["params"]["text"]
    jax.tree.map(np.testing.assert_array_equal, after["tower"], before["tower"])
    assert np.any(after["projection"]["kernel"] != before["projection"]["kernel"])
    assert "tower" not in state.params["text"] and "tower" not in state.teacher_params["text"]
    assert_close(from_text[-1], from_features[-1], atol=1e-5)


def test_a_frozen_tower_runs_once_for_student_and_teacher(variables, monkeypatch):
    runs = []

    def counted(model, variables, batch, modality, *, train, rngs=None):
        runs.append((modality, train))
        return tower_features(model, variables, batch, modality, train=train, rngs=rngs)

    monkeypatch.setattr("zslflax.training.forward.tower_features", counted)
    run_steps(make_config(freeze=FROZEN_TEXT, teacher__batch_norm="ema"), variables, [make_batch(0)])
    assert sorted(runs) == [("image", False), ("image", True), ("text", False)]


FIXED_TEACHER = {"teacher__kind": "checkpoint", "teacher__workdir": "elsewhere"}


def test_a_fixed_teacher_may_have_another_architecture(variables):
    other = make_two_tower(bert=BertConfig(40, 24, 2, 2, 48, TOKENS, dropout=0.0))
    batch, teacher = make_batch(0), init_variables(other, seed=5)
    c = make_config(objective__alpha=0.0, **FIXED_TEACHER)
    ((state, metrics),) = run_steps(c, variables, [batch], fixed_teacher=teacher, teacher_model=other)
    assert state.teacher_params == {} and state.teacher_batch_stats == {}
    v, t = jax.jit(other.apply)(teacher, batch["image"], batch["text"], batch["text_mask"])
    soft = [jax.nn.softmax(s / 0.1, axis=-1) for s in (v @ t.T, t @ v.T)]
    assert metrics["soft_entropy"] == pytest.approx(
        np.mean([-np.sum(p * np.log(p), -1) for p in map(np.asarray, soft)]), rel=1e-4
    )


def test_a_fixed_teacher_shares_the_students_frozen_tower(variables):
    c = make_config(freeze=FROZEN_TEXT, **FIXED_TEACHER)
    teacher = {**variables, "params": jax.tree.map(lambda x: 1.1 * x, variables["params"])}
    teacher["params"]["text"]["tower"] = variables["params"]["text"]["tower"]
    shared = without_shared_towers(teacher, {"text": {"tower": variables["params"]["text"]["tower"]}})
    assert "tower" not in shared["params"]["text"] and "tower" in shared["params"]["image"]
    whole, without = (run_steps(c, variables, [make_batch(0)], fixed_teacher=t) for t in (teacher, shared))
    assert_close(whole[-1], without[-1], atol=1e-6)


def test_a_non_finite_step_changes_nothing(variables):
    state, arguments = make_state(make_config(optimizer__learning_rate=1e12), variables, devices=4)
    step, history = map_step(arguments, 4), [state]
    for i in range(4):
        state, _ = step(state, {}, split_batch(make_batch(i), 4))
        history.append(jax.device_get(state))
    failed = int(state.failed_step)
    assert 0 < failed < 4 and int(state.step) == failed
    before, after = history[failed], history[-1]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after.params))
    jax.tree.map(np.testing.assert_array_equal, before.replace(failed_step=after.failed_step), after)


@pytest.mark.parametrize("kind", ["ema", "none"])
def test_an_update_that_overflows_changes_nothing_although_loss_and_gradient_are_finite(variables, kind):
    c = make_config("info_nce", teacher__kind=kind, optimizer__lr_multipliers=((".*", 1e30),))
    c.optimizer.learning_rate = 1e30
    ((state, metrics),) = run_steps(c, variables, [make_batch(0)])
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert int(state.failed_step) == 0 and int(state.step) == 0
    initial = {m: variables["params"][m] for m in ("image", "text")}
    jax.tree.map(np.testing.assert_array_equal, {m: state.params[m] for m in initial}, initial)


def test_dropout_differs_between_steps_and_devices_but_not_between_runs(variables):
    model = make_two_tower(bert=BertConfig(40, 16, 1, 2, 32, TOKENS, dropout=0.5))
    c = make_config("info_nce", optimizer__learning_rate=0.0)
    state, arguments = make_state(c, variables, model, devices=4)
    step = map_step(arguments, 4)
    same_pairs = {k: np.concatenate([v[:2]] * 4).reshape(4, 2, *v.shape[1:]) for k, v in make_batch(0).items()}
    losses = []
    for _ in range(2):
        moved, metrics = step(state, {}, same_pairs)
        losses.append((float(metrics["loss"]), float(step(moved, {}, same_pairs)[1]["loss"])))
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]


def test_logit_scales_stay_in_their_range(variables):
    c = make_config(objective__log_logit_scale=4.6, optimizer__learning_rate=100.0)
    ((state, metrics),) = run_steps(c, variables, [make_batch(0)])
    low, high = contrastive.LOG_LOGIT_SCALE_RANGE
    assert {float(value) for value in state.params["objective"].values()} <= {np.float32(low), np.float32(high)}
    assert 1.0 <= metrics["logit_scale"] <= 100.0001


def test_steps_of_configs_that_differ_in_nothing_that_they_see_share_what_is_compiled(variables):
    shared = lambda **fields: TrainStep({}, **make_state(make_config(**fields), variables)[1]).shared
    step = shared(data__threads=1)
    assert shared(data__threads=2, name="other", log_every=7) is step
    for fields in ({"objective": "otter"}, {"seed": 1}, {"steps": 5}, {"optimizer__clip_norm": 1.0}):
        assert shared(**fields) is not step


def test_a_mapped_step_donates_its_state_and_is_traced_once(variables, monkeypatch):
    state, arguments = make_state(make_config(), variables, devices=4)
    step, traces = TrainStep({}, **arguments), []
    counted = lambda *args: traces.append(1) or compute_gradients(*args)
    monkeypatch.setattr("zslflax.training.step.compute_gradients", counted)
    batches = [distributed.shard(make_batch(i)) for i in range(2)]
    before = jax.tree.leaves(state)
    for batch in batches:
        state, _ = step(state, batch)
    assert all(leaf.is_deleted() for leaf in before) and not any(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    assert len(traces) == 1
    plan = step.shared.mapped.lower(state, {}, batches[0]).compile().memory_analysis()
    assert plan.alias_size_in_bytes >= sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    of_device = jax.make_jaxpr(functools.partial(train_step, **arguments), axis_env=[(AXIS, 4)])
    jaxpr = of_device(state, {}, {name: x[0] for name, x in batches[0].items()}).jaxpr
    assert step.flops == flops.count(jaxpr).total() > 0
