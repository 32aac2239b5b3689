"""A local HTTP file server, with or without support for ranges, that can fail in the ways that real servers do."""

import contextlib
import gzip
import http.server
import itertools
import re
import threading
import time
import urllib.parse
from pathlib import Path


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves the files of `server.root`."""

    protocol_version = "HTTP/1.1"

    def handle(self):
        with contextlib.suppress(ConnectionError):  # a client may close the connection early
            super().handle()

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body: bool):
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append((self.command, self.path, wanted))
        path = server.root / urllib.parse.urlsplit(self.path).path.lstrip("/")  # a proxy is asked for whole addresses
        failure = server.next_failure(self.command, wanted)
        if server.authorization and self.headers.get("Authorization") != server.authorization:
            failure = 401
        if self.command == "HEAD" and server.head_status:
            failure = server.head_status
        if not path.is_file() or isinstance(failure, int):
            return self.send(failure or 404, b"")
        data, status, headers = path.read_bytes(), 200, {"ETag": server.etag(path)} if server.tells_version else {}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
        if match and server.ranges:
            first, last = int(match[1]), min(int(match[2]), len(data) - 1)
            shift = 512 if failure == "elsewhere" else 0
            headers["Content-Range"] = f"bytes {first + shift}-{last + shift}/{len(data)}"
            data, status = data[first : last + 1], 206
        if failure == "short" and status == 206:
            data = data[: len(data) // 2]
        if failure == "long":
            data = data + bytes(1 << 20)
        if failure == "gzip":
            data = gzip.compress(data)
            headers["Content-Encoding"] = "gzip"
        self.send(status, data, headers, body, failure)

    def send(self, status, data, headers=(), body=True, failure=None):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        if failure == "endless":
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.send_body(data, failure)

    def send_body(self, data, failure):
        if failure == "slow":
            for byte in data:
                self.wfile.write(bytes([byte]))
                time.sleep(0.02)
        if failure == "cut":
            data, self.close_connection = data[: len(data) // 2], True
        self.wfile.write(data)
        self.server.sent += len(data)
        while failure == "endless":
            self.wfile.write(bytes(1 << 16))
            self.server.sent += 1 << 16

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder on a free port of this machine.

    Attributes:
        ranges: whether the server answers range requests with that range, instead of the whole file.
        failures: an iterator with an entry for each request: an HTTP status, "cut" (the connection drops in the
            middle), "short" (half of the range, claimed to be all of it), "long" (a megabyte more), "endless" (without
            a length or an end), "elsewhere" (another range), "gzip" (compressed), "slow" (50 bytes a second), or None
            for no failure.
        authorization: what the header Authorization must be, or "".
        head_status: of all HEAD requests, or 0 for the usual one.
        tells_version: whether answers have an ETag.
        requests: (method, path, range) of all requests.
        sent: bytes of all bodies.
    """

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.ranges, self.failures = root, True, itertools.repeat(None)
        self.authorization, self.head_status, self.tells_version = "", 0, True
        self.requests, self.sent = [], 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def next_failure(self, command: str, wanted: str | None):
        with self.lock:
            failure = next(self.failures)
        return None if command == "HEAD" and not isinstance(failure, int) else failure

    def etag(self, path: Path) -> str:
        return f'"{path.stat().st_mtime_ns}"'


def serve(root: Path):
    """Serves a folder within a context."""
    return running(Server(root))


@contextlib.contextmanager
def running(server: http.server.ThreadingHTTPServer):
    """Runs a server within a context."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
