"""Faults of a machine that tests can make: a user without permissions, a full disk."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

NOBODY = 65534  # the user and group that owns nothing


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Acts as a user who may not write what others own, where the tests run as root."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def give_to_nobody(folder: Path) -> None:
    """Makes the user of `as_nobody` the owner of a folder and of all that is in it, where the tests run as root."""
    if os.geteuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mounts a file system of a size, such as "1m", at a folder. Skips the test where that is not permitted."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"mount is not permitted: {mounted.stderr.decode()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
