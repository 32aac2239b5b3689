"""Models of open_clip with towers of timm and Hugging Face, compared with open_clip itself and with transformers."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.testing.networks import random_images, randomise
from tests.testing.open_clip import (
    DEPTHS,
    EMBED_DIM,
    EPS,
    EVA_SIZE,
    FASTVIT,
    MEAN,
    MODELS,
    OWN_TOKENIZER,
    SIZE,
    STD,
    VIT_SIZE,
    WIDTHS,
    save_from_transformers,
    timm,
    use_small_towers,
    write_inputs,
)
from tests.testing.published import TOKENS, photo
from tests.testing.runs import read_metrics
from zslflax.config_checks import validate
from zslflax.errors import UserError
from zslflax.inference.predictor import Predictor
from zslflax.inference.published import published_config
from zslflax.models.build import build_two_tower
from zslflax.models.convnext import ConvNeXt
from zslflax.models.import_weights.architecture import read_architecture
from zslflax.models.import_weights.image_architecture import vit_architecture
from zslflax.models.import_weights.load import load_image_tower
from zslflax.models.import_weights.timm_towers import timm_fields
from zslflax.models.vit import ViT
from zslflax.training.loop import train

IMAGES = [photo(60, 40), photo(64, 180, 1), photo(80, 80, 2)]
TEXTS = ["a photo of_the cat.", "  Two DOGS\tplay ", "it’s a “red”  dog", "red", "a red dog an the blue cat " * 5]
CLEAN = {  # what open_clip's cleaning makes of them
    "siglip2": [
        "a photo of the cat",
        "two dogs play",
        "its a red dog",
        "red",
        ("a red dog an the blue cat " * 5).strip(),
    ],
    "roberta": [
        "a photo of_the cat.",
        "Two DOGS play",
        'it\'s a "red" dog',
        "red",
        ("a red dog an the blue cat " * 5).strip(),
    ],
}
PREPARATION = {"image_mean": MEAN, "image_std": STD, "image_interpolation": "bilinear"}


def unit(x):
    x = x.detach().numpy()
    assert x.std(axis=0).max() > 0.05, "the output of the original hardly depends on its input"
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def timm_sizes(size, side=SIZE):
    width, depth, heads, hidden = size
    return {"img_size": side, "embed_dim": width, "depth": depth, "num_heads": heads, "mlp_ratio": hidden / width}


def build_original(require, monkeypatch, name, folder, **preparation):
    """Builds a small model of open_clip with random weights and saves it as open_clip does.

    Returns:
        The model, its preparation of images and its tokenizer.
    """
    torch = require("torch")
    # timm, which open_clip uses, needs torchvision, of which PyPI has no wheel for the CPU build of PyTorch.
    open_clip = pytest.importorskip("open_clip", exc_type=ImportError)
    push, timm_model = require("open_clip.push_to_hf_hub"), require("open_clip.timm_model")
    use_small_towers(monkeypatch)
    vit, eva = timm_sizes(VIT_SIZE), timm_sizes(EVA_SIZE)
    sizes = {"vit_ba": vit, "vit_so": vit, "vit_pe": eva, "eva02_": eva}
    sizes["fastvi"] = {"layers": FASTVIT.depths, "embed_dims": FASTVIT.widths}
    sizes["convne"] = {"depths": DEPTHS, "dims": WIDTHS, "norm_eps": EPS}
    create = timm_model.timm.create_model
    monkeypatch.setattr(timm_model.timm, "create_model", lambda name, **k: create(name, **k, **sizes[name[:6]]))
    folder.mkdir()
    monkeypatch.chdir(folder)
    config = write_inputs(require, name, folder)
    path = folder / f"{name.replace(' ', '-')}.json"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    model, _, prepare = open_clip.create_model_and_transforms(path.stem, pretrained_hf=False, **preparation)
    randomise(model, vectors=0.15)
    tokenizer = zero_padded(require, folder) if name in OWN_TOKENIZER else open_clip.get_tokenizer(path.stem)
    push.save_for_hf(model, tokenizer, open_clip.get_model_config(path.stem), folder / "model", True)
    if "hf_model_name" in config["text_cfg"]:
        (folder / "model" / "inputs").mkdir()
        shutil.copy(folder / "inputs" / "config.json", folder / "model" / "inputs")
    return model.eval(), prepare, tokenizer


def zero_padded(require, folder):
    """Returns the tokenizer of FOLDER/inputs, which pads with token 0 as open_clip's own does."""
    tokenizer = require("transformers").PreTrainedTokenizerFast.from_pretrained(folder / "inputs")

    def encode(texts):
        encoded = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
        return encoded["input_ids"] * encoded["attention_mask"]

    encode.save_pretrained = tokenizer.save_pretrained
    return encode


