"""Exported models: what the folder has, that it predicts the same, and which folders are refused."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.testing.faults import small_disk
from zslflax.errors import StorageError
from zslflax.inference import export
from zslflax.inference.predictor import Predictor
from zslflax.inference.restore import build_model

CLASS_NAMES = ["red circle", "blue square", "a cat"]


def test_an_exported_model_computes_exactly_the_same(predictor, exported, images):
    again = Predictor.restore(exported)
    assert again.step == 6 and again.tokenizer.identity == predictor.tokenizer.identity
    np.testing.assert_array_equal(again.encode_image(images), predictor.encode_image(images))
    np.testing.assert_array_equal(again.encode_text(CLASS_NAMES), predictor.encode_text(CLASS_NAMES))
    assert again.classify(images, CLASS_NAMES) == predictor.classify(images, CLASS_NAMES)  # with the run's prompts
    shapes = {name: x.shape for name, x in load_file(exported / export.WEIGHTS).items()}
    assert shapes["params/objective/log_logit_scale"] == () and shapes["params/text/projection/kernel"] == (
        16,
        8,
    )
    files = {str(path.relative_to(exported)) for path in exported.rglob("*") if path.is_file()}
    tokenizer = {f"text_encoder/{name}" for name in ("tokenizer.json", "tokenizer_config.json", "identity.json")}
    assert files == {"README.md", "config.json", "zslflax.safetensors"} | tokenizer


def test_an_export_has_no_paths_of_the_machine_that_trained_it(finished_workdir, exported, shapes_root):
    assert str(shapes_root) in (finished_workdir / "config.json").read_text()
    for path in exported.rglob("*.*"):
        assert str(shapes_root) not in path.read_text(errors="replace")
        assert str(finished_workdir) not in path.read_text(errors="replace")


def test_an_export_can_be_exported_and_moved(predictor, exported, tmp_path):
    Predictor.restore(exported).export(tmp_path / "second")
    shutil.move(tmp_path / "second", tmp_path / "third")
    again = Predictor.restore(str(tmp_path / "third"))
    np.testing.assert_array_equal(again.encode_text(CLASS_NAMES), predictor.encode_text(CLASS_NAMES))
    with pytest.raises(FileExistsError, match="third is not empty"):
        again.export(tmp_path / "third")


def test_an_export_that_fails_leaves_nothing_behind(exported, tmp_path, monkeypatch):
    model = Predictor.restore(exported)
    size = sum(path.stat().st_size for path in exported.rglob("*"))
    with small_disk(tmp_path / "disk", str(size - (exported / export.WEIGHTS).stat().st_size // 2)) as disk:
        with pytest.raises(StorageError, match=f"{disk}/model/zslflax.safetensors cannot be written: .*No space left"):
            model.export(disk / "model")
        assert not list(disk.iterdir())

    def interrupt(*_):
        raise KeyboardInterrupt

    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(export, "save_model", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.export(tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())


def test_the_sizes_of_a_pretrained_encoder_are_exported(tiny_config, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    sizes |= {"vocab_size": 30_522, "max_position_embeddings": 12, "type_vocab_size": 2, "model_type": "bert"}
    for folder in ("encoder", "tower"):
        (tmp_path / folder).mkdir()
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(sizes))
    (tmp_path / "encoder" / "1_Pooling").mkdir()
    (tmp_path / "encoder" / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    statistics = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "tower" / "preprocessor_config.json").write_text(json.dumps(statistics))
    tiny_config.model.text.pretrained = str(tmp_path / "encoder")
    tiny_config.model.image.pretrained = str(tmp_path / "tower")
    model, tokenizer = build_model(tiny_config)
    image, text = np.zeros((1, 16, 16, 3), np.uint8), np.zeros((1, 12), np.int32)
    variables = jax.jit(model.init)(jax.random.key(0), image, text, text == 0)
    predictor = Predictor(tiny_config, model, variables, tokenizer)
    predictor.export(tmp_path / "exported")
    assert str(tmp_path) not in (tmp_path / "exported" / "config.json").read_text()
    shutil.rmtree(tmp_path / "encoder")
    shutil.rmtree(tmp_path / "tower")
    again = Predictor.restore(tmp_path / "exported")
    assert (again.model.mean, again.model.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert again.model.text.tower.config.pool == "cls"
    assert (16, 24) in {x.shape for x in jax.tree.leaves(again.variables["params"]["text"]["tower"])}
    np.testing.assert_array_equal(again.encode_text(CLASS_NAMES), predictor.encode_text(CLASS_NAMES))


def test_an_exported_folder_loads_without_orbax_torch_or_tensorflow(exported):
    program = (
        "import sys; from zslflax.models import vit; vit.VITS['vit_nano4'] = (8, 16, 1, 2)\n"
        "from zslflax import Predictor\n"
        "Predictor.restore(sys.argv[1]).encode_text('a cat')\n"
        "print({name.partition('.')[0] for name in sys.modules} & "
        "{'orbax', 'torch', 'tensorflow', 'tensorflow_datasets', 'grain', 'transformers'})"
    )
    result = subprocess.run([sys.executable, "-c", program, exported], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("kind", ["run", "exported"])
def test_a_changed_or_unidentified_tokenizer_is_refused(finished_workdir, exported, tmp_path, kind):
    folder = shutil.copytree({"run": finished_workdir, "exported": exported}[kind], tmp_path / "copy")
    path = folder / "text_encoder" / "tokenizer.json"
    rules = json.loads(path.read_text())
    vocabulary = rules["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    path.write_text(json.dumps(rules))
    with pytest.raises(ValueError, match="not the one that the model was trained with"):
        Predictor.restore(folder)
    (folder / "text_encoder" / "identity.json").unlink()
    with pytest.raises(FileNotFoundError, match="identity.json is missing"):
        Predictor.restore(folder)


def test_folders_without_a_model_missing_steps_and_damaged_files_are_refused(exported, finished_workdir, tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json: expected the --workdir of a training run, an expo"):
        Predictor.restore(tmp_path)
    with pytest.raises(FileNotFoundError, match="no complete checkpoint of step 2; found steps 3, 6"):
        Predictor.restore(finished_workdir, step=2)
    for wrong in ({"step": 4}, {"use": "student"}):
        with pytest.raises(ValueError, match="no steps and no student"):
            Predictor.restore(exported, **wrong)
    folder = shutil.copytree(exported, tmp_path / "copy")
    weights = (folder / export.WEIGHTS).read_bytes()
    (folder / export.WEIGHTS).write_bytes(weights[:-10])
    with pytest.raises(ValueError, match="zslflax.safetensors is no safetensors file, or is cut off or damaged"):
        Predictor.restore(folder)
    save_file({"x": np.zeros(1)}, folder / export.WEIGHTS)
    for config, message in (
        ('{"hidden_size": 8}', "config.json is not a config of zslflax; found the fields hidden_size"),
        ('{"model_type": "resnet"}', "copy has model_type 'resnet'; expected a model with an image and a text tower"),
    ):
        (folder / "config.json").write_text(config)
        with pytest.raises(ValueError, match=message):
            Predictor.restore(folder)
