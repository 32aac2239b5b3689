"""Features of a frozen image tower: computed once, read afterwards, and never those of something else."""

import copy
import functools
import io
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.testing.shards import write_tar
from zslflax import distributed
from zslflax.config import default_config
from zslflax.data import crops, image_features, images, preprocess, storage
from zslflax.data.image_features import FrozenImageTower
from zslflax.data.sources.labelled import LabelledImages
from zslflax.data.sources.subset import Subset
from zslflax.data.sources.tar_format import BLOCK
from zslflax.data.sources.webdataset import WebDataset
from zslflax.data.views import Views
from zslflax.errors import StorageError
from zslflax.models.build import build_two_tower

SIZE, COUNT = 8, 10
CROP = Views(1, SIZE, resize=9)
RANDOM = Views(3, SIZE, scale=(0.3, 1.0), flip=True, seed=5)


def jpeg(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (20, 24, 3), np.uint8)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def built():
    config = default_config().model
    config.image.name, config.image.size, config.embed_dim = "resnet_nano", SIZE, 8
    config.text.scratch = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 40}
    model = build_two_tower(config)
    text = np.zeros((1, 4), np.int32)
    return model, jax.jit(model.init)(jax.random.key(0), np.zeros((1, SIZE, SIZE, 3), np.uint8), text, text == 0)


@pytest.fixture
def make_tower(built, tmp_path):
    """Makes a tower whose features are kept in one folder, and which counts the images that it computes.

    A device has memory for `fitting` images at a time.
    """

    def make(dtype="float32", identity=None, fitting=1 << 20):
        model, variables = built
        tower = FrozenImageTower(
            model, distributed.replicate(variables), identity or {"weights": "a"}, tmp_path / "kept", dtype
        )
        tower.computed, mapped, tower.apply_fn = 0, tower.apply_fn.mapped, copy.copy(tower.apply_fn)

        def count(variables, arrays):
            if arrays[0].shape[1] > fitting:
                return jnp.ones(1 << 50)
            tower.computed += int(np.any(arrays[0], axis=(2, 3, 4)).sum())  # without the zeros that fill a batch
            return mapped(variables, arrays)

        tower.apply_fn.mapped = count
        return tower

    return make


@pytest.fixture
def shards(tmp_path):
    """The path of a shard, of which image 6 is damaged."""
    contents = [b"not an image" if i == 6 else jpeg(i) for i in range(COUNT)]
    members = [
        (f"{i}.{end}", data) for i, image in enumerate(contents) for end, data in (("jpg", image), ("txt", b"a"))
    ]
    return write_tar(tmp_path / "a.tar", members)


READABLE = np.delete(np.arange(COUNT), 6)


def test_features_are_the_outputs_of_the_tower_for_the_crop_of_evaluation(built, make_tower, shards):
    model, variables = built
    features = make_tower().features_of(WebDataset(shards), CROP)
    centre_crops = [crops.resize_center_crop(images.decode(jpeg(i)), SIZE, 9) for i in READABLE]
    expected = jax.jit(functools.partial(model.apply, method="image_features"))(variables, np.stack(centre_crops))
    found, readable = features(np.arange(COUNT))
    np.testing.assert_allclose(found[READABLE], expected, rtol=1e-5, atol=5e-6)
    assert np.flatnonzero(~readable).tolist() == [6] and not found[6].any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_tower_computes_each_image_once(make_tower, shards, dtype):
    first = make_tower(dtype)
    found, _ = first.features_of(WebDataset(shards), CROP)(np.array([3, 1, 3, 2]))
    assert first.computed == 3
    second = make_tower(dtype)
    features = second.features_of(WebDataset(shards), CROP)
    np.testing.assert_array_equal(features(np.array([3, 1, 3, 2]))[0], found)  # bit for bit, whatever the type
    assert second.computed == 0
    features.fill()
    assert second.computed == COUNT - 3 - 1 and features.missing().size == 0
    features.fill()  # computes nothing but what is unreadable
    assert second.computed == COUNT - 3 - 1


def test_batches_that_do_not_fit_into_the_memory_are_halved(make_tower, shards, monkeypatch, tmp_path):
    expected, _ = make_tower().features_of(WebDataset(shards), CROP)(READABLE)
    shutil.rmtree(tmp_path / "kept")
    monkeypatch.setattr(image_features, "CPU_BATCH_SIZE", 7)
    tower = make_tower(fitting=2)
    found, _ = tower.features_of(WebDataset(shards), CROP)(READABLE)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=5e-6)
    assert tower.apply_fn.max_rows == 4 and tower.computed == len(READABLE)  # one row for each of four devices


def test_a_view_is_a_function_of_seed_image_and_number(make_tower, shards, tmp_path):
    source, tower = WebDataset(shards), make_tower()
    index, view = np.array([0, 0, 0, 4]), np.array([0, 1, 2, 1])
    found, _ = tower.features_of(source, RANDOM)(index, view)
    assert len(np.unique(found.round(4), axis=0)) == 4
    tower.root = tmp_path / "elsewhere"
    again, _ = tower.features_of(source, RANDOM)(index[::-1], view[::-1])
    np.testing.assert_allclose(again[::-1], found, atol=1e-6)
    other, _ = tower.features_of(source, Views(3, SIZE, scale=(0.3, 1.0), flip=True, seed=6))(index, view)
    assert np.abs(other - found).max() > 1e-3