@pytest.mark.parametrize(("name", "mode"), [*((name, "shortest") for name in MODELS), ("siglip", "squash")])
def test_embeddings_and_tokens_agree_with_open_clip(require, monkeypatch, tmp_path, name, mode):
    torch = require("torch")
    original, prepare, tokenizer = build_original(
        require, monkeypatch, name, tmp_path / "saved", image_resize_mode=mode, **PREPARATION
    )
    predictor = Predictor.restore(tmp_path / "saved" / "model", cache="")
    assert predictor.config.model.embed_dim == EMBED_DIM and predictor.config.model.image.size == SIZE
    texts = [*TEXTS, "a red! dog"] if name in OWN_TOKENIZER else TEXTS
    ids, (ours, mask) = tokenizer(texts), predictor.tokenizer(texts)
    np.testing.assert_array_equal(ours * mask if name in OWN_TOKENIZER else ours, ids)
    with torch.no_grad():
        image_emb = original.encode_image(torch.stack([prepare(Image.fromarray(image)) for image in IMAGES]))
        text_emb = original.encode_text(ids)
    got = predictor.encode_image(IMAGES), predictor.encode_text(texts)
    np.testing.assert_allclose(got[0], unit(image_emb), rtol=0, atol=1e-4)
    np.testing.assert_allclose(got[1], unit(text_emb), rtol=0, atol=1e-4)
    objective = predictor.variables["params"]["objective"]
    np.testing.assert_allclose(objective["log_logit_scale"], original.logit_scale.item(), rtol=1e-6)
    assert ("logit_bias" in objective) == (original.logit_bias is not None)
    if name in ("clipa", *OWN_TOKENIZER):
        predictor.export(tmp_path / "exported")
        shutil.rmtree(tmp_path / "saved")
        again = Predictor.restore(tmp_path / "exported", cache="")
        np.testing.assert_array_equal(again.encode_image(IMAGES), got[0])
        np.testing.assert_array_equal(again.encode_text(texts), got[1])


