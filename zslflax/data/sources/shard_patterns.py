"""Expands patterns of shards: braces ("train/{00000..00331}.tar", "{a,b}.tar") and globs, local and remote."""

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from zslflax.data.addresses import hide_credentials, is_http, is_remote, without_credentials
from zslflax.data.remote_files import open_file_system
from zslflax.data.retries import DEFAULT_LIMITS, ReadLimits, with_retries
from zslflax.data.sources.tar_index import SUFFIX, raise_missing
from zslflax.errors import MissingFileError, UserError
from zslflax.files import expand_user

RANGE = re.compile(r"(\d+)\.\.(\d+)")
MAX_SHARDS = 1_000_000  # of one pattern
SEPARATOR = "::"  # between patterns, webdataset's


def expand_patterns(patterns: str | Sequence[str], limits: ReadLimits = DEFAULT_LIMITS) -> list[str]:
    """The files that patterns with braces and globs match, in order. Whether remote files exist is not checked.

    A pattern may be several with "::" between them, as in webdataset. A local name that exists stands for itself,
    whatever brackets it has.

    Raises:
        MissingFileError: names the files that are missing.
        UserError: there is no pattern, a pattern is a command or stands for more than `MAX_SHARDS` files, a folder is
            given, or a glob is used where files cannot be listed.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise UserError("no shards are given: expected a pattern such as train/{00000..00331}.tar")
    paths = []
    for pattern in itertools.chain.from_iterable(map(split_pattern, patterns)):
        if pattern.startswith("pipe:"):
            raise UserError(f"{pattern} is a command: shards are read in place, by path or address")
        if is_remote(pattern):
            for name in expand_braces(pattern):
                paths += expand_remote_glob(name, limits)
        else:
            local = str(expand_user(pattern))
            for name in [local] if os.path.exists(local) else expand_braces(local):
                paths += expand_local_glob(name)
    missing = [path for path in paths if not (is_remote(path) or Path(path).is_file())]
    for path in missing:
        raise_unusable(path)
    raise_missing(missing, len(paths))
    return paths


def split_pattern(pattern: str) -> list[str]:
    """The patterns in "A::B"; an address of fsspec that names a cache, such as "simplecache::s3://…", is one.

    >>> split_pattern("a/{0..9}.tar::b/{0..9}.tar"), split_pattern("simplecache::s3://bucket/0.tar")
    (['a/{0..9}.tar', 'b/{0..9}.tar'], ['simplecache::s3://bucket/0.tar'])
    """
    if pattern.startswith("pipe:"):
        return [pattern]
    parts = pattern.split(SEPARATOR)
    if is_remote(pattern) and any(part.isidentifier() for part in parts[:-1]):
        return [pattern]
    if "" in parts:
        raise UserError(f"{hide_credentials(pattern)!r} has an empty pattern beside {SEPARATOR}")
    return parts


def raise_unusable(path: str) -> None:
    """Raises a UserError if there is something at a path that is not a file."""
    if os.path.isdir(path):
        raise UserError(f"{path} is a folder, expected tar files: give its shards, such as '{path}/*.tar'")
    if os.path.exists(path):
        raise UserError(f"{path} is a pipe or a device, which cannot be read in place: copy it into a file")


def expand_local_glob(name: str) -> list[str]:
    """The local files that a glob matches, sorted; a name without wildcards stands for itself.

    Where links lead to a folder in several ways, "**" finds its files once.
    """
    if not any(c in name for c in "*?[") or os.path.exists(name):
        return [str(Path(name))]
    names = sorted(str(Path(n)) for n in iter_glob(escape_existing(name)) if not n.endswith(SUFFIX))
    if not names:
        raise MissingFileError(f"no shard fits the pattern {name}")
    return names


def iter_glob(pattern: str) -> Iterator[str]:
    """Yields the paths that fit a glob, where "**" stands for any folders below.

    Each folder is visited once, by its shortest path: links can lead to it in many ways, and in circles without end.
    """
    before, found, after = (
        re.split(r"((?:^|/)\*\*(?:/|$))", pattern, maxsplit=1) if "**" in pattern else (pattern, "", "")
    )
    if not found:
        yield from glob.glob(pattern)
        return
    seen: set[tuple[int, int]] = set()
    folders = sorted(glob.glob(before + "/") if before else ["/" if found.startswith("/") else "."])
    while folders:
        below = []
        for folder in folders:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            yield from iter_glob(os.path.join(glob.escape(folder), after or "*"))
            with os.scandir(folder) as entries:
                below += [e.path for e in entries if not e.name.startswith(".") and e.is_dir()]
        folders = sorted(below)


def escape_existing(pattern: str) -> str:
    """A glob in which folders that exist stand for themselves: "dir [v2]/*.tar" looks into the folder "dir [v2]"."""
    escaped, literal = "", ""
    for part in re.split("(/)", pattern):
        if part != "/" and glob.has_magic(part) and os.path.isdir(literal + part):
            escaped += glob.escape(part)
        else:
            escaped += part
        literal += part
    return escaped


def expand_remote_glob(name: str, limits: ReadLimits) -> list[str]:
    """The addresses that a glob matches, sorted; an address without wildcards stands for itself."""
    http = is_http(name)
    if not any(c in name for c in ("*[" if http else "*?[")):  # in HTTP, ? begins a query
        return [name]
    shown = without_credentials(name)
    if http:
        raise UserError(f"{shown} is a glob, but files cannot be listed over HTTP: use braces, {{000..331}}")
    system, path = open_file_system(name)
    listed = with_retries(name, lambda: system.glob(path), limits)
    names = sorted(n for n in listed if not n.endswith(SUFFIX))
    if not names:
        raise MissingFileError(f"no shard fits the pattern {shown}")
    return [system.unstrip_protocol(n) for n in names]


def expand_braces(pattern: str) -> list[str]:
    """Replaces braces by each of their values, as a shell does; the rightmost braces vary fastest.

    >>> expand_braces("{a,b}-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar', 'b-09.tar', 'b-10.tar']
    >>> expand_braces("{a-{0..1},b}.tar")
    ['a-0.tar', 'a-1.tar', 'b.tar']

    Raises:
        UserError: there are more than `MAX_SHARDS` combinations.
    """
    total = count_combinations(pattern)
    if total > MAX_SHARDS:
        raise UserError(
            f"{hide_credentials(pattern)} stands for {total:,} shards, more than the {MAX_SHARDS:,} allowed; give "
            f"several patterns, with {SEPARATOR} between them or as a tuple, if the braces were not to be combined"
        )
    return combine_braces(pattern)


def combine_braces(pattern: str) -> list[str]:
    """All combinations of the values of a pattern's braces."""
    before, content, after = split_at_braces(pattern)
    if content is None:
        return [pattern]
    if bounds := RANGE.fullmatch(content):
        first, last = int(bounds[1]), int(bounds[2])
        width = max(map(len, bounds.groups())) if any(re.match("0.", b) for b in bounds.groups()) else 0
        step = 1 if first <= last else -1
        values = [f"{number:0{width}}" for number in range(first, last + step, step)]
    else:
        values = [value for part in split_at_commas(content) for value in combine_braces(part)]
    tails = combine_braces(after)
    return [before + value + tail for value in values for tail in tails]


def count_combinations(pattern: str) -> int:
    """How many values `combine_braces` returns."""
    _, content, after = split_at_braces(pattern)
    if content is None:
        return 1
    if bounds := RANGE.fullmatch(content):
        return (abs(int(bounds[2]) - int(bounds[1])) + 1) * count_combinations(after)
    return sum(map(count_combinations, split_at_commas(content))) * count_combinations(after)


def split_at_braces(pattern: str) -> tuple[str, str | None, str]:
    """What is before, in and after the first pair of braces, in which there may be others; None if there is none."""
    for start in (match.start() for match in re.finditer("{", pattern)):
        depth = 0
        for end in (match.start() for match in re.finditer("[{}]", pattern[start:])):
            depth += 1 if pattern[start + end] == "{" else -1
            if depth == 0:
                return pattern[:start], pattern[start + 1 : start + end], pattern[start + end + 1 :]
    return pattern, None, ""


def split_at_commas(content: str) -> list[str]:
    """The parts between those commas that are not in braces.

    >>> split_at_commas("a,b{c,d}")
    ['a', 'b{c,d}']
    """
    parts, depth = [""], 0
    for character in content:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts
