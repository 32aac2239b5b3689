"""A local HTTP file server, with or without support for ranges, that can fail in the ways that real servers do."""

import contextlib
import http.server
import itertools
import re
import threading
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
        path = server.root / self.path.lstrip("/").partition("?")[0]
        failure = server.next_failure(self.command, wanted)
        if not path.is_file() or isinstance(failure, int):
            return self.send(failure or 404, b"")
        data, status, headers = path.read_bytes(), 200, {"ETag": server.etag(path)}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted or "")
        if match and server.ranges:
            first, last = int(match[1]), min(int(match[2]), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        if failure == "short" and status == 206:
            data = data[: len(data) // 2]
        self.send(status, data, headers, body, cut=failure == "cut")

    def send(self, status, data, headers=(), body=True, cut=False):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data[: len(data) // 2] if cut else data)
            self.server.sent += len(data)
        self.close_connection = self.close_connection or cut

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    """Serves a folder on a free port of this machine.

    Attributes:
        ranges: whether the server answers range requests with that range, instead of the whole file.
        failures: an iterator with an entry for each request: an HTTP status, "cut" (the connection drops in the
            middle), "short" (half of the range, claimed to be all of it), or None for no failure.
        requests: (method, path, range) of all requests.
        sent: bytes of all bodies.
    """

    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.root, self.ranges, self.failures = root, True, itertools.repeat(None)
        self.requests, self.sent = [], 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def next_failure(self, command: str, wanted: str | None):
        with self.lock:
            failure = next(self.failures)
        return None if command == "HEAD" and not isinstance(failure, int) else failure

    def etag(self, path: Path) -> str:
        return f'"{path.stat().st_mtime_ns}"'


@contextlib.contextmanager
def serve(root: Path):
    """Runs a server within a context."""
    with Server(root) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
