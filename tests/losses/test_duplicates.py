"""Pairs with the same image or caption as negatives, positives, or nothing: against brute force in float64."""

import numpy as np
import pytest

from tests.testing.losses import (
    STEP,
    assert_equal,
    distinct_params,
    normalise,
    objective_config,
    of_valid,
    run_objective,
)
from zslflax.losses.contrastive import OBJECTIVES
from zslflax.losses.pairs import Embeddings, PairIds

pytestmark = pytest.mark.usefixtures("strict_types")
N, D = 8, 5
# Pairs 0 and 3 have the same image; 1 and 2, and 4, 5 and 6, the same caption; 5 is not valid.
IMAGES = np.array([0, 1, 2, 0, 4, 5, 6, 7])
TEXTS = np.array([0, 1, 1, 3, 4, 4, 4, 7])
VALID = np.array([1, 1, 1, 1, 1, 0, 1, 1], bool)
words = lambda first, second: np.stack([first, second], axis=1).astype(np.uint32)
IDS = PairIds(words(IMAGES % 4, IMAGES // 4), words(0 * TEXTS, TEXTS))  # different ids may have one equal half

VARIANTS = [
    objective_config(name, duplicates=duplicates, **fields)
    for duplicates in ("positive", "ignored")
    for name, fields in [(name, {}) for name in OBJECTIVES]
    + [
        ("self_distillation", {"remove_diagonal": True, "teacher_temperature": 0.3, "text_text_weight": 0.4}),
        ("otter", {"remove_diagonal": False, "image_image_weight": 0.0}),
    ]
]
named = pytest.mark.parametrize("config", VARIANTS, ids=lambda o: f"{o.name}-{o.duplicates}-{o.remove_diagonal}")


@pytest.fixture(scope="module")
def pairs():
    """The student's embeddings, and the teacher's, which are wider."""
    rng = np.random.default_rng(0)
    random = lambda d: normalise(rng.normal(size=(N, d)))
    return Embeddings(random(D), random(D)), Embeddings(random(7), random(7))


def roles(o, i):
    """The positives of pair i, and the pairs that take part in its sums."""
    others = {j for j in np.flatnonzero(VALID) if j != i}
    duplicates = {j for j in others if IMAGES[j] == IMAGES[i] or TEXTS[j] == TEXTS[i]}
    if o.duplicates == "positive":
        return {i, *duplicates}, {i, *others}
    return {i}, {i, *others} - duplicates


def softmax(logits, over):
    """By index, over some of the indices."""
    total = sum(np.exp(logits[j]) for j in over)
    return {j: np.exp(logits[j]) / total for j in over}


def plan(o, fit):
    """The rows of the transport plan between the valid pairs, normalised; a cell without mass is left out."""
    pairs = np.flatnonzero(VALID)
    mass = {(i, j): np.exp(fit[i, j] / o.sinkhorn_regulariser) for i in pairs for j in allowed(o, i)}
    for _ in range(o.sinkhorn_iterations):
        for axis in (0, 1):
            sums = {k: sum(m for cell, m in mass.items() if cell[axis] == k) for k in pairs}
            mass = {cell: m / sums[cell[axis]] / len(pairs) for cell, m in mass.items()}
    rows = {i: sum(m for cell, m in mass.items() if cell[0] == i) for i in pairs}
    return {cell: m / rows[cell[0]] for cell, m in mass.items()}


def allowed(o, i):
    positives, part = roles(o, i)
    return part - positives if o.remove_diagonal else part


def brute_force(o, student, teacher):
    """The loss of each valid pair in float64, written out pair by pair."""
    (v, t), (tv, tt) = ([np.asarray(x, np.float64) for x in embeddings] for embeddings in (student, teacher))
    params = {name: float(value) for name, value in distinct_params(o).items()}
    scale, soft_scale = np.exp(params["log_logit_scale"]), np.exp(params.get("log_soft_logit_scale", 0.0))
    losses = np.zeros(N)
    weight = (1 - o.alpha) * min(1.0, (int(STEP) + 1) / max(o.soft_ramp_steps, 1))
    for s, cross in ((v @ t.T, tv @ tt.T), (t @ v.T, tt @ tv.T)):
        fit = cross + o.image_image_weight * tv @ tv.T + o.text_text_weight * tt @ tt.T
        transported = plan(o, fit) if o.name == "otter" else {}
        for i in np.flatnonzero(VALID):
            positives, part = roles(o, i)
            if o.name == "sigmoid":
                signs = {j: 1 if j in positives else -1 for j in part}
                logits = scale * (v @ t.T)[i] + o.logit_bias
                losses[i] += 0.5 * sum(np.log1p(np.exp(-signs[j] * logits[j])) for j in part)
                continue
            hard = {j: 1 / len(positives) for j in positives}
            if o.name == "label_smoothing":
                rest = part - positives
                hard = {j: (1 - o.smoothing) / len(positives) for j in positives}
                hard |= {j: o.smoothing / len(rest) for j in rest}
            predicted = softmax(scale * s[i], part)
            loss = -sum(p * np.log(predicted[j]) for j, p in hard.items())
            if o.name in ("self_distillation", "otter"):
                soft = softmax(fit[i] / o.teacher_temperature, allowed(o, i))
                if o.name == "otter":
                    soft = {j: transported[i, j] for j in allowed(o, i)}
                predicted = softmax(soft_scale * s[i], part)
                distilled = -sum(p * np.log(predicted[j]) for j, p in soft.items())
                loss = (1 - weight) * loss + weight * distilled
            losses[i] += 0.5 * loss
    return losses[VALID]


@named
def test_loss_of_each_pair_agrees_with_brute_force(config, pairs):
    losses, _, _ = run_objective(config, *pairs, VALID, ids=IDS)
    expected = brute_force(config, *pairs)
    np.testing.assert_allclose(losses["loss"][VALID], expected, rtol=3e-5)
    plain, _, _ = run_objective(objective_config(**{**config, "duplicates": "negative"}), *pairs, VALID)
    assert not np.allclose(plain["loss"][VALID], expected, rtol=1e-4)


@named
def test_chunks_on_four_devices_equal_the_whole_on_one(config, pairs):
    chunks = objective_config(**{**config, "max_similarities": N})  # a row at a time
    one = of_valid(run_objective(config, *pairs, VALID, 1, IDS), VALID)
    assert_equal(of_valid(run_objective(chunks, *pairs, VALID, 4, IDS), VALID), one)
    assert np.abs(one[2].image).max() > 1e-3  # there is a gradient to compare


@named
def test_a_batch_of_one_image_stays_finite(config, pairs):
    ids = PairIds(np.zeros_like(IDS.image), IDS.text)
    losses, params_grads, emb_grads = run_objective(config, *pairs, VALID, ids=ids)
    for leaf in (*losses.values(), *params_grads.values(), *emb_grads):
        assert np.isfinite(leaf).all()
    if config.duplicates == "ignored" and config.name == "info_nce":
        np.testing.assert_allclose(losses["loss"][VALID], 0.0, atol=1e-6)  # nothing is left to compare with
