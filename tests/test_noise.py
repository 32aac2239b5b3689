"""The noise command: it finds pairs that are known to be mismatched, and training can leave them out."""

import csv
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from zslflax import checkpoint, noise
from zslflax.data.sources.opening import open_source
from zslflax.data.sources.subset import exclude_samples
from zslflax.errors import StorageError
from zslflax.evaluation.caption_noise import embed_pairs, pair_scores
from zslflax.inference.predictor import Predictor
from zslflax.models import vit
from zslflax.training import loop


@pytest.fixture
def noisy(tiny_config, monkeypatch):
    """Shapes of which a third have another image's caption, and a run that is long enough to tell colours apart."""
    monkeypatch.setitem(vit.VITS, "vit_nano4", (4, 32, 1, 2))
    tiny_config.data.shapes.update(train=2_000, test=24, size=16, noise=0.3)
    tiny_config.data.crop_scale = (0.6, 1.0)
    tiny_config.eval.sets.test.data, tiny_config.objective.name, tiny_config.teacher.kind = "", "info_nce", "none"
    tiny_config.objective.log_logit_scale, tiny_config.optimizer.learning_rate, tiny_config.optimizer.warmup_steps = (
        2.3,
        8e-3,
        20,
    )
    tiny_config.model.embed_dim, tiny_config.model.text.dropout, tiny_config.batch_size, tiny_config.steps = (
        32,
        0.0,
        64,
        160,
    )
    tiny_config.eval.every = tiny_config.checkpoint.every = 160
    return tiny_config


def mismatched(config) -> dict[str, bool]:
    """Whether each sample is mismatched according to the shards, by the name of the sample."""
    source = open_source("shapes", config.data, "train")
    truth = {}
    for path in source.paths:
        with tarfile.open(path) as shard:
            for member in shard.getmembers():
                if member.name.endswith(".json"):
                    about = json.loads(shard.extractfile(member).read())
                    truth[f"{path}:{member.name.removesuffix('.json')}"] = about["mismatched"]
    return truth


def test_mismatched_pairs_score_lowest_and_training_can_exclude_them(noisy, tmp_path, monkeypatch, capsys):
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
    pairs = embed_pairs(Predictor.restore(tmp_path / "run"), source, "shapes")
    auc = roc_auc_score(list(truth.values()), -pair_scores(pairs))
    assert auc > 0.7  # chance: 0.5 ± 0.013
    assert np.mean([truth[row["name"]] for row in worst]) > 1.5 * np.mean(list(truth.values()))

    # The same file as a filter.
    (source,) = exclude_samples([source], str(folder / "noise.csv"))
    names = {source[i]["name"] for i in range(len(source))}
    assert len(source) == len(names) == 1_600 and names == truth.keys() - {row["name"] for row in worst}
    noisy.data.exclude, noisy.steps = str(folder / "noise.csv"), 2
    loop.train(noisy, tmp_path / "cleaner")
    assert checkpoint.complete_steps(tmp_path / "cleaner") == [2]


def test_the_results_of_a_model_of_the_hub_are_not_in_a_folder_called_like_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    assert noise.own_folder("run") == Path("run")
    assert noise.own_folder("openai/clip-vit-base-patch32") == Path("runs/clip-vit-base-patch32")


def test_a_folder_that_cannot_be_written_is_refused_before_pairs_are_embedded(
    tiny_config, finished_workdir, tmp_path, monkeypatch, caplog
):
    (tmp_path / "file").write_text("")
    command = ["noise", f"--workdir={finished_workdir}", "--data=shapes", f"--to={tmp_path / 'file'}"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(StorageError, match=f"{tmp_path / 'file'} cannot be written: File exists"):
        noise.main()
    assert "readable" not in caplog.text
