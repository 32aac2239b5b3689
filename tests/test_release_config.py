"""`r50_declutr.py:release` has the values of the authors' published scripts."""

import importlib.util
from pathlib import Path

import pytest

from zslflax.config_checks import validate
from zslflax.errors import UserError

CONFIG = Path(__file__).parent.parent / "configs" / "r50_declutr.py"


@pytest.fixture(scope="module")
def get_config():
    spec = importlib.util.spec_from_file_location("r50_declutr", CONFIG)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config


def test_release_sets_what_the_scripts_set(get_config):
    c = get_config("release")
    validate(c)
    assert c.name == "r50_declutr_release" and c.objective.name == "self_distillation"
    assert c.steps == 10 * (2_911_810 // c.batch_size) == 56_870
    assert (c.objective.image_image_weight, c.objective.text_text_weight) == (1.0, 1.0)
    assert (c.objective.log_logit_scale, c.objective.teacher_temperature, c.objective.alpha) == (3.9, 0.01, 0.5)
    assert (c.compute_dtype, c.data.flip, c.model.text.projection) == ("float32", False, "none")
    assert round(c.eval.resize_factor * c.model.image.size) == 256


@pytest.mark.parametrize("objective", ["info_nce", "label_smoothing", "self_distillation", "otter"])
def test_release_takes_an_objective(get_config, objective):
    c = get_config(f"release_{objective}")
    validate(c)
    assert c.objective.name == objective and c.objective.smoothing == 0.0
    assert c.objective.remove_diagonal == (objective == "otter")


def test_a_mistyped_release_is_refused(get_config):
    with pytest.raises(UserError, match="objective.name is 'relese'"):
        validate(get_config("relese"))
