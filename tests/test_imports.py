"""Imports: the training path needs neither TensorFlow nor PyTorch, and a module imports only from lower layers."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import zslflax
from tests.testing.configs import MINILM

PACKAGE = Path(zslflax.__file__).parent
MODULES = sorted(
    ".".join(("zslflax", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)
GRADIO = ("zslflax.app", "zslflax.page")  # need Gradio, which may import anything

IMPORTS = """
import importlib, pathlib, sys
for module in sys.argv[3:]:
    importlib.import_module(module)
    found = {name for name in ("torch", "tensorflow") if sys.modules.get(name)}
    assert not found, (module, found)
from zslflax.data.text import Tokenizer
from zslflax.models.import_weights.locate import locate
from zslflax.training.metrics import Reporter
Reporter(pathlib.Path(sys.argv[1]), 0, 1).close()
Tokenizer.from_folder(locate(sys.argv[2]), 8)
found = {name for name in ("torch", "tensorflow") if sys.modules.get(name)}
assert not found, found
"""


def test_no_module_imports_tensorflow_or_torch(tmp_path):
    """Nor do the parts that import libraries when they are first used: TensorBoard's writer and the tokenizer."""
    modules = [module for module in MODULES if module not in GRADIO]
    assert {"zslflax", "zslflax.main", "zslflax.training.loop", "zslflax.training.step"} <= set(modules)
    arguments = [sys.executable, "-c", IMPORTS, str(tmp_path), MINILM, *modules]
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0, done.stderr


# Lower layers first. Modules of one layer may import each other. All other modules are commands, the highest layer.
LAYERS = (
    ("errors", "interrupts", "files", "saving", "figures", "background", "peers", "compilation", "progress"),
    ("cli", "distributed", "device_batches", "checkpoint_checks", "checkpoint", "checkpoint_recovery"),
    ("models", "losses"),
    ("config", "config_names", "config_json", "config_checks", "config_file"),
    ("data",),
    ("inference",),
    ("evaluation",),
    ("training",),
)


def layer(module: str) -> int:
    """The number of a module's layer, from the lowest."""
    return next((i for i, names in enumerate(LAYERS) if module.split(".")[1] in names), len(LAYERS))


def imports(module: str) -> set[str]:
    """The modules of the package that a module imports, also inside functions."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.startswith("zslflax.")}


@pytest.mark.parametrize("module", [module for module in MODULES if module != "zslflax"])
def test_a_module_imports_only_from_its_own_layer_and_those_below(module):
    higher = {name for name in imports(module) if name != "zslflax.__version__" and layer(name) > layer(module)}
    assert not higher, f"{module} imports from higher layers: {higher}"