def test_what_features_depend_on_has_its_own_files(make_tower, shards, tmp_path):
    """Another tower, crop, seed, type or source, and a changed file, meet no features of before."""
    source = WebDataset(shards)
    make_tower().features_of(source, CROP).fill()
    assert make_tower().features_of(source, CROP).missing().size == 0
    # The identity of a tower, with its mean, is tested where it is made, in tests/training/test_frozen_features.py.
    for tower, views in (
        (make_tower(identity={"weights": "b"}), CROP),
        (make_tower("float16"), CROP),
        (make_tower(), Views(1, SIZE, resize=10)),
        (make_tower(), Views(1, 2 * SIZE, resize=18)),
        (make_tower(), RANDOM),
    ):
        features = tower.features_of(source, views)
        assert features.missing().size == len(features)
    status = os.stat(shards)
    os.utime(shards, ns=(status.st_atime_ns, status.st_mtime_ns + 1_000))
    assert make_tower().features_of(WebDataset(shards), CROP).missing().size == COUNT


def test_an_image_file_that_changes_is_computed_again(make_tower, tmp_path):
    path = tmp_path / "0.jpg"
    path.write_bytes(jpeg(0))
    before, _ = make_tower().features_of(LabelledImages([path], [(0,)]), CROP)(np.array([0]))
    path.write_bytes(jpeg(1))
    after, _ = make_tower().features_of(LabelledImages([path], [(0,)]), CROP)(np.array([0]))
    assert np.abs(after - before).max() > 1e-3


def test_a_moved_folder_of_shards_keeps_its_features(make_tower, shards, tmp_path):
    make_tower().features_of(WebDataset(shards), CROP).fill()
    (tmp_path / "moved").mkdir()
    moved = os.rename(shards, tmp_path / "moved" / "a.tar") or str(tmp_path / "moved" / "a.tar")
    assert make_tower().features_of(WebDataset(moved), CROP).missing().size == 0


def test_a_subset_shares_the_features_of_the_whole_source(make_tower, shards):
    source, tower = WebDataset(shards), make_tower()
    whole, _ = tower.features_of(source, CROP)(np.arange(COUNT))
    computed = tower.computed
    features = tower.features_of(Subset(source, np.array([2, 6, 7])), CROP)
    assert len(features) == 3 and features.missing(unreadable=True).tolist() == [6]
    found, readable = features(np.array([2, 0, 1]))
    np.testing.assert_array_equal(found, whole[[7, 2, 6]])
    assert readable.tolist() == [True, True, False] and tower.computed == computed


def test_ids_of_images_are_those_of_their_files_and_are_kept(make_tower, shards, monkeypatch):
    features = make_tower().features_of(WebDataset(shards), RANDOM)
    expected = np.stack([preprocess.content_id(jpeg(i)) for i in range(COUNT)])
    found = features.image_ids(np.array([3, 1, 3, 0]))
    np.testing.assert_array_equal(found, expected[[3, 1, 3, 0]])
    monkeypatch.setattr(WebDataset, "__getitem__", None)  # files are read once
    subset = Subset(WebDataset(shards), np.array([1, 3]))
    np.testing.assert_array_equal(make_tower().features_of(subset, RANDOM).image_ids(np.array([1])), expected[[3]])


def test_a_damaged_row_is_computed_again(make_tower, shards):
    features = make_tower().features_of(WebDataset(shards), CROP)
    before, _ = features(READABLE)
    with open(features.rows.folder / "rows", "r+b") as file:
        file.seek(3 * features.width * 4)
        file.write(b"damage")
    tower = make_tower()
    after, _ = tower.features_of(WebDataset(shards), CROP)(READABLE)
    np.testing.assert_array_equal(after, before)
    assert tower.computed == 1


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(make_tower, shards, monkeypatch):
    features, tower = make_tower().features_of(WebDataset(shards), CROP), make_tower()
    monkeypatch.setattr(image_features.shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(StorageError, match="has 0 MB free; make room, set features.folder"):
        image_features.log_size([features])
    assert tower.computed == 0


class Usage:
    free = 10


def test_reading_annotations_reads_no_image(shards, monkeypatch):
    source, read, read_spans = WebDataset(shards), [], storage.read_spans

    def recording(path, fingerprint, spans, limits):
        read.extend(spans)
        return read_spans(path, fingerprint, spans, limits)

    monkeypatch.setattr(storage, "read_spans", recording)
    (text,) = source.read_annotations(3)["text"]
    assert [size for _, size in read] == [BLOCK + len(text)]  # with the header of the text's file
    assert preprocess.EvalTransform(source, 1, 1, read_images=False)([3, -1])["valid"].tolist() == [True, False]
