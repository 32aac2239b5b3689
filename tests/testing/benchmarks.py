"""Imports the scripts in benchmarks/, which import each other by their bare names."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest

from tests.testing.configs import ROOT

BENCHMARKS = ROOT / "benchmarks"


@contextlib.contextmanager
def imported(*names: str) -> Iterator[tuple[ModuleType, ...]]:
    """Imports scripts for a while; afterwards they and those that they import are forgotten."""
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as context:
        context.syspath_prepend(BENCHMARKS)
        yield tuple(map(importlib.import_module, names))
    for name in sys.modules.keys() - before:
        if (BENCHMARKS / f"{name}.py").is_file():
            del sys.modules[name]
