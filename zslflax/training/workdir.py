"""The workdir of a run: locks it, checks that its checkpoints have the same config, and writes config.json."""

import contextlib
import fcntl
import logging
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from zslflax import checkpoint, distributed
from zslflax.config_json import compare, from_json, read_config, to_json
from zslflax.errors import MissingFileError, UserError
from zslflax.files import storage_errors, write_text

log = logging.getLogger("zslflax")

# Fields, or beginnings of fields, that a resumed run may change: they change neither the state nor the sample order.
CHANGEABLE = (
    *("eval.", "log_every", "checkpoint.", "data.threads", "data.workers", "compilation"),
    *("profile_steps", "model.image.remat", "model.text.remat"),
    # Thresholds that a stopped run may have to raise before it can continue.
    *("data.max_bad_fraction", "optimizer.max_nonfinite_steps", "data.request_timeout", "data.read_timeout"),
)


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Creates the workdir and locks it for this run. The kernel releases the lock when the process ends in any way.

    In a multi-process run the main process holds the lock for all. The lock is `flock` on workdir/lock. Some network
    file systems do not pass it on (NFS before Linux 2.6.12, most bucket mounts): there, two machines do not see each
    other's lock.

    Raises:
        UserError: another run holds the lock; in all processes.
        StorageError: the workdir cannot be created.
    """
    with contextlib.ExitStack() as stack:
        locked = not distributed.is_main() or acquire_lock(workdir, stack)
        if not distributed.all_hosts(locked):
            raise UserError(
                f"another process is training in {workdir}; wait for it, stop it, or choose another --workdir"
            )
        yield


def acquire_lock(workdir: Path, stack: contextlib.ExitStack) -> bool:
    """Locks the workdir until the stack is closed; returns False if another process holds the lock."""
    with storage_errors(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = stack.enter_context(open(workdir / "lock", "w"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def check_config(config: ConfigDict, workdir: Path, changed: bool = False) -> None:
    """Checks that the workdir's checkpoints, if there are any, were written with this config.

    The main process reads the workdir's config.json, and all processes come to its result.

    Args:
        config: the run's config.
        workdir: the run's folder.
        changed: log the differences instead of raising.

    Raises:
        UserError: a field differs that is not in `CHANGEABLE`, or config.json is of an older version. The message names
            the fields, with both values or with their current names.
    """
    differences, error = [], ""
    if distributed.is_main():
        try:
            differences = config_differences(config, workdir)
        except UserError as raised:
            error = str(raised)
    differences, error = distributed.gather_json([differences, error])[0]
    if error:
        raise UserError(error)
    described = "\n  ".join(differences)
    if differences and not changed:
        raise UserError(
            f"{workdir} holds a run of another config; choose another --workdir, undo the change, or say --changed to "
            f"resume with it:\n  {described}"
        )
    if differences:
        log.warning("%s resumes with another config:\n  %s", workdir, described)


def config_differences(config: ConfigDict, workdir: Path) -> list[str]:
    """Descriptions of the fields that differ from the config of the workdir's checkpoints."""
    path = workdir / "config.json"
    if not (path.exists() and checkpoint.complete_steps(workdir)):
        return []
    current = from_json(to_json(config))  # with tuples for lists, as read_config returns them
    return [
        f"{field}: {old!r} there, {new!r} now"
        for field, old, new in compare(read_config(path), current)
        if not field.startswith(CHANGEABLE)
    ]


def write_config(config: ConfigDict, workdir: Path) -> None:
    """Writes config.json, which describes the workdir's checkpoints. Call it when they are known to fit the config.

    Raises:
        StorageError: the file cannot be written.
        MissingFileError: this process does not see the file that the main process has written.
    """
    path = workdir / "config.json"
    if distributed.is_main():
        write_text(path, to_json(config))
    distributed.wait_for_hosts()
    if not path.exists():
        raise MissingFileError(
            f"this process does not see {path}, which the main process has written; --workdir must be on a file system "
            "that all hosts share"
        )
