"""Evaluation of test sets against metrics computed one image at a time with the `Predictor`."""

import dataclasses

import cv2
import numpy as np
import pytest
from PIL import Image

from tests.testing.shards import write_tar
from zslflax import config
from zslflax.data.images import decode
from zslflax.errors import UserError
from zslflax.evaluation import zero_shot
from zslflax.evaluation.results import flat_names
from zslflax.evaluation.test_sets import check_test_sets, open_test_sets
from zslflax.inference.predictor import Predictor
from zslflax.inference.restore import build_model
from zslflax.training.initial_state import create_state

IDS = ["n02084071", "n02121808", "n02958343"]
NAMES = ["dog", "house cat", "car"]


@pytest.fixture
def predictors(tiny_config):
    """Two untrained models."""
    made = {}
    for seed, model_name in enumerate(("", "student")):
        tiny_config.seed = seed
        model, tokenizer = build_model(tiny_config)
        state, _ = create_state(tiny_config, model, pretrained=False)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        made[model_name] = Predictor(tiny_config, model, variables, tokenizer, step=7)
    return made


@pytest.fixture
def folder(tmp_path):
    """Photos of three classes in folders by id, of different sizes, one of them broken."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(IDS):
        (tmp_path / "images" / name).mkdir(parents=True)
        for j in range(9 + i):
            noise = rng.integers(0, 256, (2 + j, 3, 3), dtype=np.uint8)
            pixels = cv2.resize(noise, (24 + 4 * j, 30), interpolation=cv2.INTER_LINEAR)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{j}.png")
    (tmp_path / "images" / IDS[1] / "3.png").write_bytes(b"not an image")
    (tmp_path / "words.txt").write_text("".join(f"{i}\t{n}\n" for i, n in zip(IDS, NAMES)))
    return tmp_path


def test_hits_and_intervals_of_a_folder_with_a_subfolder_per_class(tiny_config, predictors, folder):
    with tiny_config.unlocked():
        tiny_config.eval.sets = {
            "pets": config.eval_set(data=f"folder:{folder / 'images'}", classes=str(folder / "words.txt"))
        }
    tiny_config.eval.templates = ("a photo of a {}.", "{}")
    metrics = flat_names(zero_shot.evaluate(predictors, open_test_sets(tiny_config), tiny_config, folder, resamples=50))
    for who, predictor in (("", predictors[""]), ("student/", predictors["student"])):
        prompts = [[template.replace("{}", name) for template in tiny_config.eval.templates] for name in NAMES]
        classes = np.stack([np.mean([predictor.encode_text(p)[0] for p in of_name], axis=0) for of_name in prompts])
        classes /= np.linalg.norm(classes, axis=1, keepdims=True)
        hits = {1: [], 2: []}
        for label, name in enumerate(IDS):
            for path in sorted((folder / "images" / name).glob("*.png")):
                if path.read_bytes() != b"not an image":
                    order = np.argsort(-(classes @ predictor.encode_image(path)[0]))
                    for k in hits:
                        hits[k].append(label in order[:k])
        assert len(hits[1]) == 29
        for k in hits:
            assert metrics[f"eval/pets/{who}hit@{k}"] == pytest.approx(np.mean(hits[k]), abs=1e-9)
            assert metrics[f"eval/pets/{who}hit@{k}/low"] <= np.mean(hits[k]) <= metrics[f"eval/pets/{who}hit@{k}/high"]
        assert metrics[f"eval/pets/{who}labelled"] == 29
    with Image.open(folder / "7.png") as picture:
        assert picture.width > 600


def test_retrieval_of_images_and_captions(tiny_config, predictors, tmp_path):
    tiny_config.eval.sets.test.data = "shapes"
    (test,) = open_test_sets(tiny_config)
    predictor = predictors[""]
    metrics = flat_names(zero_shot.evaluate({"": predictor}, [test], tiny_config, tmp_path))
    images = np.concatenate([predictor.encode_image(decode(test.source[i]["image"])) for i in range(24)])
    texts = predictor.encode_text([test.source[i]["text"][0] for i in range(24)])
    places = [int(np.sum(row > row[i])) for i, row in enumerate(images @ texts.T)]
    for k in (1, 5, 10):
        assert metrics[f"eval/test/retrieval/image_to_text@{k}"] == pytest.approx(
            np.mean(np.array(places) < k), abs=1 / 24 + 1e-9
        )


def test_blank_captions_are_ignored(tiny_config, predictors, tmp_path):
    tiny_config.eval.sets.test.data = "shapes"
    (test,) = open_test_sets(tiny_config)

    class WithBlanks:
        classes, negatives, excluded = None, None, {}

        def __init__(self, source):
            self.source = source

        def __len__(self):
            return len(self.source)

        def __getitem__(self, index):
            record = self.source[index]
            return record | {"text": (*record["text"], " ")}

    predictor = {"": predictors[""]}
    expected = zero_shot.evaluate(predictor, [test], tiny_config, tmp_path)
    assert (
        zero_shot.evaluate(
            predictor, [dataclasses.replace(test, source=WithBlanks(test.source))], tiny_config, tmp_path
        )
        == expected
    )


def test_a_label_beyond_the_class_names_is_refused(tiny_config, predictors, tmp_path):
    tiny_config.eval.sets.test.data = "shapes"
    (test,) = open_test_sets(tiny_config)
    tiny_config.eval.sets.test.data = test.source.paths[0]
    tiny_config.eval.sets.test.class_names = "cat,dog,car"
    with pytest.raises(ValueError, match=r"has the label \d+, but there are 3 names"):
        zero_shot.evaluate(predictors, open_test_sets(tiny_config), tiny_config, tmp_path)
    with pytest.raises(UserError, match=r"eval.sets.test: sample .*\.tar:\d+ has the label \d+, but there are 3 names"):
        check_test_sets(open_test_sets(tiny_config))


def test_a_test_set_without_anything_to_measure_is_named(tiny_config, tmp_path, caplog):
    for i in range(3):
        (tmp_path / "labels" / str(i)).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "labels" / str(i) / "a.png")
    members = [(f"{i}.{end}", data) for i in range(3) for end, data in (("jpg", b"-"), ("cls", b"%d" % i))]
    tiny_config.eval.sets.test.data = write_tar(tmp_path / "a.tar", members)
    check_test_sets(open_test_sets(tiny_config))
    assert "NOTHING WILL BE MEASURED on eval.sets.test: 3 samples that were read have no captions" in caplog.text
    assert "their labels have no names; give eval.sets.test.class_names" in caplog.text
    caplog.clear()
    tiny_config.eval.sets.test.class_names = "cat,dog,car"
    check_test_sets(open_test_sets(tiny_config))
    tiny_config.eval.sets.test.data, tiny_config.eval.sets.test.class_names = f"folder:{tmp_path / 'labels'}", "a,b,c"
    check_test_sets(open_test_sets(tiny_config))
    assert not caplog.text
    tiny_config.eval.sets.test.data = ""
    check_test_sets(open_test_sets(tiny_config))
    assert "NOTHING WILL BE MEASURED: no test set has data" in caplog.text
