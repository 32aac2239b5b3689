"""Addresses of remote files: what is one, and how messages name it without its secrets."""

import re

USER_AND_PASSWORD = re.compile(r"(://)[^/@\s'\":]*:[^/@\s'\"]*@")
HTTP_USER = re.compile(r"(\b(?:https?|s?ftp)://)[^/@\s'\"]*@")  # elsewhere, as in abfs://, what precedes @ is a place
QUERY = re.compile(r"(://[^\s'\",?]*)\?[^\s'\",)]*")


def is_remote(path: str) -> bool:
    """Whether a path is an address.

    >>> is_remote("gs://bucket/00000.tar"), is_remote("shards/00000.tar")
    (True, False)
    """
    return "://" in path


def is_http(path: str) -> bool:
    return path.startswith(("http://", "https://"))


def without_credentials(path: str) -> str:
    """A path for messages, without the user, the password and the signature that an address may carry.

    >>> without_credentials("https://me:secret@example.org/00000.tar?signature=secret")
    'https://example.org/00000.tar'
    """
    return hide_credentials(path).partition("?")[0] if is_remote(path) else path


def hide_credentials(text: str) -> str:
    """A text for messages, without the users, passwords and signatures of the addresses in it.

    >>> hide_credentials("('https://me:secret@example.org/0.tar?key=1', 'b.tar')")
    "('https://example.org/0.tar', 'b.tar')"
    """
    for pattern in (USER_AND_PASSWORD, HTTP_USER, QUERY):
        text = pattern.sub(r"\1", text)
    return text
