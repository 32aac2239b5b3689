"""Broken images, captions and shards: reading continues, the bad samples are counted exactly, memory is bounded."""

import collections
import itertools
import multiprocessing
import resource
import shutil
import struct
import subprocess

import numpy as np
import pytest

from tests.testing import broken
from tests.testing.shards import tar_header
from zslflax.data import images, pipeline
from zslflax.data.images import BadSample
from zslflax.data.sources.webdataset import WebDataset


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


class Lengths:
    """A tokenizer of one token: the caption's length."""

    identity = {"pad_id": 0}

    def __call__(self, captions):
        ids = np.array([[len(caption)] for caption in captions], np.int32)
        return ids, np.ones_like(ids, bool)


def read_epoch(folder, samples: int, batch_size: int):
    """Reads one epoch; returns (valid rows, how often each name was bad, MB that reading added to the peak memory)."""
    source = WebDataset(f"{folder}/*.tar", require_captions=True)
    assert len(source) == samples
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    options = {"batch_size": batch_size, "image_size": 32, "seed": 0, "threads": 4}
    batches, good, bad = pipeline.train_batches([source], (), Lengths(), **options), 0, collections.Counter()
    for batch in itertools.islice(batches, samples // batch_size):
        assert (batch["valid"].sum() + len(batch["errors"])) == batch_size
        good += int(batch["valid"].sum())
        bad.update(name for name, _ in batch["errors"])
    batches.close()
    return good, dict(bad), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def test_five_percent_of_broken_data_is_counted_exactly_and_affects_no_other_sample(tmp_path):
    samples, bad = broken.write_corpus(tmp_path)
    divisor = next(d for d in range(16, samples) if samples % d == 0)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        good, errors, peak = pool.apply(read_epoch, (tmp_path, samples, divisor))
    assert errors == dict.fromkeys(bad, 1)
    assert good == samples - len(bad)
    assert peak < 700  # most of it for the 5000 × 5000 PNG


@pytest.mark.parametrize("kind", broken.bad_images())
def test_every_broken_image_is_decoded_or_raises_bad_sample(kind):
    data, readable = broken.bad_images()[kind]
    if readable:
        assert images.decode(data).dtype == np.uint8
    else:
        with pytest.raises(BadSample):
            images.decode(data)


@pytest.mark.parametrize("kind", broken.bad_captions())
def test_every_broken_caption_is_read_or_raises_bad_sample(tmp_path, kind):
    files, readable = broken.bad_captions()[kind]
    path = tmp_path / "a.tar"
    path.write_bytes(broken.tar_bytes(lambda tar: broken.add_sample(tar, "0", {"jpg": broken.JPEG} | files)))
    try:
        captions = [caption for caption in WebDataset(str(path))[0]["text"] if caption.strip()]
    except BadSample:
        captions = []
    assert len(captions) == readable and all(type(caption) is str for caption in captions)


@pytest.mark.parametrize("kind", broken.unreadable_shards())
def test_one_unreadable_shard_in_twenty_is_left_out_and_two_raise(tmp_path, caplog, kind):
    shards = [broken.bad_shards()["odd paths"][0]] * 19 + [broken.unreadable_shards()[kind]]
    for i, data in enumerate(shards):
        (tmp_path / f"{i:02}.tar").write_bytes(data)
    source = WebDataset(f"{tmp_path}/*.tar")
    assert len(source) == 19 * 7
    assert "left out, with all its samples: " in caplog.text and "19.tar" in caplog.text
    assert all(source[i]["text"] == ("a dog",) for i in range(len(source)))
    (tmp_path / "07.tar").write_bytes(shards[-1])
    with pytest.raises(ValueError, match="^2 of 20 shards: (.|\n)*07.tar(.|\n)*19.tar"):
        WebDataset(f"{tmp_path}/*.tar")


def test_a_member_that_claims_more_bytes_than_the_file_has_allocates_no_memory(tmp_path):
    path = tmp_path / "a.tar"
    for size in (1 << 27, 1 << 40):
        claim = tar_header(b"0", b"\x80" + struct.pack(">3xQ", size))
        path.write_bytes(tar_header(b"0", b"%011o\0" % 5, b"1.jpg") + b"hello".ljust(512, b"\0") + claim)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        source = WebDataset(str(path))
        with pytest.raises(BadSample, match="the shard ends before|more than the .* bytes allowed"):
            source[1]
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
        assert source[0]["image"] == b"hello"


def test_sparse_members_written_by_the_tar_command_raise_bad_sample(tmp_path):
    """The bytes of a sparse member are not contiguous: the holes are left out."""
    if not shutil.which("tar"):
        pytest.skip("there is no tar command")
    with open(tmp_path / "0.jpg", "wb") as file:
        for at in range(0, 60 << 20, 3 << 20):  # more pieces than fit into one header
            file.seek(at)
            file.write(broken.JPEG)
    (tmp_path / "0.txt").write_bytes(b"sparse")
    (tmp_path / "1.jpg").write_bytes(broken.JPEG)
    for format in ("gnu", "pax"):
        path = tmp_path / f"{format}.tar"
        command = ["tar", "-S", f"--format={format}", "-cf", path, "0.jpg", "0.txt", "1.jpg"]
        subprocess.run(command, cwd=tmp_path, check=True)
        assert path.stat().st_size < 1 << 20
        source = WebDataset(str(path))
        with pytest.raises(BadSample, match="stored sparse"):
            source[0]
        assert len(source) == 2 and source[1]["image"] == broken.JPEG


@pytest.mark.parametrize("kind", ["damaged tars", "whole tars", "images", "captions and labels"])
def test_fuzzed_input_does_not_crash(tmp_path, monkeypatch, require, kind):
    """A short run of tests/testing/fuzz.py."""
    hypothesis = require("hypothesis")
    from tests.testing import fuzz

    monkeypatch.setattr(images, "MAX_PIXELS", fuzz.MAX_PIXELS)
    settings = hypothesis.settings(max_examples=60, derandomize=True, **fuzz.SETTINGS)
    settings(fuzz.properties(tmp_path)[kind])()
