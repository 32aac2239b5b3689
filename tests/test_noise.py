"""Noise analysis: exact figures, mismatched pairs found where they are known, training without them."""

import csv
import json
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from zslflax import noise
from zslflax.data.sources import subset
from zslflax.data.sources.opening import open_source
from zslflax.models import vit
from zslflax.training import checkpoint, loop


def units(rng, n, d=6):
    x = rng.standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.mark.parametrize("n, size, scale", [(40, 40, 5.0), (50, 16, 30.0), (7, 2, 100.0)])
def test_agreement_is_brute_force(n, size, scale):
    rng = np.random.default_rng(n)
    image_emb, text_emb = units(rng, n), units(rng, n)
    order = np.random.default_rng(3).permutation(n)
    own, other = [], []
    for batch in range(n // size):
        members = order[batch * size : (batch + 1) * size]
        for i in members:
            p = softmax([scale * np.dot(image_emb[i].astype(np.float64), text_emb[j]) for j in members])
            own.append(p[members == i].item())
            other.append(p[members != i].max())
    found = noise.agreement(image_emb, text_emb, scale, size, seed=3)
    assert found["on_diagonal_mean"] == pytest.approx(np.mean(own), rel=1e-4)
    assert found["off_diagonal_max"] == pytest.approx(np.mean(other), rel=1e-4)


def test_figures_of_clean_and_of_shuffled_pairs():
    """Pairs of orthogonal vectors: every softmax is known."""
    n, captions = 600, ["the same", "twice", "twice", *(f"caption {i}" for i in range(596)), "the same"]
    image_emb = np.eye(n, dtype=np.float32)
    clean = noise.analyse(noise.Pairs(np.arange(n), image_emb, image_emb, captions), scale=8.0)
    assert clean["pairs"] == 600 and list(clean["batches"]) == [512]
    others = np.exp(8.0) + 511
    assert clean["batches"][512]["on_diagonal_mean"] == pytest.approx(np.exp(8.0) / others, rel=1e-5)
    assert clean["batches"][512]["off_diagonal_max"] == pytest.approx(1 / others, rel=1e-5)
    assert clean["duplicate_captions"] == pytest.approx(4 / 600)
    assert clean["most_frequent_captions"] == {"the same": 2, "twice": 2}
    few = noise.analyse(noise.Pairs(np.arange(3), image_emb[:3], image_emb[[1, 2, 0]], captions[:3]), scale=8.0)
    assert list(few["batches"]) == [3]  # all of them, where there are fewer than the smallest batch
    assert few["batches"][3]["on_diagonal_mean"] == pytest.approx(1 / (np.exp(8.0) + 2), rel=1e-5)
    assert few["batches"][3]["off_diagonal_max"] == pytest.approx(np.exp(8.0) / (np.exp(8.0) + 2), rel=1e-5)


@pytest.fixture
def noisy(tiny, monkeypatch):
    """Scenes of which a third have another image's caption, and a run long enough to tell colours apart."""
    monkeypatch.setitem(vit.VITS, "vit_nano4", (4, 32, 1, 2))
    tiny.data.shapes.update(train=2_000, test=24, size=16, noise=0.3)
    tiny.data.crop_scale = (0.6, 1.0)
    tiny.eval.sets.test.data, tiny.objective.name, tiny.teacher.kind = "", "info_nce", "none"
    tiny.objective.log_logit_scale, tiny.optimizer.learning_rate, tiny.optimizer.warmup_steps = 2.3, 8e-3, 20
    tiny.model.embed_dim, tiny.model.text.dropout, tiny.batch_size, tiny.steps = 32, 0.0, 64, 160
    tiny.eval.every = tiny.checkpoint.every = 160
    return tiny


def mismatched(config) -> dict[str, bool]:
    """What the shards themselves say, by the samples' names."""
    source = open_source("shapes", config.data, "train")
    truth = {}
    for path in source.paths:
        with tarfile.open(path) as shard:
            for member in shard.getmembers():
                if member.name.endswith(".json"):
                    about = json.loads(shard.extractfile(member).read())
                    truth[f"{path}:{member.name.removesuffix('.json')}"] = about["mismatched"]
    return truth


def test_mismatched_pairs_are_the_worst_and_training_can_leave_them_out(noisy, tmp_path, monkeypatch, capsys):
    loop.train(noisy, tmp_path / "run")
    command = ["noise", f"--workdir={tmp_path / 'run'}", "--data=shapes", "--worst=0.2"]
    monkeypatch.setattr(sys, "argv", command)
    noise.main()
    figures = json.loads(capsys.readouterr().out)
    folder = tmp_path / "run" / "noise"
    assert figures == json.loads((folder / "noise.json").read_text()) and figures["pairs"] == 2_000
    assert figures["batches"]["512"]["on_diagonal_mean"] > 1.5 / 512  # chance is 1 / 512
    with open(folder / "noise.csv", newline="") as file:
        worst = list(csv.DictReader(file))
    assert list(worst[0]) == ["name", "score", "caption"] and len(worst) == 400
    scores = [float(row["score"]) for row in worst]
    assert scores == sorted(scores)
    with Image.open(folder / "noise.png") as picture:
        assert picture.width > 600 and len(picture.getcolors(1 << 20)) > 100

    truth = mismatched(noisy)
    source = open_source("shapes", noisy.data, "train")
    assert list(source.names()) == list(truth) == [source[i]["name"] for i in range(len(source))]
    found = noise.embed(noise.Predictor.restore(tmp_path / "run"), source, "shapes")
    auc = roc_auc_score(list(truth.values()), -noise.scores_of(found))
    assert auc > 0.7  # of chance, 0.5 ± 0.013
    assert np.mean([truth[row["name"]] for row in worst]) > 1.5 * np.mean(list(truth.values()))

    # The same file as a filter.
    (source,) = subset.exclude_samples([source], str(folder / "noise.csv"))
    names = {source[i]["name"] for i in range(len(source))}
    assert len(source) == len(names) == 1_600 and names == truth.keys() - {row["name"] for row in worst}
    noisy.data.exclude, noisy.steps = str(folder / "noise.csv"), 2
    loop.train(noisy, tmp_path / "cleaner")
    assert checkpoint.available(tmp_path / "cleaner") == [2]
