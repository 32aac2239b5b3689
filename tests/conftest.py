"""What every test shares: four virtual CPU devices, and tools that some tests need."""

import importlib
import os

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_platforms", "cpu")


@pytest.fixture(scope="session")
def require():
    """Imports a test-only library; where it is missing the test is skipped, but never in CI."""

    def load(name):
        return importlib.import_module(name) if os.environ.get("CI") else pytest.importorskip(name)

    return load


@pytest.fixture
def strict_types():
    """No implicit promotion between number types: for this project's own mathematics (optax relies on promotion)."""
    with jax.numpy_dtype_promotion("strict"):
        yield
