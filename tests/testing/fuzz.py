"""Fuzzes the tar reader, the JSON reader and the image decoder: no crash, no hang, no unbounded allocation.

    python -m tests.testing.fuzz --minutes=10

The fuzzed code runs in a process of its own with limited memory. Every input is written to a file before it is tried,
so that an input that ends the process can be tried again: the error message names the file.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import logging
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from pathlib import Path

import hypothesis
import numpy as np
from hypothesis import strategies as st

from tests.testing import broken
from zslflax.data import crops, images, storage
from zslflax.data.sources import tar_format, webdataset
from zslflax.errors import UserError

HANG = 30  # seconds after which an input counts as hanging
MEMORY = 6 << 30  # bytes of address space
MAX_PIXELS = 1 << 22  # in place of `images.MAX_PIXELS`: many small images are worth more than a few large ones
SETTINGS = {"database": None, "deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}

SIZES = st.one_of(
    st.binary(min_size=12, max_size=12),
    st.sampled_from([b"-0000000001\0", b"77777777777\0", b"\x80" + b"\xff" * 11, b"\xff" * 12]),
    st.integers(0, 1 << 95).map(lambda n: b"\x80" + (n % (1 << 88)).to_bytes(11, "big")),
    st.integers(0, 8**11 - 1).map(lambda n: b"%011o\0" % n),
)
KINDS = st.sampled_from(list(b"0123456789xgLKSDMNVX\0"))
RECORDS = st.lists(
    st.one_of(
        st.binary(max_size=40),
        st.tuples(st.integers(-5, 1 << 70), st.sampled_from([b"path", b"size"]), st.binary(max_size=9)).map(
            lambda r: b"%d %s=%s\n" % r
        ),
        st.tuples(st.sampled_from([b"path", b"GNU.sparse.name"]), st.binary(max_size=30)).map(lambda r: pax_record(*r)),
        st.integers(-3, 1 << 70).map(lambda n: pax_record(b"size", b"%d" % n)),
    ),
    max_size=4,
).map(b"".join)
CHANGES = st.lists(st.tuples(st.integers(0, 1 << 20), st.binary(min_size=1, max_size=8)), max_size=6)


def pax_record(key: bytes, value: bytes) -> bytes:
    """A pax record with the right length."""
    rest = b" " + key + b"=" + value + b"\n"
    length = len(rest)
    while length != len(rest) + len(str(length)):
        length = len(rest) + len(str(length))
    return b"%d" % length + rest


def damage(data: bytes, changes: list[tuple[int, bytes]], cut: float = 1.0) -> bytes:
    """Overwrites some bytes and cuts off the end.

    Args:
        data: to damage.
        changes: (position, new bytes).
        cut: share of the data that is left.
    """
    data = bytearray(data)
    for at, new in changes:
        at %= max(1, len(data))
        data[at : at + len(new)] = new
    return bytes(data[: round(cut * len(data))])


def tar_member(kind: int, name: bytes, size: bytes | None, body: bytes, magic: bytes, right_checksum: bool) -> bytes:
    """A header and a body; the size field may be wrong."""
    header = bytearray(512)
    header[: min(100, len(name))] = name[:100]
    header[124:136] = b"%011o\0" % len(body) if size is None else size
    header[156], header[257:265] = kind, magic
    header[148:156] = b"%06o\0 " % (tar_format.checksums(bytes(header))[0] + (not right_checksum))
    return bytes(header) + body + bytes(-len(body) % 512)


MEMBERS = st.builds(
    tar_member,
    KINDS,
    st.one_of(st.sampled_from([b"a.jpg", b"a.txt", b"b.jpg", b"b.json", b"../c.jpg"]), st.binary(max_size=100)),
    st.one_of(st.none(), st.none(), st.none(), SIZES),
    st.one_of(RECORDS, st.sampled_from([broken.JPEG, b"a dog"]), st.binary(max_size=600)),
    st.sampled_from([b"ustar\x0000", b"ustar  \0", bytes(8)]),
    st.sampled_from([True] * 9 + [False]),
)
TARS = st.one_of(
    st.tuples(st.lists(MEMBERS, max_size=12).map(b"".join), CHANGES, st.floats(0, 1)),
    st.tuples(st.sampled_from([data for data, *_ in broken.bad_shards().values()]), CHANGES, st.floats(0.5, 1)),
).map(lambda parts: damage(*parts))
IMAGES = [data for data, _ in broken.bad_images().values() if 0 < len(data) < 20_000] + [
    broken.encode(broken.smooth_image(), format, **options)
    for format, options in [
        ("JPEG", {"progressive": True}),
        ("JPEG", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"}),
        ("PNG", {"interlace": 1}),
        ("WEBP", {"lossless": True}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("TIFF", {"compression": "jpeg"}),
        ("AVIF", {}),
        ("GIF", {"save_all": True, "append_images": [broken.smooth_image(seed=1)]}),
    ]
]
IMAGE_FILES = st.tuples(st.sampled_from(IMAGES), CHANGES, st.floats(0.3, 1) | st.just(1.0)).map(lambda p: damage(*p))


def check_damaged_tar(data: bytes, folder: Path) -> None:
    """The members of a damaged tar file are in order, and each sample is read from its bytes or is bad."""
    path = folder / "fuzzed.tar"
    path.write_bytes(data)
    try:
        found = list(tar_format.iter_members(io.BytesIO(data), str(path)))
    except UserError:
        return
    assert len(found) <= len(data) // 512
    offsets = [offset for _, offset, _ in found if offset != tar_format.SPARSE]
    assert offsets == sorted(set(offsets)) and all(512 <= offset for offset in offsets)
    assert all(0 <= size <= tar_format.MAX_MEMBER and len(name) <= tar_format.MAX_NAME for name, _, size in found)
    storage.open_file.cache_clear()
    try:
        source = webdataset.WebDataset(str(path))
    except UserError as error:
        assert "has an image" in str(error)
        return
    for i in range(len(source)):
        try:
            record = source[i]
        except images.BadSample:
            continue
        assert record["image"] in data and len(record["text"]) <= 1


def check_whole_tar(names: list[str], bodies: list[bytes], format: int) -> None:
    """The members of a tar file that `tarfile` wrote are where `tarfile` finds them."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format, encoding="utf-8", errors="surrogateescape") as tar:
        for name, body in zip(names, bodies):
            try:
                broken.add_member(tar, name, body)
            except ValueError:  # ustar has no room for long names
                pass
    file.seek(0)
    with tarfile.open(fileobj=file, encoding="utf-8", errors="surrogateescape") as tar:
        expected = [(m.name.rstrip("/"), m.offset_data, m.size) for m in tar if m.isreg()]
    found = [
        (name.decode(errors="surrogateescape").rstrip("/"), *rest) for name, *rest in tar_format.iter_members(file, "")
    ]
    assert found == expected  # except for trailing slashes, which tarfile removes from some names


