"""The flags of zslflax.main, parsed in a test as the command does."""

import sys

import pytest
from absl import flags
from ml_collections import ConfigDict

from zslflax import main


def parse_flags(monkeypatch: pytest.MonkeyPatch, arguments: list[str]) -> ConfigDict:
    """Parses arguments, and returns the config. Call `reset_flags` at the end of the test."""
    reset_flags()
    monkeypatch.setattr(sys, "argv", ["main", *arguments])
    main.parse(sys.argv)
    return main.CONFIG.value


def reset_flags() -> None:
    """Undoes the parsing, and removes the flags that ml_collections defined for the overrides."""
    flags.FLAGS.unparse_flags()
    for name in [name for name in flags.FLAGS if name.startswith("config.")]:
        delattr(flags.FLAGS, name)
