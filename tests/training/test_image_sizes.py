"""Training on smaller images first: the sizes of the batches, resuming across the change, and evaluation."""

import itertools
import shutil

import numpy as np
import pytest

from tests.testing.runs import assert_same_run, read_metrics
from zslflax.errors import UserError
from zslflax.inference.predictor import Predictor
from zslflax.inference.restore import build_model
from zslflax.training import loop
from zslflax.training.input import host_batches
from zslflax.training.setup import open_train_sources


@pytest.mark.parametrize("start", [0, 1, 3, 4, 5])
def test_batches_have_the_sizes_of_the_schedule_and_the_order_of_any_run(tiny_config, start):
    tokenizer, sources = build_model(tiny_config)[1], open_train_sources(tiny_config)
    load = lambda: itertools.islice(host_batches(tiny_config, sources, tokenizer, 1, start), 7 - start)
    plain = list(load())
    tiny_config.model.image.schedule = ((8, 2), (12, 4))
    scheduled = list(load())
    assert [batch["image"].shape[1] for batch in scheduled] == [8, 8, 12, 12, 16, 16, 16][start:]
    for a, b in zip(plain, scheduled, strict=True):
        np.testing.assert_array_equal(a["text"], b["text"])
    np.testing.assert_array_equal(plain[-1]["image"], scheduled[-1]["image"])


def test_a_run_that_resumes_before_the_change_equals_the_uninterrupted_one(tiny_config, tmp_path):
    tiny_config.model.image.schedule = ((8, 4),)
    loop.train(tiny_config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "6")
    loop.train(tiny_config, tmp_path / "parts")  # from step 3
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    assert all(np.isfinite(line["train/loss"]) for line in read_metrics(tmp_path / "parts"))
    predictor = Predictor.restore(tmp_path / "parts")
    assert predictor.encode_image(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 8)


def test_a_size_that_the_tower_does_not_take_is_refused_before_the_first_step(tiny_config, tmp_path):
    tiny_config.model.image.schedule = ((12, 4),)
    with pytest.raises(UserError, match="12 × 12 pixels: expected multiples of the patch's 8.*model.image.schedule"):
        loop.train(tiny_config, tmp_path / "run")
