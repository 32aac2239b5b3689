"""Micro-batches: the update of the whole batch in less memory, and what they mean for batch normalisation."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.losses import assert_equal
from tests.testing.training import MODEL, N, init_variables, make_batch, make_config, make_two_tower, run_steps
from zslflax.data.packing import pack_batches
from zslflax.distributed import AXIS
from zslflax.losses import contrastive
from zslflax.losses.contrastive import OBJECTIVES
from zslflax.losses.pairs import Embeddings
from zslflax.models.vit import ViT
from zslflax.training import flops, loop
from zslflax.training.gradients import compute_gradients
from zslflax.training.optimizer import build_optimizer
from zslflax.training.step import train_step
from zslflax.training.train_state import create_train_state

FEW = 2  # pairs at a time
BATCHES = [make_batch(0), make_batch(1, all_valid=False)]
VIT = make_two_tower(ViT(2, 8, 1, 2))


@pytest.fixture(scope="module")
def variables():
    return init_variables(VIT)


def run(config, variables, batches, devices=1, model=VIT):
    config.optimizer.learning_rate = 0.01  # a step that multiplies the gradient would multiply the rounding error
    return run_steps(config, variables, batches, devices, model=model)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_update_is_that_of_the_whole_batch(variables, objective):
    """Without batch normalisation; on one device, and on four that compute the losses in chunks."""
    fields = dict(objective__image_image_weight=0.3, objective__soft_ramp_steps=3)
    whole = run(make_config(objective, **fields), variables, BATCHES)
    one = run(make_config(objective, **fields, micro_batch=FEW), variables, BATCHES)
    chunks = make_config(objective, **fields, micro_batch=1, objective__max_similarities=N)  # a row in each
    four = run(chunks, variables, BATCHES, devices=4)
    for wanted, a, b in zip(whole, one, four, strict=True):
        assert_equal(a, wanted)
        assert_equal(b, wanted)
    moved = jax.tree.map(
        lambda old, new: np.abs(old - new).max(), variables["params"]["text"], wanted[0].params["text"]
    )
    assert min(moved["projection"].values()) > 1e-4  # there is an update to compare


def test_packed_captions_make_the_same_update(variables):
    packed = pack_batches(map(dict, BATCHES), rows=2, width=8, parts=N // FEW)
    whole = run(make_config(), variables, BATCHES)
    few = run(make_config(micro_batch=FEW), variables, packed, devices=2)
    for wanted, (state, metrics) in zip(whole, few, strict=True):
        assert metrics.pop("truncated") == 0.0
        assert_equal((state, metrics), wanted)


def test_duplicates_are_found_in_the_whole_batch(variables):
    """Pairs of one caption, on two devices and in other micro-batches: an update other than that of negatives."""
    ids = np.stack([np.arange(N), np.arange(N) * 7], axis=1).astype(np.uint32)
    batches = [{**batch, "image_id": ids, "text_id": ids % np.uint32(5)} for batch in BATCHES]
    c = make_config(objective__duplicates="positive")
    whole = run(c, variables, batches)
    few = make_config(objective__duplicates="positive", micro_batch=FEW, objective__max_similarities=N)
    packed = pack_batches(map(dict, batches), rows=2, width=8, parts=N // FEW)
    for wanted, (state, metrics) in zip(whole, run(few, variables, packed, devices=2), strict=True):
        assert metrics.pop("truncated") == 0.0
        assert_equal((state, metrics), wanted, tolerance=1e-4)  # rounding of packed rows, chunks and micro-batches
    negative = run(make_config(), variables, BATCHES)
    assert abs(negative[0][1]["loss"] - whole[0][1]["loss"]) > 1e-3


@pytest.mark.parametrize("cached", [False, True], ids=["text", "its features"])
def test_a_frozen_text_tower_makes_the_same_update(variables, cached):
    c = make_config(freeze=(("text/tower", -1),))
    whole = run(c, variables, BATCHES)
    batches = BATCHES
    if cached:
        features = lambda b: VIT.apply(variables, b["text"], b["text_mask"], method="text_features")
        batches = [
            {"image": b["image"], "valid": b["valid"], "text_features": np.asarray(features(b))} for b in BATCHES
        ]
    c.micro_batch = FEW
    for wanted, found in zip(whole, run(c, variables, batches), strict=True):
        assert_equal(found, wanted)


def test_each_micro_batch_has_the_same_dropout_in_both_passes():
    """Against the gradient of the same function of all micro-batches together, each with its own key."""
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(5, 3)), "objective": {"scale": np.float64(2.0)}}
    params, x = jax.tree.map(jnp.float32, params), jnp.float32(rng.normal(size=(6, 5)))

    def embed(params, x, key):
        kept = jax.random.bernoulli(key, 0.5, (len(x), 3))
        image = jnp.tanh(x @ params["w"]) * kept
        return Embeddings(image, image**2), {"mean": jnp.mean(x)}

    def loss(objective, emb):
        logits = objective["scale"] * emb.image @ emb.text.T
        return jnp.mean(jax.nn.logsumexp(logits, axis=1) - jnp.diag(logits)), jnp.max(logits)

    def whole(params):
        keys = jax.random.split(jax.random.key(7), 3)
        embeddings = [embed(params, part, key)[0] for part, key in zip(jnp.split(x, 3), keys)]
        return loss(params["objective"], jax.tree.map(lambda *parts: jnp.concatenate(parts), *embeddings))

    wanted, wanted_metric = jax.grad(whole, has_aux=True)(params)
    grads, metric, stats = compute_gradients(embed, loss, params, x, jax.random.key(7), num_micro_batches=3)
    assert_equal(grads, wanted)
    assert metric == pytest.approx(float(wanted_metric)) and stats["mean"] == pytest.approx(float(x.mean()), abs=1e-6)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted)) > 1e-3


@pytest.fixture(scope="module")
def normalised():
    """The variables of a model with batch normalisation."""
    return init_variables(MODEL)


def test_batch_normalisation_uses_a_micro_batch_and_running_statistics_move_once_a_step(normalised):
    ((state, _),) = run(make_config("info_nce", micro_batch=FEW), normalised, BATCHES[:1], model=MODEL)
    stats = state.batch_stats["image"]["tower"]["BatchNorm_0"]
    pixels = (BATCHES[0]["image"].reshape(N, -1, 3) / 255.0 - 0.5) / 0.25
    dense = normalised["params"]["image"]["tower"]["Dense_0"]
    inputs = (pixels.reshape(N, -1) @ dense["kernel"] + dense["bias"]).reshape(N // FEW, FEW, -1)
    np.testing.assert_allclose(stats["mean"], 0.1 * inputs.mean(axis=(0, 1)), atol=1e-5)  # the whole batch's, too
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * inputs.var(axis=1).mean(axis=0), atol=1e-5)


def test_four_devices_normalise_their_micro_batches_together(normalised):
    """The i-th pairs of all devices together equal a micro-batch of one device with the pairs in that order."""
    together = np.arange(N).reshape(4, 2).T.ravel()
    ordered = [{name: x[together] for name, x in batch.items()} for batch in BATCHES]
    one = run(make_config(micro_batch=4), normalised, ordered, model=MODEL)
    four = run(make_config(micro_batch=1), normalised, BATCHES, devices=4, model=MODEL)
    for a, b in zip(one, four, strict=True):
        assert_equal(a, b)


def test_statistics_of_a_frozen_tower_stay_exactly_the_same(normalised):
    c = make_config("info_nce", micro_batch=1, freeze=(("image/tower", -1),))
    six = {name: x[:6] for name, x in BATCHES[0].items()}
    stats = jax.tree.map(lambda x: x + np.float32(0.1), normalised["batch_stats"])
    ((state, _),) = run(c, {**normalised, "batch_stats": stats}, [six], model=MODEL)
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, stats)


def test_micro_batches_need_less_memory_and_one_more_forward_pass():
    """64 pairs, 4 at a time: XLA plans less than a third of the memory that it plans for all at once."""
    model, n, shape = make_two_tower(ViT(4, 32, 2, 2)), 64, jax.ShapeDtypeStruct
    batch = {"image": shape((n, 16, 16, 3), jnp.uint8), "text": shape((n, 6), jnp.int32)}
    batch |= {"text_mask": shape((n, 6), bool)}
    variables = jax.eval_shape(model.init, jax.random.key(0), *batch.values())

    def compiled(micro_batch):
        c = make_config("info_nce", teacher__kind="none", micro_batch=micro_batch)
        params = {**variables["params"], "objective": contrastive.init_params(c.objective)}
        tx = build_optimizer(c, params, 3)
        create = functools.partial(create_train_state, tx=tx, ema=False, frozen=())
        state = jax.eval_shape(create, {"params": params, "batch_stats": {}})
        step = functools.partial(train_step, model=model, teacher_model=model, tx=tx, config=c)
        step = jax.jit(jax.vmap(step, in_axes=(None, None, 0), out_axes=None, axis_name=AXIS))
        one = jax.tree.map(lambda x: shape((1, *x.shape), x.dtype), batch | {"valid": shape((n,), bool)})
        traced = step.trace(state, {}, one)
        return flops.count(traced.jaxpr).total(), traced.lower().compile().memory_analysis().temp_size_in_bytes

    (whole, large), (few, small) = compiled(0), compiled(4)
    assert small < large / 3
    assert few - whole == flops.count(jax.make_jaxpr(model.apply)(variables, *batch.values()).jaxpr).total()


def test_a_run_with_packed_captions_has_the_losses_of_the_whole_batch(tiny_config, tmp_path):
    c = tiny_config
    c.optimizer.name, c.optimizer.learning_rate, c.model.text.dropout = "sgd", 0.1, 0.0
    c.steps, c.log_every, c.eval.sets.test.data, c.model.text.pack_length = 2, 1, "", 16
    loop.train(c, tmp_path / "whole")
    c.micro_batch = 2
    loop.train(c, tmp_path / "few")
    whole, few = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "few"))
    for a, b in zip(map(json.loads, whole), map(json.loads, few), strict=True):
        assert a.keys() == b.keys()
        for name in ("train/loss", "train/grad_norm", "train/truncated", "train/in_batch_accuracy"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), (name, a["step"])
