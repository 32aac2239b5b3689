"""The whole update: over devices, against the equation written out for one, with frozen towers, and when it breaks."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from zslflax import distributed
from zslflax.config import default_config, set_objective
from zslflax.data.packing import pack_batches
from zslflax.losses import contrastive
from zslflax.losses.contrastive import OBJECTIVES
from zslflax.models.bert import Bert, BertConfig
from zslflax.models.two_tower import ProjectedTower, TwoTower
from zslflax.training import optimizer, train_state
from zslflax.training.step import AXIS, features, train_step

N, SIZE, TOKENS, STEPS = 8, 4, 6, 3
BERT = BertConfig(vocab_size=40, width=16, layers=1, heads=2, hidden=32, positions=TOKENS, dropout=0.0)


class Perceptron(nn.Module):
    """An image tower with batch normalisation, which compiles faster than one with convolutions."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Dense(8)(x.reshape(len(x), -1))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, axis_name=AXIS if train else None)(x)
        return nn.Dense(8)(nn.relu(x))


def two_towers(bert=BERT):
    image = ProjectedTower(Perceptron(), nn.Dense(12))
    return TwoTower(image, ProjectedTower(Bert(bert), nn.Dense(12)), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


MODEL = two_towers()


def batch_of(step, valid=True):
    rng = np.random.default_rng(step)
    lengths = rng.integers(1, TOKENS + 1, (N, 1))
    mask = np.ones(N, bool)
    mask[[1, 6]] = valid
    return {
        "image": rng.integers(0, 256, (N, SIZE, SIZE, 3), dtype=np.uint8),
        "text": rng.integers(0, 40, (N, TOKENS), dtype=np.int32),
        "text_mask": np.arange(TOKENS) < lengths,
        "valid": mask,
    }


@pytest.fixture(scope="module")
def variables():
    batch = batch_of(0)
    made = jax.jit(MODEL.init)(jax.random.key(0), batch["image"], batch["text"], batch["text_mask"])
    return {"params": made["params"], "batch_stats": made["batch_stats"]}


def config_of(objective="self_distillation", **fields):
    c = default_config()
    set_objective(c, objective)
    c.optimizer.learning_rate = 0.1
    c.objective.teacher_temperature = 0.1
    c.teacher.ema_decay = 0.9
    for name, value in fields.items():
        *path, leaf = name.split("__")
        functools.reduce(lambda node, key: node[key], path, c)[leaf] = value
    return c


# Where a test needs nothing else, so that its step is compiled once for all of them.
COMMON = {"objective__image_image": 0.3, "objective__text_text": 0.2, "objective__ramp_steps": 3}


def start(c, variables, devices=1, model=MODEL):
    params = {**variables["params"], "objective": contrastive.init_params(c.objective)}
    tx, frozen = optimizer.build(c, params, STEPS), optimizer.frozen_towers(params, c.freeze)
    state = train_state.create({**variables, "params": params}, tx, ema=c.teacher.kind == "ema", frozen=frozen)
    return distributed.replicate(state, devices), dict(model=model, tx=tx, config=c, frozen=frozen)


def run(c, variables, batches, devices=1, teacher=(), **more):
    """Takes a step for each batch; returns the states after each and their metrics."""
    state, fixed = start(c, variables, devices)
    step = functools.partial(train_step, **(fixed | more))
    step = jax.pmap(step, AXIS, in_axes=(None, None, 0), out_axes=(None, None), devices=jax.devices()[:devices])
    history = []
    for batch in batches:
        split = jax.tree.map(lambda x: x.reshape(devices, -1, *x.shape[1:]), batch)
        state, metrics = step(state, dict(teacher), split)
        history.append(jax.device_get((state, metrics)))
    return history


def assert_close(a, b, atol):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=atol), a, b)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_four_devices_do_what_one_does(variables, objective):
    batches = [batch_of(0), batch_of(1, valid=False)]
    one, four = (run(config_of(objective, **COMMON), variables, batches, devices) for devices in (1, 4))
    for (state1, metrics1), (state4, metrics4) in zip(one, four):
        assert_close(metrics1, metrics4, atol=1e-5)
        assert_close(state1, state4, atol=1e-5)
    assert float(one[1][1]["pairs"]) == N - 2


