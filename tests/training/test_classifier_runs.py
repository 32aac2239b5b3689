"""Whole runs of classifiers: two generations, prompts as teacher, resumption, export, and what is refused."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from tests.testing.configs import COMPILATION_CACHE
from tests.testing.images import COLOURS, jpeg, write
from tests.testing.runs import act_at_batch, assert_same_bits, assert_same_run, read_metrics, read_state
from zslflax import checkpoint, predict
from zslflax.config import default_config
from zslflax.config_checks import validate
from zslflax.data.preprocess import record_image
from zslflax.data.sources.opening import open_source
from zslflax.data.views import evaluation_view
from zslflax.files import read_json
from zslflax.inference.classifier import Classifier
from zslflax.inference.predictor import Predictor
from zslflax.inference.restore import build_model
from zslflax.training.classes import resolve_class_names
from zslflax.training.evaluate import evaluate_run
from zslflax.training.initial_state import create_state
from zslflax.training.input import host_batches, with_reasons
from zslflax.training.loop import train
from zslflax.training.setup import open_sources, open_train_sources

NAMES = sorted(COLOURS)


@pytest.fixture
def base_config(tiny_config, colour_folder) -> ConfigDict:
    """A run of six steps that learns the labels of colours."""
    c = default_config()
    c.name, c.steps, c.batch_size, c.log_every, c.compute_dtype = "colours", 6, 16, 2, "float32"
    c.compilation_cache = str(COMPILATION_CACHE)
    c.model.image.name, c.model.image.size = "vit_nano4", 16
    c.objective.name, c.objective.rotation_weight, c.teacher.kind = "cross_entropy", 2.0, "none"
    c.optimizer.learning_rate, c.optimizer.no_decay, c.optimizer.drops = 0.05, (), ((0.5, 0.1),)
    c.data.train = (f"folder:{colour_folder}",)
    c.eval.every, c.eval.batch_size, c.checkpoint.every = 3, 16, 3
    c.eval.sets.test.data = f"folder:{colour_folder}"
    return c


@pytest.fixture
def generation_0(base_config, tmp_path) -> Path:
    validate(base_config)
    assert train(base_config, tmp_path / "generation_0")
    return tmp_path / "generation_0"


def later_generation(config: ConfigDict, teacher: Path) -> ConfigDict:
    """The config of generation 1."""
    config.objective.name, config.objective.rotation_weight = "logit_distillation", 1.0
    config.teacher.kind, config.teacher.workdir, config.init_from = "checkpoint", str(teacher), str(teacher)
    validate(config)
    return config


def prompt_config(config: ConfigDict, teacher: Path, tmp_path: Path) -> ConfigDict:
    """The config of a student of a zero-shot model."""
    (tmp_path / "sentences.json").write_text(json.dumps({name: [f"{name} things", f"it is {name}"] for name in NAMES}))
    config.objective.name, config.objective.sentences = "prompt_distillation", str(tmp_path / "sentences.json")
    config.objective.fairness_weight, config.objective.reasons_share = 0.1, 0.5
    config.teacher.kind, config.teacher.workdir = "checkpoint", str(teacher)
    config.features.folder, config.model.class_names = str(tmp_path / "features"), tuple(NAMES)
    validate(config)
    return config


def test_two_generations(base_config, generation_0, tmp_path):
    (*_, last) = read_metrics(generation_0)
    assert {"train/rotation_accuracy", "train/accuracy", "eval/test/hit@1"} <= last.keys()
    assert read_json(generation_0 / "config.json")["model"]["class_names"] == NAMES

    config = later_generation(base_config, generation_0)
    config.model.class_names = resolve_class_names(config, open_sources(config))
    model, _ = build_model(config)
    start, _ = create_state(config, model, pretrained=True)
    saved = read_state(generation_0, 6)
    assert_same_bits(saved["params"]["image"], start.params["image"])  # the start is a copy of generation 0
    assert start.params["objective"] == {}

    config.model.class_names = ()
    assert train(config, tmp_path / "generation_1")
    first = read_metrics(tmp_path / "generation_1")[0]
    assert first["train/distil_loss"] < 0.2 * last["train/label_loss"]  # it begins at its teacher
    assert read_state(tmp_path / "generation_1", 6)["params"].keys() == {"image", "objective"}


def test_a_stopped_run_resumes_bit_for_bit(base_config, generation_0, tmp_path, monkeypatch):
    def fail() -> None:
        raise OSError("the disk is away")

    with monkeypatch.context() as context, pytest.raises(OSError, match="away"):
        act_at_batch(context, 6, fail)
        train(base_config, tmp_path / "stopped")
    assert checkpoint.complete_steps(tmp_path / "stopped")[-1] < 6
    assert train(base_config, tmp_path / "stopped")
    assert_same_run(generation_0, tmp_path / "stopped")


def test_a_student_of_prompts_learns_resumes_and_is_exported(
    base_config, finished_workdir, tmp_path, monkeypatch, capsys
):
    config = prompt_config(base_config, finished_workdir, tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(config, whole)
    (*_, last) = read_metrics(whole)
    assert {"train/agreement", "train/reason_loss", "train/fairness_loss", "train/confident"} <= last.keys()

    shutil.copytree(whole, parts)
    for step in checkpoint.complete_steps(parts):
        if step > 3:
            shutil.rmtree(parts / checkpoint.FOLDER / str(step))
    assert train(config, parts)
    assert_same_bits(read_state(whole, 6), read_state(parts, 6))

    classifier = Predictor.restore(whole)
    assert isinstance(classifier, Classifier) and classifier.class_names == tuple(NAMES)
    classifier.export(tmp_path / "export")
    files = sorted(path.name for path in (tmp_path / "export").iterdir())
    assert files == ["README.md", "config.json", "zslflax.safetensors"]
    card = (tmp_path / "export" / "README.md").read_text()
    assert "pipeline_tag: image-classification\n" in card and "An image classifier of 4 classes." in card
    assert "text_encoder" not in card
    exported = Predictor.restore(tmp_path / "export")
    images = sorted(Path(config.data.train[0].removeprefix("folder:")).glob("*/0.png"))
    assert exported.classify(images) == classifier.classify(images)
    (answer,) = exported.classify(images[0], probabilities=True)
    assert all(score == probability for _, score, probability in answer)
    probabilities = exported.encode_image(images)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, rtol=1e-5)
    assert "reason_head" not in str(exported.variables.keys()) and "objective" not in exported.variables["params"]
    best = exported.classify(images[0], top_k=1)[0][0]
    assert best == (NAMES[probabilities[0].argmax()], pytest.approx(probabilities[0].max()))
    assert {name for name, _ in exported.classify(images[0], ["red", "blue"])[0]} == {"red", "blue"}
    assert exported.search("red", images, top_k=4)[0][0] == probabilities[:, NAMES.index("red")].argmax()
    with pytest.raises(ValueError, match="has 4 classes, and 'rod' is not among them; nearest: red"):
        exported.classify(images, ["rod", "blue"])

    monkeypatch.setattr(sys, "argv", ["predict", str(images[0]), f"--model={tmp_path / 'export'}", "--json", "--top=1"])
    predict.main()
    out, err = capsys.readouterr()
    assert json.loads(out)["classes"][0]["name"] == best[0]
    assert f"no --class-names: the 4 classes of the classifier are taken ({', '.join(NAMES)})" in err

    metrics = evaluate_run(whole)
    labels = [NAMES.index(path.parent.name) for path in sorted(images[0].parents[1].glob("*/*.png"))]
    answers = classifier.encode_image(sorted(images[0].parents[1].glob("*/*.png"))).argmax(axis=1)
    assert metrics["eval/test/hit@1"] == pytest.approx(np.mean(answers == labels))


def test_the_moving_average_refines_the_labels_and_is_what_the_run_ships(base_config, finished_workdir, tmp_path):
    config = prompt_config(base_config, finished_workdir, tmp_path)
    config.objective.sentences, config.objective.refine_weight, config.objective.refine_from = "", 0.5, 2
    config.eval.templates, config.objective.choose_templates = ("a {} thing", "{}"), 1
    assert train(config, tmp_path / "whole")
    first, *_, last = read_metrics(tmp_path / "whole")
    assert first["train/refined"] == 0.0 and last["train/refined"] == 1.0  # of steps 1 and 2, and with no threshold
    assert {"eval/test/hit@1", "eval/test/student/hit@1"} <= last.keys()
    saved = read_state(tmp_path / "whole", 6)
    assert_same_bits(
        Predictor.restore(tmp_path / "whole").variables["params"]["image"], saved["teacher_params"]["image"]
    )

    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    for step in checkpoint.complete_steps(tmp_path / "parts"):
        if step > 3:
            shutil.rmtree(tmp_path / "parts" / checkpoint.FOLDER / str(step))
    assert train(config, tmp_path / "parts")
    assert_same_bits(saved, read_state(tmp_path / "parts", 6))


def test_the_weak_view_is_the_crop_of_evaluation(base_config, finished_workdir, tmp_path):
    config = prompt_config(base_config, finished_workdir, tmp_path)
    source = open_source(config.data.train[0], config.data, "train", captions=False)
    plain = next(host_batches(config, [source], None, 1, 0))
    config.objective.refine_weight = 0.5
    batch, view = next(host_batches(config, [source], None, 1, 0)), evaluation_view(config)
    assert batch.keys() - plain.keys() == {"weak_image"}
    np.testing.assert_array_equal(batch["image"], plain["image"])
    wanted = [view(record_image(source[i]), i, 0) for i in batch["index"].tolist()]
    np.testing.assert_array_equal(batch["weak_image"], np.stack(wanted))


def test_a_student_of_prompts_takes_images_alone_and_labels_need_classes(base_config, tmp_path):
    for i in range(3):
        write(tmp_path / "images" / f"{i}.jpg", jpeg(i))
    base_config.data.train, base_config.model.class_names = (f"folder:{tmp_path / 'images'}",), tuple(NAMES)
    with pytest.raises(ValueError, match="holds no captions"):
        open_train_sources(base_config)
    base_config.objective.name = "prompt_distillation"
    (source,) = open_train_sources(base_config)
    assert len(source) == 3 and source.read_annotations(0)["label"] == ()


def test_a_share_of_the_images_has_reasons_always_the_same(base_config):
    base_config.objective.reasons_share = 0.25
    source = open_source(base_config.data.train[0], base_config.data, "train", captions=False)
    seen = {}
    batches = with_reasons(base_config, [source], host_batches(base_config, [source], None, 1, 0))
    for batch, _ in zip(batches, range(6)):
        for index, has_reasons in zip(batch["index"].tolist(), batch["has_reasons"].tolist()):
            assert seen.setdefault(index, has_reasons) == has_reasons
    assert sum(seen.values()) == 6 and len(seen) == 24


def test_classes_may_be_fewer_than_those_of_the_data(base_config, tmp_path):
    (tmp_path / "names.txt").write_text("red\nblue\n")
    base_config.model.class_names = (str(tmp_path / "names.txt"),)
    base_config.batch_size, base_config.eval.sets.test.data = 8, ""
    assert train(base_config, tmp_path / "run")
    assert Predictor.restore(tmp_path / "run").class_names == ("red", "blue")
    assert read_json(tmp_path / "run" / "data.json", list)[0]["samples"] == 12


def test_what_a_classifier_cannot_learn_from_is_refused(base_config, generation_0, finished_workdir, tmp_path):
    def refused(match: str, config: ConfigDict, **fields: object) -> None:
        config = config.copy_and_resolve_references()
        config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
        with pytest.raises(ValueError, match=match):
            validate(config)
            train(config, tmp_path / "refused")

    (tmp_path / "one.txt").write_text("red\n")
    refused("there is only one class, 'red'", base_config, model__class_names=(str(tmp_path / "one.txt"),))
    refused("the class name 'red' comes twice", base_config, model__class_names=("red", "blue", "red"))
    refused("1 classes that the images lack, such as 'rod'", base_config, model__class_names=("rod", "blue"))
    two_towers = base_config.copy_and_resolve_references()
    two_towers.model.text.tokenizer, two_towers.model.class_names = "package:none", ("red", "blue")
    refused("trains two towers, which have no classes", two_towers, objective__name="info_nce")
    refused("learns from labels", base_config, teacher__kind="checkpoint", teacher__workdir="runs/x")

    later = later_generation(base_config.copy_and_resolve_references(), generation_0)
    refused("has 4 classes and the student 2, which differ in green, yellow", later, model__class_names=("red", "blue"))
    refused("takes images of 16 pixels, the student of 24", later, model__image__size=24)
    refused("is a model with a text tower, but .* needs a classifier", later, teacher__workdir=str(finished_workdir))
    refused("learns from a teacher, but teacher.kind is none", later, teacher__kind="none", teacher__workdir="")
    refused("learns from a fixed teacher", later, teacher__kind="ema", teacher__workdir="")

    prompts = prompt_config(base_config.copy_and_resolve_references(), finished_workdir, tmp_path)
    refused("is a classifier, but .* needs a model with a text tower", prompts, teacher__workdir=str(generation_0))
    refused("features.folder is empty", prompts, features__folder="")
    (tmp_path / "few.json").write_text('{"red": ["red things"]}')
    few = str(tmp_path / "few.json")
    refused("no sentences for 3 of the 4 classes, such as 'blue'; nearest: red", prompts, objective__sentences=few)
    refused("refine_weight is 2.0, expected a share", prompts, objective__refine_weight=2.0, objective__refine_from=0)
    refused("refine_from is 1000, but the run has 6 steps", prompts, objective__refine_weight=0.5)
    refused("choose_templates is 1, but eval.templates has 1", prompts, objective__choose_templates=1)
    refused("reasons_share is 2", prompts, objective__reasons_share=2.0)
