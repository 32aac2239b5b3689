"""The built-in source: the contents of its shards, read with tarfile and with the project's own reader."""

import collections
import dataclasses
import hashlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest

from zslflax.data.images import decode
from zslflax.data.sources import shapes
from zslflax.data.sources.shapes_drawing import PlacedShape, coverage
from zslflax.data.sources.webdataset import WebDataset

TRAIN, TEST, NOISE = 3_000, 600, 0.25
COLOURS, SHAPES = list(shapes.COLOURS), list(shapes.SHAPES)


def words(text):
    return re.findall(r"[a-z]+", text.lower())


def read_samples(shards, split):
    """The files of each sample by extension, by key in order, read without the project's own reader."""
    samples = collections.defaultdict(dict)
    for path in sorted(shards.path.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                samples[key][extension] = tar.extractfile(member).read()
    for sample in samples.values():
        sample["json"] = json.loads(sample["json"])
    return dict(samples)


def file_hashes(path):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(path.iterdir())}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return shapes.ensure_shards(tmp_path_factory.mktemp("shapes"), train=TRAIN, test=TEST, noise=NOISE)


@pytest.fixture(scope="module")
def train(shards):
    return read_samples(shards, "train")


@pytest.fixture(scope="module")
def test(shards):
    return read_samples(shards, "test")


def says_no_more_than(caption, objects):
    """Whether every colour, shape and class in a caption belongs to the objects, given by their class names."""
    shown = {tuple(name.split()) for name in objects}
    named = words(caption)
    pairs = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b", caption)
    later = re.findall(rf"({'|'.join(SHAPES)}) (?:that is|in) ({'|'.join(COLOURS)})\b", caption)
    mentioned = set(pairs) | {(colour, shape) for shape, colour in later}
    return (
        mentioned <= shown
        and {w for w in named if w in COLOURS} <= {c for c, _ in shown}
        and {w for w in named if w in SHAPES} <= {s for _, s in shown}
        and any(w in COLOURS or w in SHAPES for w in named)
    )


def test_class_names_combine_every_colour_with_every_shape():
    assert shapes.CLASS_NAMES == [f"{c} {s}" for c in COLOURS for s in SHAPES]
    assert len(COLOURS) >= 10 and len(SHAPES) >= 12
    assert len(shapes.SYNONYMS) == len(shapes.CLASS_NAMES) == len(set(shapes.SYNONYMS))
    assert all("{}" in template for template in shapes.TEMPLATES)


def test_a_fifth_of_the_classes_is_unseen_spread_over_all_colours_and_shapes():
    assert len(set(shapes.UNSEEN)) == len(shapes.UNSEEN) == len(shapes.CLASS_NAMES) // 5
    unseen = [shapes.CLASS_NAMES[i].split() for i in shapes.UNSEEN]
    assert set(collections.Counter(c for c, _ in unseen).values()) <= {2, 3}
    assert set(collections.Counter(s for _, s in unseen).values()) == {2}


def test_training_images_and_captions_have_only_seen_classes(train):
    objects = {name for sample in train.values() for name in sample["json"]["objects"]}
    assert objects == {name for i, name in enumerate(shapes.CLASS_NAMES) if i not in shapes.UNSEEN}
    unseen = [shapes.CLASS_NAMES[i].split() for i in shapes.UNSEEN]
    forbidden = "|".join(rf"\b{c} {s}\b|\b{s} (?:that is|in) {c}\b" for c, s in unseen)
    captions = [sample["txt"].decode() for sample in train.values()]
    assert not [c for c in captions if re.search(forbidden, c)]
    assert set(COLOURS) | set(SHAPES) <= {w for c in captions for w in words(c)}


def test_captions_agree_with_their_images(train, test):
    for sample in train.values():
        about = sample["json"]
        assert sample["txt"].decode() == about["caption"]
        assert says_no_more_than(about["true_caption"], about["objects"]), about
        assert about["mismatched"] or about["caption"] == about["true_caption"]
    for sample in test.values():
        about = sample["json"]
        assert says_no_more_than(sample["txt"].decode(), about["objects"]), about
        assert not about["mismatched"]


def test_captions_vary(train):
    captions = [sample["json"]["true_caption"] for sample in train.values()]
    assert len(set(captions)) > 0.8 * len(captions)
    counts = [(sum(w in COLOURS for w in words(c)), sum(w in SHAPES for w in words(c))) for c in captions]
    assert min(sum(c == 0 for c, _ in counts), sum(s == 0 for _, s in counts)) > 0.05 * len(counts)
    partial = sum(len(s["json"]["objects"]) > max(n) for s, n in zip(train.values(), counts, strict=True))
    assert 0.2 * len(counts) < partial < 0.8 * len(counts)
    assert not [c for c in captions if re.search(r"\ba [aeiou]|\ban [^aeiou]", c)]


