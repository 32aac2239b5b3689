"""The command `zslflax export`: the model card, ONNX in ONNX Runtime, the upload, and other libraries' loaders."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.testing.configs import ROOT
from tests.testing.hub_server import serve
from zslflax import export
from zslflax.errors import UserError
from zslflax.inference import onnx_export
from zslflax.inference.predictor import Predictor
from zslflax.training.evaluate import evaluate_run


@pytest.fixture
def run_export(monkeypatch, capsys, tiny_config, finished_workdir):
    """Runs the command on a finished run, and returns what it prints."""

    def run(*arguments, workdir=finished_workdir):
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments), f"--workdir={workdir}"])
        export.main()
        return capsys.readouterr().out

    return run


def test_the_card_has_licence_data_and_results(run_export, trained_workdir, tmp_path):
    answer = json.loads(run_export(tmp_path / "a", "--license=mit", "--data=Coloured shapes", "--json"))
    assert answer == {"folder": str(tmp_path / "a"), "step": 6}
    card = (tmp_path / "a" / "README.md").read_text()
    last = json.loads((trained_workdir / "metrics.jsonl").read_text().splitlines()[-1])
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["license"] == "mit" and head["pipeline_tag"] == "zero-shot-image-classification"
    results = {m["type"]: m["value"] for result in head["model-index"][0]["results"] for m in result["metrics"]}
    assert results["hit@1"] == round(last["eval/test/hit@1"], 4) and not any("student" in name for name in results)
    assert f"| test | hit@1 | {100 * last['eval/test/hit@1']:.1f} | – |" in card
    assert "Coloured shapes, 96 image-caption pairs." in card and "The weights are under mit." in card

    measured = evaluate_run(trained_workdir, {"eval.bootstrap_resamples": 50}, None)
    run_export(tmp_path / "b", workdir=trained_workdir)
    card = (tmp_path / "b" / "README.md").read_text()
    hit, low, high = (100 * measured[f"eval/test/hit@1{end}"] for end in ("", "/low", "/high"))
    assert f"| test | hit@1 | {hit:.1f} | {low:.1f} to {high:.1f} |" in card and str(trained_workdir) not in card
    run_export(tmp_path / "c", workdir=tmp_path / "b")  # an exported model knows no results
    card = (tmp_path / "c" / "README.md").read_text()
    assert "exported without results" in card and "has given none" in card and "has not described it" in card


@pytest.mark.parametrize("folder", ["gs://bucket/model", "s3://bucket/model"])
def test_an_address_is_refused_before_anything_starts(folder, run_export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"FOLDER is '{folder}', an address"):
        run_export(folder, workdir="nowhere")
    assert not list(tmp_path.iterdir())


PUSH = """
import sys
from zslflax.models import vit
vit.VITS["vit_nano4"] = (8, 16, 1, 2)
from zslflax.cli import exit_on_error
from zslflax.export import main
with exit_on_error():
    main()
