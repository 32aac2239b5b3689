"""CLIP and SigLIP as they are published, compared with `transformers`, from files to embeddings."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.testing.published import EMBED_DIM, SIZE, TEXTS, TOKENS, photo, save_clip, save_siglip, to_open_clip
from tests.testing.runs import read_metrics
from zslflax.config_checks import validate
from zslflax.errors import UserError
from zslflax.evaluation.test_sets import open_test_sets
from zslflax.inference.predictor import Predictor
from zslflax.training.evaluate import evaluate_model
from zslflax.training.loop import train

SAVE = {"clip": save_clip, "siglip": save_siglip}
# Of sizes whose crops have one centre: where it lies between two pixels, transformers and torchvision differ.
IMAGES = [photo(60, 40), photo(32, 90, 1), photo(40, 40, 2)]


@pytest.fixture(scope="module", params=SAVE)
def published(require, request, tmp_path_factory):
    """A folder with a published model, and the original model."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, SAVE[request.param](require, folder)


def unit(outputs) -> np.ndarray:
    """The embeddings in the output of an original, as unit vectors."""
    x = getattr(outputs, "pooler_output", outputs).detach().numpy()
    assert x.std(axis=0).max() > 0.05, "the output of the original hardly depends on its input"
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def original_image_emb(require, folder, model):
    """What the original computes of `IMAGES` with its own image processor."""
    transformers = require("transformers")
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(
        [Image.fromarray(image) for image in IMAGES], return_tensors="pt"
    )
    return unit(model.get_image_features(**pixels))


def original_text_emb(require, folder, model):
    """What the original computes of `TEXTS` with its own tokenizer; SigLIP's takes no mask."""
    tokenizer = require("transformers").AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    mask = {} if model.config.model_type == "siglip" else {"attention_mask": tokens["attention_mask"]}
    return unit(model.get_text_features(tokens["input_ids"], **mask))


def test_embeddings_agree_with_transformers(require, published):
    folder, model = published
    predictor = Predictor.restore(folder, cache="")
    np.testing.assert_allclose(
        predictor.encode_image(IMAGES), original_image_emb(require, folder, model), rtol=0, atol=1e-4
    )
    np.testing.assert_allclose(
        predictor.encode_text(TEXTS), original_text_emb(require, folder, model), rtol=0, atol=1e-4
    )
    scale = predictor.variables["params"]["objective"]["log_logit_scale"]
    np.testing.assert_allclose(np.asarray(scale), model.logit_scale.detach().numpy().reshape(()), rtol=1e-6)