def test_noise_is_the_share_of_captions_from_other_training_images(train):
    own = {sample["json"]["true_caption"] for sample in train.values()}
    mismatched = [sample["json"] for sample in train.values() if sample["json"]["mismatched"]]
    assert len(mismatched) == round(NOISE * TRAIN)
    assert all(about["caption"] in own for about in mismatched)
    wrong = sum(not says_no_more_than(about["caption"], about["objects"]) for about in mismatched)
    assert wrong > 0.75 * len(mismatched)  # a few fit by chance


def test_noise_changes_only_captions(train, tmp_path):
    clean = read_samples(shapes.ensure_shards(tmp_path, train=20, test=1), "train")
    for key, sample in clean.items():
        assert sample["jpg"] == train[key]["jpg"]
        assert sample["json"]["true_caption"] == train[key]["json"]["true_caption"]
        assert not sample["json"]["mismatched"]


def test_test_samples_have_all_labels_and_cover_every_class(test):
    labels = [[int(i) for i in sample["cls"].decode().split()] for sample in test.values()]
    assert [[shapes.CLASS_NAMES[i] for i in ids] for ids in labels] == [s["json"]["objects"] for s in test.values()]
    assert {len(ids) for ids in labels} == {1, 2, 3} and all(len(set(ids)) == len(ids) for ids in labels)
    assert {i for ids in labels for i in ids} == set(range(len(shapes.CLASS_NAMES)))


def test_webdataset_reads_the_shards(shards, train, test):
    source = WebDataset(shards.train, require_captions=True)
    assert len(source) == TRAIN
    record = source[TRAIN - 1]
    sample = train[record["name"].rpartition(":")[2]]
    assert record["text"] == (sample["txt"].decode(),) and record["image"] == sample["jpg"]
    assert record["label"] == ()  # training samples have captions and no labels
    source = WebDataset(shards.test)
    assert [source[i]["label"] for i in range(TEST)] == [
        tuple(int(i) for i in s["cls"].decode().split()) for s in test.values()
    ]
    assert decode(source[0]["image"]).shape == (32, 32, 3)


def test_synonyms_use_no_words_of_captions(train, test):
    known = {w for s in [*train.values(), *test.values()] for w in words(s["txt"].decode())}
    known |= {w for n in shapes.CLASS_NAMES for w in words(n)}
    assert not known & {w for n in shapes.SYNONYMS for w in words(n)}


def test_shapes_are_visible_apart_and_of_their_colour(test):
    for i, sample in enumerate(list(test.values())[:200]):
        placed = shapes.describe_image(0, "test", i).shapes
        assert [shapes.CLASS_NAMES[shape.label] for shape in placed] == sample["json"]["objects"]
        image = decode(sample["jpg"]).astype(float)
        smallest, largest = shapes.SIDES[len(placed)]
        for k, shape in enumerate(placed):
            assert smallest <= shape.side <= largest
            centred = coverage(dataclasses.replace(shape, x=0.5, y=0.5), 32)
            visible = coverage(shape, 32) * np.prod([1 - coverage(other, 32) for other in placed[k + 1 :]], axis=0)
            assert visible.sum() > 0.75 * centred.sum()
            colour = np.median(image[visible > 0.99], axis=0) if (visible > 0.99).sum() > 8 else None
            if colour is not None:
                distances = [math.dist(colour, rgb) for rgb in shapes.COLOURS.values()]
                assert COLOURS[int(np.argmin(distances))] == shapes.CLASS_NAMES[shape.label].split()[0]


def test_shapes_differ_at_every_rotation():
    """At 32 pixels, two shapes differ in a good part of their area at all of 72 rotations."""
    drawn = {
        s: [coverage(PlacedShape(i, 0.5, 0.5, 0.4, 2 * math.pi * a / 72), 32) for a in range(72)]
        for i, s in enumerate(SHAPES)
    }
    for a in SHAPES:
        for b in SHAPES[: SHAPES.index(a)]:
            fixed, rotated = drawn[a][0], np.stack(drawn[b])
            overlap = np.minimum(fixed, rotated).sum((1, 2)) / np.maximum(fixed, rotated).sum((1, 2))
            assert overlap.max() < 0.86, (a, b, overlap.max())