"""


def test_a_model_is_uploaded_by_the_hubs_own_client(finished_workdir, tmp_path):
    def push(folder, server):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret", "JAX_PLATFORMS": "cpu"}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "PYTHONPATH": str(ROOT)}
        arguments = [str(folder), f"--workdir={finished_workdir}", "--push=me/shapes", "--private", "--json"]
        return subprocess.run([sys.executable, "-c", PUSH, *arguments], env=environment, capture_output=True, text=True)

    with serve(tmp_path / "hub") as server:
        done = push(tmp_path / "model", server)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["url"] == f"http://127.0.0.1:{server.server_port}/me/shapes"
        assert server.made[0].get("private") or server.made[0].get("visibility") == "private"
        assert set(server.tokens) == {"Bearer hf_secret"}
        server.refuses = True
        refused = push(tmp_path / "again", server)
    files = [path.relative_to(tmp_path / "model") for path in (tmp_path / "model").rglob("*") if path.is_file()]
    assert len(files) >= 6
    for file in files:
        assert (tmp_path / "hub" / "me" / "shapes" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()
    assert refused.returncode == 1 and "Traceback" not in refused.stderr and "hf auth login" in refused.stderr
    assert (tmp_path / "again" / "README.md").exists() and "hf_secret" not in refused.stderr


def test_what_cannot_work_is_refused_before_the_model_is_loaded(run_export, tmp_path, monkeypatch):
    for arguments, message in (
        (["gs://bucket/model"], "FOLDER is 'gs://bucket/model', an address"),
        ([tmp_path / "a", "--push=shapes"], "the repository is 'shapes', expected USER/NAME"),
    ):
        with pytest.raises(UserError, match=message):
            run_export(*arguments, workdir=tmp_path / "nowhere")
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(UserError, match=r'pip install "zslflax\[onnx\]"'):
        run_export(tmp_path / "a", "--onnx")
    assert not (tmp_path / "a").exists()


def test_transformers_does_not_load_the_folder_with_random_weights(require, run_export, tmp_path):
    transformers = require("transformers")
    require("torch")
    run_export(tmp_path / "model")
    for name in ("AutoModel", "CLIPModel", "BertModel", "VisionTextDualEncoderModel", "ViTModel"):
        for folder in (tmp_path / "model", tmp_path / "model" / "text_encoder"):
            with pytest.raises((OSError, ValueError)):
                getattr(transformers, name).from_pretrained(folder, local_files_only=True)


class TestOnnx:
    @pytest.fixture
    def exported(self, require, run_export, tmp_path):
        require("jax2onnx")
        run_export(tmp_path / "model", "--onnx")
        return tmp_path / "model"

    def test_onnx_runtime_computes_the_same_and_the_documented_program_runs(
        self, require, exported, finished_workdir, tmp_path, monkeypatch
    ):
        predictor, rng = Predictor.restore(finished_workdir), np.random.default_rng(1)
        session = require("onnxruntime").InferenceSession
        image, text = (session(exported / name) for name in (onnx_export.IMAGE_TOWER, onnx_export.TEXT_TOWER))
        pixels = rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
        (image_emb,) = image.run(["image_emb"], {"image": pixels})
        np.testing.assert_allclose(image_emb, predictor.encode_image(pixels), atol=1e-4)
        texts = ["a red circle", "two blue squares and a very long sentence after them that has to be cut", ""]
        ids, mask = predictor.tokenizer(texts)
        (text_emb,) = text.run(["text_emb"], {"text": ids, "text_mask": mask})
        np.testing.assert_allclose(text_emb, predictor.encode_text(texts), atol=1e-4)

        blocks = re.findall(r"```python\n(.*?)```", serving_page(), re.DOTALL)
        (program,) = [block for block in blocks if "InferenceSession" in block]
        small = Image.fromarray(rng.integers(0, 256, (3, 4, 3), np.uint8))
        small.resize((41, 30), Image.Resampling.BICUBIC).save(tmp_path / "image.png")  # smooth, as photographs are
        monkeypatch.chdir(tmp_path)
        found = {}
        exec(program.replace("image.jpg", "image.png"), found)
        expected = dict(predictor.classify("image.png", found["class_names"], templates="a photo of {}.")[0])
        for name, score in zip(found["class_names"], found["scores"], strict=True):
            assert score == pytest.approx(expected[name], abs=0.02)  # Pillow's resampling is not OpenCV's

    def test_a_tower_that_computes_something_else_is_refused(self, require, exported):
        session = require("onnxruntime").InferenceSession(exported / onnx_export.IMAGE_TOWER)
        example = {"image": np.zeros((3, 16, 16, 3), np.uint8)}
        with pytest.raises(UserError, match="image_tower.onnx computes something else than the model"):
            onnx_export.check_session(
                session, lambda image: np.ones((len(image), 8)), example, exported / onnx_export.IMAGE_TOWER
            )


def serving_page() -> str:
    return (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