def test_packed_captions_on_four_devices_make_the_update_of_padded_ones_on_one(variables):
    batches = [batch_of(0), batch_of(1, valid=False)]
    packed = pack_batches(map(dict, batches), rows=3, width=8, parts=4)
    for (wanted, figures), (state, metrics) in zip(
        run(config_of(**COMMON), variables, batches),
        run(config_of(**COMMON), variables, packed, devices=4),
        strict=True,
    ):
        assert metrics.pop("truncated") == 0.0
        assert_close(metrics, figures, atol=1e-5)
        assert_close(state, wanted, atol=1e-5)


def test_truncated_captions_of_all_devices_are_counted(variables):
    batch = batch_of(0)
    lengths = batch["text_mask"].sum(axis=1).reshape(4, 2)
    ((_, metrics),) = run(config_of("info_nce"), variables, pack_batches([dict(batch)], 1, 8, 4), devices=4)
    # Of two captions in a row of eight, those are cut that exceed half of it or what the shorter one leaves.
    cut = lengths > np.maximum(4, 8 - lengths.min(axis=1, keepdims=True))
    assert metrics["truncated"] == cut.sum() > 0


@pytest.mark.parametrize("batch_norm", ["batch", "ema", "student"])
def test_the_update_is_the_papers_equation(variables, batch_norm):
    """α · InfoNCE + (1 − α) · cross-entropy with the teacher's softmax, written out for the whole batch at once."""
    c = config_of(objective__alpha=0.3, teacher__batch_norm=batch_norm)
    batches = [batch_of(0), batch_of(1)]
    (after_one, _), (after_two, metrics) = run(c, variables, batches)
    batch = batches[1]

    def embed(params, batch_stats, train):
        images = (batch["image"],)
        apply = functools.partial(two_towers().apply, {"params": params, "batch_stats": batch_stats})
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
        hard, distilled = (jnp.exp(params["objective"][f"{kind}_log_scale"]) for kind in ("hard", "soft"))
        total = 0.0
        for s, targets in zip((v @ t.T, t @ v.T), soft):
            info_nce = -jnp.mean(jnp.diag(jax.nn.log_softmax(hard * s)))
            distillation = -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(distilled * s), axis=-1))
            total += 0.5 * (0.3 * info_nce + 0.7 * distillation)
        return total

    value, grads = jax.jit(jax.value_and_grad(loss))(after_one.params)
    assert metrics["loss"] == pytest.approx(float(value), rel=1e-5)
    rate = 0.1 * 0.5 * (1 + np.cos(np.pi * 1 / STEPS))  # of the second step
    trace = jax.tree.map(lambda old, first: (old - first) / 0.1, dict_of(c, variables), after_one.params)
    expected = jax.tree.map(lambda p, g, m: p - rate * (g + 0.9 * m), after_one.params, grads, trace)
    assert_close(after_two.params, expected, atol=2e-5)


def dict_of(c, variables):
    return {**variables["params"], "objective": contrastive.init_params(c.objective)}


def test_the_teacher_is_the_average_of_students(variables):
    c = config_of(**COMMON)  # whose decay of 0.9 is far: this is the warm-up
    history = run(c, variables, [batch_of(i) for i in range(2)])
    for part in ("params", "batch_stats"):
        average = {m: variables["params"][m] for m in ("image", "text")} if part == "params" else variables[part]
        for k, (state, _) in enumerate(history, start=1):
            student = {m: state.params[m] for m in ("image", "text")} if part == "params" else state.batch_stats
            d = (1 + k) / (10 + k)
            average = jax.tree.map(lambda a, s: d * a + (1 - d) * s, average, student)
        assert_close(getattr(history[-1][0], f"teacher_{part}"), average, atol=1e-6)


def test_a_frozen_tower_stays_and_its_output_can_stand_in_for_the_text(variables):
    c = config_of(freeze=(("text/tower", -1),), optimizer__weight_decay=0.1)
    batches = [batch_of(i) for i in range(2)]
    towards = jax.jit(functools.partial(MODEL.apply, variables, method="text_features"))
    with_features = [
        {"image": b["image"], "valid": b["valid"], "text_features": np.asarray(towards(b["text"], b["text_mask"]))}
        for b in batches
    ]
    with_text, without = run(c, variables, batches), run(c, variables, with_features)
    state = with_text[-1][0]
    jax.tree.map(np.testing.assert_array_equal, state.params["text"]["tower"], variables["params"]["text"]["tower"])
    assert np.any(state.params["text"]["projection"]["kernel"] != variables["params"]["text"]["projection"]["kernel"])
    assert "tower" not in state.teacher_params["text"]
    assert_close(with_text[-1], without[-1], atol=1e-5)


