"""The few-shot command on a contrastive run: every number is that of the metrics on images embedded one at a time."""

import json
import re
import sys

import numpy as np
import pytest
from PIL import Image

from tests.testing.images import COLOURS, PER_COLOUR
from tests.testing.shards import write_tar
from zslflax import few_shot as command
from zslflax.data.views import Views
from zslflax.errors import UserError
from zslflax.evaluation import few_shot
from zslflax.evaluation.few_shot_sets import embed_views, format_metrics, open_labelled, single_labels
from zslflax.inference.predictor import Predictor


@pytest.fixture
def run(monkeypatch, capsys, tiny_config, finished_workdir, colour_folder):
    def call(*flags: str) -> dict[str, float]:
        arguments = [
            "few_shot",
            f"--workdir={finished_workdir}",
            f"--data=folder:{colour_folder}",
            "--queries=2",
            *flags,
        ]
        monkeypatch.setattr(sys, "argv", arguments)
        command.main()
        return json.loads(capsys.readouterr().out)

    return call


def test_a_contrastive_run_is_measured_by_its_features_and_embeddings(run, finished_workdir, colour_folder):
    found = run("--ways=3", "--shots=2", "--episodes=40", "--views=3", f"--train=folder:{colour_folder}")
    predictor = Predictor.restore(finished_workdir)
    size = predictor.config.model.image.size
    views = Views(3, size, scale=(0.7, 1.0), flip=True, seed=0)
    images = [np.array(Image.open(colour_folder / name / f"{i}.png")) for name in COLOURS for i in range(PER_COLOUR)]
    labels = np.repeat(np.arange(4), PER_COLOUR)
    centre = predictor.image_outputs(images)
    augmented = predictor.image_outputs(
        np.stack([views(image, i, v) for i, image in enumerate(images) for v in range(3)])
    )
    assert np.linalg.norm(centre["embedding"], axis=1) == pytest.approx(1.0, abs=1e-5)
    assert predictor.project_image(centre["features"]) == pytest.approx(predictor.encode_image(images), abs=1e-5)
    for output, emb in centre.items():
        support_views = augmented[output].reshape(len(images), 3, -1)
        expected = few_shot.few_shot(
            emb, labels, support_views=support_views, ways=3, queries=2, shots=2, num_episodes=40
        )
        for name, value in expected.items():
            assert found[f"{output}/2-shot/{name}"] == pytest.approx(value, abs=0.01)
        probe = few_shot.linear_probe(emb, labels, emb, labels)["accuracy"]
        assert found[f"{output}/probe"] == pytest.approx(probe, abs=0.05)
        assert found[f"{output}/neighbours"] == few_shot.nearest_neighbours(emb, labels, emb, labels)["accuracy"]
    assert found["features/2-shot/logistic"] > 0.6  # colours are easy, and chance is a third
    assert "features/2-shot/logistic" in format_metrics(found)


def test_images_are_resized_as_in_evaluation(tiny_config, finished_workdir, colour_folder):
    predictor = Predictor.restore(finished_workdir)
    predictor.config.eval.interpolation = "bicubic"
    embedded = embed_views(predictor, open_labelled(f"folder:{colour_folder}"), num_views=0)
    np.testing.assert_allclose(embedded.centre["embedding"], predictor.encode_image(colour_folder), atol=1e-5)


def test_shards_with_numbers_for_classes_are_measured_as_a_folder_is(run, colour_folder, tmp_path):
    images = [(name, colour_folder / name / f"{i}.png") for name in COLOURS for i in range(PER_COLOUR)]
    members = [
        (f"{i:03}.{extension}", contents)
        for i, (name, path) in enumerate(images)
        for extension, contents in (("png", path.read_bytes()), ("cls", str(list(COLOURS).index(name)).encode()))
    ]
    shard = write_tar(tmp_path / "test.tar", members)
    (tmp_path / "names.txt").write_text("\n".join(COLOURS))
    (tmp_path / "novel.txt").write_text("red\nblue\nyellow\n")
    flags = ["--ways=2", "--shots=1", "--episodes=20", "--views=0"]
    names, novel = f"--class-names={tmp_path}/names.txt", f"--classes={tmp_path}/novel.txt"
    assert run(*flags, f"--data={shard}", names, novel) == run(*flags, novel)
    _, labels = single_labels(open_labelled(shard))  # all classes together need no names
    np.testing.assert_array_equal(labels, np.repeat(np.arange(4), PER_COLOUR))
    with pytest.raises(ValueError, match="selects classes by name, but the labels are numbers; give the class names"):
        run(*flags, f"--data={shard}", novel)
    with pytest.raises(ValueError, match="labels up to 3, but there are 3 class names, for 0 to 2; give the names of"):
        run(*flags, f"--data={shard}", "--class-names=blue,green,red", "--classes=red,blue")


def test_classes_and_shots_as_they_are(run):
    found = run("--ways=2", "--shots=1", "--episodes=20", "--classes=red,blue", "--views=0", "--use=student")
    assert found["embedding/1-shot/centroid"] > 0.7  # of two very different colours


def test_images_with_several_labels_or_unreadable_are_left_out(
    tiny_config, finished_workdir, colour_folder, tmp_path, caplog
):
    (tmp_path / "images.csv").write_text(
        f"path,labels\n{colour_folder}/red/0.png,red\n{colour_folder}/red/1.png,red;round\nx.png,red\n"
    )
    (tmp_path / "x.png").write_text("no image")
    source = open_labelled(f"csv:{tmp_path}/images.csv")
    with caplog.at_level("WARNING", logger="zslflax"):
        images = embed_views(Predictor.restore(finished_workdir), source, 2)
    assert images.labels.tolist() == [0] and images.views["features"].shape[:2] == (1, 2)
    assert "left out 1 of 3 images" in caplog.text and "x.png" in caplog.text


def test_what_cannot_be_measured_is_refused(run, finished_workdir, colour_folder):
    with pytest.raises(
        ValueError, match=r"only 4 of 4 classes have 1 \+ 2 images, but an episode has 5 classes; lower the ways"
    ):
        run("--shots=1", "--views=0")
    with pytest.raises(ValueError, match=r"only 0 of 4 classes have 5 \+ 2"):
        run("--ways=2", "--shots=5", "--views=0")
    with pytest.raises(ValueError, match="that the images lack, such as 'rod'; nearest: red"):
        run("--classes=rod,blue")
    with pytest.raises(ValueError, match="expected 0 augmented views.* at least 2; found 1"):
        run("--views=1")
    with pytest.raises(SystemExit):
        run("--shots=one")


@pytest.mark.parametrize("flag", ["--ways=1", "--shots=0,1", "--queries=0", "--episodes=1", "--views=-1", "--seed=-1"])
def test_numbers_that_no_episode_can_have_are_refused_at_once(flag, run, capsys):
    with pytest.raises(SystemExit):
        run("--workdir=nowhere", flag)
    assert re.search(
        f"{flag.partition('=')[0]}.* expected (a whole number from|numbers such as)", capsys.readouterr().err
    )


def test_missing_training_images_are_named_before_anything_is_embedded(run, tmp_path):
    with pytest.raises(UserError, match="nowhere is not a folder"):
        run("--workdir=nowhere", f"--train=folder:{tmp_path / 'nowhere'}")
