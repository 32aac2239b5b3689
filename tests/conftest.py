"""Fixtures of all tests: four virtual CPU devices, tiny configs, trained workdirs, and optional libraries."""

import importlib
import os
import shutil
import tempfile
from pathlib import Path

import jax
import pytest
from filelock import FileLock

from tests.testing.configs import (
    COMPILATION_CACHE,
    TINY_VIT,
    XLA_FLAGS,
    make_learned_config,
    make_tiny_config,
)
from tests.testing.faults import give_to_nobody
from tests.testing.images import write_colours
from zslflax import checkpoint, device_batches
from zslflax.models import vit
from zslflax.training import loop
from zslflax.training.step import mapped_step

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}"
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_platforms", "cpu")
# Functions that an earlier run or another test has compiled are not compiled again. The cache has no limit to its size:
# with one, jax reads the age of each entry whenever it adds one. An entry that another process has written in part is
# compiled again.
jax.config.update("jax_compilation_cache_dir", str(COMPILATION_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
# The same for the processes that tests start.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(COMPILATION_CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


@pytest.fixture(scope="module", autouse=True)
def clear_compiled_functions():
    """Frees what a module compiled: each function maps memory, and Linux allows 65,530 maps to a process."""
    yield
    mapped_step.cache_clear()
    device_batches.map_method.cache_clear()
    jax.clear_caches()


@pytest.fixture(scope="session")
def require():
    """Imports a library that only tests need. Where it is missing the test is skipped, but fails in CI."""

    def load(name):
        return importlib.import_module(name) if os.environ.get("CI") else pytest.importorskip(name)

    return load


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory):
    """The folder in which the built-in source is written, once for all tests."""
    return tmp_path_factory.mktemp("shapes")


@pytest.fixture
def tiny_config(shapes_root, monkeypatch):
    """The config of a run that trains in seconds."""
    monkeypatch.setitem(vit.VITS, "vit_nano4", TINY_VIT)
    return make_tiny_config(shapes_root)


@pytest.fixture(scope="session")
def finished_workdir(shapes_root):
    """The workdir of a finished run of `tiny_config`. Tests must not change it."""
    with pytest.MonkeyPatch.context() as context:
        context.setitem(vit.VITS, "vit_nano4", TINY_VIT)
        loop.train(make_tiny_config(shapes_root), shapes_root / "finished")
    return shapes_root / "finished"


@pytest.fixture
def trained_workdir(finished_workdir, tmp_path):
    """A copy of `finished_workdir`, which a test may change."""
    return shutil.copytree(finished_workdir, tmp_path / "finished")


@pytest.fixture(scope="session")
def learned_workdir(tmp_path_factory):
    """The workdir of a run that learned to tell colours, trained once for all processes of pytest-xdist.

    Tests must not change it.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the processes share it
    with FileLock(folder / "learned.lock"):
        if not checkpoint.complete_steps(folder / "learned"):
            loop.train(make_learned_config(folder / "learned_shapes"), folder / "learned")
    return folder / "learned"


@pytest.fixture(scope="session")
def colour_folder(tmp_path_factory):
    """Labelled images in subfolders by colour. Tests must not change them."""
    return write_colours(tmp_path_factory.mktemp("colours"))


@pytest.fixture
def nobodys_folder():
    """A new folder that `as_nobody` can reach and write. pytest's own folders are closed to other users."""
    with tempfile.TemporaryDirectory() as folder:
        give_to_nobody(Path(folder))
        yield Path(folder)


@pytest.fixture
def strict_types():
    """No implicit promotion between number types, for this project's own mathematics (optax relies on promotion)."""
    with jax.numpy_dtype_promotion("strict"):
        yield
