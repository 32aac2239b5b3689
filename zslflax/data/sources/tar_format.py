"""Finds the members of tar files, in the ustar, pax and GNU formats.

The standard library's tarfile takes three times as long (`benchmarks/shards.py` measures both), which delays the first
start on a dataset: both hold Python's lock, so that threads do not help, and millions of members take minutes.
"""

import logging
import re
from collections.abc import Iterator
from typing import BinaryIO

from zslflax.errors import UserError

log = logging.getLogger("zslflax")

BLOCK = 512
MAX_NAME = 4096  # bytes; Linux's
MAX_EXTENDED_HEADER = 1 << 20  # bytes of a pax header, which may hold access lists and the like
RECORD = 20 * BLOCK  # an empty tar file
MAX_PADDING = 1 << 20  # bytes of zeros after the end marker
MAX_MEMBER = 1 << 40  # bytes; file systems refuse positions far beyond any file
SPARSE = -1  # in place of the offset of a sparse member: its bytes are not those of its file
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}  # their commands


class BadHeader(Exception):
    """A header is damaged; the message says why."""


def iter_members(file: BinaryIO, path: str) -> Iterator[tuple[bytes, int, int]]:
    """Yields (name, offset, size) of the regular files in a tar file; the offset of a sparse one is `SPARSE`.

    Reads headers only. The end of the file may be missing: this is logged.

    Args:
        file: the tar file, at its beginning.
        path: its name, for messages.

    Raises:
        UserError: the file is compressed, is not a tar file, is damaged in the middle, or goes on after its end marker.
    """
    position, name, size, sparse = 0, None, None, False  # the last three come from headers that extend the next one
    while True:
        file.seek(position)
        header = file.read(BLOCK)
        if len(header) < BLOCK:
            log.warning("the shard %s is truncated: its end marker is missing", path)
            return
        if header[0] == 0 and not any(header):
            check_end(file, path, position)
            return
        kind, body = header[156:157], position + BLOCK
        try:
            stored = parse_size(header)
            if kind in b"xL":  # x: a pax header for the next member, L: GNU's long name of it
                extension = read_extended_header(file, stored)
                if kind == b"L":
                    name = until_nul(extension)
                elif b"path=" in extension or b"size=" in extension or b"GNU.sparse." in extension:
                    records = parse_pax_records(extension)
                    name = records.get(b"GNU.sparse.name", records.get(b"path", name))
                    size = parse_decimal(records[b"size"]) if b"size" in records else size
                    sparse = any(key.startswith(b"GNU.sparse.") for key in records)
            elif kind in b"07\0S":
                stored = stored if size is None else size
                name = name or parse_name(header)
                if len(name) > MAX_NAME:
                    raise BadHeader(f"a name of {len(name)} bytes")
                if kind == b"S":  # GNU's older sparse format, in which further blocks may list the holes
                    sparse, body = True, skip_sparse_map(file, header, body)
                yield name, SPARSE if sparse else body, stored
                name, size, sparse = None, None, False
            elif kind not in b"Kg":  # K (a link's long target) and g (defaults for pax headers) are not needed
                # Links, devices and folders have no contents, whatever size their header gives.
                stored = 0 if kind in b"123456" else stored if size is None else size
                name, size, sparse = None, None, False
        except BadHeader as error:
            raise UserError(damage_message(path, header, position, error)) from None
        position = body + -(-stored // BLOCK) * BLOCK


def check_end(file: BinaryIO, path: str, position: int) -> None:
    """Raises a UserError if more than padding follows.

    Args:
        file: after the first block of the end marker.
        path: of the file.
        position: of the end marker, bytes.
    """
    rest = file.read(MAX_PADDING + 1)
    if position == 0 and BLOCK + len(rest) > RECORD:
        raise UserError(f"the shard {path} holds no files, only zeros at its beginning; fetch it again")
    if len(rest) > MAX_PADDING or any(rest):
        raise UserError(
            f"the shard {path} has an end marker at byte {position}, but goes on: its download is not complete, or "
            "several tar files were joined by cat; fetch it again, or join them with tar -A"
        )


def parse_size(header: bytes) -> int:
    """The size of a member's contents.

    Raises:
        BadHeader: the checksum is wrong: this is not a header.
    """
    if parse_number(header[148:156]) not in checksums(header):
        raise BadHeader("the checksum is wrong")
    return parse_number(header[124:136])


def checksums(header: bytes) -> tuple[int, int]:
    """The sum of a header's bytes with its checksum field blank, with unsigned bytes and with signed ones."""
    counted = header[:148] + b" " * 8 + header[156:]
    total = sum(counted)
    return total, total - 256 * sum(byte > 127 for byte in counted) if not counted.isascii() else total


def parse_number(field: bytes) -> int:
    """The value of a number field: octal digits, or GNU's binary form.

    Raises:
        BadHeader: it is neither, or negative, or more than `MAX_MEMBER`.
    """
    if field[0] == 0x80:
        value = int.from_bytes(field[1:], "big")
    else:
        digits = until_nul(field).strip()
        if digits.strip(b"01234567"):
            raise BadHeader(f"{field!r} is not a number")
        value = int(digits or b"0", 8)
    if value > MAX_MEMBER:
        raise BadHeader(f"a size of {value} bytes")
    return value


def parse_decimal(digits: bytes) -> int:
    """The value of the decimal digits in a pax record.

    Raises:
        BadHeader: they are not digits, or more than `MAX_MEMBER`.
    """
    if not digits.isdigit() or len(digits) > 19 or int(digits) > MAX_MEMBER:
        raise BadHeader(f"{digits[:40]!r} is not a size")
    return int(digits)


def until_nul(field: bytes) -> bytes:
    return field.partition(b"\0")[0]


def parse_name(header: bytes) -> bytes:
    name = until_nul(header[:100])
    prefix = until_nul(header[345:500]) if header[257:263] == b"ustar\0" else b""  # GNU's format has times there
    return prefix + b"/" + name if prefix else name


def read_extended_header(file: BinaryIO, size: int) -> bytes:
    """The contents of a header that extends the next one; empty if the file ends within, which its reader notices."""
    if size > MAX_EXTENDED_HEADER:
        raise BadHeader(f"a header of {size} bytes")
    contents = file.read(size)
    return contents if len(contents) == size else b""


def parse_pax_records(contents: bytes) -> dict[bytes, bytes]:
    """Parses "LENGTH KEY=VALUE\\n…", where the length counts the whole record.

    >>> parse_pax_records(b"14 path=a.jpg\\n11 size=42\\n")
    {b'path': b'a.jpg', b'size': b'42'}
    """
    records, position = {}, 0
    while position < len(contents) and contents[position] != 0:
        blank = contents.find(b" ", position, position + 20)
        if blank < 0:
            raise BadHeader("a pax record without its length")
        length = parse_decimal(contents[position:blank])
        end = position + length
        if end <= blank + 1 or end > len(contents) or contents[end - 1 : end] != b"\n":
            raise BadHeader(f"a pax record of {length} bytes that does not end there")
        key, _, value = contents[blank + 1 : end - 1].partition(b"=")
        records[key], position = value, end
    return records


def skip_sparse_map(file: BinaryIO, header: bytes, body: int) -> int:
    """Where the contents of a GNU sparse member begin: after the blocks that continue its list of holes."""
    file.seek(body)
    more = header[482]
    while more:
        block = file.read(BLOCK)
        if len(block) < BLOCK:
            break
        body, more = body + BLOCK, block[504]
    return body


def damage_message(path: str, header: bytes, position: int, reason: Exception) -> str:
    """Says why a file cannot be read as a tar file, and what to do.

    Args:
        path: of the file.
        header: the block that is not a header.
        position: of the block in the file, bytes.
        reason: why it is not a header.
    """
    if position:
        expected = f"expected the header of a member ({reason})"
        return f"the shard {path} is damaged at byte {position}: {expected}; fetch it again"
    for start, compression in COMPRESSIONS.items():
        if header.startswith(start):
            plain = re.sub(r"\.tar\.\w+$|\.t[bgx]z2?$", ".tar", path)
            plain = plain if plain != path else path.removesuffix(".tar") + "-unpacked.tar"
            return (
                f"the shard {path} is compressed ({compression}), but shards are read in place; unpack it: "
                f"{compression} -dc {path} > {plain}"
            )
    return f"{path} is not a tar file: it starts with {header[:16]!r}"
