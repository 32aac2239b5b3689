"""Training on kept features: the same run as with the towers in the step, without reading images."""

import itertools

import jax
import numpy as np
import pytest

from tests.testing.runs import act_at_batch, assert_same_run, read_metrics, read_state
from tests.testing.training import assert_close
from zslflax import features as command
from zslflax.data import crops, images
from zslflax.data.sources import shapes
from zslflax.data.sources.webdataset import WebDataset
from zslflax.data.views import training_views
from zslflax.errors import StorageError, UserError
from zslflax.evaluation.caption_noise import analyse_source
from zslflax.inference.predictor import Predictor
from zslflax.inference.restore import build_model
from zslflax.training import loop
from zslflax.training.evaluate import evaluate_run
from zslflax.training.frozen_features import open_image_tower, open_kept_features
from zslflax.training.initial_state import create_state


@pytest.fixture
def config(tiny_config, tmp_path):
    """A run whose towers are both frozen, with their features on disk."""
    tiny_config.freeze = (("image/tower", -1), ("text/tower", -1))
    tiny_config.features.folder, tiny_config.features.dtype = str(tmp_path / "features"), "float32"
    return tiny_config


@pytest.fixture
def center_crops(monkeypatch):
    """Training images in the crop of evaluation, where steps read images."""

    def crop(image, size, rng, scale, flip, out):
        out[...] = crops.resize_center_crop(image, size, round(1.15 * size))

    monkeypatch.setattr(crops, "random_resized_crop", crop)


