"""Broken data as found on the web: images, captions and whole shards."""

import gzip
import io
import itertools
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from zslflax.data import images
from zslflax.data.sources import tar_format


def smooth_image(height=48, width=64, seed=0) -> Image.Image:
    """An image of smooth colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


JPEG = encode(smooth_image(), "JPEG", quality=90)


def compressed_zeros(count: int) -> bytes:
    """A zlib stream of zeros, made by repeating a compressed million."""
    block = zlib.compressobj(9, wbits=-15)
    million = block.compress(bytes(1_000_000)) + block.flush(zlib.Z_FULL_FLUSH)
    rest = block.compress(bytes(count % 1_000_000)) + block.flush()
    checksum = struct.pack(">HH", count % 65521, 1)  # Adler-32
    return b"\x78\xda" + count // 1_000_000 * million + rest + checksum


def black_png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of black pixels, which takes few bytes, with further chunks (kind, body)."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", compressed_zeros(height * (3 * width + 1))), (b"IEND", b"")]
    word = lambda number: struct.pack(">I", number)
    encoded = (word(len(body)) + kind + body + word(zlib.crc32(kind + body)) for kind, body in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(encoded)


def flip_bit(data: bytes, at: int) -> bytes:
    """The data with one bit of one byte flipped."""
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


def jpeg_claiming(width: int, height: int) -> bytes:
    """A JPEG whose header claims another size."""
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", height, width) + JPEG[at + 4 :]


def jpeg_with_scans(count: int) -> bytes:
    """A progressive JPEG of two megapixels that repeats its last scan; each takes the work of a whole image."""
    data = encode(Image.new("RGB", (2000, 1000)), "JPEG", progressive=True)
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:start] + count * data[start:end] + data[end:]


def bad_images() -> dict[str, tuple[bytes, bool]]:
    """By kind: the contents of a file named .jpg, and whether it can be decoded all the same."""
    grey = encode(smooth_image().convert("L"), "JPEG")
    text_bomb = b"Comment\0\0" + compressed_zeros(200 << 20)
    return {
        "truncated": (JPEG[: len(JPEG) // 2], False),
        "cut after the header": (JPEG[: JPEG.index(b"\xff\xda")], False),
        "flipped bit at the start": (flip_bit(JPEG, 1), False),
        "flipped bit in the size": (flip_bit(JPEG, JPEG.index(b"\xff\xc0") + 5), True),  # like Pillow: grey below
        "png": (encode(smooth_image(), "PNG"), True),
        "webp": (encode(smooth_image(), "WEBP"), True),
        "gif": (encode(smooth_image(), "GIF"), True),
        "cmyk": (encode(smooth_image().convert("CMYK"), "JPEG"), True),
        "grey": (grey, True),
        "1x1": (encode(smooth_image(1, 1), "JPEG"), True),
        "1x1 png": (encode(smooth_image(1, 1), "PNG"), True),
        "long": (encode(Image.new("RGB", (60_000, 1)), "JPEG"), True),
        "20000x20000": (black_png(20_000, 20_000), False),
        "20000x20000 jpeg": (jpeg_claiming(20_000, 20_000), False),
        "65500x65500 gif": (b"GIF89a" + struct.pack("<HHBBB", 65_500, 65_500, 0, 0, 0) + b";", False),
        "5000x5000": (black_png(5_000, 5_000), True),
        "scans": (jpeg_with_scans(images.MAX_SCANS), False),
        "text bomb": (black_png(8, 8, (b"zTXt", text_bomb)), False),
        "no pixels": (jpeg_claiming(0, 0), False),
        "empty": (b"", False),
        "zeros": (bytes(4000), False),
        "html": (b"<!DOCTYPE html><title>404</title>", False),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', False),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n", False),
    }


def bad_captions() -> dict[str, tuple[dict[str, bytes], bool]]:
    """By kind: a sample's text and JSON files by extension, and whether they hold a caption."""
    text = {
        "nul": "a\0b\0",
        "nuls": "\0" * 500,
        "emoji": "🐕‍🦺 👩🏽‍🚀 🏳️‍🌈" * 50,
        "long": "word " * 20_000,
        "one long word": "x" * 100_000,
        "right to left": "כלב ברחוב \u202e كلب في الشارع",
        "controls": "\x01\x1b[31m\r\n\u2028\ufeff\ufffe",
        "combining": "e" + "\u0301" * 10_000,
    }
    json_files = {
        "surrogate": (b'{"caption": "\\ud83d dog"}', True),
        "deep": (b"[" * 100_000, False),
        "no caption": (b'{"caption": null}', False),
        "number": (b'{"caption": 5}', False),
        "cut": (b'{"caption": "a d', False),
        "utf-16": (json.dumps({"caption": "é"}, ensure_ascii=False).encode("utf-16"), True),
        "digits": (b'{"caption": "a", "label": ' + b"9" * 10_000 + b"}", False),
    }
    return {
        **{kind: ({"txt": caption.encode()}, True) for kind, caption in text.items()},
        "invalid utf-8": ({"txt": b"\xff\xfe dog \xc3"}, True),
        "blank": ({"txt": b" \n\t\xc2\xa0"}, False),
        "no text": ({}, False),
        "label": ({"txt": b"a dog", "cls": b"dog"}, False),
        "2 MB": ({"txt": b"word " * 400_000}, False),
        **{f"json: {kind}": ({"json": data}, readable) for kind, (data, readable) in json_files.items()},
    }


