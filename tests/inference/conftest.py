"""A model as a run and as an exported folder, and images to predict."""

import numpy as np
import pytest

from zslflax.inference.predictor import Predictor


@pytest.fixture(scope="session")
def export_folder(tmp_path_factory):
    """The parent of the folder that `exported` writes once for all tests."""
    return tmp_path_factory.mktemp("exports")


@pytest.fixture
def predictor(tiny_config, finished_workdir):
    """The predictor of a finished run."""
    return Predictor.restore(finished_workdir)


@pytest.fixture
def exported(predictor, export_folder):
    """The run's model as an exported folder, which no test may change."""
    if not (export_folder / "exported").is_dir():
        predictor.export(export_folder / "exported")
    return export_folder / "exported"


@pytest.fixture
def images():
    """Arrays of several sizes."""
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (20 + 3 * i, 41 - 2 * i, 3), np.uint8) for i in range(11)]
