"""Evaluating a checkpoint of a run: it measures what the run measured, and more that is asked for."""

import json

import pytest
from PIL import Image

from tests.testing.runs import read_metrics
from zslflax.config_json import read_config, to_json
from zslflax.data.sources.shapes import ensure_shards
from zslflax.errors import UserError
from zslflax.training import loop
from zslflax.training.evaluate import evaluate_run


@pytest.mark.usefixtures("tiny_config")
def test_an_evaluation_repeats_that_of_the_run_and_leaves_its_files(trained_workdir, caplog, capsys):
    files = {path: path.read_bytes() for path in trained_workdir.rglob("*") if path.is_file()}
    with caplog.at_level("INFO", logger="zslflax"):
        evaluated = evaluate_run(trained_workdir)
    last = read_metrics(trained_workdir)[-1]
    for name, value in last.items():
        if name.startswith("eval/"):
            assert evaluated[name] == pytest.approx(value, abs=1e-6), name
    assert evaluated["eval/test/hit@1/low"] <= evaluated["eval/test/hit@1"] <= evaluated["eval/test/hit@1/high"]
    assert all(path.read_bytes() == content for path, content in files.items())

    written = json.loads((trained_workdir / "evaluation" / "6.json").read_text())
    data = {"test": {"data": "shapes", "samples": 24, "classes": 120}}
    assert written == {"step": 6, "data": data, "metrics": evaluated}
    assert json.loads(capsys.readouterr().out) == {"step": 6, **evaluated}
    assert "test: data shapes, samples 24, classes 120" in caplog.text and " ±" in caplog.text
    with Image.open(trained_workdir / "evaluation" / "6.png") as image:
        assert image.width > 600


@pytest.mark.usefixtures("tiny_config")
def test_overrides_add_a_test_set_and_change_prompts(trained_workdir):
    root = read_config(trained_workdir / "config.json").data.shapes.root
    overrides = {
        "eval.sets.more.data": "shapes",
        "eval.templates": ("a drawing of a {}.",),
        "eval.bootstrap_resamples": 0,
    }
    found = evaluate_run(trained_workdir, overrides | {"data.shapes.root": root}, step=3)
    assert found["eval/more/hit@1"] == found["eval/test/hit@1"]
    assert json.loads((trained_workdir / "evaluation" / "3.json").read_text())["data"].keys() == {"test", "more"}
    assert (trained_workdir / "evaluation" / "3-more.png").exists()
    with pytest.raises(UserError, match="--config.model.image.size is 32, but an evaluation takes that of the run, 16"):
        evaluate_run(trained_workdir, {"steps": 6, "model.image.size": 32})
    with pytest.raises(UserError, match="eval.bacth_size: there is no such field; nearest: eval.batch_size"):
        evaluate_run(trained_workdir, {"eval.bacth_size": 32})


@pytest.mark.usefixtures("tiny_config")
def test_an_evaluation_whose_files_cannot_be_written_still_prints_its_results(trained_workdir, caplog, capsys):
    (trained_workdir / "evaluation").write_text("in the way")
    found = evaluate_run(trained_workdir, {"eval.bootstrap_resamples": 0})
    assert json.loads(capsys.readouterr().out) == {"step": 6, **found}
    for name in ("6.png", "6.json"):
        assert f"{trained_workdir / 'evaluation' / name} cannot be written" in caplog.text


@pytest.mark.usefixtures("tiny_config")
def test_a_run_without_test_sets_has_nothing_to_evaluate(trained_workdir):
    config = read_config(trained_workdir / "config.json")
    config.eval.sets.test.data = ""
    (trained_workdir / "config.json").write_text(to_json(config))
    with pytest.raises(UserError, match="there is nothing to measure: give the data of a test set"):
        evaluate_run(trained_workdir)


def test_a_label_beyond_the_class_names_ends_a_run_before_its_first_step(tiny_config, tmp_path):
    shards = tiny_config.data.shapes
    shard = ensure_shards(shards.root, train=shards.train, test=shards.test, size=shards.size).test
    tiny_config.eval.sets.test.data, tiny_config.eval.sets.test.class_names = shard, "cat,dog"
    with pytest.raises(UserError, match=r"has the label \d+, but there are 2 names"):
        loop.train(tiny_config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