def test_an_exported_model_is_the_same(published, tmp_path):
    folder, _ = published
    moved = shutil.copytree(folder, tmp_path / "moved")
    predictor = Predictor.restore(moved, cache="")
    predictor.export(tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "This is a published model" in card and "trained with zslflax" not in card
    shutil.rmtree(moved)
    again = Predictor.restore(tmp_path / "exported", cache="")
    np.testing.assert_array_equal(again.encode_image(IMAGES), predictor.encode_image(IMAGES))
    np.testing.assert_array_equal(again.encode_text(TEXTS), predictor.encode_text(TEXTS))
    assert again.config.eval.resize_factor == predictor.config.eval.resize_factor


def test_pixels_that_fill_no_patch_are_left_out(require, tmp_path):
    """As in google/siglip-so400m-patch14-384."""
    model = save_siglip(require, tmp_path, size=SIZE + 4)
    predictor = Predictor.restore(tmp_path, cache="")
    wanted = original_image_emb(require, tmp_path, model)
    np.testing.assert_allclose(predictor.encode_image(IMAGES), wanted, rtol=0, atol=1e-4)


def test_open_clips_folder_is_the_same_model(require, tmp_path, caplog):
    caplog.set_level("INFO", "zslflax")
    save_clip(require, tmp_path / "hf", text_width=24)
    to_open_clip(require, tmp_path / "hf", tmp_path / "open_clip")
    predictors = [Predictor.restore(tmp_path / name, cache="") for name in ("hf", "open_clip")]
    assert predictors[1].config.model.embed_dim == EMBED_DIM
    assert predictors[1].model.mean == (0.1, 0.2, 0.3)
    read = [message for message in caplog.messages if "no part of the tower" in message]
    assert len(read) == 4 and all(
        "no head and 0 constant buffers; " in message for message in read
    )  # and counts others
    text_emb = [predictor.encode_text(TEXTS) for predictor in predictors]
    np.testing.assert_allclose(text_emb[1], text_emb[0], atol=1e-6)
    pixels = np.stack([photo(32, 32, i) for i in range(3)])
    inputs = [(pixels - 255 * np.array(p.model.mean)) / (255 * np.array(p.model.std)) for p in predictors]
    towers = [
        p.model.image.tower.apply({"params": p.variables["params"]["image"]["tower"]}, inputs[0]) for p in predictors
    ]
    np.testing.assert_allclose(towers[1], towers[0], atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_openais_own_file_is_read_after_the_command_of_the_message(require, tmp_path):
    """A TorchScript archive, as OpenAI published CLIP, beside the JSON files of the same model on the Hub."""
    torch, safetensors = require("torch"), require("safetensors.torch")
    save_clip(require, tmp_path / "hf", text_width=24)
    to_open_clip(require, tmp_path / "hf", tmp_path / "open_clip")
    weights = safetensors.load_file(tmp_path / "open_clip" / "open_clip_model.safetensors")
    constants = {name: torch.tensor(8) for name in ("input_resolution", "context_length", "vocab_size")}
    (tmp_path / "clip").mkdir()
    for path in (tmp_path / "hf").glob("*.json"):
        shutil.copy(path, tmp_path / "clip")
    torch.jit.script(module_of(torch, weights | constants)).save(tmp_path / "clip" / "ViT-B-32.pt")
    with pytest.raises(FileNotFoundError, match="ViT-B-32.pt' is a file; expected the folder of a model. A file of"):
        Predictor.restore(str(tmp_path / "clip" / "ViT-B-32.pt"))
    with pytest.raises(FileNotFoundError, match="has no config.json: .* needs config.json and the tokenizer"):
        Predictor.restore(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"own format only \(ViT-B-32.pt\); convert it once") as error:
        Predictor.restore(tmp_path / "clip")
    command = str(error.value).splitlines()[-1].strip()
    subprocess.run(command.replace("python", sys.executable, 1), shell=True, check=True, timeout=120)
    hf, converted = (Predictor.restore(tmp_path / name, cache="") for name in ("hf", "clip"))
    np.testing.assert_allclose(converted.encode_text(TEXTS), hf.encode_text(TEXTS), atol=1e-6)
    np.testing.assert_allclose(converted.encode_image(IMAGES), hf.encode_image(IMAGES), atol=1e-6)


def module_of(torch, tensors):
    """A PyTorch module that has tensors as buffers under their names, in modules inside of modules."""

    class Node(torch.nn.Module):
        def forward(self, x):
            return x

    root = Node()
    for name, tensor in tensors.items():
        *path, leaf = name.split(".")
        node = root
        for part in path:
            if part not in node._modules:
                node.add_module(part, Node())
            node = node._modules[part]
        node.register_buffer(leaf, tensor)
    return root


def test_what_is_not_computed_is_refused_by_field(require, published, tmp_path):
    folder, _ = published
    copy = shutil.copytree(folder, tmp_path / "copy")
    values = json.loads((copy / "config.json").read_text())
    for section, field, value in (
        ("vision_config", "hidden_act", "relu"),
        ("vision_config", "num_channels", 1),
        ("text_config", "hidden_act", "silu"),
        ("vision_config", "hidden_size", "24"),
        ("vision_config", "num_hidden_layers", 10**9),
    ):
        changed = values | {section: values[section] | {field: value}}
        (copy / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=f"{field}|width|depth|wrong type"):
            Predictor.restore(copy, cache="")


def test_a_single_encoder_is_no_model(require, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="model_type 'bert'; expected a model with an image and a text tower, clip or"):
        Predictor.restore(tmp_path)


def test_a_published_model_is_evaluated_on_any_test_set(published, tiny_config, tmp_path):
    folder, _ = published
    metrics = evaluate_model(str(folder), tmp_path / "runs", config=tiny_config)
    [test_set] = open_test_sets(tiny_config)
    records = [test_set.source[i] for i in range(len(test_set.source))]
    predictor = Predictor.restore(folder, cache="")
    names = test_set.label_space.class_names
    answers = predictor.classify([record["image"] for record in records], names, top_k=1)
    hits = [names.index(answer[0][0]) in record["label"] for answer, record in zip(answers, records)]
    assert metrics["eval/test/hit@1"] == pytest.approx(np.mean(hits))
    assert (tmp_path / "runs" / "evaluation" / "0.png").is_file()


def test_overrides_alone_give_the_test_sets_and_the_model_the_prompts(published, colour_folder, tmp_path):
    predictor = Predictor.restore(published[0], cache="")
    predictor.config.eval.templates = ("the {} dog", "red {}")
    predictor.export(tmp_path / "exported")
    options = {
        "eval.sets.colours.data": f"folder:{colour_folder}",
        "eval.bootstrap_resamples": 0,
        "eval.class_cache": "",
    }
    own = evaluate_model(str(tmp_path / "exported"), tmp_path / "run", options)
    assert {name.split("/")[1] for name in own} == {"colours"}
    prompts = {"eval.templates": ("the {} dog", "red {}")}
    assert evaluate_model(str(published[0]), tmp_path / "run", options | prompts) == own
    square = evaluate_model(str(published[0]), tmp_path / "run", options | prompts | {"eval.resize_factor": 2.0})
    assert square != own
    with pytest.raises(UserError, match="nothing to measure: give the data of a test set, such as --config.eval.sets"):
        evaluate_model("no/such-model", tmp_path / "run", {"eval.templates": ("{}",)})
    with pytest.raises(UserError, match="--config.model.image.size has no effect on no/such-model"):
        evaluate_model("no/such-model", tmp_path / "run", {"model.image.size": 32})


def test_the_card_of_a_model_of_the_hub_has_its_id_as_the_title(published, tmp_path):
    folder = shutil.copytree(published[0], tmp_path / "hub" / "models--some-org--clip" / "snapshots" / "c0ffee")
    Predictor.restore(folder, cache="").export(tmp_path / "exported")
    assert "\n# some-org/clip\n" in (tmp_path / "exported" / "README.md").read_text()
    assert Predictor.restore(tmp_path / "exported", cache="").config.name == "some-org/clip"


def test_the_towers_alone_start_a_run_and_the_whole_model_teaches_it(require, tiny_config, tmp_path):
    save_clip(require, tmp_path / "clip")
    save_siglip(require, tmp_path / "siglip")
    c = tiny_config
    c.model.image.update(name="", pretrained=str(tmp_path / "siglip"), size=SIZE)
    c.model.text.update(pretrained=str(tmp_path / "clip"), tokenizer="", max_tokens=TOKENS)
    c.freeze = (("image/tower", -1), ("text/tower", -1))
    c.teacher.kind, c.teacher.workdir, c.steps = "checkpoint", str(tmp_path / "clip"), 2
    c.objective.feature_weight = 10.0
    validate(c)
    train(c, tmp_path / "run")
    assert {"train/soft_loss", "train/feature_loss"} <= read_metrics(tmp_path / "run")[-1].keys()
    for name in ("clip", "siglip"):
        (tmp_path / name / "model.safetensors").unlink()
    predictor = Predictor.restore(tmp_path / "run", cache="")
    assert predictor.model.image.tower.pool == "map" and predictor.model.text.tower.config.causal
    assert predictor.model.mean == (0.5, 0.5, 0.5)
    predictor.export(tmp_path / "exported")
    shutil.rmtree(tmp_path / "run")
    again = Predictor.restore(tmp_path / "exported", cache="")
    np.testing.assert_array_equal(again.encode_image(IMAGES), predictor.encode_image(IMAGES))
    np.testing.assert_array_equal(again.encode_text(TEXTS), predictor.encode_text(TEXTS))
