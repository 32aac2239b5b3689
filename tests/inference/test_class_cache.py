"""The cache of class embeddings: its keys, damaged files, its size limit, and concurrent use."""

import concurrent.futures
import os
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from zslflax.inference import class_cache
from zslflax.inference.class_cache import MIN_PROMPTS, ClassCache

NAMES = [f"thing {i}" for i in range(MIN_PROMPTS // 2)]
TEMPLATES = ["a photo of a {}.", "{}"]
MODEL = {"weights": "a1", "tokenizer": {"name": "WordPiece", "max_tokens": 12}}


@pytest.fixture
def cache(tmp_path):
    return ClassCache(tmp_path / "deep" / "classes", lambda: MODEL)


@pytest.fixture
def class_emb():
    return np.random.default_rng(0).standard_normal((len(NAMES), 5), np.float32)


def cached_files(cache) -> list:
    return sorted(cache.folder.iterdir()) if cache.folder.is_dir() else []


def test_embeddings_are_read_only_for_the_names_templates_and_model_they_were_written_for(cache, class_emb):
    assert cache.read(NAMES, TEMPLATES) is None
    cache.write(NAMES, TEMPLATES, class_emb)
    found = ClassCache(str(cache.folder), lambda: dict(MODEL)).read(tuple(NAMES), tuple(TEMPLATES))
    np.testing.assert_array_equal(found, class_emb)
    assert found.dtype == np.float32
    for names, templates in (
        (NAMES[::-1], TEMPLATES),
        (NAMES + ["one more"], TEMPLATES),
        ([*NAMES[:-1], "Thing 499"], TEMPLATES),
        (NAMES, TEMPLATES[::-1]),
        (NAMES, ["a photo of a {}", "{}"]),
    ):
        assert cache.read(names, templates) is None
    for model in (MODEL | {"weights": "a2"}, MODEL | {"tokenizer": {"name": "WordPiece", "max_tokens": 16}}):
        assert ClassCache(cache.folder, lambda model=model: model).read(NAMES, TEMPLATES) is None


def test_few_prompts_are_not_cached_and_the_model_is_not_identified(cache, class_emb):
    fails = ClassCache(cache.folder, lambda: pytest.fail("hashed"))
    fails.write(NAMES[:-1], TEMPLATES, class_emb[:-1])
    assert fails.read(NAMES[:-1], TEMPLATES) is None and cached_files(cache) == []
    nowhere = ClassCache()  # has no folder
    nowhere.write(NAMES, TEMPLATES, class_emb)
    assert nowhere.read(NAMES, TEMPLATES) is None


def truncate(path, class_emb):
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(path, class_emb):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def make_empty(path, class_emb):
    path.write_bytes(b"")


def replace_by_another_models_file(path, class_emb):
    other = ClassCache(path.parent, lambda: MODEL | {"weights": "a2"})
    other.write(NAMES, TEMPLATES, -class_emb)
    shutil.move(other.path(NAMES, TEMPLATES), path)


def replace_by_a_file_without_metadata(path, class_emb):
    save_file({"class_emb": -class_emb}, path)


def transpose(path, class_emb):
    header = f"[{len(NAMES)},5]", f"[5,{len(NAMES)}]"
    path.write_bytes(path.read_bytes().replace(*(text.encode() for text in header), 1))
    assert load_file(path)["class_emb"].shape == (5, len(NAMES))


def replace_by_a_folder(path, class_emb):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        flip_a_bit,
        make_empty,
        replace_by_another_models_file,
        replace_by_a_file_without_metadata,
        transpose,
        replace_by_a_folder,
    ],
)
def test_damaged_and_foreign_files_are_ignored_and_logged(cache, class_emb, caplog, damage):
    cache.write(NAMES, TEMPLATES, class_emb)
    (path,) = cached_files(cache)
    damage(path, class_emb)
    assert cache.read(NAMES, TEMPLATES) is None
    assert f"{path} cannot be used, and the class embeddings are computed again" in caplog.text
    if path.is_dir():
        path.rmdir()
    cache.write(NAMES, TEMPLATES, class_emb)
    np.testing.assert_array_equal(cache.read(NAMES, TEMPLATES), class_emb)


def test_a_folder_that_cannot_be_written_to_is_logged_and_disables_the_cache(tmp_path, class_emb, caplog):
    (tmp_path / "file").write_text("no folder")
    cache = ClassCache(tmp_path / "file", lambda: MODEL)
    cache.write(NAMES, TEMPLATES, class_emb)
    assert cache.read(NAMES, TEMPLATES) is None
    assert f"the class embeddings cannot be kept in {tmp_path / 'file'}" in caplog.text


def test_files_used_longest_ago_are_removed_and_foreign_files_stay(cache, class_emb, monkeypatch):
    cache.folder.mkdir(parents=True)
    (cache.folder / "mine.safetensors").write_bytes(bytes(1 << 20))
    paths, size = [], class_emb.nbytes + 1_000
    monkeypatch.setattr(class_cache, "MAX_BYTES", 3 * size)
    for i in range(3):
        cache.write(NAMES, [f"{i} {{}}", "{}"], class_emb)
        paths.append(cache.path(NAMES, [f"{i} {{}}", "{}"]))
        os.utime(paths[i], (1_000 + i, 1_000 + i))
    assert cache.read(NAMES, ["0 {}", "{}"]) is not None  # used again, so that 1 is now the oldest
    cache.write(NAMES, ["3 {}", "{}"], class_emb)
    assert [path.exists() for path in paths] == [True, False, True]
    assert (cache.folder / "mine.safetensors").exists() and len(cached_files(cache)) == 4
    monkeypatch.setattr(class_cache, "MAX_BYTES", 1)
    cache.write(NAMES, ["4 {}", "{}"], class_emb)
    assert cache.read(NAMES, ["4 {}", "{}"]) is not None and len(cached_files(cache)) == 2


def test_concurrent_writers_and_readers_get_whole_files(cache, class_emb):
    def use(number):
        cache.write(NAMES, TEMPLATES, class_emb)
        return cache.read(NAMES, TEMPLATES)

    with concurrent.futures.ThreadPoolExecutor(8) as threads:
        for found in threads.map(use, range(40)):
            np.testing.assert_array_equal(found, class_emb)
    assert cached_files(cache) == [cache.path(NAMES, TEMPLATES)]
