"""Weights & Biases: the real client, offline, gets a run's metrics and figures, without passwords."""

import json
import sys

import pytest
from PIL import Image

from zslflax.errors import UserError
from zslflax.training import loop
from zslflax.training.wandb_run import ID_FILE, WandbRun


def test_a_missing_library_is_named_with_its_extra(tiny_config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r'pip install "zslflax\[wandb\]", or set wandb=""'):
        WandbRun(tiny_config, tmp_path)


@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_a_missing_key_is_a_line_that_says_what_to_set(require, tiny_config, tmp_path, monkeypatch):
    wandb = require("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    tiny_config.wandb = "shapes"
    with pytest.raises(UserError, match="wandb is 'shapes', .* API key .*WANDB_API_KEY or WANDB_MODE=offline"):
        WandbRun(tiny_config, tmp_path)
    wandb.teardown()  # it keeps what it read of the environment


@pytest.mark.filterwarnings("ignore")  # wandb's own
def test_a_run_sends_metrics_and_figures_and_continues_under_its_id(require, tiny_config, tmp_path, monkeypatch):
    wandb = require("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tiny_config.wandb = "shapes"
    tiny_config.steps = tiny_config.eval.every = 2
    assert loop.train(tiny_config, tmp_path)
    run_id = json.loads((tmp_path / ID_FILE).read_text())["id"]
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert folder.name.endswith(run_id)
    assert list(folder.glob("files/media/images/predictions_*.png"))

    tiny_config.data.exclude = "https://me:pa55@example.org/a.csv"
    again = WandbRun(tiny_config, tmp_path)
    assert again.run.id == run_id and again.run.config["steps"] == 2
    assert again.run.config["data"]["exclude"] == "https://example.org/a.csv"
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    again.log(3, {"train/loss": 1.0, "train/grad_norm": None})
    again.log_figure(3, "predictions", tmp_path / "a.png")
    again.finish()
    assert wandb.run is None
    logs = b"".join(path.read_bytes() for path in tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert b"train/loss" in logs and b"eval/test/hit@1" in logs and b"pa55" not in logs