@pytest.mark.parametrize(
    ("name", "pool"),
    [
        ("eva_giant_patch14_224", "token"),
        ("eva02_large_patch14_clip_224", "token"),
        ("vit_pe_core_large_patch14_336", "map"),
        ("vit_pe_core_gigantic_patch14_448", "map"),
    ],
)
def test_images_of_another_size_agree_with_timm(require, monkeypatch, tmp_path, name, pool):
    torch, library = require("torch"), pytest.importorskip("timm", exc_type=ImportError)
    use_small_towers(monkeypatch)
    torch.manual_seed(0)
    original = library.create_model(name, num_classes=0, global_pool=pool, **timm_sizes(EVA_SIZE, side=56))
    randomise(original, vectors=0.15)
    weights = {f"visual.trunk.{n}": x for n, x in original.state_dict().items()}
    require("safetensors.torch").save_file(weights, tmp_path / "open_clip_model.safetensors")
    model = {"embed_dim": 64, "vision_cfg": timm(name, pool, None) | {"image_size": 56}, "text_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    tower = ViT(**vit_architecture(read_architecture(tmp_path)))
    for size in (56, 84):
        original.set_input_size(img_size=(size, size))
        images = random_images(3, size)
        with torch.no_grad():
            expected = original(torch.tensor(images.transpose(0, 3, 1, 2))).numpy()
        shapes = jax.eval_shape(tower.init, jax.random.key(0), images)
        ours = jax.jit(tower.apply)(load_image_tower(tmp_path, "", shapes, size), images)
        assert expected.std(axis=0).max() > 0.05
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["siglip2", "roberta", "convnext"])
def test_embeddings_and_tokens_agree_with_transformers(require, monkeypatch, tmp_path, name):
    torch = require("torch")
    use_small_towers(monkeypatch, eps=1e-6)
    embed_image, embed_text = save_from_transformers(require, name, tmp_path / "model")
    predictor = Predictor.restore(tmp_path / "model", cache="")
    pixels = np.stack([photo(SIZE, SIZE, seed) for seed in range(3)])
    normalised = torch.tensor(((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2), dtype=torch.float32)
    tokenizer = require("transformers").AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = CLEAN.get(name, CLEAN["roberta"])
    ids = tokenizer(texts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")["input_ids"]
    np.testing.assert_array_equal(predictor.tokenizer(TEXTS)[0], ids)
    with torch.no_grad():
        image_emb, text_emb = embed_image(normalised), embed_text(ids)
    np.testing.assert_allclose(predictor.encode_image(list(pixels)), unit(image_emb), rtol=0, atol=1e-4)
    np.testing.assert_allclose(predictor.encode_text(TEXTS), unit(text_emb), rtol=0, atol=1e-4)
    objective = {name: float(x) for name, x in predictor.variables["params"]["objective"].items()}
    assert objective == {"log_logit_scale": 2.0} | ({"logit_bias": -9.0} if name == "siglip2" else {})


def test_an_exported_model_is_the_same_without_the_published_files(require, monkeypatch, tmp_path):
    use_small_towers(monkeypatch)
    save_from_transformers(require, "roberta", tmp_path / "model")
    predictor = Predictor.restore(tmp_path / "model", cache="")
    predictor.export(tmp_path / "exported")
    shutil.rmtree(tmp_path / "model")
    again = Predictor.restore(tmp_path / "exported", cache="")
    np.testing.assert_array_equal(again.tokenizer(TEXTS)[0], predictor.tokenizer(TEXTS)[0])
    np.testing.assert_array_equal(again.encode_image(IMAGES), predictor.encode_image(IMAGES))
    np.testing.assert_array_equal(again.encode_text(TEXTS), predictor.encode_text(TEXTS))


def test_its_towers_start_a_run_and_the_whole_model_teaches_it(require, monkeypatch, tiny_config, tmp_path):
    use_small_towers(monkeypatch)
    save_from_transformers(require, "convnext", tmp_path / "convnext")
    save_from_transformers(require, "roberta", tmp_path / "roberta")
    c = tiny_config
    c.model.image.update(name="", pretrained=str(tmp_path / "convnext"), size=SIZE, mean=(), std=())
    c.model.text.update(pretrained=str(tmp_path / "roberta"), tokenizer="", max_tokens=TOKENS)
    c.freeze = (("image/tower", -1), ("text/tower", -1))
    c.teacher.kind, c.teacher.workdir, c.steps = "checkpoint", str(tmp_path / "roberta"), 1
    validate(c)
    train(c, tmp_path / "run")
    assert "train/soft_loss" in read_metrics(tmp_path / "run")[-1]
    run = Predictor.restore(tmp_path / "run", cache="")
    assert run.model.mean == MEAN and run.model.text.tower.config.pool == "mean"
    for modality, folder in (("image", "convnext"), ("text", "roberta")):
        published = Predictor.restore(tmp_path / folder, cache="").variables["params"][modality]["tower"]
        jax.tree.map(np.testing.assert_array_equal, run.variables["params"][modality]["tower"], published)


def test_weights_of_timm_beside_those_of_open_clip_are_left_alone(require, monkeypatch, tmp_path):
    use_small_towers(monkeypatch)
    save_from_transformers(require, "siglip2", tmp_path / "model")
    expected = Predictor.restore(tmp_path / "model", cache="").encode_text(TEXTS)
    (tmp_path / "model" / "config.json").write_text(json.dumps({"architecture": "vit_so400m_patch16_siglip_256"}))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"the image tower alone")
    np.testing.assert_array_equal(Predictor.restore(tmp_path / "model", cache="").encode_text(TEXTS), expected)


def test_a_tower_may_be_named(require, monkeypatch, tmp_path):
    use_small_towers(monkeypatch)
    save_from_transformers(require, "convnext", tmp_path / "model")
    tower = ConvNeXt(DEPTHS, WIDTHS)
    shapes = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))
    named, described = (load_image_tower(tmp_path / "model", name, shapes, SIZE) for name in ("convnext_base", ""))
    jax.tree.map(np.testing.assert_array_equal, named, described)


