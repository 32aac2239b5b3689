"""Remote shards: from a server that serves ranges, from one that fails now and then, and from one without ranges."""

import concurrent.futures
import errno
import itertools
import logging
import os
import random
import resource

import fsspec
import pytest

from tests.testing.range_server import serve
from tests.testing.shards import samples, write_tar
from zslflax.data import storage
from zslflax.data.sources import tar_index
from zslflax.data.sources.shard_patterns import expand_patterns
from zslflax.data.sources.webdataset import WebDataset


@pytest.fixture(autouse=True)
def isolate(tmp_path, monkeypatch, require):
    """Each test has its own home folder, short waits, and no open files or retry counts of other tests."""
    require("aiohttp")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(storage, "FIRST_WAIT", 0.001)
    storage.open_file.cache_clear()
    storage.retry_counts.clear()


@pytest.fixture
def root(tmp_path):
    """A folder of three shards of eight samples."""
    folder = tmp_path / "shards"
    for shard in range(3):
        files = [(i, ("jpg", bytes([i]) * (5000 * i + 1)), ("txt", b"caption %d" % i)) for i in range(8)]
        members = [(f"{shard}{i}.{extension}", contents) for i, *pair in files for extension, contents in pair]
        write_tar(folder / f"{shard}.tar", members)
    return folder


@pytest.fixture
def server(root):
    with serve(root) as server:
        yield server


def contents(records):
    return [(r["image"], r["text"], r["name"].rpartition("/")[2]) for r in records]


def test_remote_shards_give_the_records_of_local_shards(root, server, monkeypatch):
    monkeypatch.setattr(storage, "READ_AHEAD", 16 << 10)
    local = list(WebDataset(f"{root}/{{0..2}}.tar"))
    remote = WebDataset(f"{server.url}/{{0..2}}.tar", require_captions=True)
    assert contents(remote) == contents(local)
    assert remote[0]["name"] == f"{server.url}/0.tar:00"
    order = random.Random(0).choices(range(24), k=200)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert contents(pool.map(remote.__getitem__, order)) == [contents(local)[i] for i in order]
    assert not storage.retry_counts


def test_a_sample_takes_one_request_and_a_small_shard_is_indexed_with_one(root, server):
    source = WebDataset(f"{server.url}/0.tar")
    size = (root / "0.tar").stat().st_size
    blocks = [wanted for method, _, wanted in server.requests if method == "GET" and wanted != "bytes=1-1"]
    assert blocks == [f"bytes=0-{size - 1}"]  # smaller than the read-ahead
    server.requests.clear()
    assert source[5]["text"] == ("caption 5",)
    assert [method for method, _, _ in server.requests] == ["GET"]


def test_indexing_skips_members_longer_than_the_read_ahead(tmp_path, server, monkeypatch):
    monkeypatch.setattr(storage, "READ_AHEAD", 1 << 10)
    server.sent = 0
    WebDataset(f"{server.url}/0.tar")
    assert 0 < server.sent < (server.root / "0.tar").stat().st_size / 4


def test_the_index_of_a_remote_shard_is_cached_until_the_shard_changes(root, server, monkeypatch):
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


def test_a_remote_shard_that_changes_while_it_is_used_raises(root, server):
    source = WebDataset(f"{server.url}/0.tar")
    os.utime(root / "0.tar", ns=(1, 1))
    storage.open_file.cache_clear()
    with pytest.raises(ValueError, match="has been changed while it was in use"):
        source[0]


def test_transient_failures_are_retried_and_counted(root, server, caplog):
    """Every second response fails, in each of the ways in turn."""
    kinds = itertools.cycle([503, "cut", 429, "short", 500])
    server.failures = itertools.chain.from_iterable((None, next(kinds)) for _ in itertools.count())
    with caplog.at_level(logging.WARNING):
        remote = WebDataset(f"{server.url}/{{0..2}}.tar")
        assert contents(remote) == contents(WebDataset(f"{root}/{{0..2}}.tar"))
    assert storage.retry_counts[server.url] >= 12
    assert caplog.text.count("; attempt ") == storage.retry_counts[server.url]


@pytest.mark.parametrize("failure", [503, "cut", "short"])
def test_a_failure_that_persists_raises_after_some_attempts(server, failure):
    source = WebDataset(f"{server.url}/0.tar")
    server.failures = itertools.repeat(failure)
    server.requests.clear()
    with pytest.raises(OSError, match=f"0.tar cannot be read, after {storage.ATTEMPTS} attempts"):
        source[3]
    assert len(server.requests) == storage.ATTEMPTS


