"""A corpus of what is wrong with data from the web: images, captions and whole shards."""

import gzip
import io
import itertools
import json
import os
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from zslflax.data import images
from zslflax.data.sources import tar_format


def picture(height=48, width=64, seed=0) -> Image.Image:
    """Smooth colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encode(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


JPEG = encode(picture(), "JPEG", quality=90)


def zeros(number: int) -> bytes:
    """So many zeros, compressed: a block of a million, again and again."""
    block = zlib.compressobj(9, wbits=-15)
    million = block.compress(bytes(1_000_000)) + block.flush(zlib.Z_FULL_FLUSH)
    rest = block.compress(bytes(number % 1_000_000)) + block.flush()
    checksum = struct.pack(">HH", number % 65521, 1)  # Adler-32
    return b"\x78\xda" + number // 1_000_000 * million + rest + checksum


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of black pixels, which hardly take any bytes, with further chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zeros(height * (3 * width + 1))), (b"IEND", b"")]
    word = lambda number: struct.pack(">I", number)
    chunks = (word(len(body)) + kind + body + word(zlib.crc32(kind + body)) for kind, body in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0x40]) + data[at + 1 :]


def claiming(width: int, height: int) -> bytes:
    """A JPEG whose header claims a size."""
    at = JPEG.index(b"\xff\xc0") + 5
    return JPEG[:at] + struct.pack(">HH", height, width) + JPEG[at + 4 :]


def with_scans(number: int) -> bytes:
    """A progressive JPEG of two megapixels, whose last scan is repeated: a whole image's work each time."""
    data = encode(Image.new("RGB", (2000, 1000)), "JPEG", progressive=True)
    start, end = data.rindex(b"\xff\xda"), data.rindex(b"\xff\xd9")
    return data[:start] + number * data[start:end] + data[end:]


