"""Shards written by webdataset, tarfile and GNU tar: the records, the index, and the errors for faulty shards."""

import collections
import concurrent.futures
import contextlib
import io
import itertools
import json
import logging
import multiprocessing
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import tokenizers
from PIL import Image

from tests.testing.shards import sample, samples, write_tar
from zslflax.data import images, pipeline, storage
from zslflax.data.images import BadSample
from zslflax.data.sources import tar_index
from zslflax.data.sources.shard_patterns import expand_patterns
from zslflax.data.sources.webdataset import WebDataset
from zslflax.data.text import Tokenizer


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """The home folder, whose cache has the indexes that cannot be beside their shards."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def written_by_webdataset(tmp_path, require):
    """The pattern of three shards with pax headers and unusual names, and the (name, fields) of their samples."""
    webdataset = require("webdataset")
    written = []
    for shard in range(3):
        with webdataset.TarWriter(str(tmp_path / f"{shard:05}.tar")) as writer:
            for i in range(4 + shard):
                key = f"{shard:05}{i:04}" + ("/" + "long-" * 60 + "é" if i == 2 else "")
                fields = {
                    "__key__": key,
                    "jpg": os.urandom(1500 * i),
                    "txt": f"ein Vögelein {i}",
                    "json": {"caption": "from json", "label": i},
                    "cls": 10 * shard + i,
                }
                writer.write(fields)
                written.append((f"{tmp_path}/{shard:05}.tar:{key}", fields))
    return f"{tmp_path}/{{00000..00002}}.tar", written


def test_shards_written_by_webdataset(written_by_webdataset):
    pattern, written = written_by_webdataset
    source = WebDataset(pattern)
    assert len(source) == len(written) == 15
    for record, (name, fields) in zip(source, written, strict=True):
        assert record == {
            "image": fields["jpg"],
            "text": (fields["txt"],),
            "label": (fields["cls"],),
            "name": name,
        }
        assert type(record["label"][0]) is int


def test_records_agree_with_webdatasets_reader(written_by_webdataset, require):
    reader = require("webdataset.tariterators")
    pattern, _ = written_by_webdataset
    with contextlib.ExitStack() as stack:
        streams = [{"url": str(p), "stream": stack.enter_context(open(p, "rb"))} for p in expand_patterns(pattern)]
        theirs = list(reader.group_by_keys(reader.tar_file_expander(streams)))
    ours = list(WebDataset(pattern))
    assert [r["name"].partition(".tar:")[2] for r in ours] == [s["__key__"] for s in theirs]
    assert [r["image"] for r in ours] == [s["jpg"] for s in theirs]
    assert [r["text"][0].encode() for r in ours] == [s["txt"] for s in theirs]


def test_shards_written_by_the_tar_command(tmp_path):
    if not shutil.which("tar"):
        pytest.skip("there is no tar command")
    folder = tmp_path / "files" / ("deep" * 20) / ("deep" * 10)
    folder.mkdir(parents=True)
    for name, contents in samples(range(5)):
        (folder / name).write_bytes(contents)
    for format in ("gnu", "pax", "ustar"):
        path = tmp_path / f"{format}.tar"
        subprocess.run(["tar", f"--format={format}", "-cf", path, "."], cwd=tmp_path / "files", check=True)
        records = sorted(WebDataset(str(path)), key=lambda r: r["name"])  # the command does not sort
        assert [(r["text"], r["image"]) for r in records] == [
            ((f"caption {i}",), bytes([i]) * (700 * i + 1)) for i in range(5)
        ]


def test_members_of_a_sample_may_be_apart_and_keys_may_repeat(tmp_path):
    apart = [sample(i)[0] for i in range(3)] + [sample(i)[1] for i in range(3)]
    again = [("00001.jpg", b"other"), ("00001.txt", b"other caption")]
    source = WebDataset(write_tar(tmp_path / "a.tar", apart + again))
    expected = ["caption 0", "caption 1", "caption 2", "other caption"]
    assert [record["text"][0] for record in source] == expected
    assert source[3]["image"] == b"other" and source[1]["image"] == dict(sample(1))["00001.jpg"]


def test_images_without_a_caption_are_counted_in_the_log(tmp_path, caplog):
    members = [("0.jpg", b"x"), ("0.txt", b"a cat"), ("1.jpg", b"x"), ("2.jpg", b"x"), ("2.cls", b"3")]
    path = write_tar(tmp_path / "a.tar", members)
    WebDataset(path)
    assert not caplog.text
    assert len(WebDataset(path, require_captions=True)) == 3
    assert f"2 of 3 images have no caption and are skipped; the first is {path}:1" in caplog.text


def test_captions_and_labels_come_from_text_json_and_label_files(tmp_path):
    to_json = lambda **fields: json.dumps(fields).encode()
    cases = [
        ({"json": to_json(caption="j", label=3)}, ("caption 0",), (3,)),
        ({"json": to_json(caption="j", labels=[4, 4, 1])}, ("caption 1",), (4, 1)),
        ({"json": to_json(label=3), "cls": b"7, 8\n9 7"}, ("caption 2",), (7, 8, 9)),
        ({"txt": b" \n", "json": to_json(caption="j")}, ("",), ()),
        ({"txt": b"\xff\xc3\xa9 \n"}, ("�é",), ()),
        ({"json": to_json(label="bird")}, ("caption 5",), ()),
        ({"json": to_json(labels=[True, 1.5])}, ("caption 6",), ()),
    ]
    members = [member for i, (others, *_) in enumerate(cases) for member in sample(i, **others)]
    source = WebDataset(write_tar(tmp_path / "a.tar", members))
    assert [(r["text"], r["label"]) for r in source] == [tuple(expected) for _, *expected in cases]
    without = [("0.jpg", b"x"), ("0.json", to_json(caption=" of json ")), ("1.jpg", b""), ("1.json", b"{}")]
    source = WebDataset(write_tar(tmp_path / "b.tar", without), require_captions=True)
    assert [r["text"] for r in source] == [("of json",), ()]


def test_several_captions_come_from_lists_in_json_and_if_asked_for_from_lines(tmp_path):
    to_json = lambda value: json.dumps(value).encode()
    cases = [
        ({"json": to_json({"caption": ["a", " b "]})}, ("a", "b")),
        ({"json": to_json({"captions": ["a", "b"]})}, ("a", "b")),
        ({"json": to_json({"captions": "a"})}, ("a",)),
        ({"json": to_json({"caption": None, "captions": ["a", 3]})}, ("a",)),
        ({"txt.json": to_json(["a", "b"]), "txt": b"c", "json": to_json({"caption": "d"})}, ("a", "b")),
        ({"txt": b"a\n\n b\r\n"}, ("a\n\n b",)),
    ]
    members = [(f"{i}.{e}", data) for i, (files, _) in enumerate(cases) for e, data in ({"jpg": b"x"} | files).items()]
    path = write_tar(tmp_path / "a.tar", members)
    assert [record["text"] for record in WebDataset(path, require_captions=True)] == [texts for _, texts in cases]
    assert WebDataset(path, captions_per_line=True)[5]["text"] == ("a", "b")
    for i, (files, texts) in enumerate(cases[:5]):  # each form alone has captions
        alone = [(f"{i}.{e}", data) for e, data in ({"jpg": b"x"} | files).items()]
        source = WebDataset(write_tar(tmp_path / f"{i}.tar", alone), require_captions=True)
        assert source[0]["text"] == texts
    path = write_tar(tmp_path / "bad.tar", [("0.jpg", b"x"), ("0.txt.json", b'{"a": 1}')])
    with pytest.raises(BadSample, match="its list of captions is dict .*expected a JSON list of texts"):
        WebDataset(path)[0]


def test_training_draws_one_of_several_captions_and_evaluation_has_all(tmp_path):
    pixels = np.zeros((16, 16, 3), np.uint8)
    texts = json.dumps({"captions": ["one", "two", "three"]}).encode()
    members = [(f"{i}.{e}", d) for i in range(8) for e, d in (("jpg", encode(pixels, "JPEG")), ("json", texts))]
    source = WebDataset(write_tar(tmp_path / "a.tar", members), require_captions=True)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(["[PAD]", "one", "two", "three"])})
    )
    batches = pipeline.train_batches([source], (), Tokenizer(words, 2, "[PAD]"), batch_size=8, image_size=8, seed=0)
    drawn = np.concatenate([batch["text"][:, 0] for batch in itertools.islice(batches, 4)])
    assert set(drawn.tolist()) == {1, 2, 3}
    batch = next(pipeline.eval_batches(source, batch_size=8, image_size=8, resize=8))
    assert batch["captions"] == [("one", "two", "three")] * 8


def test_keys_may_have_dots(tmp_path):
    """A key ends at the first dot, except where that would leave a captioned or lonely image out."""
    files = ["a.jpg", "a.txt", "a.seg.png", "Photo.V2.jpg", "Photo.V2.txt", "b.1.jpg", "b.1.txt", "b.2.jpg", "b.2.txt"]
    files += ["c.jpg", "c.txt", "c.old.png", "c.old.txt", "d.left.png", "e.1.2.jpg", "e.1.2.json"]
    members = [(name, name.encode() if not name.endswith("json") else b"{}") for name in files]
    source = WebDataset(write_tar(tmp_path / "a.tar", members))
    found = [(r["name"].rpartition(":")[2], r["image"].decode(), r["text"]) for r in source]
    assert found == [
        ("a", "a.jpg", ("a.txt",)),
        ("Photo.V2", "Photo.V2.jpg", ("Photo.V2.txt",)),
        ("b.1", "b.1.jpg", ("b.1.txt",)),
        ("b.2", "b.2.jpg", ("b.2.txt",)),
        ("c", "c.jpg", ("c.txt",)),
        ("c.old", "c.old.png", ("c.old.txt",)),
        ("d.left", "d.left.png", ()),
        ("e.1.2", "e.1.2.jpg", ()),
    ]


def test_images_of_every_extension_that_the_decoder_reads_are_samples_and_others_are_counted(tmp_path, caplog):
    names = [f"{i}.{extension}" for i, extension in enumerate([*images.IMAGE_EXTENSIONS, "JPG", "heic", "txt"])]
    with caplog.at_level(logging.WARNING):
        source = WebDataset(write_tar(tmp_path / "a.tar", [(name, b"x") for name in names]))
    assert len(source) == len(names) - 2 and source.excluded == {"no_image": 2}
    assert f"2 of {len(names)} keys have no image that can be read" in caplog.text and "with heic" in caplog.text
    assert WebDataset(write_tar(tmp_path / "b.tar", [("0.jpg", b"x")])).excluded == {}


def test_extensions_of_images_captions_and_labels_can_be_chosen(tmp_path):
    members = [("0.PNG", b"png"), ("0.jpg", b"jpg"), ("0.caption.txt", b"c"), ("0.id", b"5"), ("0.txt", b"t")]
    path = write_tar(tmp_path / "a.tar", members)
    source = WebDataset(path, image_keys=("png", "jpg"), text_key="caption.txt", label_key="id")
    assert source[0] == {"image": b"png", "text": ("c",), "label": (5,), "name": f"{path}:0"}
    assert WebDataset(path)[0]["image"] == b"jpg"  # the same index serves other keys


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"cls": b"bird"}, "its label is b'bird', expected whole numbers"),
        ({"json": b'{"label": 3'}, "its JSON is damaged"),
        ({"json": b'["label"]'}, "its JSON is a list, expected an object"),
    ],
)
def test_damaged_samples_raise_bad_sample_with_their_name(tmp_path, others, message):
    path = write_tar(tmp_path / "a.tar", sample(0) + sample(1, **others) + sample(2))
    source = WebDataset(path)
    with pytest.raises(BadSample, match=message) as caught:
        source[1]
    assert caught.value.name == f"{path}:00001"
    assert source[2]["text"] == ("caption 2",)


def encode(pixels, format, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def test_bad_samples_are_masked_and_named_and_do_not_change_other_samples(tmp_path):
    rng = np.random.default_rng(0)
    jpegs = [encode(rng.integers(0, 256, (20, 24, 3), np.uint8), "JPEG", quality=95) for _ in range(24)]
    good = [sample(i, jpg=jpegs[i]) for i in range(24)]
    damaged = list(good)
    damaged[2] = sample(2, jpg=jpegs[2][:-300])
    damaged[7] = sample(7, jpg=jpegs[7], txt=b" \n")
    damaged[11] = sample(11, jpg=jpegs[11])[:1]
    damaged[18] = sample(18, jpg=b"<html>gone</html>")
    damaged[20] = sample(20, jpg=encode(images.decode(jpegs[20]), "PNG"))  # readable: the extension does not matter
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(["[PAD]", "caption", *map(str, range(24))])})
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = Tokenizer(words, 4, "[PAD]")

    def batches(members, folder):
        for shard in range(3):
            write_tar(folder / f"{shard}.tar", sum(members[8 * shard : 8 * shard + 8], []))
        source = WebDataset(f"{folder}/{{0..2}}.tar", require_captions=True)
        options = {"batch_size": 8, "image_size": 16, "seed": 1, "threads": 2}
        taken = pipeline.train_batches([source], (), tokenizer, **options)
        yield from itertools.islice(taken, 6)
        taken.close()

    names, identities = [], []
    for clean, other in zip(batches(good, tmp_path / "a"), batches(damaged, tmp_path / "b"), strict=True):
        number = clean["text"][:, 1] - 2
        np.testing.assert_array_equal(other["valid"], ~np.isin(number, (2, 7, 11, 18)))
        for key in ("image", "text", "text_mask"):
            np.testing.assert_array_equal(clean[key][other["valid"]], other[key][other["valid"]])
        names += [name for name, _ in other["errors"]]
        identities += number.tolist()
    assert sorted(identities) == sorted([*range(24), *range(24)])  # two epochs
    shards = collections.Counter(name.rpartition(":")[0] for name in names)
    assert shards == {f"{tmp_path}/b/0.tar": 4, f"{tmp_path}/b/1.tar": 2, f"{tmp_path}/b/2.tar": 2}
    assert {name.rpartition(":")[2] for name in names} == {"00002", "00007", "00011", "00018"}


def test_a_truncated_shard_loses_only_its_last_sample(tmp_path, caplog):
    path = write_tar(tmp_path / "a.tar", samples(range(6)))
    with tarfile.open(path) as tar:
        last = tar.getmember("00005.jpg")
    with open(path, "r+b") as file:
        file.truncate(last.offset_data + 1000)
    with caplog.at_level(logging.WARNING):
        source = WebDataset(path)
    assert f"{path} is truncated" in caplog.text
    assert len(source) == 6
    assert [source[i]["text"] for i in range(5)] == [(f"caption {i}",) for i in range(5)]
    with pytest.raises(BadSample, match="the shard ends before the end of this sample") as caught:
        source[5]
    assert caught.value.name.rpartition(":")[0] == path


def test_the_index_is_built_once_and_again_when_the_shard_changes(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", samples(range(3)))
    WebDataset(path)
    assert sorted(os.listdir(tmp_path)) == ["a.tar", "a.tar.index.npz"]
    with monkeypatch.context() as patch:
        patch.setattr(tar_index, "build_index", lambda *_: pytest.fail("there is an index already"))
        assert len(WebDataset(path)) == 3
    write_tar(tmp_path / "a.tar", samples(range(4)))
    assert [r["text"][0] for r in WebDataset(path)] == [f"caption {i}" for i in range(4)]
    (tmp_path / "a.tar.index.npz").write_bytes(b"PK\3\4 damaged")
    assert len(WebDataset(path)) == 4
    assert tar_index.read_index(tmp_path / "a.tar.index.npz").keys.tolist() == [b"%05d" % i for i in range(4)]


@pytest.mark.parametrize("obstacle", ["mode", "folder in the place"])
def test_the_index_is_cached_where_it_cannot_be_beside_the_shard(tmp_path, home, obstacle, monkeypatch):
    path = write_tar(tmp_path / "shards" / "a.tar", samples(range(3)))
    if obstacle == "mode":
        (tmp_path / "shards").chmod(0o555)
    else:
        (tmp_path / "shards" / "a.tar.index.npz").mkdir()
    WebDataset(path)
    assert len(list((home / ".cache/zslflax/index").iterdir())) == 1
    assert not any(p.is_file() for p in (tmp_path / "shards").iterdir() if p.name != "a.tar")
    monkeypatch.setattr(tar_index, "build_index", lambda *_: pytest.fail("there is an index already"))
    assert len(WebDataset(path)) == 3
    (tmp_path / "shards").chmod(0o755)


def test_a_shard_that_is_replaced_while_it_is_used_raises(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(range(3)))
    source = WebDataset(path)
    write_tar(tmp_path / "b.tar", samples(range(3, 6)))
    os.replace(tmp_path / "b.tar", path)
    with pytest.raises(ValueError, match="has been changed while it was in use"):
        source[0]


def test_an_index_file_that_cannot_be_of_its_shard_is_built_anew(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(range(6)))
    place = tmp_path / "a.tar.index.npz"
    WebDataset(path)
    with np.load(place) as stored:
        arrays = dict(stored)

    def compressed(arrays):
        with open(place, "wb") as file:
            np.savez_compressed(file, **arrays)

    def plain(arrays):
        with open(place, "wb") as file:
            np.savez(file, **arrays)

    def claiming(arrays):
        """An array whose header claims more than the file has."""
        plain(arrays)
        data = place.read_bytes()
        place.write_bytes(data.replace(b"(12,)", b"(99999999999,)".ljust(14), 1).replace(b"      \n", b"\n", 1))

    other = WebDataset(write_tar(tmp_path / "other.tar", samples(range(3)) + samples(range(10, 30))))
    assert len(other) == 23
    with np.load(tmp_path / "other.tar.index.npz") as stored:
        foreign = dict(stored) | {"fingerprint": arrays["fingerprint"]}
    for write, changed in [
        (plain, foreign),
        (plain, arrays | {"sample": arrays["sample"] + 1_000}),
        (plain, arrays | {"extension": arrays["extension"] - 5}),
        (plain, arrays | {"offset": arrays["offset"] + 512 * 10**9}),
        (plain, arrays | {"offset": arrays["offset"] + 7}),
        (plain, arrays | {"size": arrays["size"][:-1]}),
        (plain, arrays | {"size": -arrays["size"]}),
        (plain, arrays | {"keys": np.array([b"x" * 10] * 6, object)}),
        (plain, {name: array for name, array in arrays.items() if name != "header"}),
        (compressed, arrays),
        (claiming, arrays),
    ]:
        write(changed)
        assert [record["text"] for record in WebDataset(path)] == [(f"caption {i}",) for i in range(6)]
        with np.load(place) as stored:
            assert all(np.array_equal(stored[name], array) for name, array in arrays.items())


def test_shards_of_zeros_and_shards_that_go_on_after_their_end_are_named(tmp_path, caplog):
    for shard in range(20):
        write_tar(tmp_path / f"{shard}.tar", samples(range(4)))
    zeros = tmp_path / "3.tar"
    zeros.write_bytes(bytes(zeros.stat().st_size))
    with caplog.at_level(logging.ERROR):
        assert len(WebDataset(f"{tmp_path}/{{0..19}}.tar")) == 76
    assert "left out, with all its samples: the shard" in caplog.text and "3.tar holds no files" in caplog.text
    with pytest.raises(ValueError, match="3.tar holds no files, only zeros"):
        WebDataset(str(zeros))
    first, second = (tmp_path / "0.tar").read_bytes(), (tmp_path / "1.tar").read_bytes()
    joined = tmp_path / "joined.tar"
    for data in (first + second, first + bytes(2 << 20)):
        joined.write_bytes(data)
        with pytest.raises(ValueError, match="joined.tar has an end marker at byte .*, but goes on"):
            WebDataset(str(joined))


def test_without_a_home_folder_indexes_are_beside_their_shards(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(range(2)))
    code = f"""
