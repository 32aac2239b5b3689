"""Datasets of Hugging Face's `datasets`: saved to disk, and by name."""

import json
import pickle
import sys

import huggingface_hub
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.testing.images import jpeg
from zslflax.config import default_config
from zslflax.data import images
from zslflax.data.sources.opening import open_source

DATA = default_config().data


@pytest.fixture
def datasets(require, tmp_path, monkeypatch):
    """The library, with a cache of the test's own."""
    datasets = require("datasets")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def make_dataset(datasets):
    features = datasets.Features(
        image=datasets.Image(),
        caption=datasets.List(datasets.Value("string")),
        label=datasets.ClassLabel(names=["cat", "dog"]),
    )
    pixels = [Image.fromarray(np.full((8, 9, 3), 20 * i, np.uint8)) for i in range(5)]
    columns = {"image": pixels, "caption": [[f"a {i}", f"b {i}"] for i in range(5)], "label": [0, 1, 0, 1, -1]}
    return datasets.Dataset.from_dict(columns, features=features)


def check(source, rows):
    """Compares the records of a source with rows of `make_dataset`."""
    assert len(source) == len(rows) and source.classes == ["cat", "dog"]
    for record, row in zip([source[i] for i in range(len(source))], rows, strict=True):
        assert record["text"] == (f"a {row}", f"b {row}") and record["label"] == ((), (row % 2,))[row < 4]
        assert (images.decode(record["image"]) == 20 * row).all()
    assert pickle.loads(pickle.dumps(source))[0] == source[0]


def test_a_saved_dataset(datasets, tmp_path):
    dataset = make_dataset(datasets)
    dataset.save_to_disk(tmp_path / "saved", num_shards=2)
    for spec in (f"hf_dataset:{tmp_path}/saved", f"{tmp_path}/saved", f"folder:{tmp_path}/saved"):
        source = open_source(spec, DATA, "train")
        check(source, range(5))
    assert list(source.names())[4] == f"{tmp_path}/saved:4"
    dataset.select([3, 1]).save_to_disk(tmp_path / "chosen")
    check(open_source(f"{tmp_path}/chosen", DATA, "test"), [3, 1])
    assert open_source(f"{tmp_path}/chosen", DATA, "test").fingerprint() != source.fingerprint()


def test_saved_splits(datasets, tmp_path):
    dataset = make_dataset(datasets)
    datasets.DatasetDict(train=dataset, val=dataset.select([2])).save_to_disk(tmp_path / "saved")
    check(open_source(f"{tmp_path}/saved", DATA, "train"), range(5))
    check(open_source(f"{tmp_path}/saved/val", DATA, "test"), [2])
    with pytest.raises(ValueError, match="saved has no split test, only train, val; give .*/saved/train"):
        open_source(f"{tmp_path}/saved", DATA, "test")


def test_a_dataset_by_name(datasets, tmp_path):
    (tmp_path / "repo").mkdir()
    make_dataset(datasets).to_parquet(tmp_path / "repo" / "train-00000-of-00001.parquet")
    source = open_source(f"hf_dataset:{tmp_path}/repo:train", DATA, "train")
    check(source, range(5))
    check(open_source(f"hf_dataset:{tmp_path}/repo", DATA, "train"), range(5))
    assert next(source.names()) == f"hf_dataset:{tmp_path}/repo:train:0"
    with pytest.raises(ValueError, match="is a part of a split; give a whole split, hf_dataset:.*/repo:train"):
        open_source(f"hf_dataset:{tmp_path}/repo:train[:2]", DATA, "train")
    with pytest.raises(ValueError, match='repo:test cannot be loaded: Unknown split "test"'):
        open_source(f"hf_dataset:{tmp_path}/repo", DATA, "test")
    with pytest.raises(FileNotFoundError, match="there is no folder .*/none; a name is USER/NAME or NAME"):
        open_source(f"hf_dataset:{tmp_path}/none:train", DATA, "train")
    with pytest.raises(ValueError, match="hf_dataset:me/none:train cannot be loaded"):
        open_source("hf_dataset:me/none", DATA, "train")


def test_without_the_library_saved_datasets_can_be_read_and_others_not(tmp_path, monkeypatch):
    """The files are those that `save_to_disk` writes."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    features = {"image": {"_type": "Image"}, "label": {"feature": {"names": ["a", "b"], "_type": "ClassLabel"}}}
    table = pa.table({"image": [{"bytes": jpeg(50), "path": None}], "label": [[1, 0]]})
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    with pa.ipc.new_stream(str(tmp_path / "data-00000-of-00001.arrow"), table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    source = open_source(str(tmp_path), DATA, "test")
    assert source[0]["label"] == (1, 0) and source.classes == ["a", "b"] and source[0]["image"] == jpeg(50)
    with pytest.raises(ImportError, match=r"pip install 'zslflax\[datasets\]'"):
        open_source("hf_dataset:me/none", DATA, "train")
