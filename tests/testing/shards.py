"""Writes tar shards, and samples of which each has contents of its own."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from zslflax.data.sources import tar_format

Member = tuple[str, bytes]  # name and contents


def write_tar(path: Path, members: Iterable[Member], format=tarfile.PAX_FORMAT) -> str:
    """Writes a tar file with tarfile; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, contents in members:
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    return str(path)


def sample(i: int, **others: bytes) -> list[Member]:
    """The members of sample i: an "image" whose length depends on i, the caption "caption i", and others."""
    files = {"jpg": bytes([i % 251]) * (700 * i + 1), "txt": f"caption {i}".encode()} | others
    return [(f"{i:05}.{extension}", contents) for extension, contents in files.items()]


def samples(numbers: Iterable[int]) -> list[Member]:
    """The members of several samples."""
    return [member for i in numbers for member in sample(i)]


def tar_header(kind: bytes, size: bytes, name: bytes = b"0.jpg") -> bytes:
    """A ustar header with a right checksum; the size field may be wrong."""
    block = bytearray(512)
    block[: len(name)], block[124:136], block[156:157], block[257:265] = name, size, kind, b"ustar\x0000"
    block[148:156] = b"%06o\0 " % tar_format.checksums(bytes(block))[0]
    return bytes(block)
