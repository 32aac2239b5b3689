"""Batches are a function of the seed and the step; bad samples and padding are masked."""

import collections
import io
import itertools

import numpy as np
import pytest
from PIL import Image

from zslflax.data import pipeline
from zslflax.data.images import BadSample
from zslflax.data.preprocess import content_id

SIZE, TOKENS = 16, 5


def encode(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=95)
    return file.getvalue()


class Memory:
    """A source in memory: sample i is a JPEG of noise with the captions "NUMBER i k" for k = 0, 1, ….

    Args:
        size: samples.
        number: of the source.
        captions: of each sample.
        changes: for some samples, fields that differ, or the message of a `BadSample`.
    """

    def __init__(self, size: int, number: int = 0, captions: int = 1, changes: dict | None = None):
        rng = np.random.default_rng(number)
        self.images = [encode(rng.integers(0, 256, (20, 24, 3), np.uint8)) for _ in range(size)]
        self.number, self.captions, self.changes = number, captions, changes or {}

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        text = tuple(f"{self.number} {i} {k}" for k in range(self.captions))
        record = {
            "image": self.images[i],
            "text": text,
            "label": (i % 3, 7),
            "name": f"shard{i // 8}.tar:{i:04}",
        }
        change = self.changes.get(i, {})
        if isinstance(change, str):
            raise BadSample(change, name=record["name"])
        return record | change

    def read_annotations(self, i):
        return self[i]


class Numbers:
    """A tokenizer whose tokens are the numbers in the caption plus 100; the padding is 9."""

    identity = {"pad_id": 9}

    def __call__(self, captions):
        ids = np.full((len(captions), TOKENS), 9, np.int32)
        for row, caption in zip(ids, captions, strict=True):
            numbers = [100 + int(word) for word in caption.split()]
            row[: len(numbers)] = numbers
        return ids, ids != 9


def train(sources, steps, weights=(), **options):
    """The first training batches."""
    options = {"batch_size": 8, "image_size": SIZE, "seed": 3, "threads": 2} | options
    batches = pipeline.train_batches(sources, weights, Numbers(), **options)
    taken = list(itertools.islice(batches, steps))
    batches.close()
    return taken


def identities(batches):
    """(source, sample, caption) of every row of some batches."""
    return [tuple(row[:3] - 100) for batch in batches for row in batch["text"]]


def assert_same(one, other):
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
            assert type(a[key]) is type(b[key])


SOURCES = (Memory(21, 0, captions=3), Memory(11, 1, changes={4: {"image": b"no image"}}))


def test_a_batch_has_fixed_shapes_and_types():
    (batch,) = train(SOURCES, 1)
    shapes = {key: (value.shape, value.dtype.name) for key, value in batch.items() if key != "errors"}
    assert shapes == {
        "image": ((8, SIZE, SIZE, 3), "uint8"),
        "text": ((8, TOKENS), "int32"),
        "text_mask": ((8, TOKENS), "bool"),
        "valid": ((8,), "bool"),
    }


def test_equal_images_and_equal_captions_have_equal_ids():
    same_image, same_text = {"image": Memory(1).images[0]}, {"text": ("0 4 0",)}
    source = Memory(8, changes={2: same_image, 5: same_text, 6: "cannot be read"})
    first, second = train([source], 2, with_ids=True)
    ids = lambda batch, name: [tuple(row) for row in batch[name].tolist()]
    by_sample = dict(zip((int(row[1]) - 100 for row in first["text"]), ids(first, "image_id")))
    assert first["image_id"].dtype == first["text_id"].dtype == np.uint32 and first["image_id"].shape == (8, 2)
    assert len(set(ids(first, "image_id"))) == 7  # the unreadable sample has another
    assert len(set(ids(first, "text_id"))) == 7 and set(ids(first, "text_id")) == set(ids(second, "text_id"))
    assert set(ids(first, "image_id")) == set(ids(second, "image_id"))  # whatever the crop
    assert by_sample[0] == by_sample[2] == tuple(content_id(source.images[0]))
    (kept,) = train([source], 1, views=1, with_ids=True)
    readable = first["valid"]
    np.testing.assert_array_equal(kept["text_id"][readable], first["text_id"][readable])


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_batches_do_not_depend_on_the_number_of_threads(threads):
    assert_same(train(SOURCES, 7, threads=threads), train(SOURCES, 7, threads=2))


@pytest.mark.parametrize(("workers", "threads"), [(1, 1), (2, 3), (5, 1)])
def test_batches_do_not_depend_on_the_number_of_workers(workers, threads, monkeypatch):
    monkeypatch.setattr(pipeline, "CHUNK", 3)  # several chunks in a batch, and more than the workers hold
    assert_same(train(SOURCES, 5, workers=workers, threads=threads, start_step=3), train(SOURCES, 8)[3:])