@pytest.mark.parametrize("status", [401, 403, 410])
def test_permanent_failures_are_not_retried(server, status):
    source = WebDataset(f"{server.url}/0.tar")
    server.failures = itertools.repeat(status)
    server.requests.clear()
    with pytest.raises(OSError, match=f"/0.tar cannot be read: HTTP {status} "):
        source[3]
    assert len(server.requests) == 1


def test_a_server_without_ranges_is_refused_before_it_sends_the_whole_file(root, server):
    (root / "large.tar").write_bytes(bytes(32 << 20))
    server.ranges = False
    with pytest.raises(ValueError, match="large.tar does not serve parts of files .*: copy the shards"):
        WebDataset(f"{server.url}/large.tar")
    assert server.sent < 32 << 20


def test_a_server_that_stops_serving_ranges_raises(server):
    source = WebDataset(f"{server.url}/0.tar")
    server.ranges = False
    with pytest.raises(ValueError, match="does not serve parts of files"):
        source[3]


def test_missing_remote_shards_are_named(server):
    with pytest.raises(FileNotFoundError, match=r"2 of 4 shards are missing:\n  .*/3.tar\n  .*/4.tar$"):
        WebDataset(f"{server.url}/{{1..4}}.tar")


def test_names_and_messages_do_not_contain_signatures(server, caplog):
    source = WebDataset(f"{server.url}/0.tar?signature=secret")
    assert source[1]["name"] == f"{server.url}/0.tar:01"
    server.failures = itertools.repeat(503)
    with pytest.raises(OSError, match="0.tar cannot be read") as caught:
        source[3]
    assert "secret" not in str(caught.value) + caplog.text


def test_globs_list_remote_files_except_over_http(root):
    memory = fsspec.filesystem("memory")
    for path in root.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    memory.pipe("/bucket/0.tar.index.npz", b"")
    assert expand_patterns("memory://bucket/*") == [f"memory:///bucket/{i}.tar" for i in range(3)]
    assert contents(WebDataset("memory://bucket/?.tar")) == contents(WebDataset(f"{root}/?.tar"))
    assert expand_patterns(f"file://{root}/[12].tar") == [f"file://{root}/{i}.tar" for i in (1, 2)]
    with pytest.raises(FileNotFoundError, match="no shard fits the pattern memory://bucket/x"):
        expand_patterns("memory://bucket/x*")
    with pytest.raises(ValueError, match="files cannot be listed over HTTP: use braces"):
        expand_patterns("https://example.org/*.tar")
    assert expand_patterns("https://a.org/{0..1}.tar?x") == ["https://a.org/0.tar?x", "https://a.org/1.tar?x"]


def test_unknown_and_uninstalled_protocols_are_named():
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


def test_transient_failures_of_a_local_disk_are_retried(root, monkeypatch):
    source = WebDataset(f"{root}/0.tar")
    expected, failures, pread = source[3], iter([errno.EIO, errno.ESTALE]), os.pread

    def fail_twice(descriptor, size, offset):
        if code := next(failures, None):
            raise OSError(code, os.strerror(code))
        return pread(descriptor, size, offset)

    monkeypatch.setattr(os, "pread", fail_twice)
    assert source[3] == expected
    assert storage.retry_counts == {str(root): 2}


def test_shards_are_read_where_the_limit_of_open_files_is_low(tmp_path):
    paths = [write_tar(tmp_path / f"{i:02}.tar", samples([i])) for i in range(40)]
    fingerprints = [storage.read_fingerprint(path) for path in paths]
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 8, limits[1]))
        for _ in range(2):
            for path, fingerprint in zip(paths, fingerprints):
                assert storage.read_spans(path, fingerprint, [(0, 1)])[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_local_shard_that_is_truncated_while_it_is_used_raises(root):
    source = WebDataset(f"{root}/0.tar")
    assert source[7]["text"] == ("caption 7",)
    os.truncate(root / "0.tar", 4096)
    with pytest.raises(ValueError, match="has been changed while it was in use"):
        source[7]


def test_a_local_shard_that_vanishes_raises_at_once(root):
    source = WebDataset(f"{root}/0.tar")
    (root / "0.tar").unlink()
    storage.open_file.cache_clear()
    with pytest.raises(FileNotFoundError, match="0.tar"):
        source[3]
    assert not storage.retry_counts