import os, pwd
from zslflax.data.sources.webdataset import WebDataset
def nobody(_): raise KeyError("no such user")
pwd.getpwuid = nobody  # as in a container that runs under a number
assert len(WebDataset("{path}")) == 2
assert os.path.exists("{path}.index.npz")
os.remove("{path}.index.npz"); os.mkdir("{path}.index.npz")
assert len(WebDataset("{path}")) == 2
WebDataset("~/0.tar")
"""
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "UserError: ~/0.tar is in the home folder, but HOME is not set" in result.stderr
    assert "the index of" in result.stderr and "cannot be kept" in result.stderr


def test_threads_and_processes_read_the_same_records(tmp_path):
    for shard in range(4):
        write_tar(tmp_path / f"{shard}.tar", samples(range(10 * shard, 10 * shard + 10)))
    source = WebDataset(f"{tmp_path}/{{0..3}}.tar")
    alone = [source[i] for i in range(40)]
    assert [r["text"] for r in alone] == [(f"caption {i}",) for i in range(40)]
    order = np.random.default_rng(0).integers(0, 40, 400).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(source.__getitem__, order)) == [alone[i] for i in order]
    copy = pickle.loads(pickle.dumps(source))
    assert [copy[i] for i in range(40)] == alone
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(source.__getitem__, range(0, 40, 7)) == alone[::7]


def test_the_number_of_open_files_is_limited(tmp_path, monkeypatch):
    limited = storage.functools.lru_cache(maxsize=3)(storage.open_file.__wrapped__)
    monkeypatch.setattr(storage, "open_file", limited)
    for shard in range(10):
        write_tar(tmp_path / f"{shard}.tar", sample(shard))
    source = WebDataset(f"{tmp_path}/{{0..9}}.tar")
    descriptors = pathlib.Path("/proc/self/fd")
    count = lambda: sum(os.path.realpath(fd).startswith(str(tmp_path)) for fd in descriptors.iterdir())
    for _ in range(2):
        assert [source[i]["text"] for i in range(10)] == [(f"caption {i}",) for i in range(10)]
        assert count() == 3
    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # files are closed while others are being read
        numbers = np.random.default_rng(0).integers(0, 10, 2000).tolist()
        read = pool.map(lambda i: source[i]["text"], numbers)
        assert list(read) == [(f"caption {i}",) for i in numbers]
    assert count() == 3


def test_a_shard_that_is_named_twice_counts_twice(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(range(3)))
    assert [record["text"] for record in WebDataset([path, path])] == 2 * [(f"caption {i}",) for i in range(3)]


def test_the_error_for_missing_images_lists_the_extensions_found(tmp_path):
    members = [(f"{i}.{e}", b"{}") for i in range(3) for e in ("image.jpg", "TXT", "json")]
    with pytest.raises(ValueError, match="one of jpg, .*, avif; found: 3 × image.jpg, 3 × txt, 3 × json"):
        WebDataset(write_tar(tmp_path / "a.tar", members))
    with pytest.raises(ValueError, match="found: nothing"):
        WebDataset(write_tar(tmp_path / "b.tar", []))


def test_the_error_for_missing_captions_lists_the_extensions_and_fields_found(tmp_path):
    members = [(f"{i}.{e}", b'{"url": "", "alt": ""}') for i in range(3) for e in ("jpg", "json", "caption")]
    path = write_tar(tmp_path / "a.tar", members)
    expected = "expected KEY.txt, .*found: 3 × jpg, 3 × json, 3 × caption; fields of KEY.json: url, alt"
    with pytest.raises(ValueError, match=expected):
        WebDataset(path, require_captions=True)
    assert len(WebDataset(path)) == 3
    assert len(WebDataset(path, text_key="caption", require_captions=True)) == 3


def test_files_that_are_not_tar_files_compressed_files_and_damaged_files_are_named(tmp_path):
    text, packed, damaged = tmp_path / "a.tar", tmp_path / "b.tar", tmp_path / "c.tar"
    text.write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(ValueError, match="is not a tar file: it starts with b'<html>404"):
        WebDataset(str(text))
    with tarfile.open(packed, "w:gz") as tar:
        info = tarfile.TarInfo("0.jpg")
        info.size = 5000
        tar.addfile(info, io.BytesIO(os.urandom(5000)))
    with pytest.raises(ValueError, match=r"compressed \(gzip\).* gzip -dc .*b.tar > .*/b-unpacked.tar"):
        WebDataset(str(packed))
    with pytest.raises(ValueError, match="gzip -dc .*b.tar.gz > .*/b.tar$"):
        WebDataset(str(packed.rename(tmp_path / "b.tar.gz")))
    write_tar(damaged, samples(range(4)))
    data = bytearray(damaged.read_bytes())
    with tarfile.open(damaged) as tar:
        at = tar.getmember("00002.jpg").offset
    for start, stop in ((at, at + 512), (at + 124, at + 136)):
        broken = data.copy()
        broken[start:stop] = b"\x5a" * (stop - start)
        damaged.write_bytes(broken)
        with pytest.raises(ValueError, match=f"c.tar is damaged at byte {at}"):
            WebDataset(str(damaged))
