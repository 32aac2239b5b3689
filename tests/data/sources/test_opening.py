"""Sources are opened by the prefix of their specification."""

import types

import pytest

from zslflax.data.retries import ReadLimits
from zslflax.data.sources import folders, opening
from zslflax.data.sources.opening import open_source


def test_sources_are_opened_by_their_prefix(monkeypatch):
    class Recorder:
        def __init__(self, *arguments, **options):
            self.call = (*arguments, options)

    written = types.SimpleNamespace(train="s/train-{0..1}.tar", test="s/test.tar")
    for module in (opening, folders):
        monkeypatch.setattr(module, "WebDataset", type("Tar", (Recorder,), {}))
    monkeypatch.setattr(opening, "TfdsSource", type("Tfds", (Recorder,), {}))
    monkeypatch.setattr(opening.shapes, "ensure_shards", lambda root, **options: written)
    c = types.SimpleNamespace(root="~/x", train=1, test=2, size=3, noise=0.0, seed=4)
    config = types.SimpleNamespace(
        tfds_dir="", shapes=c, captions_per_line=True, request_timeout=10.0, read_timeout=20.0
    )
    options = {"captions_per_line": True, "limits": ReadLimits(10.0, 20.0)}
    opened = [
        open_source("shapes", config, "train"),
        open_source("shapes", config, "test"),
        open_source("tfds:coco_captions/2014:1.1.0/train", config, "train"),
        open_source("/data/{0..3}.tar", config, "train"),
        open_source("/data/{0..3}.tar", config, "test"),
        open_source("hf://datasets/a#b/{0..3}.tar", config, "test"),
    ]
    assert [(type(source).__name__, source.call) for source in opened] == [
        ("Tar", (written.train, {})),
        ("Tar", (written.test, {})),
        ("Tfds", ("coco_captions/2014:1.1.0", "train", {"data_dir": None, "require_captions": True})),
        ("Tar", ("/data/{0..3}.tar", {"require_captions": True} | options)),
        ("Tar", ("/data/{0..3}.tar", {"require_captions": False} | options)),
        ("Tar", ("hf://datasets/a#b/{0..3}.tar", {"require_captions": False} | options)),
    ]
    with pytest.raises(ValueError, match="tfds:NAME/SPLIT"):
        open_source("tfds:coco_captions", config, "train")
