"""Models by their ids on the Hugging Face Hub: its own client and a small local server with the Hub's addresses."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np

from tests.testing.hub_server import SHA, serve
from zslflax.inference.predictor import Predictor
from zslflax.inference.restore import build_model

PROGRAM = """
import json, sys
from zslflax.models import vit
vit.VITS["vit_nano4"] = (8, 16, 1, 2)
from zslflax import Predictor
from zslflax.models.import_weights.locate import locate
predictor = Predictor.restore("some-org/shapes", cache="")
encoder, old = locate("some-org/encoder"), locate("some-org/old")
answer = {"encoder": str(encoder), "old": sorted(path.name for path in old.iterdir())}
print(json.dumps({"text": predictor.encode_text("a red circle").tolist(), **answer}))
try:
    locate("some-org/shape")
except FileNotFoundError as error:
    print(error)
"""


def run(home, endpoint: str, **variables) -> list[str]:
    """Runs the program in a new process, because the Hub's client reads its settings at import; returns its output."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "JAX_PLATFORMS": "cpu", **variables}
    return subprocess.check_output([sys.executable, "-c", PROGRAM], env=environment, text=True).splitlines()


def test_models_are_downloaded_by_id_and_then_found_without_network(tiny_config, tmp_path):
    model, tokenizer = build_model(tiny_config)
    image, text = np.zeros((1, 16, 16, 3), np.uint8), np.zeros((1, 12), np.int32)
    predictor = Predictor(tiny_config, model, jax.jit(model.init)(jax.random.key(0), image, text, text == 0), tokenizer)
    predictor.export(tmp_path / "hub" / "some-org" / "shapes")
    encoder = shutil.copytree(
        tmp_path / "hub" / "some-org" / "shapes" / "text_encoder", tmp_path / "hub" / "some-org" / "encoder"
    )
    for name in ("model.safetensors", "pytorch_model.bin"):
        (encoder / name).write_bytes(b"weights")
    old = tmp_path / "hub" / "some-org" / "old"  # as openai/clip-vit-base-patch32
    (old / "pull-request").mkdir(parents=True)
    for path in (old / "pytorch_model.bin", old / "config.json", old / "pull-request" / "model.safetensors"):
        path.write_bytes(b"{}")
    with serve(tmp_path / "hub") as server:
        online = run(tmp_path / "home", f"http://127.0.0.1:{server.server_port}")
        assert {"zslflax.safetensors", "config.json", "text_encoder/tokenizer.json"} <= set(server.given)
        assert "pytorch_model.bin" not in server.given
    found = json.loads(online[0])
    np.testing.assert_allclose(found["text"], predictor.encode_text("a red circle"), atol=1e-6)
    there = {path.name for path in tmp_path.glob(f"home/hub/models--some-org--encoder/snapshots/{SHA}/*")}
    assert there == {path.name for path in encoder.iterdir()} - {"pytorch_model.bin"}
    assert found["encoder"].endswith(SHA)
    assert found["old"] == ["model.safetensors"]
    assert re.match("'some-org/shape' is no folder here, and the Hugging Face Hub did not give it. Check", online[1])

    unreachable, offline = {}, {"HF_HUB_OFFLINE": "1"}
    for variables in (unreachable, offline):
        answer, error, *_ = run(tmp_path / "home", f"http://127.0.0.1:{server.server_port}", **variables)
        assert json.loads(answer) == found
        assert error.startswith("'some-org/shape' is no folder here, and the Hugging Face Hub did not give it. Check")
        assert "copy the model's folder here and name that" in error
