"""CLIP with a ResNet as it is published, compared with a PyTorch network of the paper's parts in OpenAI's names."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.testing.clip_resnet import MEAN, SIZE, STD, image_tower, save_clip_resnet
from tests.testing.published import EMBED_DIM, TEXTS, TOKENS, photo
from tests.testing.runs import read_metrics
from zslflax.config import default_config
from zslflax.config_checks import validate
from zslflax.errors import UserError
from zslflax.inference.predictor import Predictor
from zslflax.models.build import configured_tower, described_tower
from zslflax.models.import_weights.image_architecture import clip_resnet_architecture
from zslflax.models.import_weights.load import load_image_tower
from zslflax.models.import_weights.open_clip import to_hugging_face
from zslflax.models.resnet import ResNet
from zslflax.training.loop import train

PARAMETERS = {  # millions in the image tower, with its projection, of open_clip's model profiles: layers, width, image
    "RN50": ([3, 4, 6, 3], 64, 224, 1024, 38.32),
    "RN101": ([3, 4, 23, 3], 64, 224, 512, 56.26),
    "RN50x4": ([4, 6, 10, 6], 80, 288, 640, 87.14),
    "RN50x16": ([6, 8, 18, 8], 96, 384, 768, 167.33),
}


@pytest.fixture(scope="module")
def published(require, tmp_path_factory):
    """A folder with the model, its image tower in PyTorch, and the original model of its text tower."""
    folder = tmp_path_factory.mktemp("clip_resnet") / "clip"
    return folder, *save_clip_resnet(require, folder)


def photos(size):
    """Three images of a size in three tints, uint8 [3, size, size, 3]."""
    tints = np.array([[1, 0.3, 0.1], [0.1, 1, 0.3], [0.5, 0.2, 1]])
    return np.stack([(photo(size, size, seed) * tint).astype(np.uint8) for seed, tint in enumerate(tints)])


def normalise(images):
    """The input of the tower, float32 [b, s, s, 3]."""
    return ((images / 255 - MEAN) / STD).astype(np.float32)


def run_original(torch, network, images, projected=True):
    with torch.no_grad():
        x = network(torch.tensor(normalise(images).transpose(0, 3, 1, 2)), projected).numpy()
    assert x.std(axis=0).max() > 0.05, "the output of the original hardly depends on its input"
    return x


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_embeddings_agree_with_the_original(require, published, caplog):
    caplog.set_level("INFO", "zslflax")
    folder, network, text_model = published
    predictor = Predictor.restore(folder, cache="")
    wanted = unit(run_original(require("torch"), network, photos(SIZE)))
    np.testing.assert_allclose(predictor.encode_image(list(photos(SIZE))), wanted, rtol=0, atol=1e-4)
    tokenizer = require("transformers").AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    text_emb = text_model.get_text_features(tokens["input_ids"], attention_mask=tokens["attention_mask"])
    text_emb = getattr(text_emb, "pooler_output", text_emb).detach().numpy()
    np.testing.assert_allclose(predictor.encode_text(TEXTS), unit(text_emb), rtol=0, atol=1e-4)
    assert predictor.config.model.embed_dim == EMBED_DIM and predictor.config.model.image.size == SIZE
    read = [message for message in caplog.messages if "no part of the tower" in message]
    assert len(read) == 2 and all("no part of the tower: no head and " in message for message in read)


def test_an_exported_model_is_the_same(published, tmp_path):
    moved = shutil.copytree(published[0], tmp_path / "moved")
    predictor = Predictor.restore(moved, cache="")
    predictor.export(tmp_path / "exported")
    shutil.rmtree(moved)
    again = Predictor.restore(tmp_path / "exported", cache="")
    np.testing.assert_array_equal(again.encode_image(list(photos(SIZE))), predictor.encode_image(list(photos(SIZE))))
    np.testing.assert_array_equal(again.encode_text(TEXTS), predictor.encode_text(TEXTS))


@pytest.mark.parametrize("size", [SIZE, 96])
def test_the_tower_alone_gives_what_precedes_the_projection(require, published, size):
    torch, (folder, network, _) = require("torch"), published
    config = default_config().model.image
    config.update(name="", pretrained=str(folder), size=size)
    tower = described_tower(config, jnp.float32)
    shapes = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    variables = load_image_tower(folder, "", shapes, size)
    original = image_tower(torch, size)
    weights, name = network.state_dict(), "attnpool.positional_embedding"
    mean, grid = weights[name][:1], weights[name][1:].T.reshape(1, -1, SIZE // 32, SIZE // 32)
    grid = torch.nn.functional.interpolate(grid, (size // 32, size // 32), mode="bicubic", align_corners=False)
    original.load_state_dict(weights | {name: torch.cat([mean, grid[0].flatten(1).T])})
    wanted = run_original(torch, original, photos(size), projected=False)
    got = jax.jit(tower.apply)(variables, normalise(photos(size)))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4)


def test_the_tower_trains_and_the_whole_model_teaches_it(published, tiny_config, tmp_path):
    folder, c = str(published[0]), tiny_config
    c.model.image.update(name="", pretrained=folder, size=SIZE)
    c.model.text.update(pretrained=folder, tokenizer="", max_tokens=TOKENS)
    c.freeze = (("text/tower", -1),)
    c.teacher.kind, c.teacher.workdir, c.steps = "checkpoint", folder, 2
    c.objective.feature_weight = 10.0
    validate(c)
    train(c, tmp_path / "run")
    assert {"train/soft_loss", "train/feature_loss"} <= read_metrics(tmp_path / "run")[-1].keys()
    trained, first = (Predictor.restore(path, cache="").variables for path in (tmp_path / "run", published[0]))
    means = [x["batch_stats"]["image"]["tower"]["bn1"]["mean"] for x in (trained, first)]
    assert np.abs(means[0] - means[1]).max() > 1e-3


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_number_of_parameters_is_the_published_one(tmp_path, name):
    layers, width, size, embed_dim, millions = PARAMETERS[name]
    image = {"layers": layers, "width": width, "image_size": size, "patch_size": None}
    model = {"embed_dim": embed_dim, "vision_cfg": image, "text_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    tower = ResNet(**clip_resnet_architecture(to_hugging_face(tmp_path / "open_clip_config.json")))
    shapes = jax.eval_shape(tower.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))["params"]
    projection = (32 * width + 1) * embed_dim
    found = sum(x.size for x in jax.tree.leaves(shapes)) + projection
    assert found / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": [1, 2, 1]}, r"layers \[1, 2, 1\], .*; expected four numbers of layers"),
        ({"layers": [1, 2, 10**9, 1]}, "expected four numbers of layers, of 1024 at most"),
        ({"head_width": 100}, "and 5 heads; .* a number of heads that divides"),
        ({"width": "16"}, "lacks a field or has one of the wrong type"),
        ({"image_size": 80}, "80 × 80 pixels: expected multiples of 32"),
        ({"width": 24}, "other shapes than the tower"),
    ],
)
def test_what_cannot_be_a_resnet_of_clip_is_refused(published, tmp_path, change, message):
    folder = shutil.copytree(published[0], tmp_path / "copy")
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["vision_cfg"] |= change
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        Predictor.restore(folder, cache="")


def test_patch_drop_and_pools_of_a_vit_are_refused(published):
    config = default_config().model.image
    config.update(name="", pretrained=str(published[0]), size=SIZE, pool="mean")
    with pytest.raises(UserError, match="model.image.pool is 'mean'; expected of this tower \"\": it has one way"):
        described_tower(config, jnp.float32)
    config.update(pool="", patch_drop=0.5)
    with pytest.raises(UserError, match="patch_drop is 0.5, but this tower has no patches"):
        configured_tower(config, jnp.float32, None)
