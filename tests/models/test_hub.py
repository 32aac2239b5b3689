"""Models by their ids on the Hugging Face Hub: its own client and a small local server with the Hub's addresses."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import jax
import numpy as np

from zslflax.inference.predictor import Predictor
from zslflax.inference.restore import build_model

SHA = "c0ffee" + 34 * "0"  # of the only commit
CONVERTED_SHA = "decade" + 34 * "0"  # of the pull request that adds safetensors
CONVERTED = {
    "num": 15,
    "title": "Adding `safetensors` variant of this model",
    "author": {"name": "SFconvertbot"},
    "createdAt": "2023-01-01T00:00:00.000Z",
    "status": "open",
    "isPullRequest": True,
    "repo": {"name": "some-org/old", "type": "model"},
}
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


class Hub(http.server.BaseHTTPRequestHandler):
    """Serves the folders ORG/NAME of `server.root` as models, at the addresses of the Hub.

    The folders ORG/NAME/pull-request are their pull requests.
    """

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path, root = self.path.partition("?")[0], self.server.root
        discussed, about, listed, file = (
            re.fullmatch(pattern, path)
            for pattern in (
                r"/api/models/([\w-]+/[\w-]+)/discussions",
                r"/api/models/([\w-]+/[\w-]+)/revision/(main|refs%2Fpr%2F15)",
                rf"/api/models/([\w-]+/[\w-]+)/tree/({SHA}|{CONVERTED_SHA})",
                rf"/([\w-]+/[\w-]+)/resolve/({SHA}|{CONVERTED_SHA})/(.+)",
            )
        )
        found = next(found for found in (discussed, about, listed, file) if found)
        model = found[1]
        if not (root / model).is_dir():
            return self.send(404, b"", {"X-Error-Code": "RepoNotFound"}, body)
        if discussed:
            return self.send(200, json.dumps({"discussions": [CONVERTED], "start": 0, "count": 1}).encode(), {}, body)
        sha = SHA if found[2] in ("main", SHA) else CONVERTED_SHA
        if sha == CONVERTED_SHA:
            model += "/pull-request"
        if file:
            data = (root / model / file[3]).read_bytes()
            self.server.given.append(file[3])
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self.send(200, data, {"ETag": etag, "X-Repo-Commit": sha}, body)
        files = [
            path
            for path in (root / model).rglob("*")
            if path.is_file() and (path.parent.name != "pull-request" or sha == CONVERTED_SHA)
        ]
        tree = [
            {
                "type": "file",
                "path": str(path.relative_to(root / model)),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(path.read_bytes()).hexdigest(),
            }
            for path in files
        ]
        self.send(200, json.dumps({"id": found[1], "sha": sha} if about else tree).encode(), {}, body)

    def send(self, status: int, data: bytes, headers: dict, body: bool):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serve(root):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.root, server.given = root, []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


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
        assert {"model.safetensors", "config.json", "text_encoder/tokenizer.json"} <= set(server.given)
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
