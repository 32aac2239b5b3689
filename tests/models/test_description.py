"""What the files beside published weights say is used: pixel statistics, pooling, options of the architecture."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.configs import MINILM, ROOT, load_config
from zslflax.config import default_config
from zslflax.errors import MissingFileError, UserError
from zslflax.models.bert import Bert
from zslflax.models.build import IMAGENET_MEAN, IMAGENET_STD, build_two_tower, resolve_model, text_config
from zslflax.models.import_weights.description import (
    Resizing,
    read_pixel_statistics,
    read_resizing,
    read_text_pooling,
)
from zslflax.models.import_weights.load import load_image_tower, load_text_tower


def write(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def image_config(folder="", name="vit_b16", **changes):
    config = default_config().model
    config.image.update({"name": name, "pretrained": str(folder), **changes})
    config.text.scratch = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 40}
    return config


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255},
        {"do_rescale": False, "image_mean": [127.5, 100.0, 90.0], "image_std": [60.0, 50.0, 40.0]},
        {"do_normalize": False},
        {"rescale_factor": 1 / 127.5},
    ],
)
def test_statistics_are_those_of_transformers_image_processor(require, tmp_path, options):
    require("torch")
    transformers = require("transformers")
    values = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]} | options
    processor = transformers.ViTImageProcessorPil(do_resize=False, **values)
    processor.save_pretrained(tmp_path)
    found = read_pixel_statistics(tmp_path)
    assert found.path == tmp_path / "preprocessor_config.json"
    image = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    wanted = np.asarray(processor(image, return_tensors="np")["pixel_values"][0]).transpose(1, 2, 0)
    ours = (image / 255.0 - found.mean) / found.std
    np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("nested", [True, False])
def test_statistics_of_timms_config_are_read(tmp_path, nested):
    statistics = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.25, 0.5]}
    values = {"pretrained_cfg": statistics} if nested else statistics
    write(tmp_path / "config.json", {"architecture": "vit_base_patch16_224"} | values)
    found = read_pixel_statistics(tmp_path)
    assert found[1:] == ((0.5, 0.5, 0.5), (0.5, 0.25, 0.5))


def test_empty_statistics_are_those_of_the_weights_or_else_of_the_tower(tmp_path):
    write(tmp_path / "a" / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    (tmp_path / "b").mkdir()
    resolved = lambda *args: resolve_model(image_config(*args)).image
    assert (resolved(tmp_path / "a").mean, resolved(tmp_path / "a").std) == ((0.5,) * 3, (0.25,) * 3)
    for folder in (tmp_path / "b", ""):
        assert (resolved(folder).mean, resolved(folder).std) == (IMAGENET_MEAN, IMAGENET_STD)
        assert resolved(folder, "efficientnet_lite2").mean == (0.5,) * 3
    model = build_two_tower(image_config(tmp_path / "a"))
    assert (model.mean, model.std) == ((0.5,) * 3, (0.25,) * 3)


def test_statistics_that_contradict_the_weights_are_refused(tmp_path):
    write(tmp_path / "preprocessor_config.json", {"image_mean": [0.5] * 3, "image_std": [0.25] * 3})
    assert resolve_model(image_config(tmp_path, mean=(0.5, 0.5, 0.50001))).image.std == (0.25,) * 3
    wrong = image_config(tmp_path, mean=IMAGENET_MEAN)
    message = r"model.image.mean is \(0.485.*preprocessor_config.json says \(0.5.*allow_other_statistics=True"
    with pytest.raises(UserError, match=message):
        resolve_model(wrong)
    with pytest.raises(UserError, match="model.image.std is"):
        resolve_model(image_config(tmp_path, std=IMAGENET_STD))
    wrong.image.allow_other_statistics = True
    assert resolve_model(wrong).image.mean == IMAGENET_MEAN
    wrong.image.allow_other_statistics = False
    assert build_two_tower(wrong).mean == IMAGENET_MEAN  # a trained model is as it was trained


def sentence_encoder(require, folder, pooling="cls", kind="bert", extra=()):
    """A small encoder with random weights, saved in `folder` with the files of sentence-transformers."""
    torch, transformers = require("torch"), require("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 24,
    }
    config, model = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "xlm-roberta": (transformers.XLMRobertaConfig, transformers.XLMRobertaModel),
        "camembert": (transformers.CamembertConfig, transformers.CamembertModel),
    }[kind]
    model = model(config(**sizes)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(folder)
    types = ["Transformer", "Pooling", *extra]
    write(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": f"{i}_{x}" if i else "", "type": f"sentence_transformers.models.{x}"}
            for i, x in enumerate(types)
        ],
    )
    write(folder / "1_Pooling" / "config.json", {"embedding_dimension": 32, "pooling_mode": pooling})
    return model


def tokens():
    lengths = np.array([7, 1, 12, 4])
    ids = np.random.default_rng(0).integers(4, 50, (4, 12)).astype(np.int32)
    mask = np.arange(12) < lengths[:, None]
    return np.where(mask, ids, 1).astype(np.int32), mask


@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "camembert"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_each_pooling_agrees_with_transformers(require, tmp_path, kind, pooling):
    original, torch = sentence_encoder(require, tmp_path, pooling, kind, extra=["Normalize"]), require("torch")
    ids, mask = tokens()
    with torch.no_grad():
        inputs = {"input_ids": torch.tensor(ids).long(), "attention_mask": torch.tensor(mask).long()}
        states = original(**inputs).last_hidden_state.numpy()
    mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)
    wanted = {"cls": states[:, 0], "mean": mean}[pooling]
    config = default_config().model
    config.text.pretrained = str(tmp_path)
    config = resolve_model(config)
    assert config.text.pool == pooling
    model = Bert(text_config(config.text))
    variables = load_text_tower(tmp_path, jax.eval_shape(model.init, jax.random.key(0), ids, mask))
    assert wanted.std(axis=0).max() > 0.05
    np.testing.assert_allclose(jax.jit(model.apply)(variables, ids, mask), wanted, rtol=0, atol=1e-4)

    segment = np.where(mask, np.arange(1, 5)[:, None], 0).astype(np.int32).reshape(2, 24)
    position = np.tile(np.arange(12, dtype=np.int32), 4).reshape(2, 24)
    packed = jax.jit(lambda *args: model.apply(variables, *args, 4, method="packed"))
    packed = packed(ids.reshape(2, 24), segment, position)
    np.testing.assert_allclose(packed, wanted, rtol=0, atol=1e-4)


def test_a_pooling_in_the_older_format_is_read(tmp_path):
    modes = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": False}
    write(tmp_path / "1_Pooling" / "config.json", {"word_embedding_dimension": 384} | modes)
    assert read_text_pooling(tmp_path) == "cls"
    modes = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    write(tmp_path / "1_Pooling" / "config.json", modes)
    assert read_text_pooling(tmp_path) == "mean"
    assert read_text_pooling(tmp_path / "nothing") == "mean"


def test_another_pooling_or_module_is_refused(require, tmp_path):
    sentence_encoder(require, tmp_path / "a", "max")
    with pytest.raises(UserError, match="1_Pooling/config.json has the pooling max.*set model.text.pool to"):
        read_text_pooling(tmp_path / "a")
    write(tmp_path / "b" / "1_Pooling" / "config.json", {"pooling_mode": ["cls", "mean"]})
    with pytest.raises(UserError, match="has the pooling cls and mean"):
        read_text_pooling(tmp_path / "b")
    sentence_encoder(require, tmp_path / "c", extra=["Dense"])
    with pytest.raises(UserError, match="modules.json has a module sentence_transformers.models.Dense"):
        read_text_pooling(tmp_path / "c")
    config = default_config().model
    config.text.pretrained, config.text.pool = str(tmp_path / "c"), "cls"
    assert resolve_model(config).text.pool == "cls"
    config.text.pool = "max"
    with pytest.raises(UserError, match="model.text.pool is 'max'; expected"):
        resolve_model(config)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("resnet50", {"architecture": "resnetblur50"}, "architecture 'resnetblur50', but resnet50 here computes with"),
        ("resnet50", {"architecture": "resnetaa50"}, "architecture 'resnetaa50'"),
        ("resnet50", {"architecture": "resnet50", "model_args": {"output_stride": 8}}, "model_args.*output_stride"),
        ("resnet50", {"downsample_in_first_stage": True}, "downsample_in_first_stage True"),
        ("efficientnet_lite0", {"architecture": "efficientnet_lite0"}, "computes with 'efficientnet-lite0' or 'tf_"),
        ("vit_b16", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu'"),
        ("vit_b16", {"layer_norm_eps": 1e-5}, "layer_norm_eps 1e-05"),
        ("vit_b16", {"global_pool": "avg"}, "global_pool 'avg'"),
        ("vit_b16", {"qkv_bias": False}, "qkv_bias False"),
    ],
)
def test_options_that_change_the_computation_are_refused(tmp_path, name, values, message):
    write(tmp_path / "config.json", values)
    with pytest.raises(UserError, match=message):
        load_image_tower(tmp_path, name, {"params": {"x": jnp.zeros(1)}}, 224)


@pytest.mark.parametrize(
    ("name", "architecture", "right"),
    [
        ("efficientnet_lite0", "mobilenet_v2", "mobilenet_v2"),
        ("efficientnet_lite0", "mobilenetv2_100", "mobilenet_v2"),
        ("mobilenet_v2", "tf_efficientnet_lite3", "efficientnet_lite3"),
        ("resnet50d", "gluon_resnet50_v1b", "resnet50"),
        ("resnet50", "convnext_tiny_in22k", "convnext_tiny"),
        ("efficientnet_lite0", "efficientnet_lite0", ""),  # timm's own, which no tower here computes
        ("resnet50", "resnetblur50", ""),
    ],
)
def test_the_tower_that_config_json_names_is_suggested(tmp_path, name, architecture, right):
    write(tmp_path / "config.json", {"architecture": architecture})
    with pytest.raises(UserError, match=f"architecture '{architecture}', but {name} here") as error:
        load_image_tower(tmp_path, name, {"params": {"x": jnp.zeros(1)}}, 224)
    found = str(error.value).partition("; set model.image.name=")[2]
    assert found == (f"{right} for it" if right else "")


@pytest.mark.parametrize("name", ["", "efficientnet_lite0", "vit_nano4"])
def test_a_missing_folder_of_weights_is_reported_with_its_field_and_an_id(tmp_path, name):
    with pytest.raises(MissingFileError, match=f"{tmp_path}/none' is no folder here") as error:
        resolve_model(image_config(tmp_path / "none", name))
    hub_id = "timm/tf_efficientnet_lite0.in1k" if name == "efficientnet_lite0" else "microsoft/resnet-18"
    assert str(error.value).startswith("set model.image.pretrained to a folder") and hub_id in str(error.value)
    config = image_config()
    config.text.pretrained = str(tmp_path / "none")
    with pytest.raises(MissingFileError, match="set model.text.pretrained to .* sentence-transformers/all-MiniLM-L6"):
        resolve_model(config)


@pytest.mark.parametrize(
    ("name", "values", "mean"),
    [
        ("efficientnet_lite0", {"architecture": "efficientnet-lite0"}, (0.5,) * 3),
        (
            "efficientnet_lite0",
            {"architecture": "tf_efficientnet_lite0", "mean": [0.5] * 3, "std": [0.5] * 3},
            (0.5,) * 3,
        ),
        ("mobilenet_v2", {"architecture": "mobilenet_v2"}, IMAGENET_MEAN),
        ("mobilenet_v2", {"mean": [0.4] * 3, "std": [0.25] * 3}, (0.4,) * 3),
    ],
)
def test_photos_normalises_pixels_as_its_tower_was_trained(tmp_path, name, values, mean):
    write(tmp_path / "config.json", values)
    config = load_config(ROOT / "configs" / "photos.py").model
    config.image.name, config.image.pretrained, config.text.pretrained = name, str(tmp_path), MINILM
    for check in (True, False):
        assert resolve_model(config, check).image.mean == mean


CLIPS_OWN = Resizing(224, 224, "bicubic")


@pytest.mark.parametrize(
    ("file", "values", "wanted"),
    [
        ("preprocessor_config.json", {"size": 224, "crop_size": 224, "resample": 3}, CLIPS_OWN),  # the first releases
        ("preprocessor_config.json", {"size": {"shortest_edge": 256}, "crop_size": {"height": 240, "width": 240}},
         Resizing(240, 256, "bicubic")),
        ("preprocessor_config.json", {"size": {"height": 384, "width": 384}, "crop_size": 384, "resample": 2},
         Resizing(384, 0, "bilinear")),
        ("preprocessor_config.json", {"size": {"height": 224, "width": 224}, "do_center_crop": False},
         Resizing(224, 0, "bicubic")),
        ("processor_config.json", {"image_processor": {"size": {"shortest_edge": 256}}}, Resizing(224, 256, "bicubic")),
        ("open_clip_config.json", {"preprocess_cfg": {"resize_mode": "squash"}}, Resizing(224, 0, "bicubic")),
        ("open_clip_config.json", {"preprocess_cfg": {"interpolation": "bilinear"}}, Resizing(224, 224, "bilinear")),
        ("other.json", {}, CLIPS_OWN),
    ],
)  # fmt: skip
def test_the_files_say_how_images_are_resized(tmp_path, file, values, wanted):
    (tmp_path / file).write_text(json.dumps(values))
    assert read_resizing(tmp_path, CLIPS_OWN) == wanted


@pytest.mark.parametrize(
    "values",
    [{"resample": 0}, {"do_resize": False}, {"size": {"height": 224, "width": 336}}, {"do_center_crop": False}],
)
def test_other_ways_to_resize_are_refused_with_the_file(tmp_path, values):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="preprocessor_config.json has"):
        read_resizing(tmp_path, CLIPS_OWN)
