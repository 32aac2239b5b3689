"""Worker processes read every kind of source as threads do."""

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from tests.testing.images import jpeg, write
from zslflax.config import default_config
from zslflax.data import pipeline
from zslflax.data.sources.opening import open_source

TOKENS = 20


class Characters:
    """A tokenizer whose tokens are characters."""

    identity = {"pad_id": 0}

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array([[ord(c) for c in text[:TOKENS].ljust(TOKENS, "\0")] for text in texts], np.int32)
        return ids, ids > 0


@pytest.fixture(params=["folder", "csv", "parquet"])
def spec(request, tmp_path, monkeypatch):
    """Ten images of different grey values, of which each caption tells the value."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    values = range(0, 200, 20)
    if request.param == "parquet":
        columns = {
            "image": [{"bytes": jpeg(v), "path": None} for v in values],
            "caption": [f"grey {v}" for v in values],
        }
        parquet.write_table(pa.table(columns), tmp_path / "pairs.parquet")
        return f"{tmp_path}/pairs.parquet"
    for value in values:
        write(tmp_path / "images" / f"{value}.jpg", jpeg(value))
        if request.param == "folder":
            write(tmp_path / "images" / f"{value}.txt", f"grey {value}")
    if request.param == "folder":
        return f"{tmp_path}/images"
    rows = [f"images/{value}.jpg,grey {value}" for value in values]
    return str(write(tmp_path / "pairs.csv", "\n".join(["filepath,title", *rows])))


def test_batches_are_the_same_from_workers_and_from_threads(spec):
    source = open_source(spec, default_config().data, "train")

    def batches(workers: int) -> list:
        made = pipeline.train_batches(
            [source], (), Characters(), batch_size=5, image_size=8, seed=0, workers=workers, threads=1
        )
        taken = [{name: np.array(value) for name, value in batch.items()} for batch in itertools.islice(made, 3)]
        made.close()
        return taken

    from_workers = batches(1)
    for ours, theirs in zip(from_workers, batches(pipeline.NO_WORKERS), strict=True):
        assert ours["valid"].all() and not ours["errors"].size
        for name in ("image", "text", "text_mask"):
            np.testing.assert_array_equal(ours[name], theirs[name])
        for image, text in zip(ours["image"], ours["text"], strict=True):
            assert abs(int(bytes(text[5:][text[5:] > 0].astype(np.uint8))) - image.mean()) < 3
