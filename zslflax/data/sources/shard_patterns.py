"""Expands patterns of shards: braces ("train/{00000..00331}.tar", "{a,b}.tar") and globs, local and remote."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from zslflax.data import storage
from zslflax.data.sources.tar_index import SUFFIX, raise_missing
from zslflax.errors import MissingFileError, UserError

BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d+)\.\.(\d+)")


def expand_patterns(patterns: str | Sequence[str]) -> list[str]:
    """The files that patterns with braces and globs match, in order. Whether remote files exist is not checked.

    Raises:
        MissingFileError: names the files that are missing.
        UserError: there is no pattern, a pattern is a command, or a glob is used where files cannot be listed.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise UserError("no shards are given: expected a pattern such as train/{00000..00331}.tar")
    paths = []
    for pattern in patterns:
        if pattern.startswith("pipe:"):
            raise UserError(f"{pattern} is a command: shards are read in place, by path or address")
        remote = storage.is_remote(pattern)
        for name in expand_braces(pattern if remote else str(Path(pattern).expanduser())):
            paths += expand_remote_glob(name) if remote else expand_local_glob(name)
    missing = [path for path in paths if not (storage.is_remote(path) or Path(path).is_file())]
    raise_missing(missing, len(paths))
    return paths


def expand_local_glob(name: str) -> list[str]:
    """The local files that a glob matches, sorted; a name without wildcards stands for itself."""
    if not any(c in name for c in "*?["):
        return [str(Path(name))]
    names = sorted(str(Path(n)) for n in glob.glob(name, recursive=True) if not n.endswith(SUFFIX))
    if not names:
        raise MissingFileError(f"no shard fits the pattern {name}")
    return names


def expand_remote_glob(name: str) -> list[str]:
    """The addresses that a glob matches, sorted; an address without wildcards stands for itself."""
    http = storage.is_http(name)
    if not any(c in name for c in ("*[" if http else "*?[")):  # in HTTP, ? begins a query
        return [name]
    if http:
        raise UserError(f"{name} is a glob, but files cannot be listed over HTTP: use braces, {{000..331}}")
    system, path = storage.open_file_system(name)
    names = sorted(n for n in storage.with_retries(name, lambda: system.glob(path)) if not n.endswith(SUFFIX))
    if not names:
        raise MissingFileError(f"no shard fits the pattern {name}")
    return [system.unstrip_protocol(n) for n in names]


def expand_braces(pattern: str) -> list[str]:
    """Replaces braces by each of their values, as a shell does; the rightmost braces vary fastest.

    >>> expand_braces("{a,b}-{08..10}.tar")
    ['a-08.tar', 'a-09.tar', 'a-10.tar', 'b-08.tar', 'b-09.tar', 'b-10.tar']
    """
    match = BRACES.search(pattern)
    if not match:
        return [pattern]
    values = match[1].split(",")
    if bounds := RANGE.fullmatch(match[1]):
        first, last = int(bounds[1]), int(bounds[2])
        width = max(map(len, bounds.groups())) if any(re.match("0.", b) for b in bounds.groups()) else 0
        step = 1 if first <= last else -1
        values = [f"{number:0{width}}" for number in range(first, last + step, step)]
    rest = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + value + tail for value in values for tail in rest]
