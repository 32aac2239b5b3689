"""The notebooks, executed on a small run, and their results against values computed here."""

import ast
import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from zslflax.data import preprocess
from zslflax.data.sources.opening import open_source
from zslflax.inference.predictor import Predictor

FOLDER = Path(__file__).parent.parent / "notebooks"


@pytest.fixture
def execute(require, learned_workdir, monkeypatch, request):
    """Executes a notebook on the run `learned_workdir`; returns what its cells print or display."""
    nbformat, nbclient = require("nbformat"), require("nbclient")
    for needed in ("ipykernel", "matplotlib"):
        require(needed)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    cache = request.config.rootpath / ".pytest_cache" / "compiled"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))

    def run(name: str) -> tuple[list[str], list[Image.Image]]:
        notebook = nbformat.read(FOLDER / name, as_version=4)
        (cell,) = (cell for cell in notebook.cells if cell.source == 'workdir = "../runs/demo"')
        cell.source = f"workdir = {str(learned_workdir)!r}"
        place = {"metadata": {"path": str(FOLDER)}}
        nbclient.NotebookClient(notebook, timeout=300, resources=place).execute()
        texts, shown = [], []
        for output in (output for cell in notebook.cells for output in cell.get("outputs", ())):
            data = output.get("data", {})
            if "image/png" in data:
                shown.append(Image.open(io.BytesIO(base64.b64decode(data["image/png"]))))
            elif output.get("name") != "stderr":
                texts.append(data.get("text/plain") or output["text"])
        return texts, shown

    return run


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_stored_without_outputs(require, path):
    notebook = require("nbformat").read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and all(cell.outputs == [] and cell.execution_count is None for cell in code)


def test_use_a_model_classifies_and_searches_as_the_predictor_does(execute, learned_workdir):
    texts, shown = execute("use_a_model.ipynb")
    drawn, others, found = map(ast.literal_eval, texts)
    predictor = Predictor.restore(learned_workdir)
    for (answer,) in (drawn, others):
        (expected,) = predictor.classify(shown[0], [name for name, _ in answer])
        assert [name for name, _ in answer] == [name for name, _ in expected] and len(answer) == 4
        np.testing.assert_allclose([s for _, s in answer], [s for _, s in expected], atol=1e-5)

    test = open_source("shapes", predictor.config.data, "test")
    image_emb = predictor.encode_image([preprocess.record_image(test[i]) for i in range(len(test))])
    (fits,) = predictor.encode_text("a red star next to something blue") @ image_emb.T
    assert [i for i, _ in found] == np.argsort(-fits)[:6].tolist()
    assert [image.size for image in (shown[0], shown[2])] == [(200, 200), (6 * 128, 128)]
    assert shown[1].width > 600 and len(shown[1].convert("RGB").getcolors(1 << 20)) > 100


def test_soft_labels_equal_the_softmax_and_find_mismatched_pairs(execute, learned_workdir):
    texts, shown = execute("soft_labels.ipynb")
    printed = "".join(texts)
    predictor = Predictor.restore(learned_workdir)
    source = open_source("shapes", predictor.config.data, "train")
    records = [source[i] for i in range(512)]
    image_emb = predictor.encode_image([preprocess.record_image(record) for record in records])
    text_emb = predictor.encode_text([record["text"][0] for record in records])
    temperature = predictor.config.objective.teacher_temperature
    own = softmax(image_emb @ text_emb.T / temperature, axis=1).diagonal()
    about = [source.read_json(i) for i in range(512)]
    mismatched = np.array([fields["mismatched"] for fields in about])
    assert f"512 pairs: {own.mean():.3f} on the pair (uniform: 0.002)" in printed
    counts = {int(k): int(n) for k, n in re.findall(r"the (\d+) worst pairs, (\d+) are mismatched", printed)}
    assert counts.keys() == {10, 20, mismatched.sum()}
    for k, count in counts.items():
        assert abs(count - mismatched[np.argsort(own)[:k]].sum()) <= 1  # rounding may swap the last two
    assert counts[20] > 2 * 20 * mismatched.mean()  # by chance: once
    assert len(shown) == 3
    for image in shown:
        assert image.width > 400 and len(image.convert("RGB").getcolors(1 << 20)) > 100
