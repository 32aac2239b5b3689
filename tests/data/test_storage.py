"""Remote shards: from a server that serves ranges, from one that fails now and then, and from one without ranges."""

import base64
import concurrent.futures
import errno
import hashlib
import itertools
import json
import logging
import os
import pathlib
import random
import resource
import subprocess
import sys
import time

import fsspec
import pytest

from tests.testing.range_server import Handler, serve
from tests.testing.shards import samples, write_tar
from zslflax.data import remote_files, retries, storage
from zslflax.data.retries import ReadLimits
from zslflax.data.sources import tar_index
from zslflax.data.sources.shard_patterns import expand_patterns
from zslflax.data.sources.webdataset import WebDataset
from zslflax.errors import MissingLibraryError


@pytest.fixture(autouse=True)
def isolate(tmp_path, monkeypatch, require):
    """Each test has its own home folder, short waits, and no open files or retry counts of other tests."""
    require("aiohttp")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(retries, "FIRST_WAIT", 0.001)
    storage.open_file.cache_clear()
    retries.reset_retry_log()


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
    assert not retries.retry_counts


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


def test_transient_failures_are_retried_and_counted(root, server, caplog, monkeypatch):
    """Every second response fails, in each of the ways in turn."""
    monkeypatch.setattr(retries, "LOG_EVERY", 0)
    kinds = itertools.cycle([503, "cut", 429, "short", 500])
    server.failures = itertools.chain.from_iterable((None, next(kinds)) for _ in itertools.count())
    with caplog.at_level(logging.WARNING):
        remote = WebDataset(f"{server.url}/{{0..2}}.tar")
        assert contents(remote) == contents(WebDataset(f"{root}/{{0..2}}.tar"))
    assert retries.retry_counts[server.url] >= 12
    assert caplog.text.count("; attempt ") == retries.retry_counts[server.url]


@pytest.mark.parametrize("failure", [503, "cut", "short"])
def test_a_failure_that_persists_raises_after_some_attempts(server, failure):
    source = WebDataset(f"{server.url}/0.tar")
    server.failures = itertools.repeat(failure)
    server.requests.clear()
    with pytest.raises(OSError, match=f"0.tar cannot be read, after {retries.ATTEMPTS} attempts"):
        source[3]
    assert len(server.requests) == retries.ATTEMPTS


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
    assert retries.retry_counts == {str(root): 2}


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
    assert not retries.retry_counts


def test_an_answer_that_ends_late_or_never_is_read_as_far_as_it_was_asked_for(root, server):
    source = WebDataset(f"{server.url}/0.tar")
    expected = WebDataset(f"{root}/0.tar")[3]["image"]
    server.failures, server.sent = itertools.repeat("endless"), 0
    assert source[3]["image"] == expected
    time.sleep(0.2)
    sent = server.sent
    time.sleep(0.2)
    assert server.sent == sent < 64 << 20  # the connection was closed; the rest is buffers of the network


@pytest.mark.parametrize("failure", ["long", "elsewhere"])
def test_an_answer_with_another_range_or_length_is_not_believed(server, failure):
    source = WebDataset(f"{server.url}/0.tar")
    server.failures, server.sent = itertools.repeat(failure), 0
    with pytest.raises(OSError, match="0.tar cannot be read, after 6 attempts in . s: .*asked for bytes"):
        source[3]


def test_compressed_answers_are_refused(server):
    source = WebDataset(f"{server.url}/0.tar")
    server.failures = itertools.repeat("gzip")
    with pytest.raises(ValueError, match=r"0.tar compresses its answers \(gzip\) although it was asked not to"):
        source[3]
    with pytest.raises(ValueError, match=r"1.tar compresses its answers"):
        WebDataset(f"{server.url}/1.tar")


def test_a_server_that_refuses_head_requests_is_asked_for_one_byte(root, server):
    server.head_status = 403
    source = WebDataset(f"{server.url}/0.tar")
    assert contents(source) == contents(WebDataset(f"{root}/0.tar"))
    assert ("GET", "/0.tar", "bytes=0-0") in server.requests


def test_a_slow_server_fails_within_the_limits(server):
    source = WebDataset(f"{server.url}/0.tar", limits=ReadLimits(request=0.2, total=0.5))
    server.failures = itertools.repeat("slow")
    started = time.monotonic()
    with pytest.raises(OSError, match=r"0.tar cannot be read, after . attempts .*not complete after 0.2 s"):
        source[7]
    assert 0.2 < time.monotonic() - started < 5
    with pytest.raises(OSError, match="1.tar cannot be read"):  # also when it is indexed
        WebDataset(f"{server.url}/1.tar", limits=ReadLimits(request=0.2, total=0.5))


