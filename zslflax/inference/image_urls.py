"""Reads images from http(s) addresses, for users who allow it."""

import http.client
import time
import urllib.request

from zslflax.data.addresses import without_credentials
from zslflax.errors import StorageError, UserError

TIMEOUT = 60.0  # seconds for a whole image
PART = 1 << 16  # bytes that are read at a time


def fetch_image(url: str, limit: int) -> bytes:
    """The contents of an image file at an http(s) address. Proxies of the environment are used.

    A redirect leads to http(s) only.

    Args:
        url: the address.
        limit: bytes that the file may have.

    Raises:
        StorageError: the server does not answer, or not with the file, or takes more than `TIMEOUT` seconds.
        UserError: the file is larger than `limit`, or the address is none.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    name, deadline, parts, size = without_credentials(url), time.monotonic() + TIMEOUT, [], 0
    request = urllib.request.Request(url, headers={"User-Agent": "zslflax"})
    try:
        with opener.open(request, timeout=TIMEOUT) as answer:
            while size <= limit and (part := answer.read(PART)):
                parts.append(part)
                size += len(part)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"it took more than {TIMEOUT:.0f} seconds")
    except UserError:
        raise
    except (OSError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
        raise StorageError(f"{name} cannot be read: {error}") from error
    if size > limit:
        raise UserError(f"{name} is larger than the {limit:,} bytes allowed")
    return b"".join(parts)
