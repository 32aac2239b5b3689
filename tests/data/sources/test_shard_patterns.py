"""Patterns of shards: braces against a shell's expansion, globs, the home folder, and what is missing."""

import pytest

from tests.testing.shards import sample, write_tar
from zslflax.data.sources.shard_patterns import expand_braces, expand_patterns


@pytest.mark.parametrize(
    "pattern",
    ["{00..11}", "{8..11}", "{08..11}", "{3..1}", "{a,b}/x{1,2}", "x", "{0..1}{b,}", "{7..7}", "{0..11}", "{0..011}"],
)
def test_braces_expand_as_in_a_shell(pattern, require):
    assert expand_braces(pattern) == list(require("braceexpand").braceexpand(pattern))


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


def test_commands_and_empty_lists_are_refused():
    with pytest.raises(ValueError, match="is a command: shards are read in place"):
        expand_patterns("pipe:cat {0..3}.tar")
    with pytest.raises(ValueError, match="no shards are given"):
        expand_patterns([])