PARAMETERS = {  # of timm's models without a classifier
    "vit_base_patch16_siglip_224": 92_884_224,
    "vit_base_patch32_siglip_256": 94_552_320,
    "vit_large_patch16_siglip_256": 315_956_224,
    "vit_so400m_patch14_siglip_384": 428_225_600,
    "vit_giantopt_patch16_siglip_256": 1_163_168_256,
    "vit_tiny_patch16_224": 5_717_416 - 193_000,
    "vit_base_patch16_224": 86_567_656 - 769_000,
    "vit_huge_patch14_224": 632_045_800 - 1_281_000,
    "vit_large_patch14_clip_224": 303_179_776,
    "eva_giant_patch14_224": 1_011_146_112,
    "eva02_base_patch16_clip_224": 85_869_312,
    "eva02_large_patch14_clip_336": 303_645_632,
    "vit_pe_core_tiny_patch16_384": 6_042_240,
    "vit_pe_core_base_patch16_224": 92_886_528,
    "vit_pe_core_gigantic_patch14_448": 1_880_066_560,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_number_of_parameters_is_that_of_timm(name):
    pool = "map" if "siglip" in name or "pe_core" in name else "token"
    size, projection = int(name.rpartition("_")[2]), None if "eva" in name or "pe_core" in name else "linear"
    vision = {"timm_model_name": name, "timm_pool": pool, "timm_proj": projection, "image_size": size}
    values, _ = timm_fields(Path("open_clip_config.json"), vision)
    fields, counts = vit_architecture(values), {}
    for depth in (1, 2):  # each further block adds the same
        init = ViT(**fields | {"depth": depth}).init
        shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
        counts[depth] = sum(x.size for x in jax.tree.leaves(shapes))
    assert counts[1] + (fields["depth"] - 1) * (counts[2] - counts[1]) == PARAMETERS[name]


VISION, SIGLIP = {"layers": 12, "patch_size": 32}, MODELS["siglip"]["vision_cfg"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"vision_cfg": timm("eva02_enormous_patch14_clip_224", "token", None)},
            "timm_model_name 'eva02_enormous_patch14",
        ),
        ({"vision_cfg": timm("vit_base_mci_224", "token", None)}, "timm_model_name 'vit_base_mci_224'"),
        ({"vision_cfg": timm("vitamin_base_224", "avg", None)}, "timm_model_name 'vitamin_base_224'"),
        ({"vision_cfg": timm("vitamin_large_256", "", "linear")}, "timm_model_name 'vitamin_large_256'"),
        ({"vision_cfg": timm("vit_base_patch16_224", "avg", None)}, "timm_pool 'avg' and timm_proj None"),
        (
            {"vision_cfg": timm("eva02_base_patch16_clip_224", "avg", None)},
            "expected the pool 'token' and no projection",
        ),
        ({"vision_cfg": SIGLIP | {"timm_pool": "avg"}}, "timm_pool 'avg' and .* expected the pool 'map'"),
        ({"vision_cfg": VISION | {"qk_norm": True, "output_tokens": False}}, "has vision_cfg.qk_norm, which"),
        ({"vision_cfg": VISION | {"pool_type": "none"}}, "pool_type 'none', which .* expected 'tok' or 'avg'"),
        ({"vision_cfg": VISION | {"image_size": 10**12}}, "open_clip_config.json has model.image.size .*1 to 4,096"),
        ({"vision_cfg": VISION | {"head_width": 0}}, "open_clip_config.json lacks a field or .*: ZeroDivisionError"),
        (
            {"vision_cfg": VISION | {"attentional_pool": "cascade"}},
            "attentional_pool 'cascade', which .* expected True",
        ),
        ({"vision_cfg": VISION | {"attentional_pool": True, "pool_type": "avg"}}, "pool_type 'avg', .* expected 'tok'"),
        ({"text_cfg": {"embed_cls": True, "no_causal_mask": True}}, "no_causal_mask True, which .* expected False"),
        ({"text_cfg": {"embed_cls": True, "hf_tokenizer_name": "x"}}, "hf_tokenizer_name 'x', which .* expected None"),
        ({"text_cfg": {"embed_cls": True, "pad_id": 1}}, "pad_id 1, which is not implemented; expected 0"),
        ({"text_cfg": {"no_causal_mask": True, "hf_tokenizer_name": "x"}}, "pool_type 'argmax', .* expected 'last'"),
        ({"text_cfg": {"no_causal_mask": True, "pool_type": "last"}}, "pool_type 'last', which .* expected 'argmax'"),
        ({"text_cfg": {"tokenizer_kwargs": {"strip_sep_token": True}}}, "text_cfg.tokenizer_kwargs.strip_sep_token"),
        (
            {"text_cfg": {"hf_model_name": "roberta-base", "hf_pooler_type": "cls_pooler"}},
            "hf_pooler_type 'cls_pooler'",
        ),
        ({"text_cfg": {"hf_model_name": "roberta-base", "hf_proj_type": "other"}}, "hf_proj_type 'other'"),
        ({"text_cfg": {"hf_model_name": "mt5"}}, "hf_model_name 'mt5' of model_type 'mt5'.*expected bert, roberta"),
        (
            {"text_cfg": {"hf_model_name": "some/bert"}},
            "'some/bert', .*: hf download some/bert config.json --local-dir '",
        ),
        ({"text_cfg": {"hf_model_name": "../elsewhere"}}, "'../elsewhere', whose sizes are in a file of its own"),
        (
            {"vision_cfg": timm("convnext_base", "", "mlp"), "text_cfg": {"hf_model_name": "roberta-base"}},
            "projections of .* hidden channels; only equal numbers",
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_field(tmp_path, change, message):
    for folder, kind in (("mt5", "mt5"), ("../elsewhere", "bert")):
        (tmp_path / "model" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / folder / "config.json").write_text(json.dumps({"model_type": kind}))
    model = {"embed_dim": 512, "vision_cfg": VISION, "text_cfg": {}} | change
    (tmp_path / "model" / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    with pytest.raises(UserError, match=message):
        Predictor.restore(tmp_path / "model")


def test_a_damaged_file_is_named_by_a_run_too(tmp_path):
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps({"model_cfg": {"embed_dim": 512, "vision_cfg": {"layers": 12}, "text_cfg": {}}}))
    with pytest.raises(UserError, match=r"open_clip_config.json lacks a field or .* KeyError\('patch_size'\)"):
        read_architecture(tmp_path)


def test_a_coca_has_its_own_ways_to_pool(tmp_path):
    vision = VISION | {"attentional_pool": True, "image_size": 64}
    model = {"embed_dim": 512, "vision_cfg": vision, "text_cfg": {"embed_cls": True}, "multimodal_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    for modality, pool in (("image", "cls"), ("text", "mean")):
        config = published_config(tmp_path).model
        config[modality].pool = pool
        with pytest.raises(
            UserError, match=f"model.{modality}.pool is '{pool}'; .*: (it|this tower) has one way to pool"
        ):
            build_two_tower(config)


def test_a_null_names_no_tower_of_timm_or_hugging_face(tmp_path):
    found = []
    for nulls in ({}, {"timm_model_name": None}):
        text = {"hf_model_name": None} if nulls else {}
        model = {"embed_dim": 512, "vision_cfg": VISION | nulls, "text_cfg": text}
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
        found.append(read_architecture(tmp_path))
    assert found[0] == found[1]