def check_image(data: bytes) -> None:
    """An image file is bad, or decodes to uint8 RGB that can be cropped both ways."""
    try:
        image = images.decode(data)
    except images.BadSample as error:
        assert str(error)
        return
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    assert 0 < image.shape[0] * image.shape[1] <= images.MAX_PIXELS
    assert crops.random_resized_crop(image, 16, np.random.default_rng(0)).shape == (16, 16, 3)
    assert crops.resize_center_crop(image, 16, 18).shape == (16, 16, 3)


def check_captions_and_labels(text: bytes | None, fields: bytes | None, label: bytes | None) -> None:
    """Captions are strings and labels are whole numbers, or the sample is bad."""
    try:
        captions, labels = webdataset.parse_captions_and_labels(text, fields, label)
    except images.BadSample:
        return
    assert all(type(c) is str for c in captions) and all(type(c) is int for c in labels)


TEXT = st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), min_size=1, max_size=300)
NAMES = st.lists(TEXT, max_size=5)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["caption", "label", "labels"]), inner),
).map(lambda value: json.dumps(value).encode())


def properties(folder: Path, trying=contextlib.nullcontext) -> dict:
    """The properties to check, by name; each generates inputs and tries each of them within `trying(input)`.

    Args:
        folder: for the files that are read.
        trying: a function from an input to a context manager.
    """

    def damaged_tars(data):
        with trying(data):
            check_damaged_tar(data, folder)

    def whole_tars(names, bodies, format):
        check_whole_tar(names, bodies, format)

    def image_files(data):
        with trying(data):
            check_image(data)

    def captions_and_labels(text, fields, label):
        with trying(fields or b""):
            check_captions_and_labels(text, fields, label)

    formats = st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    any_bytes = st.none() | st.binary(max_size=30)
    return {
        "damaged tars": hypothesis.given(TARS)(damaged_tars),
        "whole tars": hypothesis.given(NAMES, st.lists(st.binary(max_size=1100), max_size=5), formats)(whole_tars),
        "images": hypothesis.given(IMAGE_FILES)(image_files),
        "captions and labels": hypothesis.given(any_bytes, any_bytes | JSON, any_bytes)(captions_and_labels),
    }


def run(seconds: float, seed: int, folder: Path) -> None:
    """Checks all properties in turn for some seconds of this process's CPU time."""
    logging.disable()
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.environ["HOME"] = str(folder / "home")
    images.MAX_PIXELS = MAX_PIXELS
    last, counts = folder / "last", {}

    @contextlib.contextmanager
    def trying(data: bytes):
        last.write_bytes(data)
        counts[name] += 1
        faulthandler.dump_traceback_later(HANG, exit=True)  # limits trying an input, not generating it
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()

    while time.process_time() < seconds:
        for name, check in properties(folder, trying).items():
            settings = hypothesis.settings(max_examples=1000, **SETTINGS)
            counts.setdefault(name, 0)
            hypothesis.seed(seed)(settings(check))()
            seed += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{time.process_time():.0f} s of CPU, {counts}, peak memory {peak:.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="of CPU time")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    parser.add_argument("--folder", type=Path, help="runs in this process, with files in this folder")
    arguments = parser.parse_args()
    if arguments.folder:
        return run(60 * arguments.minutes, arguments.seed, arguments.folder)
    folder = Path(tempfile.mkdtemp(prefix="fuzz"))
    command = [sys.executable, "-m", "tests.testing.fuzz", f"--minutes={arguments.minutes}", f"--seed={arguments.seed}"]
    command.append(f"--folder={folder}")
    if code := subprocess.run(command).returncode:
        sys.exit(f"ended with {code}; the last input is {folder / 'last'}")


if __name__ == "__main__":
    main()
