"""Remote shards, from a server that serves ranges, one that fails now and then, and one without ranges."""

import concurrent.futures
import errno
import io
import itertools
import logging
import os
import random
import tarfile

import fsspec
import pytest

from tests.testing.range_server import serve
from zslflax.data import storage
from zslflax.data.sources import tar_index
from zslflax.data.sources.webdataset import WebDataset, expand


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch, require):
    """A home of its own, short waits, and no files or counts of other tests."""
    require("aiohttp")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
    storage.open_file.cache_clear()
    storage.retries.clear()


@pytest.fixture
def root(tmp_path):
    """Three shards of eight samples, some larger than the read-ahead is made here."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(3):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i in range(8):
                for extension, contents in (("jpg", bytes([i]) * (5000 * i + 1)), ("txt", b"caption %d" % i)):
                    info = tarfile.TarInfo(f"{shard}{i}.{extension}")
                    info.size = len(contents)
                    tar.addfile(info, io.BytesIO(contents))
    return folder


@pytest.fixture
def server(root):
    with serve(root) as server:
        yield server


def contents(records):
    return [(r["image"], r["text"], r["name"].rpartition("/")[2]) for r in records]


def test_remote_shards_read_like_local_ones(root, server, monkeypatch):
    monkeypatch.setattr(storage, "READ_AHEAD", 16 << 10)
    local = list(WebDataset(f"{root}/{{0..2}}.tar"))
    remote = WebDataset(f"{server.url}/{{0..2}}.tar", require_captions=True)
    assert contents(remote) == contents(local)
    assert remote[0]["name"] == f"{server.url}/0.tar:00"
    order = random.Random(0).choices(range(24), k=200)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert contents(pool.map(remote.__getitem__, order)) == [contents(local)[i] for i in order]
    assert not storage.retries


def test_one_request_reads_a_sample_and_read_ahead_reads_headers(root, server):
    source = WebDataset(f"{server.url}/0.tar")
    size = (root / "0.tar").stat().st_size
    blocks = [wanted for method, _, wanted in server.requests if method == "GET" and wanted != "bytes=1-1"]
    assert blocks == [f"bytes=0-{size - 1}"]  # smaller than the read-ahead
    server.requests.clear()
    assert source[5]["text"] == ("caption 5",)
    assert [method for method, _, _ in server.requests] == ["GET"]


def test_members_longer_than_the_read_ahead_are_skipped_over(tmp_path, server, monkeypatch):
    monkeypatch.setattr(storage, "READ_AHEAD", 1 << 10)
    server.sent = 0
    WebDataset(f"{server.url}/0.tar")
    assert 0 < server.sent < (server.root / "0.tar").stat().st_size / 4


def test_the_index_of_a_remote_shard_is_kept_in_the_cache_until_the_shard_changes(root, server, monkeypatch):
    WebDataset(f"{server.url}/{{0..2}}.tar")
    server.requests.clear()
    assert len(WebDataset(f"{server.url}/{{0..2}}.tar")) == 24
    assert {method for method, _, _ in server.requests} == {"HEAD"} and len(server.requests) == 3
    assert sorted(os.listdir(root)) == ["0.tar", "1.tar", "2.tar"]
    os.utime(root / "1.tar", ns=(1, 1))  # another ETag
    built, build = [], tar_index.build_index
    monkeypatch.setattr(tar_index, "build_index", lambda *file: built.append(file[0]) or build(*file))
    storage.open_file.cache_clear()
    WebDataset(f"{server.url}/{{0..2}}.tar")
    assert built == [f"{server.url}/1.tar"]


def test_a_remote_shard_that_changes_while_it_is_used_is_not_misread(root, server):
    source = WebDataset(f"{server.url}/0.tar")
    os.utime(root / "0.tar", ns=(1, 1))
    storage.open_file.cache_clear()
    with pytest.raises(ValueError, match="has been changed while it was in use"):
        source[0]


def test_troubles_that_pass_are_retried_and_counted(root, server, caplog):
    """Every second answer fails, in each of the ways in turn."""
    kinds = itertools.cycle([503, "cut", 429, "short", 500])
    server.troubles = itertools.chain.from_iterable((None, next(kinds)) for _ in itertools.count())
    with caplog.at_level(logging.WARNING):
        remote = WebDataset(f"{server.url}/{{0..2}}.tar")
        assert contents(remote) == contents(WebDataset(f"{root}/{{0..2}}.tar"))
    assert storage.retries[server.url] >= 12
    assert caplog.text.count("; attempt ") == storage.retries[server.url]


@pytest.mark.parametrize("trouble", [503, "cut", "short"])
def test_what_does_not_pass_ends_after_some_attempts(server, trouble):
    source = WebDataset(f"{server.url}/0.tar")
    server.troubles = itertools.repeat(trouble)
    server.requests.clear()
    with pytest.raises(OSError, match=f"0.tar cannot be read, after {storage.ATTEMPTS} attempts"):
        source[3]
    assert len(server.requests) == storage.ATTEMPTS


@pytest.mark.parametrize("status", [401, 403, 410])
def test_a_refusal_is_not_retried(server, status):
    source = WebDataset(f"{server.url}/0.tar")
    server.troubles = itertools.repeat(status)
    server.requests.clear()
    with pytest.raises(OSError, match=f"/0.tar cannot be read: HTTP {status} "):
        source[3]
    assert len(server.requests) == 1


def test_a_server_without_ranges_is_refused_before_it_sends_the_file(root, server):
    (root / "large.tar").write_bytes(bytes(32 << 20))
    server.ranges = False
    with pytest.raises(ValueError, match="large.tar does not serve parts of files .*: copy the shards"):
        WebDataset(f"{server.url}/large.tar")
    assert server.sent < 32 << 20


def test_ranges_that_stop_being_served_are_noticed(server):
    source = WebDataset(f"{server.url}/0.tar")
    server.ranges = False
    with pytest.raises(ValueError, match="does not serve parts of files"):
        source[3]


def test_missing_remote_shards_are_named(server):
    with pytest.raises(FileNotFoundError, match=r"2 of 4 shards are missing:\n  .*/3.tar\n  .*/4.tar$"):
        WebDataset(f"{server.url}/{{1..4}}.tar")


def test_signatures_stay_out_of_names_and_messages(server, caplog):
    source = WebDataset(f"{server.url}/0.tar?signature=secret")
    assert source[1]["name"] == f"{server.url}/0.tar:01"
    server.troubles = itertools.repeat(503)
    with pytest.raises(OSError, match="0.tar cannot be read") as caught:
        source[3]
    assert "secret" not in str(caught.value) + caplog.text


def test_globs_go_through_the_storage_but_not_over_http(root):
    memory = fsspec.filesystem("memory")
    for path in root.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    memory.pipe("/bucket/0.tar.index.npz", b"")
    assert expand("memory://bucket/*") == [f"memory:///bucket/{i}.tar" for i in range(3)]
    assert contents(WebDataset("memory://bucket/?.tar")) == contents(WebDataset(f"{root}/?.tar"))
    assert expand(f"file://{root}/[12].tar") == [f"file://{root}/{i}.tar" for i in (1, 2)]
    with pytest.raises(FileNotFoundError, match="no shard fits the pattern memory://bucket/x"):
        expand("memory://bucket/x*")
    with pytest.raises(ValueError, match="files cannot be listed over HTTP: use braces"):
        expand("https://example.org/*.tar")
    assert expand("https://a.org/{0..1}.tar?x") == ["https://a.org/0.tar?x", "https://a.org/1.tar?x"]


def test_kinds_of_addresses_that_there_are_not():
    with pytest.raises(ValueError, match="nonsense"):
        WebDataset("nonsense://bucket/0.tar")
    missing = next(p for p in ("s3", "gs", "abfs") if fsspec.utils.get_protocol(p) and not installed(p))
    with pytest.raises(ImportError, match=rf"{missing}://bucket/0.tar cannot be read: .*zslflax\[remote\]"):
        WebDataset(f"{missing}://bucket/0.tar")


def installed(protocol: str) -> bool:
    try:
        return bool(fsspec.get_filesystem_class(protocol))
    except ImportError:
        return False


def test_a_local_disk_that_hesitates_is_asked_again(root, monkeypatch):
    source = WebDataset(f"{root}/0.tar")
    expected, failures, pread = source[3], iter([errno.EIO, errno.ESTALE]), os.pread

    def hesitate(descriptor, size, offset):
        if code := next(failures, None):
            raise OSError(code, os.strerror(code))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", hesitate)
    assert source[3] == expected
    assert storage.retries == {str(root): 2}


def test_a_local_shard_that_is_cut_while_it_is_used_ends_the_run(root):
    source = WebDataset(f"{root}/0.tar")
    assert source[7]["text"] == ("caption 7",)
    os.truncate(root / "0.tar", 4096)
    with pytest.raises(ValueError, match="has been changed while it was in use"):
        source[7]


def test_a_local_shard_that_vanishes_ends_the_run_at_once(root):
    source = WebDataset(f"{root}/0.tar")
    (root / "0.tar").unlink()
    storage.open_file.cache_clear()
    with pytest.raises(FileNotFoundError, match="0.tar"):
        source[3]
    assert not storage.retries