@pytest.mark.parametrize(("cores", "chosen"), [(2, "3 threads, no worker"), (16, "14 worker processes with 1 thread")])
def test_the_automatic_choice_follows_the_cores_and_is_logged(cores, chosen, monkeypatch, caplog):
    monkeypatch.setattr(pipeline, "available_cores", lambda: cores)
    caplog.set_level("INFO", "zslflax")
    pipeline.train_batches([Memory(8)], (), Numbers(), batch_size=8, image_size=SIZE, seed=0)
    assert chosen in caplog.text


@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_batches_do_not_depend_on_the_chunk_size(monkeypatch, chunk):
    expected = train(SOURCES, 4)
    monkeypatch.setattr(pipeline, "CHUNK", chunk)
    assert_same(train(SOURCES, 4), expected)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_load_contiguous_rows_of_the_same_batches(hosts):
    whole = train(SOURCES, 6)
    parts = [train(SOURCES, 6, process_index=h, process_count=hosts) for h in range(hosts)]
    assert_same([pipeline.assemble(rows, 8) for rows in zip(*parts, strict=True)], whole)


@pytest.mark.parametrize("step", [1, 4, 9])
def test_a_resumed_run_yields_the_batches_of_an_uninterrupted_run(step):
    assert_same(train(SOURCES, 12 - step, start_step=step), train(SOURCES, 12)[step:])


def test_the_seed_changes_the_order_and_the_crops():
    source = Memory(16)
    one, other = train([source], 2), train([source], 2, seed=4)
    assert identities(one) != identities(other)
    crops = lambda batches: {
        i: image.tobytes() for i, image in zip(identities(batches), np.concatenate([b["image"] for b in batches]))
    }
    assert all(crops(one)[i] != crops(other)[i] for i in crops(one))