def test_retries_are_summed_up_in_the_log(server, caplog):
    source = WebDataset(f"{server.url}/0.tar")
    server.failures = itertools.repeat(503)
    with caplog.at_level(logging.WARNING):
        for index in range(8):
            with pytest.raises(OSError):
                source[index]
    assert retries.retry_counts[server.url] == 8 * (retries.ATTEMPTS - 1)
    assert caplog.text.count("; attempt ") == 1 and "said at most every 60 s" in caplog.text


def test_other_content_of_the_same_length_is_noticed_at_each_read(root, server):
    source = WebDataset(f"{server.url}/0.tar")
    assert source[0]["text"] == ("caption 0",)
    os.utime(root / "0.tar", ns=(1, 1))  # another ETag; the file is open
    with pytest.raises(ValueError, match='0.tar has been changed while it was in use .*ETag "1" instead of'):
        source[1]


def replace_samples(path, first):
    """Overwrites a shard in place with one of the same size, of other samples."""
    members = [(f"{first + i}.{e}", bytes([9]) * 100) for i in range(8) for e in ("jpg", "txt")]
    other = write_tar(path.with_suffix(".new"), members)
    data = pathlib.Path(other).read_bytes()
    with open(path, "r+b") as file:
        assert len(data) <= path.stat().st_size
        file.write(data.ljust(path.stat().st_size, b"\0"))


@pytest.fixture
def same_size(root):
    """A shard, and a function that replaces it by another of equal size and time."""
    path = root / "same.tar"
    write_tar(path, [(f"{i}.{e}", bytes([i]) * 100) for i in range(8) for e in ("jpg", "txt")])
    status = path.stat()

    def replace():
        replace_samples(path, 2)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    return path, replace


@pytest.mark.parametrize("remote", [True, False])
def test_a_shard_replaced_by_one_of_equal_size_and_version_is_not_read_with_the_old_index(server, same_size, remote):
    path, replace = same_size
    server.tells_version = False
    address = f"{server.url}/same.tar" if remote else str(path)
    source = WebDataset(address)
    assert source[0]["image"] == bytes([0]) * 100
    replace()
    with pytest.raises(ValueError, match="same.tar is not the file that was indexed: it has no file of the sample 3"):
        source[3]
    storage.open_file.cache_clear()
    assert [name.rpartition(":")[2] for name in WebDataset(address).names()] == [str(i) for i in range(2, 10)]
    assert WebDataset(address)[0]["image"] == bytes([9]) * 100


def test_a_stored_index_of_another_shard_is_built_anew_at_the_next_start(server, same_size):
    path, replace = same_size
    server.tells_version = False
    WebDataset(f"{server.url}/same.tar"), WebDataset(str(path))
    replace()
    storage.open_file.cache_clear()
    for address in (f"{server.url}/same.tar", str(path)):
        assert WebDataset(address)[0]["image"] == bytes([9]) * 100


def test_a_local_shard_that_is_overwritten_in_place_raises_although_it_is_open(root):
    source = WebDataset(f"{root}/0.tar")
    assert source[1]["text"] == ("caption 1",)
    with open(root / "0.tar", "r+b") as file:
        file.write(bytes(1024))
    with pytest.raises(ValueError, match="0.tar has been changed while it was in use"):
        source[5]


def test_a_server_that_wants_credentials_is_not_called_missing(root, server, caplog):
    server.authorization = "Basic " + base64.b64encode(b"me:pa55").decode()
    with pytest.raises(OSError, match=r"0.tar cannot be read: HTTP 401 .*check the address's user") as caught:
        WebDataset(f"{server.url}/0.tar")
    assert not isinstance(caught.value, FileNotFoundError)
    address = server.url.replace("://", "://me:pa55@") + "/{0..2}.tar"
    source = WebDataset(address)
    assert contents(source) == contents(WebDataset(f"{root}/{{0..2}}.tar"))
    assert source[0]["name"] == f"{server.url}/0.tar:00"
    server.failures = itertools.repeat(503)
    with caplog.at_level(logging.INFO), pytest.raises(OSError, match="0.tar cannot be read") as caught:
        source[0]
    assert "pa55" not in caplog.text + str(caught.value)
    for pattern in (address.replace("0..2", "0..9999999"), address.replace("{0..2}", "*")):
        with pytest.raises(ValueError) as caught:
            WebDataset(pattern)
        assert "pa55" not in str(caught.value)


