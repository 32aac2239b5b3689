"""What every test shares: four virtual CPU devices, strict number types, and tools that some tests need."""

import importlib
import os

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session")
def require():
    """Imports a test-only library; where it is missing the test is skipped, but never in CI."""

    def load(name):
        return importlib.import_module(name) if os.environ.get("CI") else pytest.importorskip(name)

    return load
