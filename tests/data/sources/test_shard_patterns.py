"""Patterns of shards: braces against a shell's expansion, globs, the home folder, and what is missing."""

import os
import subprocess

import pytest

from tests.testing.shards import sample, write_tar
from zslflax.data.sources.shard_patterns import expand_braces, expand_patterns


@pytest.mark.parametrize(
    "pattern",
    ["{00..11}", "{8..11}", "{08..11}", "{3..1}", "{a,b}/x{1,2}", "x", "{0..1}{b,}", "{7..7}", "{0..11}", "{0..011}"],
)
def test_braces_expand_as_in_a_shell(pattern, require):
    assert expand_braces(pattern) == list(require("braceexpand").braceexpand(pattern))


@pytest.mark.parametrize(
    "pattern", ["{a,{0..2}}", "{a-{0..1},b}.tar", "x{0..1}{a,b{c,d}}y", "a{b/{0..1}", "{a,{b,{c,d}}}z", "}{"]
)
def test_braces_in_braces_expand_as_in_bash(pattern):
    expanded = subprocess.run(["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True)
    assert expand_braces(pattern) == expanded.stdout.splitlines()


def test_globs_braces_and_lists(tmp_path):
    for name in ("a-00.tar", "a-01.tar", "b/c.tar"):
        write_tar(tmp_path / name, sample(1))
    (tmp_path / "a-00.tar.index.npz").touch()  # an index matches the glob, but is not a shard
    names = lambda patterns: [path.removeprefix(f"{tmp_path}/") for path in expand_patterns(patterns)]
    assert names(f"{tmp_path}/a-*") == ["a-00.tar", "a-01.tar"]
    assert names(f"{tmp_path}/**/*.tar") == ["a-00.tar", "a-01.tar", "b/c.tar"]
    patterns = [f"{tmp_path}/b/?.tar", f"{tmp_path}/a-{{01,00}}.tar"]
    assert names(patterns) == ["b/c.tar", "a-01.tar", "a-00.tar"]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write_tar(tmp_path / "a.tar", sample(1))
    assert expand_patterns("~/a.tar") == [path]


def test_missing_shards_are_named(tmp_path):
    write_tar(tmp_path / "0.tar", sample(1))
    with pytest.raises(FileNotFoundError, match=r"2 of 3 shards are missing:\n  .*/1.tar\n  .*/2.tar$"):
        expand_patterns(f"{tmp_path}/{{0..2}}.tar")
    with pytest.raises(FileNotFoundError, match=r"9 of 9 (.|\n)*4.tar\n  …\nthere is no folder .*/nowhere"):
        expand_patterns(f"{tmp_path}/nowhere/{{0..8}}.tar")
    with pytest.raises(FileNotFoundError, match="no shard fits the pattern .*x-"):
        expand_patterns(f"{tmp_path}/x-*.tar")


def test_a_name_that_is_missing_is_told_its_neighbours(tmp_path):
    (tmp_path / "a_photos").mkdir()
    with pytest.raises(FileNotFoundError, match="there is no file or folder .*/a_photo; nearest there: a_photos$"):
        expand_patterns(f"{tmp_path}/a_photo")
    with pytest.raises(FileNotFoundError, match="there is no file or folder .*/zebra$"):
        expand_patterns(f"{tmp_path}/zebra")


def test_folders_with_brackets_and_braces_in_their_names(tmp_path):
    for name in ("dir [v2]/a.tar", "dir [v2]/b.tar", "{0..1}.tar", "c[1].tar", "c1.tar"):
        write_tar(tmp_path / name, sample(1))
    names = lambda pattern: [path.removeprefix(f"{tmp_path}/") for path in expand_patterns(f"{tmp_path}/{pattern}")]
    assert names("dir [v2]/*.tar") == names("dir [v2]/{a,b}.tar") == ["dir [v2]/a.tar", "dir [v2]/b.tar"]
    assert names("dir [v2]/a.tar") == ["dir [v2]/a.tar"] and names("dir*/[b].tar") == ["dir [v2]/b.tar"]
    assert names("{0..1}.tar") == ["{0..1}.tar"]  # there is a file of this name
    assert names("c[1].tar") == ["c[1].tar"] and names("c[12].tar") == ["c1.tar"]


def test_links_to_folders_do_not_multiply_shards(tmp_path):
    for name in ("a.tar", "b/c.tar"):
        write_tar(tmp_path / name, sample(1))
    (tmp_path / "here").symlink_to(".")
    (tmp_path / "b" / "up").symlink_to("..")
    assert expand_patterns(f"{tmp_path}/**/*.tar") == [f"{tmp_path}/a.tar", f"{tmp_path}/b/c.tar"]


def test_colons_separate_patterns(tmp_path):
    for name in ("a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"):
        write_tar(tmp_path / name, sample(1))
    pattern = f"{tmp_path}/a/{{0..1}}.tar::{tmp_path}/b/{{0..1}}.tar"
    assert expand_patterns(pattern) == [f"{tmp_path}/{name}.tar" for name in ("a/0", "a/1", "b/0", "b/1")]
    wide = "https://a.org/{0..9999}.tar::https://a.org/x{0..9999}.tar"
    assert len(expand_patterns(wide)) == 20_000
    with pytest.raises(
        ValueError, match="stands for 100,000,000 shards, more than the 1,000,000 allowed; give several"
    ):
        expand_patterns("https://a.org/{0..9999}/{0..9999}.tar")
    with pytest.raises(ValueError, match="has an empty pattern beside ::"):
        expand_patterns("a.tar::")
    assert expand_patterns("simplecache::s3://bucket/0.tar") == ["simplecache::s3://bucket/0.tar"]


def test_folders_and_pipes_are_told_from_missing_files(tmp_path):
    (tmp_path / "shards").mkdir()
    os.mkfifo(tmp_path / "pipe.tar")
    with pytest.raises(
        ValueError, match="shards is a folder, expected tar files: give its shards, such as '.*/shards/"
    ):
        expand_patterns(f"{tmp_path}/shards")
    with pytest.raises(ValueError, match="pipe.tar is a pipe or a device"):
        expand_patterns(f"{tmp_path}/pipe.tar")


def test_commands_and_empty_lists_are_refused():
    with pytest.raises(ValueError, match="is a command: shards are read in place"):
        expand_patterns("pipe:cat {0..3}.tar")
    with pytest.raises(ValueError, match="no shards are given"):
        expand_patterns([])
