"""Decides which requests the page answers: from whom, how large, and how many uploads."""

import asyncio
import collections
import contextlib
import ipaddress
import socket
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]  # of ASGI, like the three types below
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

DRAINED, DRAINING_TIME = 64 << 20, 10  # bytes and seconds of a refused body
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


class Guard:
    """ASGI middleware that refuses requests with a foreign host or origin, large bodies, and too many uploads.

    A page of another site can make the browser send requests to this machine under that site's name (DNS rebinding).
    The host of such a request is a name, never an address. Answered are therefore the names of this machine, and
    addresses only where the page serves other machines.

    Args:
        app: the application behind it.
        host: that the server listens on.
        max_body: bytes of the body of a request.
        max_upload: bytes of the body of an upload.
        max_uploads, max_uploaded: uploads, and their bytes, that are kept at a time.
        kept: seconds until an upload has been removed.
    """

    def __init__(
        self,
        app: Callable[[Scope, Receive, Send], Awaitable[None]],
        host: str,
        max_body: int,
        max_upload: int,
        max_uploads: int,
        max_uploaded: int,
        kept: float,
    ):
        self.app, self.max_body, self.max_upload = app, max_body, max_upload
        self.max_uploads, self.max_uploaded, self.kept = max_uploads, max_uploaded, kept
        self.local_only = is_loopback(host)
        self.names = {*LOOPBACK_NAMES, host.lower()}
        if not self.local_only:
            self.names |= {socket.gethostname().lower(), socket.getfqdn().lower()}
        self.uploads: collections.deque[tuple[float, int]] = collections.deque()  # time and bytes, oldest first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):  # the start and the end of the server
            return await self.app(scope, receive, send)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.is_own_host(host):
            return await refuse(scope, receive, send, 403, f"this server is not {host!r}")
        if origin is not None and origin.partition("://")[2] != host:
            return await refuse(scope, receive, send, 403, f"pages of {origin!r} may not use this server")
        upload = scope["type"] == "http" and scope["method"] == "POST" and scope["path"].rstrip("/").endswith("/upload")
        limit = self.max_upload if upload else self.max_body
        if upload and self.is_full():
            return await refuse(scope, receive, send, 429, "too many images were uploaded; try again in an hour")
        declared = headers.get("content-length", "0")
        if not declared.isdecimal() or int(declared) > limit:
            return await refuse(scope, receive, send, 413, f"at most {limit:,} bytes are accepted")
        await self.forward(scope, receive, send, limit, upload)

    async def forward(self, scope: Scope, receive: Receive, send: Send, limit: int, upload: bool) -> None:
        """Passes a request on, and ends it where its body is longer than `limit`, whatever length it declared."""
        received, started, is_long = 0, False, False

        async def counted_receive() -> Message:
            nonlocal received, is_long
            message = await receive()
            received += len(message.get("body", b""))
            is_long = is_long or received > limit
            return {"type": "http.disconnect"} if is_long else message

        async def watched_send(message: Message) -> None:
            nonlocal started
            if not is_long or started:
                started = True
                await send(message)

        try:
            await self.app(scope, counted_receive, watched_send)
        except Exception:
            if not is_long:
                raise
        if is_long and not started:
            await refuse(scope, receive, send, 413, f"at most {limit:,} bytes are accepted")
        if upload:
            self.uploads.append((time.monotonic(), received))

    def is_own_host(self, host: str) -> bool:
        """Whether the Host header of a request, a name or an address with or without port, means this server."""
        name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
        return name.lower() in self.names or (not self.local_only and is_address(name))

    def is_full(self) -> bool:
        """Whether so much was uploaded, and not yet removed, that no more is accepted."""
        while self.uploads and self.uploads[0][0] < time.monotonic() - self.kept:
            self.uploads.popleft()
        return len(self.uploads) >= self.max_uploads or sum(size for _, size in self.uploads) >= self.max_uploaded


def is_address(name: str) -> bool:
    """Whether a host is written as an IP address.

    >>> is_address("192.168.0.7"), is_address("192.168.0.7.example.org")
    (True, False)
    """
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether a server on this host answers this machine only.

    >>> is_loopback("127.0.0.1"), is_loopback("0.0.0.0")
    (True, False)
    """
    return host.lower() == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


async def refuse(scope: Scope, receive: Receive, send: Send, status: int, message: str) -> None:
    """Answers a request with a status and a line of text.

    Up to `DRAINED` bytes of the body are read and forgotten, because most clients read no answer before they have sent
    all. A client that sends more, or takes longer than `DRAINING_TIME`, loses the connection.
    """
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(drain(receive), DRAINING_TIME)
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"zslflax: {message}\n".encode()})


async def drain(receive: Receive) -> None:
    """Reads the rest of a body, at most `DRAINED` bytes of it."""
    drained, more = 0, True
    while more and drained <= DRAINED:
        part = await receive()
        drained += len(part.get("body", b""))
        more = part.get("more_body", False)
