"""Compiled programs on disk."""

import os

import jax

from zslflax import cli, distributed
from zslflax.config import default_config


def test_compiled_functions_are_cached_unless_the_config_says_otherwise(tmp_path, caplog, monkeypatch):
    assert default_config().compilation_cache
    before, shortest = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)  # jax's own value
    try:
        distributed.initialize(str(tmp_path))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.0
        distributed.initialize("")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
        (tmp_path / "file").write_text("in the way")
        distributed.initialize(f"{tmp_path}/file/folder")
        assert f"compiled programs are not kept: {tmp_path}/file/folder cannot be written" in caplog.text
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
        monkeypatch.setattr(cli, "COMPILATION_CACHE", str(tmp_path / "other"))
        cli.prepare_inference()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path) and not (tmp_path / "other").exists()
        jax.config.update("jax_compilation_cache_dir", None)
        cli.prepare_inference()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "other")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", shortest)


def test_commands_that_use_a_model_take_memory_as_needed_unless_the_environment_says_otherwise(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)
    for before, after in ((None, "false"), ("true", "true")):
        if before:
            monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", before)
        cli.share_gpu()
        assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == after
