"""Broken images, captions and shards among good ones: reading goes on, counts are exact, memory bounded."""

import collections
import io
import itertools
import multiprocessing
import resource
import shutil
import struct
import subprocess
import tarfile

import numpy as np
import pytest

from tests.testing import broken
from zslflax.data import images, pipeline
from zslflax.data.images import BadSample
from zslflax.data.sources import tar_format
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
    """(rows with a mask, {name: how often it was bad}, MB that reading added to the peak), of one epoch."""
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


def test_five_percent_of_broken_data_is_counted_exactly_and_costs_nothing_else(tmp_path):
    samples, bad = broken.write_corpus(tmp_path)
    divisor = next(d for d in range(16, samples) if samples % d == 0)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        good, errors, peak = pool.apply(read_epoch, (tmp_path, samples, divisor))
    assert errors == dict.fromkeys(bad, 1)
    assert good == samples - len(bad)
    assert peak < 700  # of which the 5000 × 5000 PNG needs most


@pytest.mark.parametrize("kind", broken.bad_images())
def test_every_broken_image_is_decoded_or_bad(kind):
    data, readable = broken.bad_images()[kind]
    if readable:
        assert images.decode(data).dtype == np.uint8
    else:
        with pytest.raises(BadSample):
            images.decode(data)


@pytest.mark.parametrize("kind", broken.bad_captions())
def test_every_broken_caption_is_text_or_bad(tmp_path, kind):
    files, readable = broken.bad_captions()[kind]
    path = tmp_path / "a.tar"
    path.write_bytes(broken.shard(lambda tar: broken.add_sample(tar, "0", {"jpg": broken.JPEG} | files)))
    try:
        captions = [caption for caption in WebDataset(str(path))[0]["text"] if caption.strip()]
    except BadSample:
        captions = []
    assert len(captions) == readable and all(type(caption) is str for caption in captions)


@pytest.mark.parametrize("kind", broken.unreadable_shards())
def test_one_unreadable_shard_of_twenty_is_left_out_and_two_end_the_run(tmp_path, caplog, kind):
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


def header(kind: bytes, size: bytes, name: bytes = b"0.jpg") -> bytes:
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157], block[257:265] = name, size, kind, b"ustar\x0000"
    block[148:156] = b"%06o\0 " % tar_format.checksums(bytes(block))[0]
    return bytes(block)


def listed(data: bytes) -> list:
    return list(tar_format.members(io.BytesIO(data), "x.tar"))


GOOD_MEMBER = header(b"0", b"%011o\0" % 5) + b"hello".ljust(512, b"\0")


@pytest.mark.parametrize(
    "size",  # the last of them once was a seek beyond what a file system takes
    [b"-0000000001\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\x81" + bytes(11),
     b"1_000".ljust(12, b"\0"), b"0o17        ", b"\x80\0\0\0" + struct.pack(">Q", 1 << 62)],
)  # fmt: skip
def test_impossible_sizes_are_damage(size):
    with pytest.raises(ValueError, match="is damaged at byte 1024: .*; fetch it again"):
        listed(GOOD_MEMBER + header(b"0", size) + GOOD_MEMBER)


@pytest.mark.parametrize(
    "record",  # the last of them once was a loop without end
    [b"0 path=a\n", b"-9 path=a\n", b"path=a\n", b" path=a\n", b"99 path=a\n", b"11 size=-1\n",
     b"5 path=a\n", b"3 size=\n", b"12 size=1_0\n",
     b"9999999999999999999999 size=1\n", b"27 size=9999999999999999999\n",
     b"10 path=a\nno-blank-in-twenty-bytes"],
)  # fmt: skip
def test_impossible_pax_records_are_damage(record):
    extra = header(b"x", b"%011o\0" % len(record)) + record.ljust(512, b"\0")
    with pytest.raises(ValueError, match="is damaged at byte 1024"):
        listed(GOOD_MEMBER + extra + GOOD_MEMBER)


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_headers_and_names_beyond_measure_are_damage_before_they_are_read(kind):
    class Counting(io.BytesIO):
        def read(self, size):
            assert size <= tar_format.LONGEST_EXTRA
            return super().read(size)

    huge = header(kind, b"%011o\0" % (1 << 32))
    with pytest.raises(ValueError, match="a header of 4294967296 bytes"):
        list(tar_format.members(Counting(GOOD_MEMBER + huge), "x.tar"))
    name = header(b"L", b"%011o\0" % 5120) + b"n" * 5120
    with pytest.raises(ValueError, match="a name of 5120 bytes"):
        listed(GOOD_MEMBER + name + GOOD_MEMBER)


def test_a_member_that_claims_more_than_the_file_has_allocates_nothing(tmp_path):
    path = tmp_path / "a.tar"
    for size in (1 << 27, 1 << 40):
        claim = header(b"0", b"\x80" + struct.pack(">3xQ", size))
        path.write_bytes(header(b"0", b"%011o\0" % 5, b"1.jpg") + b"hello".ljust(512, b"\0") + claim)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        source = WebDataset(str(path))
        with pytest.raises(BadSample, match="the shard ends before|more than the .* bytes allowed"):
            source[1]
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000
        assert source[0]["image"] == b"hello"


def test_sparse_members_of_the_tar_command_are_bad_and_not_misread(tmp_path):
    """With holes, where a file's bytes are not in one piece."""
    if not shutil.which("tar"):
        pytest.skip("there is no tar command")
    with open(tmp_path / "0.jpg", "wb") as file:
        for at in range(0, 60 << 20, 3 << 20):  # more pieces than a header has room for
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


def test_a_long_name_is_the_next_members_whatever_that_is():
    """K is the long name of a link's target, which may come in between; D is a folder of GNU's backups."""
    long = header(b"L", b"%011o\0" % 9) + b"long.jpg\0".ljust(512, b"\0")
    target = header(b"K", b"%011o\0" % 7) + b"target\0".ljust(512, b"\0")
    backup = header(b"D", b"%011o\0" % 5) + b"hello".ljust(512, b"\0")
    assert listed(long + target + GOOD_MEMBER + bytes(1024)) == [(b"long.jpg", 2560, 5)]
    assert listed(long + backup + GOOD_MEMBER + bytes(1024)) == [(b"0.jpg", 2560, 5)]


def test_sums_are_tarfiles():
    info = tarfile.TarInfo("é" * 20)
    block = info.tobuf(tarfile.GNU_FORMAT)
    assert tar_format.checksums(block) == tarfile.calc_chksums(block)
    assert tar_format.number(block[148:156]) in tar_format.checksums(block)


@pytest.mark.parametrize("kind", ["tars", "whole tars", "pictures", "descriptions"])
def test_a_little_fuzzing(tmp_path, monkeypatch, require, kind):
    """tests/fuzz.py does more of it."""
    hypothesis = require("hypothesis")
    from tests.testing import fuzz

    monkeypatch.setattr(images, "MAX_PIXELS", fuzz.PIXELS)
    settings = hypothesis.settings(max_examples=60, derandomize=True, **fuzz.SETTINGS)
    settings(fuzz.properties(tmp_path)[kind])()