def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr(shapes, "SHARD_SIZE", 7)
    monkeypatch.setattr(shapes, "DRAWN_AT_ONCE", 3)
    options = {"train": 40, "test": 10, "size": 32, "noise": 0.5, "seed": 3}
    for workers in (0, 2):
        (tmp_path / str(workers)).mkdir()
        random.seed(workers)
        shapes.write_shards(tmp_path / str(workers), options, workers)
    first = file_hashes(tmp_path / "0")
    assert len(first) == 6 + 2 + 1 and first == file_hashes(tmp_path / "2")
    (tmp_path / "other").mkdir()
    shapes.write_shards(tmp_path / "other", {**options, "seed": 4}, 0)
    assert not set(first.values()) & set(file_hashes(tmp_path / "other").values())


def test_one_shard_is_open_at_a_time(tmp_path):
    code = (
        "import resource; from zslflax.data.sources import shapes; shapes.SHARD_SIZE = 5; "
        "resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40)); "
        f"shapes.ensure_shards({str(tmp_path)!r}, train=500, test=5, size=16)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert len(list(tmp_path.glob("*/train-*.tar"))) == 100


def test_shards_are_written_once_in_a_folder_for_each_set_of_options(tmp_path, monkeypatch):
    small = {"train": 5, "test": 3}
    first = shapes.ensure_shards(tmp_path / "new" / "root", **small)
    others = [{**small, "noise": 0.5}, {**small, "seed": 1}, {**small, "size": 40}, {"train": 5, "test": 4}]
    assert len({first.path, *(shapes.ensure_shards(first.path.parent, **o).path for o in others)}) == 5
    monkeypatch.setattr(shapes, "write_shards", None)
    assert shapes.ensure_shards(tmp_path / "new" / "root", **small) == first


def test_a_damaged_folder_is_written_again(tmp_path):
    first = shapes.ensure_shards(tmp_path, train=5, test=3)
    whole = file_hashes(first.path)
    (first.path / shapes.MARKER).unlink()
    (first.path / "train-00000.tar").write_bytes(b"half")
    assert file_hashes(shapes.ensure_shards(tmp_path, train=5, test=3).path) == whole


WRITER = """
import sys
from zslflax.data.sources import shapes
shapes.SHARD_SIZE = 50
print(shapes.ensure_shards(sys.argv[1], train=int(sys.argv[2]), test=50).path)
"""


def start_writer(root, train):
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(root), str(train)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_two_writers_may_write_at_once(tmp_path):
    results = [(w, *w.communicate(timeout=60)) for w in [start_writer(tmp_path, 300), start_writer(tmp_path, 300)]]
    assert [w.returncode for w, _, _ in results] == [0, 0], results
    (path,) = {out for _, out, _ in results}
    assert [str(p) for p in tmp_path.iterdir()] == [path.decode().strip()]  # no temporary folder is left
    assert (tmp_path / path.decode().strip() / shapes.MARKER).exists()


def test_the_temporary_folder_of_a_killed_writer_is_ignored_and_later_removed(tmp_path, monkeypatch):
    process = start_writer(tmp_path, 200_000)
    deadline = time.time() + 30
    while not list(tmp_path.glob(".*/train-00001.tar")) and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".") and not (leftover / shapes.MARKER).exists()
    abandoned = tmp_path / f"{leftover.name.rpartition('-')[0]}-0.tmp"
    assert shapes.ensure_shards(tmp_path, train=5, test=3).path != leftover
    assert leftover.exists()  # of another set of options
    folder = tmp_path / leftover.name.removeprefix(".").rpartition("-")[0]
    shapes.remove_stale(folder)
    assert leftover.exists()  # its writer may still be at work
    abandoned.mkdir()
    for f in [*leftover.iterdir(), leftover]:
        os.utime(f, (0, 0))
    shapes.remove_stale(folder)
    assert not leftover.exists() and abandoned.exists()


@pytest.mark.parametrize(
    "wrong",
    [{"train": 0}, {"test": 0}, {"size": 8}, {"noise": 1.5}, {"train": 1, "noise": 0.5}, {"seed": -1}],
)
def test_options_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError, match="shapes: "):
        shapes.ensure_shards(tmp_path, **{"train": 5, "test": 3, **wrong})
    assert not list(tmp_path.iterdir())


def test_a_full_disk_names_the_folder_and_leaves_nothing_behind(tmp_path):
    """The limit of a file's size fails like a full disk, in the middle of a write."""
    code = (
        f"from zslflax.data.sources.shapes import ensure_shards; ensure_shards({str(tmp_path / 'root')!r}, train=500)"
    )
    command = f'ulimit -f 100; exec {sys.executable} -c "{code}"'
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert f"StorageError: {tmp_path}/root cannot be written: File too large" in result.stderr
    assert list((tmp_path / "root").iterdir()) == []
