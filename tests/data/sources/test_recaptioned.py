"""A source whose records have other captions."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.testing.shards import write_tar
from zslflax.data.sources.recaptioned import Recaptioned
from zslflax.data.sources.subset import Subset
from zslflax.data.sources.webdataset import WebDataset


@pytest.fixture
def source(tmp_path):
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, "JPEG")
    members = [
        (f"{i}.{end}", data)
        for i in range(3)
        for end, data in (("jpg", file.getvalue()), ("txt", b"old"), ("cls", b"7"))
    ]
    return WebDataset(write_tar(tmp_path / "a.tar", members))


def test_records_keep_their_images_labels_and_names_and_get_the_new_captions(source):
    changed = Recaptioned(source, ["a", "b", "c"])
    assert len(changed) == 3 and list(changed.names()) == list(source.names())
    assert changed[1] == source[1] | {"text": ("b",)} and changed[1]["label"] == (7,)
    assert changed.read_annotations(2) == source.read_annotations(2) | {"text": ("c",)}
    assert Subset(changed, np.array([0, 2])).read_annotations(1)["text"] == ("c",)
    assert (changed.classes, changed.negatives, changed.excluded) == (source.classes, source.negatives, source.excluded)


def test_features_of_the_images_are_shared_with_the_source(source):
    assert Recaptioned(source, ["a", "b", "c"]).fingerprint() == source.fingerprint()


def test_each_record_needs_a_caption(source):
    with pytest.raises(ValueError, match="2 captions for 3 records"):
        Recaptioned(source, ["a", "b"])
