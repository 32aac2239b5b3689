"""The tar reader against the standard library's tarfile, and its errors for damaged files."""

import io
import struct
import tarfile

import pytest

from tests.testing.shards import samples, tar_header, write_tar
from zslflax.data.sources import tar_format
from zslflax.data.sources.webdataset import WebDataset
from zslflax.errors import UserError

NAMES = [
    "a.jpg",
    "./b.jpg",
    "folder.with.dots/" + "x" * 120 + "/c.jpg",
    "é" * 80 + ".jpg",
    "d" * 300 + ".jpg",
    "n" * 99 + ".jpg",
    "no-extension",
    ".hidden.jpg",
    "f/._e.jpg",
    "e.seg.JPG",
]
GOOD_MEMBER = tar_header(b"0", b"%011o\0" % 5) + b"hello".ljust(512, b"\0")


def list_members(data: bytes) -> list:
    return list(tar_format.iter_members(io.BytesIO(data), "x.tar"))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_where_tarfile_finds_them(tmp_path, format):
    fits = lambda name: format != tarfile.USTAR_FORMAT or max(map(len, name.encode().split(b"/"))) <= 100
    names = list(filter(fits, NAMES))
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=format) as tar:
        for i, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 300 * i, 1.5e9 + 0.25
            tar.addfile(info, io.BytesIO(bytes([i]) * info.size))
            link = tarfile.TarInfo("link.jpg")
            link.type, link.linkname, link.size = tarfile.LNKTYPE, "l" * 130 + "/path=", 700
            if format != tarfile.USTAR_FORMAT:
                tar.addfile(link)
            folder = tarfile.TarInfo("folder.jpg")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    found = [(name.decode(), offset, size) for name, offset, size in list_members(path.read_bytes())]
    assert found == expected and len(found) == len(names)


def test_old_headers_and_binary_sizes(tmp_path, monkeypatch):
    """Headers older than ustar, GNU headers with times in place of the prefix, and sizes in GNU's binary form."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "old.tar"
    write_tar(path, samples(range(3)), tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    for changes in ({257: bytes(8)}, {257: tarfile.GNU_MAGIC, 345: b"14371573000\0"}):
        for at, field in changes.items():
            data[at : at + len(field)] = field
        data[148:156] = b"%06o\0 " % tar_format.checksums(bytes(data[:512]))[0]
        path.write_bytes(data)
        records = list(WebDataset(str(path)))
        assert [record["text"] for record in records] == [(f"caption {i}",) for i in range(3)]
        assert [r["name"].rpartition(":")[2] for r in records] == ["00000", "00001", "00002"]
    assert tar_format.parse_number(tarfile.itn(9 << 33, 12, tarfile.GNU_FORMAT)) == 9 << 33
    assert tar_format.parse_number(tarfile.itn(7 << 30, 12, tarfile.GNU_FORMAT)) == 7 << 30


def test_checksums_agree_with_tarfile():
    info = tarfile.TarInfo("é" * 20)
    block = info.tobuf(tarfile.GNU_FORMAT)
    assert tar_format.checksums(block) == tarfile.calc_chksums(block)
    assert tar_format.parse_number(block[148:156]) in tar_format.checksums(block)


def test_a_long_name_belongs_to_the_next_member_of_any_kind():
    """K, a link's long target, may come in between; D is a folder in a GNU incremental backup."""
    long_name = tar_header(b"L", b"%011o\0" % 9) + b"long.jpg\0".ljust(512, b"\0")
    link_target = tar_header(b"K", b"%011o\0" % 7) + b"target\0".ljust(512, b"\0")
    folder = tar_header(b"D", b"%011o\0" % 5) + b"hello".ljust(512, b"\0")
    assert list_members(long_name + link_target + GOOD_MEMBER + bytes(1024)) == [(b"long.jpg", 2560, 5)]
    assert list_members(long_name + folder + GOOD_MEMBER + bytes(1024)) == [(b"0.jpg", 2560, 5)]


@pytest.mark.parametrize(
    "size",  # the last is beyond the positions that file systems accept
    [b"-0000000001\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\x81" + bytes(11),
     b"1_000".ljust(12, b"\0"), b"0o17        ", b"\x80\0\0\0" + struct.pack(">Q", 1 << 62)],
)  # fmt: skip
def test_impossible_sizes_are_damage(size):
    with pytest.raises(UserError, match="is damaged at byte 1024: .*; fetch it again"):
        list_members(GOOD_MEMBER + tar_header(b"0", size) + GOOD_MEMBER)


@pytest.mark.parametrize(
    "record",  # the last once caused an endless loop
    [b"0 path=a\n", b"-9 path=a\n", b"path=a\n", b" path=a\n", b"99 path=a\n", b"11 size=-1\n",
     b"5 path=a\n", b"3 size=\n", b"12 size=1_0\n",
     b"9999999999999999999999 size=1\n", b"27 size=9999999999999999999\n",
     b"10 path=a\nno-blank-in-twenty-bytes"],
)  # fmt: skip
def test_impossible_pax_records_are_damage(record):
    pax_header = tar_header(b"x", b"%011o\0" % len(record)) + record.ljust(512, b"\0")
    with pytest.raises(UserError, match="is damaged at byte 1024"):
        list_members(GOOD_MEMBER + pax_header + GOOD_MEMBER)


@pytest.mark.parametrize("kind", [b"x", b"L"])
def test_oversized_headers_and_names_are_damage_and_are_not_read(kind):
    class LimitedReads(io.BytesIO):
        def read(self, size):
            assert size <= tar_format.MAX_EXTENDED_HEADER
            return super().read(size)

    huge = tar_header(kind, b"%011o\0" % (1 << 32))
    with pytest.raises(UserError, match="a header of 4294967296 bytes"):
        list(tar_format.iter_members(LimitedReads(GOOD_MEMBER + huge), "x.tar"))
    name = tar_header(b"L", b"%011o\0" % 5120) + b"n" * 5120
    with pytest.raises(UserError, match="a name of 5120 bytes"):
        list_members(GOOD_MEMBER + name + GOOD_MEMBER)
