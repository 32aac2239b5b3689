"""The documents name files, fields, flags and functions that exist, and their examples run."""

import importlib
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from zslflax.commands import COMMANDS
from zslflax.config import default_config
from zslflax.config_names import field_names
from zslflax.evaluation import metrics
from zslflax.losses import contrastive
from zslflax.losses.pairs import Embeddings

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
FIELDS = set(field_names(default_config()))
GROUPS = {field[: dot.start()] for field in FIELDS for dot in re.finditer(r"\.", field)}


@pytest.fixture(params=PAGES, ids=lambda page: page.name)
def page(request):
    return request.param


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_every_linked_file_exists(page):
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_every_config_field_exists(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"--config\.([a-z][\w.]*)", text)
    named += re.findall(r"`((?:model|objective|teacher|optimizer|data|eval)\.(?!safetensors`)[\w.]+)", text)
    fields = {re.sub(r"^eval\.sets\.\w+", "eval.sets.test", field.rstrip(".")) for field in named}
    assert fields <= FIELDS | GROUPS


def test_every_command_and_flag_exists(page, monkeypatch, capsys):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    named = re.findall(r"python -m (zslflax\.[\w.]+)(.*)", text)
    for name, arguments in re.findall(r"\bzslflax ([a-z-]+)((?: .*)?)$", text, re.MULTILINE):
        if name in COMMANDS:  # elsewhere it is a word of a sentence
            named.append((COMMANDS[name].module, arguments))
    for command, arguments in named:
        module = importlib.import_module(command)
        if hasattr(module, "__path__"):  # a package
            module = importlib.import_module(f"{command}.__main__")
        command = command.removeprefix("zslflax.")
        flags = set(re.findall(r"--([a-z][\w-]*)", arguments.partition("#")[0]))
        if command in ("main", "features"):  # both have the flags of main
            known = {"config", *importlib.import_module("zslflax.main").flags.FLAGS}
        else:
            monkeypatch.setattr(sys, "argv", [command, "--help"])
            with pytest.raises(SystemExit):
                module.main()
            known = set(re.findall(r"--([a-z][\w-]*)", capsys.readouterr().out))
        assert flags <= known, command


def test_every_named_file_of_the_repository_exists(page):
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.~])((?:benchmarks|configs|launch|tests)/[\w/.]+\.\w+)", text)
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_map_lists_every_module():
    """Folders end with a slash; the indentation of two blanks a level says what is inside what."""
    tree = re.search(r"^```\n(zslflax/\n.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)[1]
    listed, folders = set(), []
    for line in tree.splitlines():
        name = line.split()[0]
        folders[(len(line) - len(line.lstrip())) // 2 :] = [name]
        if not name.endswith("/"):
            listed.add("".join(folders))
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "zslflax").rglob("*.py") if path.name != "__init__.py"}
    assert listed == modules


def test_the_examples_of_using_a_model_run(finished_workdir, tiny_config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("image.jpg", "other.jpg"):
        Image.new("RGB", (24, 24), "red").save(name)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(finished_workdir)
    for document in (ROOT / "README.md", ROOT / "docs" / "serving.md"):
        for block in python_blocks(document):
            if "InferenceSession" not in block:  # tests/test_export.py runs it, on a model that was exported as ONNX
                exec(block, {})


class TestExamplesOfContributing:
    """Each example of CONTRIBUTING.md is executed as the file that it goes into."""

    @pytest.fixture
    def example(self):
        def run(containing: str, namespace: dict | None = None) -> dict:
            (block,) = [block for block in python_blocks(ROOT / "CONTRIBUTING.md") if containing in block]
            namespace = dict(namespace or {})
            exec(block, namespace)
            return namespace

        return run

    def test_objective(self, example, monkeypatch):
        objectives = example("OBJECTIVES", vars(contrastive))["OBJECTIVES"]
        monkeypatch.setattr(contrastive, "OBJECTIVES", objectives)
        config = default_config().objective
        config.name = "best_match"
        eye, valid = jnp.eye(4), jnp.array([True, True, True, False])
        embeddings = Embeddings(eye[None], eye[None])
        losses = jax.pmap(
            lambda student, teacher, valid: contrastive.pair_losses(
                config, contrastive.init_params(config), student, teacher, valid, step=jnp.int32(0), axis_name="data"
            ),
            axis_name="data",
        )(embeddings, embeddings, valid[None])
        np.testing.assert_allclose(losses["soft_on_pair"][0, :3], 1.0)

    def test_image_tower(self, example):
        mixer = example("class Mixer")["Mixer"](patch=4, width=16, depth=2)
        x = jnp.ones((2, 8, 8, 3))
        features = mixer.apply(mixer.init(jax.random.key(0), x), x, train=True)
        assert features.shape == (2, 16) and features.dtype == jnp.float32

    def test_data_source(self, example, tmp_path):
        Image.new("RGB", (24, 24), "red").save(tmp_path / "1.png")
        (tmp_path / "pairs.jsonl").write_text(
            '{"image": "1.png", "caption": "red"}\n{"image": "2.png", "caption": "blue"}\n'
        )
        namespace = example("class JsonLines")
        source = namespace["JsonLines"](tmp_path / "pairs.jsonl")
        assert len(source) == 2 and list(source.names()) == ["1.png", "2.png"]
        assert source.read_annotations(1) == {"text": ("blue",), "label": (), "name": "2.png"}
        before = source.fingerprint()
        os.utime(tmp_path / "1.png", (1, 1))
        assert source.fingerprint() != before
        assert source[0]["text"] == ("red",) and source[0]["image"] == (tmp_path / "1.png").read_bytes()
        with pytest.raises(namespace["BadSample"], match="cannot be read"):
            source[1]

    def test_metric(self, example):
        values = example("reciprocal_rank_at_k", vars(metrics))["reciprocal_rank_at_k"](
            [[4, 2], [0, 1], [2, 0]], [(2,), (5,), ()], ks=(1, 2)
        )
        np.testing.assert_array_equal(values, [[0.0, 0.5], [0.0, 0.0], [np.nan, np.nan]])
