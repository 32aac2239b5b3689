"""The examples in docstrings run and print what they say."""

import doctest
import importlib
import os
import pkgutil

import pytest

import zslflax

MODULES = [module.name for module in pkgutil.walk_packages(zslflax.__path__, "zslflax.")]
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if os.environ.get("CI") or str(error.name).startswith("zslflax"):
            raise
        pytest.skip(f"{error.name} is not installed")
    runner, report = doctest.DocTestRunner(optionflags=FLAGS), []
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(example, out=report.append)
    assert runner.failures == 0, "".join(report)


def test_the_examples_of_public_functions_are_found():
    examples = {
        example.name
        for name in ("zslflax.losses.contrastive", "zslflax.training.train_state")
        for example in doctest.DocTestFinder().find(importlib.import_module(name), name)
        if example.examples
    }
    assert {"zslflax.losses.contrastive.cross_entropy", "zslflax.training.train_state.update_ema"} <= examples