def test_a_server_error_at_the_start_names_the_error_not_a_missing_file(server):
    server.failures = itertools.repeat(500)
    with pytest.raises(OSError, match="0.tar cannot be read, after 6 attempts .*HTTP 500") as caught:
        WebDataset(f"{server.url}/0.tar")
    assert not isinstance(caught.value, FileNotFoundError)


def test_unknown_hosts_and_servers_without_tls_are_named(server):
    with pytest.raises(OSError, match="attempts .*Cannot connect to host nowhere.invalid") as caught:
        WebDataset("http://nowhere.invalid/0.tar")
    assert not isinstance(caught.value, FileNotFoundError)
    retries.reset_retry_log()
    with pytest.raises(OSError, match="0.tar cannot be read: .*SSL"):
        WebDataset(f"{server.url.replace('http:', 'https:')}/0.tar")
    assert not retries.retry_counts


def test_the_proxy_of_the_environment_is_used(root, server, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    source = WebDataset("http://shards.invalid/0.tar")
    assert contents(source) == contents(WebDataset(f"{root}/0.tar"))
    assert ("HEAD", "http://shards.invalid/0.tar", None) in server.requests


def test_many_shards_are_read_where_few_files_may_be_open(tmp_path):
    for shard in range(100):
        write_tar(tmp_path / f"{shard}.tar", [("0.jpg", bytes(10)), ("0.txt", b"caption %d" % shard)])
    code = f"""
import os
import pathlib
from zslflax.data.sources.webdataset import WebDataset
from zslflax.errors import MissingLibraryError
source = WebDataset("{tmp_path}/{{0..99}}.tar")
assert [source[i]["text"] for i in range(100)] == [(f"caption {{i}}",) for i in range(100)]
print(len(os.listdir("/proc/self/fd")))
"""
    command = f"ulimit -n 64; exec {sys.executable} -c '{code}'"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 40  # 16 shards, and the process's own


HUB_PROGRAM = """
import json, random
from zslflax.data import storage
from zslflax.data.sources.webdataset import WebDataset
from zslflax.errors import MissingLibraryError
source = WebDataset("hf://datasets/some-org/shards/0.tar", require_captions=True)
texts = [source[i]["text"][0] for i in random.Random(0).sample(range(8), 8)]
print(json.dumps([texts, source.fingerprints[0][2]]))
"""


class Hub(Handler):
    """Serves the folder of the server as a data set, at the addresses of the Hugging Face Hub."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send(200, json.dumps([self.describe("0.tar")]).encode(), {"Content-Type": "application/json"})

    def do_GET(self):
        path = self.path.partition("?")[0]
        if "/resolve/" in path:
            self.path = "/" + path.rpartition("/")[2]
            return self.answer(body=True)
        about = {"id": "some-org/shards", "sha": 40 * "a"}
        tree = [self.describe("0.tar")]
        found = tree if "/tree/" in path or "paths-info" in path else about
        self.send(200, json.dumps(found).encode(), {"Content-Type": "application/json"})

    def describe(self, name):
        data = (self.server.root / name).read_bytes()
        oid = hashlib.sha1(data).hexdigest()
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return {"type": "file", "path": name, "size": len(data), "oid": oid, "lfs": lfs}


def test_the_hub_is_asked_for_the_bytes_of_a_sample_alone_and_for_its_hash(root, server, require):
    require("huggingface_hub")
    server.RequestHandlerClass = Hub
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_TOKEN": "", "HF_HUB_DISABLE_XET": "1"}

    def read():
        command = [sys.executable, "-c", HUB_PROGRAM]
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    texts, version = read()
    assert sorted(texts) == [f"caption {i}" for i in range(8)]
    server.sent = 0
    read()  # the index is cached
    wanted = sum(5000 * i + 1 + len(f"caption {i}") + 2 * 512 for i in range(8))
    sent = [wanted for method, path, wanted in server.requests if wanted]
    assert server.sent < 1.3 * wanted, (server.sent, wanted, sent)
    replace_samples(root / "0.tar", 0)  # of equal size, with other captions
    other_texts, other_version = read()
    assert set(other_texts) == {(bytes([9]) * 100).decode().strip()} and other_version != version


@pytest.mark.parametrize("library", ["fsspec", "aiohttp"])
def test_a_missing_library_is_named_with_its_extra(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingLibraryError, match=rf"{library}.*; pip install 'zslflax\[remote\]'"):
        remote_files.open_file_system("https://example.org/0.tar")
