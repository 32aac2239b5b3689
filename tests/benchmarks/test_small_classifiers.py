"""The study of small classifiers in benchmarks/: its labelled photographs, real runs of each part, and its tables."""

import argparse
import io
import json
import sys

import numpy as np
import pytest
from PIL import Image

from tests.testing.benchmarks import imported
from tests.testing.shards import write_tar

COLOURS = {"fox": (200, 100, 20), "sky / sea": (20, 40, 220), "leaf": (20, 180, 30), "rose": (220, 20, 60)}
UNSEEN = ("fox", "rose")


@pytest.fixture(scope="module")
def benchmarks():
    with imported("photos_labelled", "small_classifiers", "small_classifiers_report") as modules:
        yield modules


def image_of(name: str, seed: int) -> bytes:
    """A JPEG file of noise around the colour of a class."""
    pixels = np.random.default_rng(seed).normal(COLOURS[name], 30, (20, 20, 3)).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def photos_folder(tmp_path_factory):
    """Photographs with sentences of two classes, and test photographs of two more."""
    folder, names = tmp_path_factory.mktemp("photos"), list(COLOURS)
    seen = [name for name in names if name not in UNSEEN]
    train, test = [], []
    for i in range(48):
        name = seen[i % 2]
        train += [(f"{i:03}.jpg", image_of(name, i)), (f"{i:03}.txt", f"a {name}".encode())]
        train.append((f"{i:03}.json", json.dumps({"true": name}).encode()))
    for i in range(24):
        test += [(f"{i:03}.jpg", image_of(names[i % 4], 100 + i)), (f"{i:03}.cls", str(i % 4).encode())]
    write_tar(folder / "train-00000.tar", train)
    write_tar(folder / "test-00000.tar", test)
    (folder / "names.txt").write_text("\n".join(names) + "\n")
    (folder / "unseen.txt").write_text(",".join(UNSEEN) + "\n")
    (folder / "sentences.json").write_text(json.dumps({name: [f"a {name}", f"{name}s"] for name in names}))
    return folder


def test_the_labelled_shards_have_the_photographs_of_classes_with_sentences_alone(benchmarks, photos_folder, tmp_path):
    photos = benchmarks[0].LabelledPhotos(photos_folder, tmp_path)
    assert photos.names == ["sky / sea", "leaf"] == (tmp_path / "names.txt").read_text().splitlines()
    assert photos.labels.tolist() == [0, 1] * 6
    assert photos.test[1]["image"] == image_of("leaf", 102) and photos.test[1]["text"] == ()
    assert photos.train_labels.tolist() == [0, 1] * 24
    assert sorted(photos.novel.classes) == sorted(UNSEEN) and len(photos.novel) == 12


def test_each_run_comes_after_the_runs_that_it_needs(benchmarks):
    study = benchmarks[1]
    runs = list(study.plan_runs())
    assert len({run.name for run in runs}) == len(runs) and runs[0].part == "teacher"
    for run in runs:
        if run.method == "generation 1":
            assert runs.index(run._replace(method="rotations")) < runs.index(run)
    for tower in study.PIXELS:
        assert runs.index(study.Run("distil", "soft", tower)) < [run.part for run in runs].index("speed")


def test_every_run_has_a_config_of_its_part(benchmarks, photos_folder, tmp_path):
    labelled, study, _ = benchmarks
    arguments = argparse.Namespace(
        data=photos_folder, image_weights=tmp_path, folder=tmp_path, features=tmp_path / "features"
    )
    photos = labelled.LabelledPhotos(photos_folder, tmp_path / "data")
    configs = {run: study.make_config(run, arguments, photos) for run in study.plan_runs() if run.part != "speed"}
    objectives = {(run.part, run.method): c.objective.name for run, c in configs.items()}
    assert objectives["distil", "labels"] == objectives["few_shot", "plain"] == "cross_entropy"
    assert objectives["few_shot", "generation 1"] == "logit_distillation"
    assert all(c.seed == run.seed and c.name == run.name for run, c in configs.items())
    generation = configs[study.Run("few_shot", "generation 1", seed=1)]
    assert generation.init_from == generation.teacher.workdir == str(tmp_path / "few_shot-rotations-resnet_nano-1")


def test_a_teacher_and_a_student_are_trained_measured_and_reported(
    benchmarks, photos_folder, tmp_path, tiny_config, monkeypatch, capsys
):
    """Real runs with tiny towers: a teacher, and a student of it."""
    _, study, report = benchmarks
    make_config = study.make_config

    def small(run, arguments, photos):
        c = make_config(run, arguments, photos)
        class_names = c.model.class_names
        c.model = tiny_config.model.copy_and_resolve_references()
        c.model.class_names, c.batch_size, c.log_every = class_names, 16, 3
        c.compilation_cache, c.eval.batch_size, c.eval.class_cache = tiny_config.compilation_cache, 16, ""
        c.steps = c.eval.every = c.checkpoint.every = 6
        return c

    monkeypatch.setattr(study, "make_config", small)
    monkeypatch.setattr(study, "VIEWS", 2)
    monkeypatch.setattr(study, "EPISODES", {"ways": 2, "shots": (1, 5), "queries": 1, "episodes": 3})
    arguments = argparse.Namespace(
        data=photos_folder, image_weights=tmp_path, folder=tmp_path, features=tmp_path / "features"
    )
    arguments.results = tmp_path / "results.jsonl"
    photos = benchmarks[0].LabelledPhotos(photos_folder, tmp_path / "data")
    runs = [study.Run("teacher", "sigmoid", study.TEACHER), study.Run("distil", "reasons")]
    with monkeypatch.context() as context:
        context.setattr(study.loop, "train", lambda *_: False)  # as if asked to stop
        with pytest.raises(SystemExit):
            study.perform_run(runs[0], arguments, photos)
    for run in runs:
        study.perform_run(run, arguments, photos)
    lines = {line["name"]: line for line in study.read_lines(arguments.results)}
    assert list(lines) == [run.name for run in runs]
    for line in lines.values():  # what is measured here is what the run's own evaluation measured
        assert line["accuracy"] == pytest.approx(line["eval/test/hit@1"], abs=1e-4)
        assert sum(line["right"]) == round(12 * line["accuracy"]) and line["images"] == [6, 6]
    assert 0 <= lines[runs[0].name]["train/accuracy"] <= 1
    assert 0 <= lines[runs[0].name]["embedding/5-shot/logistic"] <= 1

    monkeypatch.setattr(sys, "argv", ["report", str(arguments.results)])
    report.main()
    printed = capsys.readouterr().out
    assert "| soft labels and reasons | 1 |" in printed and "| the teacher's | embedding | 1 |" in printed


def test_one_seed_is_compared_class_by_class_and_several_by_seed(benchmarks):
    report = benchmarks[2]
    line = lambda right: {"right": right, "images": [10, 10, 10], "accuracy": sum(right) / 30}
    own, baseline = {0: line([5, 7, 9])}, {0: line([4, 5, 6])}
    assert report.difference(own, baseline) == "+20.0 ± 24.8"  # 10, 20 and 30 points; 4.303 · 10 / √3
    assert report.format_mean(report.accuracies(own)) == "70.0 ± 49.7"
    own[1], baseline[1] = line([6, 8, 10]), line([6, 6, 6])
    assert report.difference(own, baseline) == "+20.0 ± 0.0"
    assert report.format_mean(report.accuracies(own)) == "75.0 ± 63.5"  # 70 and 80; 12.706 · 7.07 / √2
