"""The shipped configs: each trains when it is shrunk, and the quick start learns."""

import pytest

from tests.testing.configs import CONFIG_FILES, MINILM, ROOT, load_config
from tests.testing.images import COLOURS
from tests.testing.runs import read_metrics
from zslflax.config import eval_set, is_classifier
from zslflax.config_checks import validate
from zslflax.inference.prompts import resolve_templates
from zslflax.models import mobilenet, resnet, resnet12, vit
from zslflax.models.mobilenet import Stage
from zslflax.training import loop


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_a_shipped_config_trains_two_steps_when_it_is_shrunk(
    path, tiny_config, finished_workdir, colour_folder, tmp_path, monkeypatch
):
    """With its own optimiser, objective, precision and freezing; smaller towers, fewer and smaller images."""
    monkeypatch.setitem(resnet.RESNETS, "resnet50", ((1, 1), True))
    monkeypatch.setitem(resnet12.RESNET12S, "resnet12", (4, 6, 8))
    stages = Stage(1, 3, 1, 1, 4), Stage(1, 3, 2, 2, 8)
    for name in ("mobilenet_v2", "efficientnet_lite0"):
        monkeypatch.setitem(mobilenet.MOBILENETS, name, mobilenet.MOBILENETS[name]._replace(stages=stages))
    monkeypatch.setitem(vit.VITS, "vit_b16", (16, 32, 1, 2))
    monkeypatch.setitem(vit.DINOV2, "dinov2_b14", (16, 32, 1, 2))
    c = load_config(path)
    resolve_templates(c)
    validate(c)
    c.steps, c.batch_size, c.eval.batch_size, c.optimizer.warmup_steps = 2, 16, 16, 1
    c.model.image.pretrained = c.model.text.pretrained = ""
    c.model.text.tokenizer, c.model.text.scratch = MINILM, tiny_config.model.text.scratch
    c.model.image.size = 32
    c.features.folder = c.features.folder and str(tmp_path / "features")
    data = "shapes"
    if is_classifier(c):
        data, c.model.class_names = f"folder:{colour_folder}", tuple(sorted(COLOURS))
        c.teacher.workdir = str(finished_workdir) if c.teacher.kind == "checkpoint" else ""
    c.data.train, c.data.shapes, c.compilation_cache = (data,), tiny_config.data.shapes, ""
    with c.unlocked():
        c.eval.sets = {"test": eval_set(data=data)}
    loop.train(c, tmp_path)
    last = read_metrics(tmp_path)[-1]
    assert last["step"] == 2 and 0 < last["train/loss"] < 100 and "eval/test/hit@1" in last


def test_the_quick_start_learns_when_it_is_shrunk(tmp_path, shapes_root):
    """It learns colours at least, in a few seconds: four times as many hits as chance among 120 names."""
    c = load_config(ROOT / "configs" / "demo.py")
    c.steps, c.batch_size = 60, 64
    c.optimizer.warmup_steps = 10
    c.objective.soft_ramp_steps = 40
    c.features.folder = str(tmp_path / "features")
    c.data.shapes.update(root=str(shapes_root), train=1_000, test=200)
    c.eval.every = c.checkpoint.every = 60
    c.eval.templates = c.eval.templates[1:2]  # the encoder of real size takes a while for each prompt
    loop.train(c, tmp_path)
    last = read_metrics(tmp_path)[-1]
    chance = 2 / 120  # two true names, on average
    assert last["eval/test/hit@1"] > 4 * chance and last["eval/test/hit@10"] > 0.4