def test_a_frozen_tower_runs_once_for_student_and_teacher(variables, monkeypatch):
    runs = []

    def counted(model, variables, batch, modality, *, train, rngs=None):
        runs.append((modality, train))
        return features(model, variables, batch, modality, train=train, rngs=rngs)

    monkeypatch.setattr("zslflax.step.features", counted)
    run(config_of(freeze=(("text/tower", -1),), teacher__batch_norm="ema"), variables, [batch_of(0)])
    assert sorted(runs) == [("image", False), ("image", True), ("text", False)]


def test_a_frozen_teacher_of_another_architecture(variables):
    other = two_towers(BertConfig(40, 24, 2, 2, 48, TOKENS, dropout=0.0))
    batch = batch_of(0)
    taught = jax.jit(other.init)(jax.random.key(5), batch["image"], batch["text"], batch["text_mask"])
    c = config_of(objective__alpha=0.0, teacher__kind="checkpoint", teacher__workdir="elsewhere")
    ((state, metrics),) = run(c, variables, [batch], teacher=taught, teacher_model=other)
    assert state.teacher_params == {} and state.teacher_batch_stats == {}
    v, t = jax.jit(other.apply)(taught, batch["image"], batch["text"], batch["text_mask"])
    soft = [jax.nn.softmax(s / 0.1, axis=-1) for s in (v @ t.T, t @ v.T)]
    assert metrics["soft_entropy"] == pytest.approx(
        np.mean([-np.sum(p * np.log(p), -1) for p in map(np.asarray, soft)]), rel=1e-4
    )


def test_a_frozen_teacher_shares_the_students_frozen_tower(variables):
    c = config_of(freeze=(("text/tower", -1),), teacher__kind="checkpoint", teacher__workdir="elsewhere")
    taught = {**variables, "params": jax.tree.map(lambda x: 1.1 * x, variables["params"])}
    taught["params"]["text"]["tower"] = variables["params"]["text"]["tower"]
    shared = train_state.without_shared(taught, variables["params"], ("text",))
    assert "tower" not in shared["params"]["text"] and "tower" in shared["params"]["image"]
    whole, without = (run(c, variables, [batch_of(0)], teacher=t, teacher_model=MODEL) for t in (taught, shared))
    assert_close(whole[-1], without[-1], atol=1e-6)


def test_a_step_that_is_not_finite_changes_nothing(variables):
    broken = {"params": jax.tree.map(jnp.copy, variables["params"]), "batch_stats": variables["batch_stats"]}
    state, fixed = start(config_of(optimizer__learning_rate=1e12), broken, 4)
    step = jax.pmap(functools.partial(train_step, **fixed), AXIS, in_axes=(None, None, 0), out_axes=(None, None))
    shard = lambda batch: jax.tree.map(lambda x: x.reshape(4, -1, *x.shape[1:]), batch)
    history = [state]
    for i in range(4):
        state, _ = step(state, {}, shard(batch_of(i)))
        history.append(jax.device_get(state))
    bad = int(state.failed_step)
    assert 0 < bad < 4 and int(state.step) == bad
    before, after = history[bad], history[-1]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(after.params))
    jax.tree.map(np.testing.assert_array_equal, before.replace(failed_step=after.failed_step), after)


def test_dropout_differs_between_steps_and_devices_but_not_between_runs(variables):
    model = two_towers(BertConfig(40, 16, 1, 2, 32, TOKENS, dropout=0.5))
    c = config_of("info_nce", optimizer__learning_rate=0.0)
    state, fixed = start(c, variables, 4, model)
    step = jax.pmap(functools.partial(train_step, **fixed), AXIS, in_axes=(None, None, 0), out_axes=(None, None))
    twice = batch_of(0)
    twice = {k: np.concatenate([v[:2]] * 4).reshape(4, 2, *v.shape[1:]) for k, v in twice.items()}
    losses = []
    for _ in range(2):
        moved, metrics = step(state, {}, twice)
        losses.append((float(metrics["loss"]), float(step(moved, {}, twice)[1]["loss"])))
    assert losses[0] == losses[1] and losses[0][0] != losses[0][1]


def test_scales_are_kept_in_their_range(variables):
    c = config_of(objective__log_scale=4.6, optimizer__learning_rate=100.0)
    (state, metrics), *_ = run(c, variables, [batch_of(0)])
    low, high = contrastive.LOG_LOGIT_SCALE_RANGE
    assert {float(value) for value in state.params["objective"].values()} <= {np.float32(low), np.float32(high)}
    assert 1.0 <= metrics["logit_scale"] <= 100.0001