def bad_samples() -> dict[str, tuple[dict[str, bytes], bool]]:
    """By kind: a sample's files by extension, and whether the sample is readable."""
    samples = {f"image: {k}": ({"jpg": d, "txt": b"a dog"}, ok) for k, (d, ok) in bad_images().items()}
    captions = bad_captions().items()
    return samples | {f"caption: {k}": ({"jpg": JPEG} | files, ok) for k, (files, ok) in captions}


def add_member(tar: tarfile.TarFile, name: str, contents: bytes, **fields) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(contents)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(contents))


def add_sample(tar: tarfile.TarFile, key: str, files: dict[str, bytes], **fields) -> None:
    for extension, contents in files.items():
        add_member(tar, f"{key}.{extension}", contents, **fields)


def tar_bytes(write: Callable[[tarfile.TarFile], object], format=tarfile.PAX_FORMAT) -> bytes:
    """A tar file with what a function adds to it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        write(tar)
    return file.getvalue()


GOOD = {"jpg": JPEG, "txt": b"a dog"}


def add_good_samples(tar: tarfile.TarFile) -> None:
    for i in range(6):
        add_sample(tar, f"{i}", GOOD)


def add_gnu_sparse(tar: tarfile.TarFile) -> None:
    """Adds a GNU sparse member whose map continues in a second block."""
    info = tarfile.TarInfo("sparse.jpg")
    info.size, info.type = 512, b"S"
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (1 << 20, 512)
    header[482] = 1  # the map continues
    header[148:156] = b"%06o\0 " % tar_format.checksums(bytes(header))[0]
    tar.fileobj.write(bytes(header) + bytes(512) + JPEG[:512].ljust(512, b"\0"))
    add_member(tar, "sparse.txt", b"a dog")
    add_sample(tar, "after", GOOD)


def add_pax_sparse(tar: tarfile.TarFile) -> None:
    fields = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "sparse.jpg"}
    data = b"1\n0\n512\n".ljust(512, b"\0") + JPEG
    add_member(tar, "GNUSparseFile.1/sparse.jpg", data, pax_headers=fields | {"GNU.sparse.realsize": "9999"})
    add_member(tar, "sparse.txt", b"a dog")
    add_sample(tar, "after", GOOD)


def add_repeated_keys(tar: tarfile.TarFile) -> None:
    for _ in range(3):
        add_sample(tar, "key", GOOD)


def add_odd_paths(tar: tarfile.TarFile) -> None:
    for key in ("../../x", "/etc/absolute", "C:\\x", "./" * 30 + "x", "a\nb", "-rf", "*"):
        add_sample(tar, key, GOOD)


def add_pax_headers(tar: tarfile.TarFile) -> None:
    headers = {"comment": "path=size=" * 50, "SCHILY.xattr.user.x": "y\n" * 500, "mtime": "1.5"}
    add_sample(tar, "é" * 200, GOOD, pax_headers=headers)


def add_links(tar: tarfile.TarFile) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        link = tarfile.TarInfo(f"kind{ord(kind)}.jpg")
        link.type, link.linkname = kind, "/etc/passwd"
        tar.addfile(link)
    add_sample(tar, "file", GOOD)


def bad_shards() -> dict[str, tuple[bytes, int, int]]:
    """By kind: the contents of a tar file, the number of its samples, and how many of them are readable."""
    six = tar_bytes(add_good_samples)
    last = tarfile.open(fileobj=io.BytesIO(six)).getmember("5.jpg")
    return {
        "cut in a member": (six[: last.offset_data + 700], 6, 5),
        "cut in a header": (six[: last.offset + 100], 5, 5),
        "without its end": (six[: six.rindex(b"a dog") + 512], 6, 6),
        "repeated keys": (tar_bytes(add_repeated_keys), 3, 3),
        "odd paths": (tar_bytes(add_odd_paths), 7, 7),
        "pax headers": (tar_bytes(add_pax_headers), 1, 1),
        "gnu sparse": (tar_bytes(add_gnu_sparse, tarfile.GNU_FORMAT), 2, 1),
        "pax sparse": (tar_bytes(add_pax_sparse), 2, 1),
        "links": (tar_bytes(add_links), 1, 1),
        "empty": (tar_bytes(lambda tar: None), 0, 0),
    }


def unreadable_shards() -> dict[str, bytes]:
    """By kind: files named .tar that are not tar files, or are damaged in the middle."""
    good = tar_bytes(add_good_samples)
    middle = tarfile.open(fileobj=io.BytesIO(good)).getmember("3.jpg").offset
    return {
        "gzip": gzip.compress(good),
        "flipped bit in a header": flip_bit(good, middle + 130),
        "html": b"<html>" * 500,
    }


def write_corpus(folder: Path, good: int = 19) -> tuple[int, dict[str, str]]:
    """Writes all kinds of broken data, mixed with good data, as shards.

    Each bad sample has a shard with `good` good samples. The bad shards are added, and one unreadable shard for every
    twenty others.

    Returns:
        The number of samples, and the kind of fault of each bad one by its name.
    """
    samples, bad = 0, {}
    for number, (kind, (files, readable)) in enumerate(bad_samples().items()):
        path = folder / f"sample{number:03}.tar"
        path.write_bytes(tar_bytes(lambda tar: add_bad_among_good(tar, files, good)))
        samples += good + 1
        bad |= {} if readable else {f"{path}:bad": kind}
    for number, (kind, (data, count, readable)) in enumerate(bad_shards().items()):
        path = folder / f"shard{number:03}.tar"
        path.write_bytes(data)
        samples += count
        keys = {"cut in a member": "5", "gnu sparse": "sparse", "pax sparse": "sparse"}
        bad |= {f"{path}:{keys[kind]}": kind} if readable < count else {}
    unreadable = itertools.islice(unreadable_shards().values(), len(os.listdir(folder)) // 20)
    for number, data in enumerate(unreadable):
        (folder / f"unreadable{number:03}.tar").write_bytes(data)
    return samples, bad


def add_bad_among_good(tar: tarfile.TarFile, files: dict[str, bytes], good: int) -> None:
    """Adds good samples, and in their middle one of the given files."""
    for i in range(good):
        if i == good // 2:
            add_sample(tar, "bad", files)
        add_sample(tar, f"good{i:03}", GOOD)
