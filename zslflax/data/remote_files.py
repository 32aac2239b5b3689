"""Remote files (https://, gs://, s3://, hf://, …) that are read in parts, through fsspec."""

import asyncio
import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zslflax.data.addresses import is_http, without_credentials
from zslflax.data.retries import ReadLimits
from zslflax.errors import MissingLibraryError, UserError

CONNECT_TIMEOUT = 30  # seconds until a connection to a server is there
SILENCE_TIMEOUT = 30  # seconds without a byte after which an HTTP request fails
MERGE_GAP = 64 << 10  # bytes between two spans of a remote file that are cheaper to fetch than another request
FINGERPRINT_VERSION = 3  # raise it when fingerprints are computed in another way
HEAD_REFUSED = (400, 403, 405, 501)  # statuses of servers, or signed addresses, that answer GET alone
HTTP_VERSION_KEYS = ("ETag", "Last-Modified")
VERSION_KEYS = (
    *"ETag etag Last-Modified LastModified last_modified updated mtime generation Content-MD5".split(),
    *"md5Hash crc32c blob_id xet_hash".split(),
)
CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")

Fingerprint = tuple[int, int, int]  # FINGERPRINT_VERSION, size in bytes, modification time or a hash of the version


def make_fingerprint(size: int, version: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint of a remote file of a size and of a version, as the storage tells it; {} if it tells none."""
    digest = hashlib.sha256(repr(sorted((key, str(value)) for key, value in version.items())).encode()).digest()
    return FINGERPRINT_VERSION, size, int.from_bytes(digest[:7], "big")


def has_version(fingerprint: Fingerprint) -> bool:
    """Whether the storage told a version of the file, besides its size."""
    return fingerprint[2] != make_fingerprint(0, {})[2]


class RemoteFile:
    """A remote file that several threads may read at once, by requests for ranges of bytes.

    Args:
        path: an address.
        limits: of the time of its requests.

    Attributes:
        fingerprint: of the file when it was opened.

    Raises:
        FileNotFoundError, PermissionError: from the storage.
        UserError: the storage does not tell the file's size.
    """

    def __init__(self, path: str, limits: ReadLimits):
        self.name, self.limits = without_credentials(path), limits
        self.system, self.path = open_file_system(path)
        self.fingerprint = self.read_fingerprint()

    def read_fingerprint(self) -> Fingerprint:
        """Asks the storage for the size and the version of the file."""
        # The Hub tells the hash of a file only if asked, and its own size alone would not show a replaced file.
        options = {"expand_info": True} if "hf" in protocols(self.system) else {}
        info = self.run("info", self.path, **options)
        if info.get("size") is None:
            raise UserError(no_size_message(self.name))
        return make_fingerprint(int(info["size"]), {key: info[key] for key in VERSION_KEYS if info.get(key)})

    def run(self, operation: str, *args: Any, **options: Any) -> Any:
        """Calls an operation of the file system; one that is asynchronous has `limits.request` seconds."""
        from fsspec.asyn import AsyncFileSystem, sync

        if isinstance(self.system, AsyncFileSystem) and self.system.async_impl:
            function = getattr(self.system, f"_{operation}")
            try:
                return sync(self.system.loop, function, *args, timeout=self.limits.request, **options)
            except TimeoutError as error:
                raise ConnectionError(str(error) or late_message(self.limits)) from error
        return getattr(self.system, operation)(*args, **options)

    def read_spans(self, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each span (offset, size); fewer where the file ends before. Near spans share a request."""
        contents, file_size = [b""] * len(spans), self.fingerprint[1]
        nonempty = (i for i, (offset, size) in enumerate(spans) if size and offset < file_size)
        remaining = sorted(nonempty, key=spans.__getitem__)
        while remaining:
            group = [remaining.pop(0)]
            start, stop = spans[group[0]][0], sum(spans[group[0]])
            while remaining and spans[remaining[0]][0] <= stop + MERGE_GAP:
                group.append(remaining.pop(0))
                stop = max(stop, sum(spans[group[-1]]))
            data = self.fetch(start, min(stop, file_size))
            for i in group:
                offset, size = spans[i]
                contents[i] = data[offset - start : offset - start + size]
        return contents

    def fetch(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), by one request."""
        # Without a cache, which for some storages would read megabytes ahead at each call.
        options = {} if self.system.async_impl else {"cache_type": "none"}
        data = self.run("cat_file", self.path, start=start, end=stop, **options)
        if len(data) > stop - start:
            raise UserError(no_ranges_message(self.name))
        if len(data) < stop - start:
            raise ConnectionError(f"expected {stop - start} bytes, got {len(data)}")
        return data


class HttpFile(RemoteFile):
    """A file on a web server. The version, the range and the length of every answer are checked before it is read.

    Raises:
        UserError: when reading: the server ignores ranges, compresses its answers, or has another version of the file.
    """

    def read_fingerprint(self) -> Fingerprint:
        """Asks the server for the headers of the file."""
        return run_in_time(self.system, self.limits, self.describe)

    def fetch(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), by one request."""
        return run_in_time(self.system, self.limits, self.get, start, stop)

    async def request(self, method: str, span: tuple[int, int] | None = None) -> Any:
        """Sends a request, for a span (start, stop) of the file or for all of it: a context with the response.

        Raises:
            aiohttp.ClientResponseError: the status is 400 or above.
        """
        session = await self.system.set_session()
        options = dict(self.system.kwargs)
        headers = {**options.pop("headers", {}), "Accept-Encoding": "identity"}
        if span is not None:
            headers["Range"] = f"bytes={span[0]}-{span[1] - 1}"
        url = self.system.encode_url(self.path)
        return await session.request(method, url, headers=headers, allow_redirects=True, **options)

    async def describe(self) -> Fingerprint:
        """The fingerprint, from the headers of a HEAD request, or of a GET of one byte where HEAD does not tell it."""
        async with await self.request("HEAD") as response:
            if response.status not in HEAD_REFUSED:
                response.raise_for_status()
            size = response.headers.get("Content-Length", "")
            usable = response.ok and size.isdigit() and not is_encoded(response)
            self.version = http_version(response)
        if not usable:
            async with await self.request("GET", (0, 1)) as response:
                response.raise_for_status()
                found = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
                size = found[3] if found and response.status == 206 else response.headers.get("Content-Length", "")
                self.version = http_version(response)
                if not size.isdigit():
                    raise UserError(no_size_message(self.name))
        return make_fingerprint(int(size), self.version)

    async def get(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop). No more than these are read, whatever the server sends."""
        async with await self.request("GET", (start, stop)) as response:
            response.raise_for_status()
            self.check_answer(response, start, stop)
            try:
                return await response.content.readexactly(stop - start)
            except asyncio.IncompleteReadError as error:
                raise ConnectionError(f"expected {stop - start} bytes, got {len(error.partial)}") from error

    def check_answer(self, response: Any, start: int, stop: int) -> None:
        """Compares the headers of an answer with what was asked for.

        Raises:
            UserError: it cannot be used, and another attempt would not help.
            ConnectionError: it is not the range that was asked for.
        """
        if response.status != 206:
            raise UserError(no_ranges_message(self.name))
        if is_encoded(response):
            encoding = response.headers["Content-Encoding"]
            raise UserError(
                f"the server of {self.name} compresses its answers ({encoding}) although it was asked not to: turn "
                "that off for these files, or copy them"
            )
        found = CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if not found:
            raise UserError(no_ranges_message(self.name))
        if found[3] not in ("*", str(self.fingerprint[1])):
            raise UserError(changed_message(self.name, f"{found[3]} bytes instead of {self.fingerprint[1]}"))
        for key, value in http_version(response).items():
            if key in self.version and self.version[key] != value:
                raise UserError(changed_message(self.name, f"{key} {value} instead of {self.version[key]}"))
        length = response.headers.get("Content-Length", str(stop - start))
        if (int(found[1]), int(found[2]) + 1) != (start, stop) or length != str(stop - start):
            raise ConnectionError(f"asked for bytes {start}-{stop - 1}, got {found[0]} with {length} bytes")


def read_whole(path: str, max_size: int, limits: ReadLimits) -> bytes:
    """The contents of a remote file, by one request over HTTP.

    Raises:
        UserError: it has more than `max_size` bytes.
    """
    system, name = open_file_system(path)
    if is_http(path):
        data = run_in_time(system, limits, read_response, system, name, max_size)
    else:
        file = RemoteFile(path, limits)
        data = file.fetch(0, min(file.fingerprint[1], max_size + 1))
    if len(data) > max_size:
        raise UserError(f"{without_credentials(path)} is larger than the {max_size:,} bytes allowed")
    return data


async def read_response(system: Any, url: str, max_size: int) -> bytes:
    """The body of the answer to a GET request; of a longer one, a little more than `max_size` bytes."""
    session = await system.set_session()
    options = dict(system.kwargs)
    options["headers"] = {**options.get("headers", {}), "Accept-Encoding": "identity"}
    async with await session.get(system.encode_url(url), **options) as response:
        response.raise_for_status()
        data = bytearray()
        async for part in response.content.iter_chunked(1 << 16):
            data += part
            if len(data) > max_size:
                break
        return bytes(data)


def run_in_time(system: Any, limits: ReadLimits, function: Callable[..., Any], *args: Any) -> Any:
    """The result of a coroutine, which runs in the thread of an fsspec file system.

    Raises:
        ConnectionError: it takes more than `limits.request` seconds.
    """
    from fsspec.asyn import sync

    async def limited() -> Any:
        try:
            async with asyncio.timeout(limits.request):
                return await function(*args)
        except TimeoutError as error:  # fsspec would replace it by one without a message
            raise ConnectionError(str(error) or late_message(limits)) from error

    return sync(system.loop, limited)


def http_version(response: Any) -> dict[str, str]:
    """The headers that identify the version of a file."""
    found = {key: response.headers[key].removeprefix("W/") for key in HTTP_VERSION_KEYS if key in response.headers}
    return {"ETag": found["ETag"]} if "ETag" in found else found


def is_encoded(response: Any) -> bool:
    """Whether the body of an answer is compressed."""
    return response.headers.get("Content-Encoding", "identity").lower() not in ("identity", "")


def open_file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of an address, and the path in it.

    HTTP requests go through the proxy that the environment names (http_proxy, https_proxy, no_proxy).

    Raises:
        MissingLibraryError: a library for this kind of address is not installed.
        UserError: there is no such kind of address.
    """
    try:
        import fsspec

        options: dict[str, Any] = {}
        if is_http(path):
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_TIMEOUT, sock_read=SILENCE_TIMEOUT)
            client = {"timeout": timeout, "trust_env": True, "auto_decompress": False}
            options = {"client_kwargs": client}
        return fsspec.core.url_to_fs(path, **options)
    except ImportError as error:
        command = "pip install 'zslflax[remote]' (and gcsfs for gs://, s3fs for s3://)"
        raise MissingLibraryError(f"{without_credentials(path)} cannot be read: {error}; {command}") from error
    except ValueError as error:  # fsspec's, of an unknown protocol
        raise UserError(f"{without_credentials(path)} cannot be read: {error}") from error


def protocols(system: Any) -> tuple[str, ...]:
    """The names of a file system's kind of address."""
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def changed_message(name: str, difference: str = "") -> str:
    found = f" ({difference})" if difference else ""
    return f"the shard {name} has been changed while it was in use{found}; start again"


def late_message(limits: ReadLimits) -> str:
    return f"the answer was not complete after {limits.request:g} s (data.request_timeout)"


def no_size_message(name: str) -> str:
    return f"the server of {name} does not tell its size, which reading in place needs"


def no_ranges_message(name: str) -> str:
    return f"the server of {name} does not serve parts of files (range requests): copy the shards"
