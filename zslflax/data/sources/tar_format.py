"""Tar files, as far as finding their members goes: ustar, pax and GNU, by whoever wrote them."""

import logging
from collections.abc import Iterator
from typing import BinaryIO

from zslflax.errors import UserError

log = logging.getLogger("zslflax")

BLOCK = 512
LONGEST_NAME = 4096  # bytes; Linux's
LONGEST_EXTRA = 1 << 20  # bytes of a pax header, which may have access lists and the like
LARGEST = 1 << 40  # bytes of a member: file systems refuse positions far beyond any file
UNREADABLE = -1  # the offset of a member whose bytes are not its file's
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}


def members(file: BinaryIO, path: str) -> Iterator[tuple[bytes, int, int]]:
    """Yields (name, offset, size) of a tar file's regular files; the offset `UNREADABLE` if one is sparse.

    A tenth of what `tarfile` needs, which makes minutes for millions of members.

    Args:
        file: is read from its beginning on, headers only.
        path: for messages.

    Raises:
        ValueError: compressed, no tar file, or damaged in the middle. A file that ends early is only logged.
    """
    at, name, size, sparse = 0, None, None, False
    while True:
        file.seek(at)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            log.warning("the shard %s is truncated: the mark of its end is missing", path)
            return
        if header[0] == 0 and not any(header):
            return
        kind, body = header[156:157], at + BLOCK
        try:
            stored = stored_size(header)
            if kind in b"xL":  # for the next member, a pax header or GNU's long name
                extra = read_extra(file, stored)
                if kind == b"L":
                    name = until_nul(extra)
                elif b"path=" in extra or b"size=" in extra or b"GNU.sparse." in extra:
                    records = pax_records(extra)
                    name = records.get(b"GNU.sparse.name", records.get(b"path", name))
                    size = decimal(records[b"size"]) if b"size" in records else size
                    sparse = any(key.startswith(b"GNU.sparse.") for key in records)
            elif kind in b"07\0S":
                stored = stored if size is None else size
                name = name or plain_name(header)
                if len(name) > LONGEST_NAME:
                    raise UserError(f"a name of {len(name)} bytes")
                if kind == b"S":  # GNU's older form: more blocks of where the holes are
                    sparse, body = True, end_of_map(file, header, body)
                yield name, UNREADABLE if sparse else body, stored
                name, size, sparse = None, None, False
            elif kind not in b"Kg":  # K and g are headers too, which say nothing of use
                # Links, devices and folders have no contents, whatever the header says.
                stored = 0 if kind in b"123456" else stored if size is None else size
                name, size, sparse = None, None, False
        except ValueError as error:
            raise UserError(not_a_tar(path, header, at, error)) from None
        at = body + -(-stored // BLOCK) * BLOCK


def stored_size(header: bytes) -> int:
    """The size of a member's contents.

    Raises:
        ValueError: this is no header, by its sum.
    """
    if number(header[148:156]) not in checksums(header):
        raise UserError("no header of a member")
    return number(header[124:136])


def checksums(header: bytes) -> tuple[int, int]:
    """The sum of a header's bytes but for its own field, and as tars with signed characters summed."""
    counted = header[:148] + b" " * 8 + header[156:]
    total = sum(counted)
    return total, total - 256 * sum(byte > 127 for byte in counted) if not counted.isascii() else total


def number(field: bytes) -> int:
    """A number in octal digits, or in GNU's binary form.

    Raises:
        ValueError: neither, negative, or larger than any file.
    """
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
    else:
        digits = until_nul(field).strip()
        if digits.strip(b"01234567"):
            raise UserError(f"{field!r} is no number")
        value = int(digits or b"0", 8)
    if value > LARGEST:
        raise UserError(f"a size of {value} bytes")
    return value


def decimal(digits: bytes) -> int:
    """A number in decimal digits, of a pax record."""
    if not digits.isdigit() or len(digits) > 19 or int(digits) > LARGEST:
        raise UserError(f"{digits[:40]!r} is no size")
    return int(digits)


def until_nul(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def plain_name(header: bytes) -> bytes:
    name = until_nul(header[:100])
    prefix = until_nul(header[345:500]) if header[257:263] == b"ustar\0" else b""  # GNU has times there
    return prefix + b"/" + name if prefix else name


def read_extra(file: BinaryIO, size: int) -> bytes:
    """The body of a header of headers; empty where the file ends in it, of which the next header tells."""
    if size > LONGEST_EXTRA:
        raise UserError(f"a header of {size} bytes")
    body = file.read(size)
    return body if len(body) == size else b""


def pax_records(body: bytes) -> dict[bytes, bytes]:
    """Parses "LENGTH KEY=VALUE\\n…", where the length counts the whole record."""
    records, at = {}, 0
    while at < len(body) and body[at] != 0:
        blank = body.find(b" ", at, at + 20)
        if blank < 0:
            raise UserError("a pax record without its length")
        length = decimal(body[at:blank])
        end = at + length
        if end <= blank + 1 or end > len(body) or body[end - 1 : end] != b"\n":
            raise UserError(f"a pax record of {length} bytes that does not end there")
        key, _, value = body[blank + 1 : end - 1].partition(b"=")
        records[key], at = value, end
    return records


def end_of_map(file: BinaryIO, header: bytes, body: int) -> int:
    """Where the contents of a GNU sparse member begin, after the blocks that continue its map."""
    file.seek(body)
    more = header[482]
    while more:
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            break
        body, more = body + BLOCK, block[504]
    return body


def not_a_tar(path: str, header: bytes, at: int, why: Exception) -> str:
    if at:
        expected = f"expected the header of a member ({why})"
        return f"the shard {path} is damaged at byte {at}: {expected}; fetch it again"
    for start, compression in COMPRESSIONS.items():
        if header.startswith(start):
            return f"the shard {path} is compressed ({compression}), but shards are read in place: unpack it"
    return f"{path} is no tar file: it starts with {header[:16]!r}"
