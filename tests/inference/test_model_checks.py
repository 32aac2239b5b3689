"""Folders of models that say what cannot be, or where to write: refused by file and field, or not obeyed."""

import json
import re
import shutil

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from zslflax.config import default_config
from zslflax.errors import UserError
from zslflax.files import hash_arrays
from zslflax.inference import class_cache, export
from zslflax.inference.predictor import Predictor

NAMES = ["a cat", "a dog"]


@pytest.fixture(params=["run", "exported"])
def folder(request, finished_workdir, exported, tmp_path):
    """A copy of a model's folder, of either kind."""
    return shutil.copytree({"run": finished_workdir, "exported": exported}[request.param], tmp_path / "copy")


@pytest.fixture
def exported_copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "copy")


def set_field(path, field, value):
    """Sets a field of a JSON file by its dotted name."""
    content = json.loads(path.read_text())
    *sections, name = field.split(".")
    section = content
    for key in sections:
        section = section[key]
    section[name] = value
    path.write_text(json.dumps(content))


def change_arrays(path, change, **metadata):
    """Changes the arrays of an exported model, and its metadata where given."""
    with safe_open(path, "numpy") as file:
        old = file.metadata()
    arrays = load_file(path)
    change(arrays)
    save_file(arrays, path, old | {"sha256": hash_arrays(arrays)} | metadata)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("model.embed_dim", 10**9, "model.embed_dim 1000000000, expected 1 to 65,536"),
        ("model.image.size", 0, "model.image.size 0, expected 1 to 4,096"),
        ("model.image.size", -16, "model.image.size -16, expected 1 to 4,096"),
        ("model.image.size", "16", "config.json has model.image.size '16', whose type is wrong"),
        ("model.image.size", None, "model.image.size None, expected a value of type int"),
        ("model.image.size", True, "model.image.size True, expected a value of type int"),
        ("model.text.scratch.layers", 10**6, "model.text.scratch.layers 1000000, expected 1 to 128"),
        ("model.text.scratch.heads", 3, "describes a model that cannot be built"),
        ("model.text.max_tokens", 10**9, "model.text.max_tokens 1000000000, expected 1 to"),
        ("eval.resize_factor", 1e9, r"eval.resize_factor 1000000000.0, expected 1.0 to 16.0"),
        ("eval.resize_factor", float("nan"), "eval.resize_factor nan, expected finite numbers"),
        ("eval.resize_factor", float("inf"), "eval.resize_factor inf, expected finite numbers"),
        ("model.image.std", [0.2, 0.0, 0.2], r"model.image.std \(0.2, 0.0, 0.2\), expected three numbers above 0"),
        ("model.image.std", [0.2, 0.2], r"model.image.std \(0.2, 0.2\), expected three numbers above 0"),
        ("model.image.mean", [0.5, "a", 0.5], r"model.image.mean .* expected three numbers"),
        ("model.image.mean", [0.5, float("nan"), 0.5], r"model.image.mean .* expected finite numbers"),
        ("eval.templates", ["a {}"] * 1_000_000, "1,000,000 eval.templates, expected 1 to 10,000"),
        ("eval.templates", ["{}" * 10**6], "among eval.templates, expected prompts of at most 1,000 characters"),
        ("eval.templates", ["a photo"], "'a photo' among eval.templates, expected prompts"),
        ("eval.templates", [7], "7 among eval.templates, expected prompts"),
        ("eval.templates", [], "0 eval.templates, expected 1 to 10,000"),
        ("model.image", [1, 2], "model.image"),
        ("model.image.name", "resnet5000", "model.image.name is 'resnet5000'"),
        ("compute_dtype", "float7", "compute_dtype"),
        ("eval", [], "eval"),
    ],
)
def test_a_field_that_cannot_be_is_refused_by_file_and_name(tiny_config, exported_copy, field, value, message):
    set_field(exported_copy / "config.json", field, value)
    with pytest.raises(UserError, match=message) as error:
        Predictor.restore(exported_copy)
    assert "config.json" in str(error.value) and len(str(error.value)) < 1_000


def test_a_field_of_a_run_is_checked_too(tiny_config, folder):
    set_field(folder / "config.json", "model.image.std", [0, 0, 0])
    with pytest.raises(UserError, match="config.json has model.image.std .* expected three numbers above 0"):
        Predictor.restore(folder)