def bad_images() -> dict[str, tuple[bytes, bool]]:
    """Contents of files named .jpg, and whether they can be read all the same."""
    grey = encode(picture().convert("L"), "JPEG")
    text_bomb = b"Comment\0\0" + zeros(200 << 20)
    return {
        "truncated": (JPEG[: len(JPEG) // 2], False),
        "cut after the header": (JPEG[: JPEG.index(b"\xff\xda")], False),
        "flipped: start": (flipped(JPEG, 1), False),
        "flipped: size": (flipped(JPEG, JPEG.index(b"\xff\xc0") + 5), True),  # as Pillow has it: grey below
        "png": (encode(picture(), "PNG"), True),
        "webp": (encode(picture(), "WEBP"), True),
        "gif": (encode(picture(), "GIF"), True),
        "cmyk": (encode(picture().convert("CMYK"), "JPEG"), True),
        "grey": (grey, True),
        "1x1": (encode(picture(1, 1), "JPEG"), True),
        "1x1 png": (encode(picture(1, 1), "PNG"), True),
        "long": (encode(Image.new("RGB", (60_000, 1)), "JPEG"), True),
        "20000x20000": (png(20_000, 20_000), False),
        "20000x20000 jpeg": (claiming(20_000, 20_000), False),
        "65500x65500 gif": (b"GIF89a" + struct.pack("<HHBBB", 65_500, 65_500, 0, 0, 0) + b";", False),
        "5000x5000": (png(5_000, 5_000), True),
        "scans": (with_scans(images.MAX_SCANS), False),
        "text bomb": (png(8, 8, (b"zTXt", text_bomb)), False),
        "no pixels": (claiming(0, 0), False),
        "empty": (b"", False),
        "zeros": (bytes(4000), False),
        "html": (b"<!DOCTYPE html><title>404</title>", False),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', False),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n", False),
    }


def bad_captions() -> dict[str, tuple[dict[str, bytes], bool]]:
    """Text and JSON files of a sample, and whether there is a caption in them."""
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
    described = {
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
        **{f"json: {kind}": ({"json": data}, readable) for kind, (data, readable) in described.items()},
    }


def bad_samples() -> dict[str, tuple[dict[str, bytes], bool]]:
    """Files of a sample by extension, and whether the sample is readable."""
    samples = {f"image: {k}": ({"jpg": d, "txt": b"a dog"}, ok) for k, (d, ok) in bad_images().items()}
    captions = bad_captions().items()
    return samples | {f"caption: {k}": ({"jpg": JPEG} | files, ok) for k, (files, ok) in captions}


def add(tar: tarfile.TarFile, name: str, contents: bytes, **fields) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(contents)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(contents))


def add_sample(tar: tarfile.TarFile, key: str, files: dict[str, bytes], **fields) -> None:
    for extension, contents in files.items():
        add(tar, f"{key}.{extension}", contents, **fields)


def shard(write, format=tarfile.PAX_FORMAT) -> bytes:
    """A tar file of what a function adds to it."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        write(tar)
    return file.getvalue()


GOOD = {"jpg": JPEG, "txt": b"a dog"}


def gnu_sparse(tar: tarfile.TarFile) -> None:
    """A GNU sparse member whose map goes on in a second block."""
    info = tarfile.TarInfo("sparse.jpg")
    info.size, info.type = 512, b"S"
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"%011o\0%011o\0" % (1 << 20, 512)
    header[482] = 1  # the map goes on
    header[148:156] = b"%06o\0 " % tar_format.checksums(bytes(header))[0]
    tar.fileobj.write(bytes(header) + bytes(512) + JPEG[:512].ljust(512, b"\0"))
    add(tar, "sparse.txt", b"a dog")
    add_sample(tar, "after", GOOD)


def pax_sparse(tar: tarfile.TarFile) -> None:
    fields = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "sparse.jpg"}
    data = b"1\n0\n512\n".ljust(512, b"\0") + JPEG
    add(tar, "GNUSparseFile.1/sparse.jpg", data, pax_headers=fields | {"GNU.sparse.realsize": "9999"})
    add(tar, "sparse.txt", b"a dog")
    add_sample(tar, "after", GOOD)


def repeated(tar: tarfile.TarFile) -> None:
    for _ in range(3):
        add_sample(tar, "key", GOOD)


def elsewhere(tar: tarfile.TarFile) -> None:
    for key in ("../../x", "/etc/absolute", "C:\\x", "./" * 30 + "x", "a\nb", "-rf", "*"):
        add_sample(tar, key, GOOD)


def described(tar: tarfile.TarFile) -> None:
    headers = {"comment": "path=size=" * 50, "SCHILY.xattr.user.x": "y\n" * 500, "mtime": "1.5"}
    add_sample(tar, "é" * 200, GOOD, pax_headers=headers)


def other_kinds(tar: tarfile.TarFile) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
        link = tarfile.TarInfo(f"kind{ord(kind)}.jpg")
        link.type, link.linkname = kind, "/etc/passwd"
        tar.addfile(link)
    add_sample(tar, "file", GOOD)


def bad_shards() -> dict[str, tuple[bytes, int, int]]:
    """Contents of tar files, how many samples they have, and how many of those are readable."""
    six = shard(lambda tar: [add_sample(tar, f"{i}", GOOD) for i in range(6)])
    last = tarfile.open(fileobj=io.BytesIO(six)).getmember("5.jpg")
    return {
        "cut in a member": (six[: last.offset_data + 700], 6, 5),
        "cut in a header": (six[: last.offset + 100], 5, 5),
        "without its end": (six[: six.rindex(b"a dog") + 512], 6, 6),
        "repeated keys": (shard(repeated), 3, 3),
        "odd paths": (shard(elsewhere), 7, 7),
        "pax headers": (shard(described), 1, 1),
        "gnu sparse": (shard(gnu_sparse, tarfile.GNU_FORMAT), 2, 1),
        "pax sparse": (shard(pax_sparse), 2, 1),
        "links": (shard(other_kinds), 1, 1),
        "empty": (shard(lambda tar: None), 0, 0),
    }


def unreadable_shards() -> dict[str, bytes]:
    """What is no tar file, or damaged in the middle, under the name of one."""
    good = shard(lambda tar: [add_sample(tar, f"{i}", GOOD) for i in range(6)])
    middle = tarfile.open(fileobj=io.BytesIO(good)).getmember("3.jpg").offset
    return {
        "gzip": gzip.compress(good),
        "flipped header": flipped(good, middle + 130),
        "html": b"<html>" * 500,
    }


def write_corpus(folder: Path, good: int = 19) -> tuple[int, dict[str, str]]:
    """Writes all of it mixed into good shards; returns how many samples, and {name: fault} of the bad.

    Every bad sample has `good` good ones around it; among the shards are the bad ones, and for every twenty
    one that is no tar file.
    """
    samples, bad = 0, {}
    for number, (kind, (files, readable)) in enumerate(bad_samples().items()):
        path = folder / f"sample{number:03}.tar"
        path.write_bytes(shard(lambda tar: fill(tar, files, good)))
        samples += good + 1
        bad |= {} if readable else {f"{path}:bad": kind}
    for number, (kind, (data, all_of_it, readable)) in enumerate(bad_shards().items()):
        path = folder / f"shard{number:03}.tar"
        path.write_bytes(data)
        samples += all_of_it
        keys = {"cut in a member": "5", "gnu sparse": "sparse", "pax sparse": "sparse"}
        bad |= {f"{path}:{keys[kind]}": kind} if readable < all_of_it else {}
    unreadable = itertools.islice(unreadable_shards().values(), len(os.listdir(folder)) // 20)
    for number, data in enumerate(unreadable):
        (folder / f"unreadable{number:03}.tar").write_bytes(data)
    return samples, bad


def fill(tar: tarfile.TarFile, files: dict[str, bytes], good: int) -> None:
    for i in range(good):
        if i == good // 2:
            add_sample(tar, "bad", files)
        add_sample(tar, f"good{i:03}", GOOD)
