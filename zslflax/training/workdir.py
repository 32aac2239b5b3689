"""The folder of a run: whose it is, and that one run at a time writes to it."""

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

from zslflax import checkpoint, distributed
from zslflax.config import compare, from_json, to_json
from zslflax.errors import MissingFileError, UserError
from zslflax.files import write_text

log = logging.getLogger("zslflax")

# What changes neither the state nor the order of the samples.
HARMLESS = (
    *("eval.", "log_every", "checkpoint.", "data.threads", "data.workers", "compilation"),
    *("profile_steps", "model.image.remat", "model.text.remat"),
    *("data.max_bad_fraction", "optimizer.max_nonfinite_steps"),  # what a run may need that they have stopped
)


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Makes the workdir, and holds it for this run; the kernel gives it back however the process ends.

    Only the main process of several asks, for all. The lock is `flock`'s on workdir/lock: where a network
    file system does not pass it on (NFS before Linux 2.6.12, most mounts of buckets), two machines do not see
    each other's.

    Raises:
        ValueError: another process holds it.
    """
    with contextlib.ExitStack() as stack:
        held = not distributed.is_main() or hold(workdir, stack)
        if not distributed.all_hosts(held):
            raise UserError(
                f"another process is training in {workdir}; wait for it, stop it, or choose another --workdir"
            )
        yield


def hold(workdir: Path, stack: contextlib.ExitStack) -> bool:
    """Whether the lock could be had; it is held until the stack is left."""
    workdir.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context(open(workdir / "lock", "w"))
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def check_config(config, workdir: Path, changed: bool = False) -> None:
    """Refuses a workdir whose checkpoints are another config's, but for what is `HARMLESS`.

    The main process looks, the others hear of it: they all go on, or none.

    Args:
        changed: go on all the same, and say what differs.

    Raises:
        ValueError: names every field that differs, with both values.
    """
    differences = distributed.gather_json(compare_kept(config, workdir) if distributed.is_main() else [])[0]
    shown = "\n  ".join(differences)
    if differences and not changed:
        raise UserError(
            f"{workdir} holds a run of another config; choose another --workdir, take back the difference, or "
            f"say --changed to go on with it:\n  {shown}"
        )
    if differences:
        log.warning("%s goes on with another config:\n  %s", workdir, shown)


def write_config(config, workdir: Path) -> None:
    """Writes config.json, which says what the workdir's checkpoints are: not before they are known to fit it.

    Raises:
        FileNotFoundError: this process does not see what the main process writes.
    """
    path = workdir / "config.json"
    if distributed.is_main():
        write_text(path, to_json(config))
    distributed.all_hosts(True)  # it is written
    if not path.exists():
        raise MissingFileError(
            f"this process does not see {path}, which the main process has written; --workdir must be on a file system "
            "that all hosts share"
        )


def compare_kept(config, workdir: Path) -> list[str]:
    """The fields in which the config of the workdir's checkpoints, if there are any, is another one."""
    path = workdir / "config.json"
    if not (path.exists() and checkpoint.available(workdir)):
        return []
    now = from_json(to_json(config))  # lists within tuples come back as tuples
    return [
        f"{field}: {old!r} there, {new!r} now"
        for field, old, new in compare(from_json(path.read_text()), now)
        if not field.startswith(HARMLESS)
    ]
