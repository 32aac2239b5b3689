"""Templates that are chosen without labels: the scores by brute force, and the choice of a real teacher."""

import numpy as np
import pytest

from tests.testing.images import COLOURS
from zslflax.data.sources.opening import open_source
from zslflax.inference.predictor import Predictor
from zslflax.training import templates
from zslflax.training.teacher import prompt_teacher
from zslflax.training.templates import score_templates

NAMES = sorted(COLOURS)
TEMPLATES = ("a photo of a {}.", "{} things", "this is not {}", "{}")


def test_scores_equal_brute_force():
    rng = np.random.default_rng(0)
    unit = lambda *shape: (x := rng.standard_normal(shape)) / np.linalg.norm(x, axis=-1, keepdims=True)
    image_emb, class_emb, reference = unit(20, 6), unit(3, 4, 6), unit(4, 6)
    confidence, agreement = score_templates(image_emb, class_emb, reference, scale=7.0)
    for t in range(3):
        highest, agrees = [], []
        for image in image_emb:
            p = np.exp(7.0 * class_emb[t] @ image)
            highest.append(max(p / p.sum()))
            agrees.append(np.argmax(p) == np.argmax(reference @ image))
        np.testing.assert_allclose([confidence[t], agreement[t]], [np.mean(highest), np.mean(agrees)])


@pytest.fixture
def teacher_of(tiny_config, finished_workdir, colour_folder, tmp_path):
    """What the step gets of a zero-shot teacher with so many of the templates."""
    config = tiny_config
    config.features.folder, config.model.class_names = str(tmp_path / "features"), tuple(NAMES)
    config.eval.templates, config.objective.teacher_scale = TEMPLATES, 20.0
    teacher = Predictor.restore(finished_workdir, cache="")
    sources = [open_source(f"folder:{colour_folder}", config.data, "train", captions=False)]

    def prepare(count: int):
        config.objective.choose_templates = count
        return teacher, prompt_teacher(config, teacher, sources)

    return prepare


def test_the_best_templates_are_averaged_and_all_are_reported(teacher_of, colour_folder, caplog, monkeypatch):
    monkeypatch.setattr(templates, "MAX_IMAGES", 12)  # every second one of 24
    with caplog.at_level("INFO", logger="zslflax"):
        teacher, (fixed, [features]) = teacher_of(2)
    image_emb = teacher.encode_image(sorted(colour_folder.glob("*/*.png"))[::2])
    class_emb = np.stack([teacher.class_embeddings(NAMES, (template,)) for template in TEMPLATES])
    of_all = teacher.class_embeddings(NAMES, TEMPLATES)
    confidence, agreement = score_templates(image_emb, class_emb, of_all, 20.0)
    best = sorted(np.argsort(-confidence * agreement)[:2])
    expected = teacher.class_embeddings(NAMES, [TEMPLATES[i] for i in best])
    np.testing.assert_array_equal(fixed["class_emb"], expected)
    assert len(features.missing()) == 12

    (report,) = [record.message for record in caplog.records if record.message.startswith("templates by")]
    assert "for 12 images without labels" in report
    for i, template in enumerate(TEMPLATES):
        line = f"{confidence[i]:10.3f} {agreement[i]:9.3f}  {'*' if i in best else ' '} {template}"
        assert line in report.splitlines()
    assert "1.000  = average of all" in report and "= average of the chosen" in report


def test_by_default_all_templates_are_averaged(teacher_of):
    teacher, (fixed, [features]) = teacher_of(0)
    np.testing.assert_array_equal(fixed["class_emb"], teacher.class_embeddings(NAMES, TEMPLATES))
    assert len(features.missing()) == 24  # no image was read


def test_more_templates_than_there_are_cannot_be_chosen(teacher_of):
    with pytest.raises(ValueError, match="choose_templates is 4, but eval.templates has 4; give more candidates"):
        teacher_of(4)