def assert_close_runs(expected, workdir, atol, without=()):
    """The last state and all metrics but some agree."""
    assert_close(read_state(expected, 6)["params"], read_state(workdir, 6)["params"], atol)
    for a, b in zip(read_metrics(expected), read_metrics(workdir), strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - without:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("micro_batch, duplicates", [(0, "negative"), (2, "positive")])
def test_a_run_on_features_is_the_run_that_computes_the_same_crops_in_its_steps(
    config, center_crops, tmp_path, micro_batch, duplicates
):
    config.micro_batch, config.objective.duplicates = micro_batch, duplicates
    loop.train(config, tmp_path / "kept")
    config.features.folder = ""
    loop.train(config, tmp_path / "computed")
    assert_close_runs(tmp_path / "computed", tmp_path / "kept", atol=1e-6)


def test_a_second_run_computes_nothing_and_reads_no_image(config, tmp_path, monkeypatch, caplog):
    loop.train(config, tmp_path / "first")
    monkeypatch.setattr(images, "decode", None)
    monkeypatch.setattr("zslflax.evaluation.zero_shot.draw_predictions", lambda *_: Drawing)  # reads a few images
    with caplog.at_level("INFO", logger="zslflax"):
        loop.train(config, tmp_path / "second")
    assert "image features: 0 of 120 are still to be computed" in caplog.text
    assert_same_run(tmp_path / "first", tmp_path / "second")


def test_an_evaluation_and_the_noise_tool_read_no_image_whose_features_were_kept(config, tmp_path, monkeypatch):
    loop.train(config, tmp_path / "run")
    folders = sorted((tmp_path / "features").iterdir())
    with monkeypatch.context() as context:
        context.setattr(images, "decode", None)
        context.setattr("zslflax.data.text_features.TextFeatures.compute", None)
        context.setattr("zslflax.evaluation.zero_shot.draw_predictions", lambda *_: Drawing)
        context.setattr("zslflax.evaluation.caption_noise.draw_pairs", lambda *_: Drawing)
        kept = evaluate_run(tmp_path / "run", {"eval.bootstrap_resamples": 0})
        predictor = Predictor.restore(tmp_path / "run")
        features_of = open_kept_features(predictor, predictor.config)
        summary = analyse_source(predictor, "shapes", 0.1, tmp_path / "noise", features_of)
    read = evaluate_run(tmp_path / "run", {"eval.bootstrap_resamples": 0, "features.folder": ""})
    assert kept == pytest.approx(read, abs=1e-6) and summary["pairs"] == 96
    assert sorted((tmp_path / "features").iterdir()) == folders


def test_an_evaluation_makes_no_folder_for_what_the_run_has_not_kept(config, tmp_path):
    loop.train(config, tmp_path / "run")
    folders = sorted((tmp_path / "features").iterdir())
    evaluate_run(tmp_path / "run", {"eval.bootstrap_resamples": 0, "eval.resize_factor": 1.5})
    assert sorted((tmp_path / "features").iterdir()) == folders


class Drawing:
    save = staticmethod(lambda path, *_: path.write_bytes(b""))


@pytest.mark.parametrize("views", [1, 3])
def test_a_run_on_features_that_was_killed_goes_on_to_the_same_bits(config, tmp_path, monkeypatch, views):
    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    config.features.views, config.features.dtype = views, "float16"
    loop.train(config, tmp_path / "whole")
    config.features.folder = str(tmp_path / "others")
    with monkeypatch.context() as context:
        act_at_batch(context, 6, kill)
        with pytest.raises(Killed):
            loop.train(config, tmp_path / "parts")
    loop.train(config, tmp_path / "parts", changed=True)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_tower_that_is_frozen_until_a_step_is_trained_on_images_from_then_on(config, center_crops, tmp_path):
    config.freeze = (("image/tower", 3), ("text/tower", -1))
    config.optimizer.name, config.optimizer.learning_rate = "sgd", 0.1  # AdamW makes much of rounding in its first step
    loop.train(config, tmp_path / "kept")
    start = create_state(config, build_model(config)[0], pretrained=False)[0].params["image"]["tower"]
    unfrozen = read_state(tmp_path / "kept", 6)["params"]["image"]["tower"]
    changes = jax.tree.map(lambda a, b: np.abs(np.asarray(a) - b).max(), start, unfrozen)
    assert max(jax.tree.leaves(changes)) > 1e-3
    config.features.folder = ""
    loop.train(config, tmp_path / "computed")
    # The norm counts the gradient of a tower that is frozen for now, which is not computed where its features are kept.
    assert_close_runs(tmp_path / "computed", tmp_path / "kept", atol=2e-5, without={"train/grad_norm"})
    config.features.folder = str(tmp_path / "features")
    with pytest.MonkeyPatch.context() as context:  # resumes where images are read, and where features are
        act_at_batch(context, 6, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, tmp_path / "parts")
    loop.train(config, tmp_path / "parts")
    assert_same_run(tmp_path / "kept", tmp_path / "parts")


def test_unreadable_images_are_masked_and_named(config, tmp_path, monkeypatch):
    config.data.max_bad_fraction = 1.0
    decode, calls = images.decode, itertools.count()
    broken = lambda data, **options: decode(data if next(calls) % 2 else b"damaged", **options)
    monkeypatch.setattr(images, "decode", broken)
    config.eval.sets.test.data = ""
    loop.train(config, tmp_path / "first")
    monkeypatch.setattr(images, "decode", None)  # what is unreadable is not read again
    loop.train(config, tmp_path / "second")
    assert_same_run(tmp_path / "first", tmp_path / "second")
    assert all(4 < line["train/pairs"] < 12 for line in read_metrics(tmp_path / "first"))


def test_the_command_computes_what_a_run_needs(config, tmp_path, monkeypatch, caplog):
    command.compute_features(config)
    monkeypatch.setattr("zslflax.data.image_features.ImageFeatures.compute", None)
    monkeypatch.setattr("zslflax.evaluation.zero_shot.draw_predictions", lambda *_: Drawing)
    with caplog.at_level("INFO", logger="zslflax"):
        command.compute_features(config)
        config.eval.sets.test.data = "shapes"
        loop.train(config, tmp_path / "run")
    assert "features of 120 images are in" in caplog.text


def test_the_command_knows_the_layers_that_compare_a_student_with_a_wider_teacher(config, finished_workdir, caplog):
    config.teacher.kind, config.teacher.workdir = "checkpoint", str(finished_workdir)
    config.objective.name, config.objective.feature_weight, config.model.embed_dim = "info_nce", 1.0, 6
    config.freeze += (("objective/feature_heads", 2),)
    config.optimizer.lr_multipliers = (("objective/feature_heads", 0.1),)
    with caplog.at_level("INFO", logger="zslflax"):
        command.compute_features(config)
    assert "features of 120 images are in" in caplog.text


def test_another_tower_or_mean_has_features_of_its_own(config, tmp_path):
    c = config.data.shapes
    source = WebDataset(shapes.ensure_shards(c.root, train=c.train, test=c.test, size=c.size).train)
    model, _ = build_model(config)
    state, _ = create_state(config, model, pretrained=False)

    def missing(tower=None):
        tower = state.frozen_params["image"]["tower"] if tower is None else tower
        opened = open_image_tower(config, build_model(config)[0], tower, state.batch_stats)
        return opened.features_of(source, training_views(config)).missing().size

    features = open_image_tower(config, model, state.frozen_params["image"]["tower"], {})
    features.features_of(source, training_views(config)).fill()
    assert missing() == 0
    config.seed = 7  # of the run, not of the features
    assert missing() == 0
    assert missing(jax.tree.map(lambda x: x + 1e-6, state.frozen_params["image"]["tower"])) == 96
    for field, value in (
        ("model.image.mean", (0.5, 0.5, 0.4)),
        ("model.image.std", (0.5, 0.5, 0.4)),
        ("compute_dtype", "bfloat16"),
        ("features.dtype", "bfloat16"),
        ("eval.resize_factor", 1.3),
    ):
        before = config.copy_and_resolve_references()
        config.update_from_flattened_dict({field: value})
        assert missing() == 96, field
        config.update(before)
    assert missing() == 0


def test_what_cannot_work_is_refused(config, finished_workdir, tmp_path):
    config.features.folder = str(tmp_path / "file" / "features")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=f"{tmp_path}/file/features/.* cannot be written"):
        loop.train(config, tmp_path / "a")
    config.features.folder = str(tmp_path / "features")
    config.teacher.kind, config.teacher.workdir = "checkpoint", str(finished_workdir)
    with pytest.raises(UserError, match="the teacher in .* has another image tower, which needs them"):
        loop.train(config, tmp_path / "b")
    config.teacher.kind, config.teacher.workdir, config.freeze = "ema", "", ()
    with pytest.raises(UserError, match="no tower is frozen.*set features.folder=''"):
        loop.train(config, tmp_path / "c")
    config.features.folder = ""
    with pytest.raises(UserError, match="features.folder is empty"):
        command.compute_features(config)