def test_places_that_a_model_names_are_neither_written_to_nor_read(tiny_config, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(class_cache, "MIN_PROMPTS", 2)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "classes-0").write_text("mine")
    config = json.loads((folder / "config.json").read_text())
    config["eval"]["class_cache"] = config["compilation_cache"] = str(victim)
    config.setdefault("data", {})["shapes"] = {"root": str(victim)}
    (folder / "config.json").write_text(json.dumps(config))
    predictor = Predictor.restore(folder)
    predictor.class_embeddings(NAMES)
    assert [path.name for path in victim.iterdir()] == ["classes-0"] and (victim / "classes-0").read_text() == "mine"
    assert len(list((tmp_path / "home/.cache/zslflax/classes").iterdir())) == 1
    defaults = default_config()
    assert predictor.config.data.shapes.root == defaults.data.shapes.root
    assert predictor.config.compilation_cache == defaults.compilation_cache


def test_an_export_gives_only_the_fields_that_prediction_needs(tiny_config, exported_copy):
    config = json.loads((exported_copy / "config.json").read_text())
    config["data"] = {"exclude": "/etc/passwd", "train": ["/etc/passwd"]}
    config["teacher"] = {"kind": "checkpoint", "workdir": "/"}
    config["eval"]["sets"] = {"x": {"data": "folder:/"}}
    (exported_copy / "config.json").write_text(json.dumps(config))
    restored, defaults = Predictor.restore(exported_copy).config, default_config()
    assert restored.data == defaults.data and restored.teacher == defaults.teacher
    assert restored.eval.sets == defaults.eval.sets and restored.name == "tiny"


def test_a_cache_that_the_run_switched_off_stays_off(tiny_config, finished_workdir):
    assert Predictor.restore(finished_workdir).class_cache.folder is None


def test_arrays_that_are_missing_unknown_or_of_another_shape_are_refused_by_name(tiny_config, exported_copy):
    path = exported_copy / export.WEIGHTS
    good = path.read_bytes()
    name = "params/image/projection/kernel"
    changes = {
        f"missing: {name}": lambda arrays: arrays.pop(name),
        "unknown: params/image/extra": lambda arrays: arrays.update({"params/image/extra": np.zeros(3)}),
        rf"of other shapes: {name} \[3, 8\] instead of \[16, 8\]": lambda arrays: arrays.update(
            {name: np.zeros((3, 8), np.float32)}
        ),
    }
    for message, change in changes.items():
        path.write_bytes(good)
        change_arrays(path, change)
        with pytest.raises(UserError, match=f"zslflax.safetensors has other arrays than the model of its .*{message}"):
            Predictor.restore(exported_copy)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tiny_config, exported_copy, value):
    path = exported_copy / export.WEIGHTS
    change_arrays(path, lambda arrays: arrays["params/text/projection/bias"].__setitem__(0, value))
    with pytest.raises(UserError, match="weights that are not finite in 1 arrays, such as params/text/projection/bias"):
        Predictor.restore(exported_copy)


def test_every_flipped_bit_of_an_export_is_noticed(tiny_config, exported_copy):
    path = exported_copy / export.WEIGHTS
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in [0, 9, *rng.integers(0, len(good), 20), len(good) - 1]:
        damaged = bytearray(good)
        damaged[position] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=re.escape(str(path))):
            Predictor.restore(exported_copy)
    path.write_bytes(good)
    assert Predictor.restore(exported_copy).step == 6


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("num_hidden_layers", 10**9, "config.json gives layers 1000000000, expected a whole number up to 128"),
        ("hidden_size", -16, "config.json gives width -16, expected a whole number"),
        ("vocab_size", "many", "config.json gives vocab_size 'many', expected a whole number"),
        ("layer_norm_eps", float("nan"), "config.json gives eps nan, expected a number of at least 0"),
        ("pad_token_id", [], "config.json"),
    ],
)
def test_sizes_of_a_text_encoder_are_checked(tiny_config, exported_copy, field, value, message):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"vocab_size": 30_522, "max_position_embeddings": 14, "type_vocab_size": 2, "model_type": "roberta"}
    set_field(exported_copy / "config.json", "model.text.pretrained", "text_encoder")
    (exported_copy / "text_encoder" / "config.json").write_text(json.dumps(sizes | {field: value}))
    with pytest.raises(UserError, match=message):
        Predictor.restore(exported_copy)
