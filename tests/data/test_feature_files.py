"""Features on disk: what was written is read again, in this process and in others, and damage is noticed."""

import multiprocessing
import os

import numpy as np
import pytest

from zslflax.data.feature_files import COMPUTED, FLOAT_TYPES, MISSING, UNREADABLE, RowFile, TextFile, open_folder
from zslflax.errors import StorageError

WIDTH = 6


def numbers(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)


def keys(count: int, seed: int = 0) -> list[bytes]:
    return [np.random.default_rng([seed, i]).bytes(16) for i in range(count)]


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_rows_are_read_as_they_were_written(tmp_path, dtype):
    values, rows = numbers(3), RowFile(tmp_path, 10, WIDTH, FLOAT_TYPES[dtype])
    rows.write(np.array([7, 0, 4]), values)
    rows.mark_unreadable(np.array([9]))
    again = RowFile(tmp_path, 10, WIDTH, FLOAT_TYPES[dtype])
    for opened in (rows, again):
        read, status = opened.read(np.array([4, 9, 7, 1]))
        assert status.tolist() == [COMPUTED, UNREADABLE, COMPUTED, MISSING]
        np.testing.assert_array_equal(read[[0, 2]], values[[2, 0]].astype(FLOAT_TYPES[dtype]).astype(np.float32))


def test_a_damaged_row_counts_as_missing(tmp_path):
    rows = RowFile(tmp_path, 4, WIDTH, np.float32)
    rows.write(np.arange(4), numbers(4))
    with open(tmp_path / "rows", "r+b") as file:
        file.seek(2 * WIDTH * 4 + 5)
        file.write(b"\xff")
    _, status = RowFile(tmp_path, 4, WIDTH, np.float32).read(np.arange(4))
    assert status.tolist() == [COMPUTED, COMPUTED, MISSING, COMPUTED]


def test_a_row_that_was_not_written_whole_counts_as_missing(tmp_path):
    """A kill between two writes leaves a row without its checksum, or both without the status."""
    rows = RowFile(tmp_path, 2, WIDTH, np.float32)
    rows.write(np.array([0]), numbers(1))
    (tmp_path / "checksums").write_bytes(bytes(8))
    assert RowFile(tmp_path, 2, WIDTH, np.float32).read(np.array([0]))[1].tolist() == [MISSING]
    rows.write(np.array([0]), numbers(1))
    (tmp_path / "status").write_bytes(bytes(2))
    assert RowFile(tmp_path, 2, WIDTH, np.float32).read(np.array([0]))[1].tolist() == [MISSING]


def test_a_row_in_the_place_of_another_counts_as_missing(tmp_path):
    rows = RowFile(tmp_path, 2, WIDTH, np.float32)
    rows.write(np.arange(2), np.stack([numbers(1)[0]] * 2))
    with open(tmp_path / "checksums", "r+b") as file:
        first = file.read(4)
        file.write(first)
    assert rows.read(np.arange(2))[1].tolist() == [COMPUTED, MISSING]


def test_numbers_that_a_type_cannot_hold_are_refused(tmp_path):
    rows = RowFile(tmp_path, 1, WIDTH, np.float16)
    with pytest.raises(ValueError, match="70000 is too large for float16 .*features.dtype to bfloat16"):
        rows.write(np.array([0]), np.full((1, WIDTH), 7e4, np.float32))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=f"{tmp_path}/file/images-.* cannot be written: .*; set features.folder"):
        open_folder(tmp_path / "file", "images", {})


def test_another_identity_has_another_folder(tmp_path):
    folders = {open_folder(tmp_path, "images", identity) for identity in ({"a": 1}, {"a": 2}, {"a": 1})}
    assert len(folders) == 2 and all((folder / "identity.json").exists() for folder in folders)


def write_rows(folder, start):
    rows = RowFile(folder, 64, WIDTH, np.float32)
    for number in range(start, 64):
        rows.write(np.array([number]), numbers(1, seed=number))


def write_texts(folder, seed):
    TextFile(folder, WIDTH, np.float32).add(keys(50, seed), numbers(50, seed))


def test_several_processes_write_the_same_files_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    jobs = [context.Process(target=write_rows, args=(tmp_path, start)) for start in (0, 10, 20)]
    jobs += [context.Process(target=write_texts, args=(tmp_path, seed)) for seed in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    values, status = RowFile(tmp_path, 64, WIDTH, np.float32).read(np.arange(64))
    assert (status == COMPUTED).all()
    np.testing.assert_array_equal(values, np.concatenate([numbers(1, seed=number) for number in range(64)]))
    texts = TextFile(tmp_path, WIDTH, np.float32)
    for seed in range(3):
        values, found = texts.find(keys(50, seed))
        assert found.all()
        np.testing.assert_array_equal(values, numbers(50, seed))


def test_texts_are_found_by_their_keys(tmp_path, monkeypatch):
    monkeypatch.setattr("zslflax.data.feature_files.RECENT_TEXTS", 100)
    texts = TextFile(tmp_path, WIDTH, np.float32)
    for seed in range(5):  # the third and the fifth addition sort the recent ones among the others
        texts.add(keys(60, seed), numbers(60, seed))
    for opened in (texts, TextFile(tmp_path, WIDTH, np.float32)):
        for seed in (4, 0, 2, 3, 1):
            values, found = opened.find(keys(60, seed))
            assert found.all()
            np.testing.assert_array_equal(values, numbers(60, seed))
        assert not opened.find(keys(5, seed=9))[1].any()
        assert opened.find([])[0].shape == (0, WIDTH)


def test_a_damaged_text_is_written_again_and_then_found(tmp_path):
    TextFile(tmp_path, WIDTH, np.float16).add(keys(3), numbers(3))
    (path,) = tmp_path.glob("*.rows")
    with open(path, "r+b") as file:
        file.seek(WIDTH * 2 + 1)
        file.write(b"\xff")
    texts = TextFile(tmp_path, WIDTH, np.float16)
    assert texts.find(keys(3))[1].tolist() == [True, False, True]
    texts.add(keys(3)[1:2], numbers(3)[1:2])
    values, found = TextFile(tmp_path, WIDTH, np.float16).find(keys(3))
    assert found.all()
    np.testing.assert_array_equal(values, numbers(3).astype(np.float16).astype(np.float32))


def test_the_end_of_a_segment_that_was_not_written_whole_is_ignored(tmp_path):
    texts = TextFile(tmp_path, WIDTH, np.float32)
    texts.add(keys(4), numbers(4))
    (path,) = tmp_path.glob("*.rows")
    os.truncate(path, 3 * WIDTH * 4 + 7)  # the last row is cut
    values, found = TextFile(tmp_path, WIDTH, np.float32).find(keys(4))
    assert found.tolist() == [True, True, True, False]
    np.testing.assert_array_equal(values[:3], numbers(4)[:3])
