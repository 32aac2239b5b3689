"""A few pairs at a time: the update of the whole batch, in less memory; what batch normalisation makes of it."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.losses.test_chunks import assert_equal
from tests.training.test_step import BERT, MODEL, N, batch_of, config_of, run
from zslflax.data.packing import pack_batches
from zslflax.losses import contrastive
from zslflax.losses.contrastive import OBJECTIVES, Embeddings
from zslflax.models.bert import Bert
from zslflax.models.two_tower import ProjectedTower, TwoTower
from zslflax.models.vit import ViT
from zslflax.training import flops, loop, optimizer, train_state
from zslflax.training.step import AXIS, gradients, train_step

FEW = 2  # pairs at a time
BATCHES = [batch_of(0), batch_of(1, valid=False)]
VIT = TwoTower(
    ProjectedTower(ViT(2, 8, 1, 2), nn.Dense(12)), ProjectedTower(Bert(BERT), nn.Dense(12)), (0.5,) * 3, (0.25,) * 3
)


def init(model):
    inputs = (BATCHES[0][name] for name in ("image", "text", "text_mask"))
    made = jax.jit(model.init)(jax.random.key(0), *inputs)
    return {"params": made["params"], "batch_stats": made.get("batch_stats", {})}


@pytest.fixture(scope="module")
def variables():
    return init(VIT)


def steps(c, variables, batches, devices=1, model=VIT):
    c.optimizer.learning_rate = 0.01  # a step that multiplies the gradient would multiply the rounding
    return run(c, variables, batches, devices, model=model)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_update_is_that_of_the_whole_batch(variables, objective):
    """Without batch normalisation; on one device, and on four whose objective is streamed."""
    fields = dict(objective__image_image=0.3, objective__ramp_steps=3)
    whole = steps(config_of(objective, **fields), variables, BATCHES)
    one = steps(config_of(objective, **fields, micro_batch=FEW), variables, BATCHES)
    four = steps(config_of(objective, **fields, micro_batch=1, objective__block=3), variables, BATCHES, 4)
    for wanted, a, b in zip(whole, one, four, strict=True):
        assert_equal(a, wanted)
        assert_equal(b, wanted)
    moved = jax.tree.map(
        lambda old, new: np.abs(old - new).max(), variables["params"]["text"], wanted[0].params["text"]
    )
    assert min(moved["projection"].values()) > 1e-4  # there is an update to compare


def test_packed_captions(variables):
    packed = pack_batches(map(dict, BATCHES), rows=2, width=8, parts=N // FEW)
    whole = steps(config_of(), variables, BATCHES)
    few = steps(config_of(micro_batch=FEW), variables, packed, devices=2)
    for wanted, (state, metrics) in zip(whole, few, strict=True):
        assert metrics.pop("truncated") == 0.0
        assert_equal((state, metrics), wanted)


@pytest.mark.parametrize("kept", [False, True], ids=["text", "its features"])
def test_a_frozen_text_tower(variables, kept):
    c = config_of(freeze=(("text/tower", -1),))
    whole = steps(c, variables, BATCHES)
    batches = BATCHES
    if kept:
        features = lambda b: VIT.apply(variables, b["text"], b["text_mask"], method="text_features")
        batches = [
            {"image": b["image"], "valid": b["valid"], "text_features": np.asarray(features(b))} for b in BATCHES
        ]
    c.micro_batch = FEW
    for wanted, found in zip(whole, steps(c, variables, batches), strict=True):
        assert_equal(found, wanted)


def test_each_micro_batch_has_the_same_dropout_in_both_passes():
    """Against the gradient of the same function, written out: with each part's own key, all parts together."""
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
        key = jax.random.key(7)
        parts = [embed(params, part, k)[0] for part, k in zip(jnp.split(x, 3), jax.random.split(key, 3))]
        return loss(params["objective"], jax.tree.map(lambda *parts: jnp.concatenate(parts), *parts))

    wanted, explained = jax.grad(whole, has_aux=True)(params)
    grads, (found, stats) = gradients(embed, loss, params, x, jax.random.key(7), parts=3)
    assert_equal(grads, wanted)
    assert found == pytest.approx(float(explained)) and stats["mean"] == pytest.approx(float(x.mean()), abs=1e-6)
    assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted)) > 1e-3


@pytest.fixture(scope="module")
def normalised():
    return init(MODEL)