def test_every_epoch_has_every_sample_once_in_a_new_order_with_new_crops():
    source = Memory(24)
    batches = train([source], 9)
    epochs = [batches[e : e + 3] for e in (0, 3, 6)]
    orders = [identities(epoch) for epoch in epochs]
    assert all(sorted(order) == [(0, i, 0) for i in range(24)] for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert orders[0] != sorted(orders[0])
    crops = collections.defaultdict(set)
    for epoch in epochs:
        for i, image in zip(identities(epoch), np.concatenate([batch["image"] for batch in epoch])):
            crops[i].add(image.tobytes())
    assert all(len(seen) == 3 for seen in crops.values())


@pytest.mark.parametrize(("weights", "share"), [((1, 3), 0.25), ((0.8, 0.2), 0.8), ((), 30 / 40)])
def test_sources_are_mixed_by_weight_or_by_size(weights, share):
    order = pipeline.global_order((30, 10), weights, seed=0)
    drawn = collections.Counter(order[p] for p in range(1200))
    counts = [sum(n for (source, _), n in drawn.items() if source == k) for k in (0, 1)]
    np.testing.assert_allclose(counts, [1200 * share, 1200 * (1 - share)], rtol=0.01)
    for source, size in enumerate((30, 10)):
        visits = [drawn[source, i] for i in range(size)]
        assert max(visits) - min(visits) <= 1


def test_one_of_several_captions_is_chosen_anew_in_every_epoch():
    chosen = collections.defaultdict(list)
    for _, sample, caption in identities(train([Memory(8, captions=3)], 30)):
        chosen[sample].append(caption)
    assert all(set(captions) == {0, 1, 2} for captions in chosen.values())
    assert len({tuple(captions) for captions in chosen.values()}) == 8
    counts = np.bincount(sum(chosen.values(), []))
    np.testing.assert_allclose(counts, 80, atol=30)  # 4 standard deviations of 240 draws


def test_blank_captions_are_never_chosen():
    source = Memory(8, changes={i: {"text": ("", "0 5 0", " ")} for i in range(8)})
    assert set(identities(train([source], 5))) == {(0, 5, 0)}


def test_flip_mirrors_half_of_the_images():
    left = np.zeros((SIZE, SIZE, 3), np.uint8)
    left[:, : SIZE // 2] = 255
    source = Memory(8, changes={i: {"image": left} for i in range(8)})
    options = {"crop_scale": (1.0, 1.0)}
    mirrored = lambda flip: [
        image[:, -2:].mean() > image[:, :2].mean()
        for b in train([source], 25, flip=flip, **options)
        for image in b["image"]
    ]
    assert 60 < sum(mirrored(True)) < 140
    assert sum(mirrored(False)) == 0


def test_bad_samples_are_masked_and_named_and_do_not_change_other_rows():
    good = Memory(32)
    changes = {
        3: {"image": good.images[3][:200]},
        9: {"text": ("  ",)},
        17: {"text": ()},
        20: {"image": b""},
        30: "the tar ends in mid-member",
    }
    clean, changed = train([good], 8), train([Memory(32, changes=changes)], 8)
    names = []
    for a, b in zip(clean, changed, strict=True):
        bad = np.isin(a["text"][:, 1] - 100, list(changes))
        np.testing.assert_array_equal(b["valid"], ~bad)
        assert a["valid"].all() and not a["errors"]
        for key in ("image", "text", "text_mask"):
            np.testing.assert_array_equal(a[key][~bad], b[key][~bad])
        assert (b["image"][bad] == 0).all() and (b["text"][bad] == 9).all()
        assert b["text_mask"][bad][:, 0].all() and not b["text_mask"][bad][:, 1:].any()
        assert len(b["errors"]) == bad.sum()
        names += [name for name, _ in b["errors"]]
    expected = {
        "shard0.tar:0003": 2,
        "shard1.tar:0009": 2,
        "shard2.tar:0017": 2,
        "shard2.tar:0020": 2,
        "shard3.tar:0030": 2,
    }
    assert collections.Counter(names) == expected


def test_errors_other_than_bad_sample_are_raised():
    class Broken(Memory):
        def __getitem__(self, i):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        train([Broken(16)], 1)


def test_an_error_gives_the_reasons_when_no_sample_is_readable():
    source = Memory(200, changes={i: {"text": ()} if i % 2 else "broken" for i in range(200)})
    with pytest.raises(ValueError, match="none of the first 1000 samples") as caught:
        train([source], 1000)
    assert "500 times: broken (first: shard" in str(caught.value)
    assert "500 times: it has no caption (first: shard" in str(caught.value)
    with pytest.raises(ValueError, match="none of the first 10 samples"):
        list(
            pipeline.eval_batches(
                Memory(10, changes=dict.fromkeys(range(10), "broken")), batch_size=4, image_size=8, resize=8
            )
        )


@pytest.mark.parametrize(
    ("sizes", "options", "message"),
    [
        ((3, 4), {}, "7 samples, fewer than one batch of 8"),
        ((20,), {"process_count": 3}, "which 3 hosts cannot share"),
        ((20, 0), {}, "positive one for each"),
        ((20, 0), {"weights": (1, 1)}, "source 1 of 2 has no samples"),
        ((20, 4), {"weights": (1,)}, "positive one for each"),
        ((20, 4), {"weights": (1, 0)}, "positive one for each"),
    ],
)
def test_impossible_arguments_are_refused_before_loading(sizes, options, message):
    options = {"weights": (), "batch_size": 8, "image_size": SIZE, "seed": 0} | options
    with pytest.raises(ValueError, match=message):
        pipeline.train_batches([Memory(size) for size in sizes], tokenizer=Numbers(), **options)


@pytest.mark.parametrize(("size", "hosts"), [(1, 1), (8, 1), (13, 1), (13, 2), (17, 4), (3, 4)])
def test_evaluation_loads_every_sample_once_in_equally_many_batches_per_host(size, hosts):
    source = Memory(size, changes={2: {"image": b"?"}} if size > 2 else None)
    options = {"batch_size": 4, "image_size": SIZE, "resize": 20, "process_count": hosts, "threads": 2}
    runs = [list(pipeline.eval_batches(source, process_index=h, **options)) for h in range(hosts)]
    assert len({len(run) for run in runs}) == 1
    seen = []
    for h, run in enumerate(runs):
        index = np.concatenate([batch["index"] for batch in run])
        own = index[index >= 0].tolist()
        assert own == list(range(h, size, hosts))
        seen += own
        for batch in run:
            assert batch["image"].shape == (4, SIZE, SIZE, 3) and batch["image"].dtype == np.uint8
            readable = (batch["index"] >= 0) & (batch["index"] != 2)
            np.testing.assert_array_equal(batch["valid"], readable)
            assert batch["labels"] == [(i % 3, 7) if ok else () for i, ok in zip(batch["index"], readable)]
            assert batch["captions"] == [(f"0 {i} 0",) if ok else () for i, ok in zip(batch["index"], readable)]
            assert (batch["image"][~readable] == 0).all()
            assert [name for name, _ in batch["errors"]] == ["shard0.tar:0002"] * int((batch["index"] == 2).sum())
    assert sorted(seen) == list(range(size))


def test_evaluation_refuses_a_resize_below_the_image_size():
    with pytest.raises(ValueError, match="resize is 1.15 pixels"):
        pipeline.eval_batches(Memory(3), batch_size=2, image_size=SIZE, resize=1.15)
