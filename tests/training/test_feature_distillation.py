"""Steps and runs whose student learns the embeddings of a wider teacher (CLIP-KD)."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.losses import assert_equal
from tests.testing.runs import assert_same_bits, read_metrics, read_state
from tests.testing.training import (
    MODEL,
    WIDTH,
    N,
    assert_close,
    init_variables,
    make_batch,
    make_config,
    make_two_tower,
    run_steps,
)
from zslflax import checkpoint
from zslflax.data.packing import pack_batches
from zslflax.inference.predictor import Predictor
from zslflax.losses.contrastive import init_params
from zslflax.models.vit import ViT
from zslflax.training.loop import train

WIDE = 16
TEACHER = make_two_tower(ViT(2, 8, 1, 2), width=WIDE)
STUDENT = make_two_tower(ViT(2, 8, 1, 2))  # has no batch normalisation
BATCHES = [make_batch(0), make_batch(1, all_valid=False)]


@pytest.fixture(scope="module")
def teacher():
    return init_variables(TEACHER, seed=5)


@pytest.fixture(scope="module")
def variables():
    return init_variables(STUDENT)


def config(objective="info_nce", **fields):
    fixed = {"teacher__kind": "checkpoint", "teacher__workdir": "elsewhere", "objective__feature_weight": 5.0}
    return make_config(objective, optimizer__learning_rate=0.05, **fixed, **fields)


def run(c, variables, teacher, batches=BATCHES, devices=1, model=STUDENT):
    return run_steps(c, variables, batches, devices, model=model, fixed_teacher=teacher, teacher_model=TEACHER)


def test_the_update_is_that_of_the_equation(variables, teacher):
    """InfoNCE + w · (the squared distance to the teacher's embeddings), written out for the whole batch at once."""
    (state, metrics), *_ = run(config(), variables, teacher)
    batch = BATCHES[0]
    inputs = batch["image"], batch["text"], batch["text_mask"]
    wanted = jax.jit(TEACHER.apply)(teacher, *inputs)
    objective_params = init_params(config().objective, jax.random.key(2), WIDTH, WIDE)
    start = {**variables["params"], "objective": objective_params}

    def loss(params):
        v, t = STUDENT.apply({"params": {m: params[m] for m in ("image", "text")}}, *inputs)
        s = jnp.exp(params["objective"]["log_logit_scale"]) * v @ t.T
        total = -0.5 * jnp.mean(jnp.diag(jax.nn.log_softmax(s)) + jnp.diag(jax.nn.log_softmax(s.T)))
        for modality, x, target in zip(("image", "text"), (v, t), wanted):
            head = params["objective"]["feature_heads"][modality]
            x = x @ head["kernel"] + head["bias"]
            x = x / jnp.linalg.norm(x, axis=1, keepdims=True)
            total += 5.0 * jnp.mean(jnp.square(x - target))
        return total

    value, grads = jax.jit(jax.value_and_grad(loss))(start)
    np.testing.assert_allclose(metrics["loss"], value, rtol=1e-5)
    assert_close(jax.tree.map(lambda p, g: p - 0.05 * g, start, grads), state.params, atol=2e-6)
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads["objective"])) > 1e-4


@pytest.mark.parametrize("objective", ["info_nce", "self_distillation", "sigmoid"])
def test_four_devices_equal_one(objective, teacher):
    """With batch normalisation and invalid pairs."""
    normalised = init_variables(MODEL)
    one, four = (run(config(objective), normalised, teacher, devices=devices, model=MODEL) for devices in (1, 4))
    for a, b in zip(one, four, strict=True):
        assert_close(a, b, atol=1e-5)


def test_micro_batches_of_packed_captions_equal_the_whole(variables, teacher):
    packed = pack_batches(map(dict, BATCHES), rows=2, width=8, parts=N // 2)
    whole = run(config(), variables, teacher)
    few = run(config(micro_batch=2, objective__max_similarities=N), variables, teacher, packed, devices=2)
    for wanted, (state, metrics) in zip(whole, few, strict=True):
        assert metrics.pop("truncated") == 0.0
        assert_equal((state, metrics), wanted, tolerance=2e-5)


def test_features_of_frozen_towers_make_the_same_update(variables, teacher):
    c = config(freeze=(("text/tower", -1), ("image/tower", -1)))
    features = lambda b: {
        "image_features": STUDENT.apply(variables, b["image"], method="image_features"),
        "text_features": STUDENT.apply(variables, b["text"], b["text_mask"], method="text_features"),
    }
    with_features = [{**b, **jax.tree.map(np.asarray, features(b))} for b in BATCHES]
    for a, b in zip(run(c, variables, teacher), run(c, variables, teacher, with_features), strict=True):
        assert_close(a, b, atol=1e-5)


def test_the_layers_follow_learning_rate_multipliers(variables, teacher):
    c = config(optimizer__lr_multipliers=(("objective/feature_heads", 0.0),))
    (slow, _), (plain, _) = (run(c, variables, teacher, BATCHES[:1])[0] for c in (c, config()))
    heads, moved = (state.params["objective"]["feature_heads"] for state in (slow, plain))
    assert all(np.any(x != y) for x, y in zip(jax.tree.leaves(heads), jax.tree.leaves(moved)))
    jax.tree.map(np.testing.assert_array_equal, heads["image"]["bias"], np.zeros(WIDE, np.float32))
    jax.tree.map(np.testing.assert_array_equal, slow.params["image"], plain.params["image"])


def test_a_run_learns_a_wider_teachers_embeddings_resumes_and_is_exported(tiny_config, finished_workdir, tmp_path):
    c = tiny_config
    c.teacher.kind, c.teacher.workdir = "checkpoint", str(finished_workdir)
    c.objective.name, c.objective.feature_weight, c.model.embed_dim = "info_nce", 100.0, 6
    c.model.text.dropout, c.eval.sets.test.data = 0.0, ""
    assert train(c, tmp_path / "run")
    first, *_, last = read_metrics(tmp_path / "run")
    assert last["train/feature_loss"] < 0.9 * first["train/feature_loss"]
    saved = read_state(tmp_path / "run", 6)
    assert saved["params"]["objective"]["feature_heads"]["text"]["kernel"].shape == (6, 8)

    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for step in checkpoint.complete_steps(tmp_path / "again"):
        if step > 3:
            shutil.rmtree(tmp_path / "again" / checkpoint.FOLDER / str(step))
    assert train(c, tmp_path / "again")
    assert_same_bits(read_state(tmp_path / "again", 6), saved)

    predictor = Predictor.restore(tmp_path / "run", cache="")
    predictor.export(tmp_path / "exported")
    exported = Predictor.restore(tmp_path / "exported", cache="")
    assert exported.variables["params"]["objective"].keys() == {"log_logit_scale"}  # the layers are for training alone
    np.testing.assert_array_equal(exported.encode_text("red"), predictor.encode_text("red"))
