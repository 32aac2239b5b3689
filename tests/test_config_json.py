"""Configs as JSON: what was written is read back, and files of older versions are explained."""

import json

import pytest

from tests.testing.configs import CONFIG_FILES, load_config
from zslflax.config import default_config, eval_set, profiled_steps
from zslflax.config_json import compare, from_json, read_config, to_json
from zslflax.errors import MissingFileError, UserError


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_a_config_is_read_back_as_it_was_written(path):
    c = load_config(path)
    c.data.train = ("a", "b")
    assert compare(c, from_json(to_json(c))) == []


def test_test_sets_of_any_names_are_read_back():
    c = default_config()
    with c.unlocked():
        c.eval.sets = {"birds": eval_set(data="folder:birds"), "cars": eval_set()}
    assert from_json(to_json(c)).eval.sets.birds.data == "folder:birds"
    assert list(from_json(to_json(c)).eval.sets) == ["birds", "cars"]
    assert list(from_json('{"steps": 3}').eval.sets) == ["test"]


def test_fields_that_differ_are_named_with_both_values():
    a, b = default_config(), default_config()
    b.steps, b.data.flip = 5, False
    with b.unlocked():
        b.eval.sets.more = eval_set(data="x")
    assert compare(a, b)[:2] == [("data.flip", True, False), ("eval.sets.more", None, eval_set(data="x").to_dict())]
    assert compare(a, b)[2:] == [("steps", 10_000, 5)]


OLDER = {
    "name": "old",
    "report_every": 20,
    "teacher": {"decay": 0.99, "kind": "ema"},
    "objective": {"log_scale": 3.9, "alpha": 0.5},
    "data": {"scenes": {"root": "~"}, "resampled": True},
    "eval": {"sets": {"pets": {"data": "", "names": "cat,dog"}}},
}


def test_a_file_of_an_older_version_is_named_with_the_current_names_of_its_fields(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(OLDER))
    with pytest.raises(UserError) as raised:
        read_config(path)
    message = str(raised.value)
    assert message.startswith(f"{path} was written by an older version of zslflax, with fields that this version does")
    for field in (
        "report_every (now log_every)",
        "teacher.decay (now teacher.ema_decay)",
        "objective.log_scale (now objective.log_logit_scale)",
        "data.scenes.root (now data.shapes.root)",
        "data.resampled,",
        "eval.sets.pets.names (now eval.sets.pets.class_names)",
    ):
        assert field in message
    assert "Start a new run in another workdir, or use the version that wrote this one" in message
    assert "\n" not in message and "alpha" not in message and "kind" not in message


def test_files_that_are_no_configs(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(MissingFileError, match=f"there is no file {path}"):
        read_config(path)
    path.write_text('{"architectures": ["BertModel"], "hidden_size": 16}')
    with pytest.raises(UserError, match="config.json is not a config of zslflax; found the fields architectures, hid"):
        read_config(path)
    path.write_text('{"steps": "many"}')
    with pytest.raises(UserError, match="config.json has steps 'many', whose type is wrong"):
        read_config(path)
    path.write_text('{"steps": 5, "eval": 3}')
    with pytest.raises(UserError, match="config.json was written by an older version .*: eval"):
        read_config(path)


def test_steps_to_profile():
    c = default_config()
    assert profiled_steps(c) is None
    c.profile_steps = "100:105"
    assert profiled_steps(c) == (100, 105)
