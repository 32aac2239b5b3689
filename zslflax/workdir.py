"""The folder of a run: whose it is, and that one run at a time writes to it."""

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

from zslflax import checkpoint, parallel
from zslflax.config import compare, from_json, to_json

log = logging.getLogger("zslflax")

# What changes neither the state nor the order of the samples.
HARMLESS = ("eval.", "report_every", "checkpoint.", "data.threads", "data.workers", "compilation")


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Makes the workdir, and holds it for this run; the kernel gives it back however the process ends.

    Only the main process of several asks. The lock is `flock`'s on workdir/lock: where a network file system does not
    pass it on (NFS before Linux 2.6.12, most FUSE mounts of buckets), two machines do not see each other's.

    Raises:
        ValueError: another process holds it.
    """
    if not parallel.is_main():
        yield
        return
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process is training in {workdir}; wait for it, stop it, or choose another --workdir"
            ) from None
        yield


def prepare(config, workdir: Path, changed: bool = False) -> None:
    """Writes config.json; refuses a workdir whose checkpoints are another config's, except in what is `HARMLESS`.

    Args:
        changed: go on all the same, and say what differs.

    Raises:
        ValueError: names every field that differs, with both values.
    """
    path = workdir / "config.json"
    if path.exists() and checkpoint.available(workdir):
        differences = [
            f"{field}: {old!r} there, {new!r} now"
            for field, old, new in compare(from_json(path.read_text()), config)
            if not field.startswith(HARMLESS)
        ]
        shown = "\n  ".join(differences)
        if differences and not changed:
            raise ValueError(
                f"{workdir} holds a run of another config; choose another --workdir, take back the difference, or say "
                f"--changed to go on with it:\n  {shown}"
            )
        if differences:
            log.warning("%s goes on with another config:\n  %s", workdir, shown)
    if parallel.is_main():
        checkpoint.write_json(path, to_json(config))
