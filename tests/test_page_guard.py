"""Which requests the page answers, for the cases that would take an hour or another machine with a real server."""

import asyncio
import socket

import pytest

from zslflax.page_guard import Guard


async def answer_ok(scope, receive, send):
    """An application that reads the body and answers."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def make_guard(host="127.0.0.1", **limits):
    defaults = {"max_body": 100, "max_upload": 1000, "max_uploads": 3, "max_uploaded": 2000, "kept": 50.0}
    return Guard(answer_ok, host=host, **(defaults | limits))


def ask(guard, path="/", body=b"", **headers):
    """The status with which a guard answers a POST request."""
    sent = []

    async def receive():
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message):
        sent.append(message)

    named = [(name.encode(), value.encode()) for name, value in ({"host": "127.0.0.1:7860"} | headers).items()]
    scope = {"type": "http", "method": "POST", "path": path, "headers": named}
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"]


def test_uploads_are_limited_in_number_and_bytes_until_they_are_removed(monkeypatch):
    guard, now = make_guard(), [0.0]
    monkeypatch.setattr("zslflax.page_guard.time.monotonic", lambda: now[0])
    assert [ask(guard, "/gradio_api/upload", bytes(10)) for _ in range(5)] == [200, 200, 200, 429, 429]
    assert ask(guard) == 200
    now[0] = 51.0
    assert [ask(guard, "/gradio_api/upload", bytes(1000)) for _ in range(3)] == [200, 200, 429]


def test_bodies_are_counted_as_they_arrive():
    guard = make_guard()
    assert ask(guard, body=bytes(100)) == 200 and ask(guard, body=bytes(101)) == 413
    assert ask(guard, "/gradio_api/upload", bytes(1000)) == 200 and ask(guard, "/gradio_api/upload", bytes(1001)) == 413
    for length in ("101", "-5", "many"):
        assert ask(guard, **{"content-length": length}) == 413


@pytest.mark.parametrize(
    "listening, host, status",
    [
        ("127.0.0.1", "[::1]:7860", 200),
        ("127.0.0.1", "LOCALHOST", 200),
        ("127.0.0.1", "192.168.0.7:7860", 403),
        ("0.0.0.0", "192.168.0.7:7860", 200),
        ("0.0.0.0", "[2001:db8::1]:7860", 200),
        ("0.0.0.0", socket.gethostname(), 200),
        ("0.0.0.0", "evil.example", 403),
        ("192.168.0.7", "evil.example", 403),
        ("me.example", "me.example:7860", 200),
    ],
)
def test_a_host_is_a_name_of_this_machine_or_an_address(listening, host, status):
    assert ask(make_guard(listening), host=host) == status