def test_batch_normalisation_sees_a_micro_batch_and_its_running_statistics_move_once_a_step(normalised):
    ((state, _),) = steps(config_of("info_nce", micro_batch=FEW), normalised, BATCHES[:1], model=MODEL)
    stats = state.batch_stats["image"]["tower"]["BatchNorm_0"]
    pixels = (BATCHES[0]["image"].reshape(N, -1, 3) / 255.0 - 0.5) / 0.25
    dense = normalised["params"]["image"]["tower"]["Dense_0"]
    inputs = (pixels.reshape(N, -1) @ dense["kernel"] + dense["bias"]).reshape(N // FEW, FEW, -1)
    np.testing.assert_allclose(stats["mean"], 0.1 * inputs.mean(axis=(0, 1)), atol=1e-5)  # the whole batch's, too
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * inputs.var(axis=1).mean(axis=0), atol=1e-5)


def test_four_devices_normalise_their_micro_batches_together(normalised):
    """The i-th pair of each device, one at a time, is what one device has at a time if the pairs come in that order."""
    together = np.arange(N).reshape(4, 2).T.ravel()
    ordered = [{name: x[together] for name, x in batch.items()} for batch in BATCHES]
    one = steps(config_of(micro_batch=4), normalised, ordered, model=MODEL)
    four = steps(config_of(micro_batch=1), normalised, BATCHES, devices=4, model=MODEL)
    for a, b in zip(one, four, strict=True):
        assert_equal(a, b)


def test_what_is_frozen_does_not_move_by_rounding(normalised):
    c = config_of("info_nce", micro_batch=1, freeze=(("image/tower", -1),))
    six = {name: x[:6] for name, x in BATCHES[0].items()}
    stats = jax.tree.map(lambda x: x + np.float32(0.1), normalised["batch_stats"])
    ((state, _),) = steps(c, {**normalised, "batch_stats": stats}, [six], model=MODEL)
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, stats)


def test_less_memory_for_one_forward_pass_more():
    """64 pairs at once, or 4 at a time: XLA's plan is under a third."""
    model = TwoTower(ProjectedTower(ViT(4, 32, 2, 2), nn.Dense(12)), VIT.text, VIT.mean, VIT.std)
    shape, n = jax.ShapeDtypeStruct, 64
    batch = {"image": shape((n, 16, 16, 3), jnp.uint8), "text": shape((n, 6), jnp.int32)}
    batch |= {"text_mask": shape((n, 6), bool)}

    def compiled(micro_batch):
        c = config_of("info_nce", teacher__kind="none", micro_batch=micro_batch)
        made = jax.eval_shape(model.init, jax.random.key(0), *batch.values())
        params = {**made["params"], "objective": contrastive.init_params(c.objective)}
        tx = optimizer.build(c, params, 3)
        create = functools.partial(train_state.create, tx=tx, ema=False, frozen=())
        state = jax.eval_shape(create, {"params": params, "batch_stats": {}})
        step = functools.partial(train_step, model=model, tx=tx, config=c, frozen=())
        step = jax.jit(jax.vmap(step, in_axes=(None, None, 0), out_axes=None, axis_name=AXIS))
        one = jax.tree.map(lambda x: shape((1, *x.shape), x.dtype), batch | {"valid": shape((n,), bool)})
        traced = step.trace(state, {}, one)
        return flops.count(traced.jaxpr).total(), traced.lower().compile().memory_analysis().temp_size_in_bytes

    (whole, large), (few, small) = compiled(0), compiled(4)
    assert small < large / 3
    made = jax.eval_shape(model.init, jax.random.key(0), *batch.values())
    assert few - whole == flops.count(jax.make_jaxpr(model.apply)(made, *batch.values()).jaxpr).total()


def test_a_run_with_packed_captions_has_the_losses_of_the_whole_batch(tiny, tmp_path):
    tiny.optimizer.name, tiny.optimizer.learning_rate, tiny.model.text.dropout = "sgd", 0.1, 0.0
    tiny.steps, tiny.log_every, tiny.eval.sets.test.data, tiny.model.text.pack_length = 2, 1, "", 16
    loop.train(tiny, tmp_path / "whole")
    tiny.micro_batch = 2
    loop.train(tiny, tmp_path / "few")
    whole, few = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "few"))
    for a, b in zip(map(json.loads, whole), map(json.loads, few), strict=True):
        assert a.keys() == b.keys()
        for name in ("train/loss", "train/grad_norm", "train/truncated", "train/in_batch_accuracy"):
            assert b[name] == pytest.approx(a[name], rel=1e-5), (name, a["step"])
