"""The workdir of a run: locks it, checks that its checkpoints have the same config and data, and describes these."""

import contextlib
import errno
import fcntl
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from zslflax import checkpoint, distributed
from zslflax.config_json import compare, from_json, read_config, to_json
from zslflax.data.addresses import hide_credentials
from zslflax.data.sources.base import Source, hash_values
from zslflax.data.sources.recaptioned import Recaptioned
from zslflax.data.sources.subset import Subset, whole_source
from zslflax.data.sources.webdataset import WebDataset
from zslflax.errors import MissingFileError, UserError
from zslflax.files import read_json
from zslflax.saving import storage_errors, write_json, write_text

log = logging.getLogger("zslflax")

DATA_FILE = "data.json"
MAX_NAMED = 3  # shards in a message
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # of a file system without `flock`

# Fields, or beginnings of fields, that a resumed run may change: they change neither the state nor the sample order.
CHANGEABLE = (
    *("eval.", "log_every", "wandb", "checkpoint.", "data.threads", "data.workers", "compilation"),
    *("profile_steps", "model.image.remat", "model.text.remat"),
    # Thresholds that a stopped run may have to raise before it can continue.
    *("data.max_bad_fraction", "optimizer.max_nonfinite_steps", "data.request_timeout", "data.read_timeout"),
)
# Fields that say where the data is. `check_data` compares what is there, where an earlier start has described it.
DATA_PLACES = ("data.train", "data.exclude", "data.tfds_dir", "data.shapes.root")


@contextlib.contextmanager
def lock_workdir(workdir: Path) -> Iterator[None]:
    """Creates the workdir and locks it for this run. The kernel releases the lock when the process ends in any way.

    In a multi-process run the main process holds the lock for all. The lock is `flock` on workdir/lock. Some network
    file systems do not pass it on (NFS before Linux 2.6.12, most bucket mounts): there, two machines do not see each
    other's lock. A file system that has no locks at all is used with a warning.

    Raises:
        UserError: another run holds the lock; in all processes.
        StorageError: the workdir cannot be created or written; in all processes as a UserError.
    """
    with contextlib.ExitStack() as stack:
        if not distributed.on_main(lambda: acquire_lock(workdir, stack)):
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
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning(
                "the file system of %s has no locks (%s): a second run in it would not be noticed", workdir, error
            )
    return True


def check_writable(workdir: Path) -> None:
    """Creates the folder of checkpoints, and raises a StorageError in all processes if it cannot be written or read."""
    distributed.on_main(lambda: probe_folder(workdir / checkpoint.FOLDER))


def probe_folder(folder: Path) -> None:
    """Raises a StorageError if a folder cannot be made, written or read."""
    with storage_errors(folder):
        folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writable-", dir=folder):
            next(folder.iterdir())


def check_config(config: ConfigDict, workdir: Path, changed: bool = False) -> None:
    """Checks that the workdir's checkpoints, if there are any, were written with this config.

    The main process reads the workdir's config.json, and all processes come to its result.

    Args:
        config: the run's config.
        workdir: the run's folder.
        changed: log the differences instead of raising.

    Raises:
        UserError: a field differs that a resumed run may not change, or config.json is of an older version. The message
            names the fields, with both values or with their current names.
    """
    refuse_differences("config", lambda: config_differences(config, workdir), workdir, changed)


def check_data(specs: Sequence[str], sources: Sequence[Source], workdir: Path, changed: bool = False) -> None:
    """Checks that the workdir's checkpoints, if there are any, were trained on this data.

    Args:
        specs: of the training sources, as in the config.
        sources: these sources.
        workdir: the run's folder.
        changed: log the differences instead of raising.

    Raises:
        UserError: a source has other files, sizes, numbers of samples or contents than workdir/data.json says.
    """
    refuse_differences("data", lambda: data_differences(describe_data(specs, sources), workdir), workdir, changed)


def refuse_differences(what: str, find: Callable[[], list[str]], workdir: Path, changed: bool) -> None:
    """Raises a UserError in all processes if the main process finds differences, or logs them if `changed`.

    Args:
        what: differs, for the message.
        find: describes the differences; it is called in the main process.
        workdir: the run's folder.
        changed: whether the user has allowed differences.
    """
    differences = distributed.on_main(find)
    described = "\n  ".join(differences)
    if differences and not changed:
        raise UserError(
            f"{workdir} holds a run of another {what}; choose another --workdir, undo the change, or say --changed to "
            f"resume with it:\n  {described}"
        )
    if differences:
        log.warning("%s resumes with another %s:\n  %s", workdir, what, described)


def config_differences(config: ConfigDict, workdir: Path) -> list[str]:
    """Descriptions of the fields that differ from the config of the workdir's checkpoints."""
    path = workdir / "config.json"
    if not (path.exists() and checkpoint.complete_steps(workdir)):
        return []
    current, before = from_json(to_json(config)), read_config(path)  # both with tuples for lists
    changeable = CHANGEABLE + (DATA_PLACES if (workdir / DATA_FILE).exists() else ())
    if config.steps > before.steps:
        log.info(
            "the run is now %d steps long instead of %d; the learning rate follows the cosine of the longer run",
            config.steps,
            before.steps,
        )
        before.steps = config.steps
    return [
        hide_credentials(f"{field}: {old!r} there, {new!r} now")
        for field, old, new in compare(before, current)
        if not field.startswith(changeable)
    ]


def describe_data(specs: Sequence[str], sources: Sequence[Source]) -> list[dict[str, Any]]:
    """What data.json says of each training source: `source`, `samples`, `digest`, and `files` where it has shards.

    Each of the `files` is [name, bytes, samples, digest of what is in it].
    """
    described = []
    for spec, source in zip(specs, sources, strict=True):
        entry: dict[str, Any] = {"source": hide_credentials(spec), "samples": len(source)}
        whole = whole_source(source)
        if isinstance(whole, WebDataset):
            entry["files"] = [list(file) for file in whole.files()]
            kept = source.indices.tolist() if isinstance(source, Subset) else None
            entry["digest"] = hash_values(entry["files"], kept)
        else:
            entry["digest"] = source.fingerprint()
        if isinstance(whole, Recaptioned):
            entry["digest"] = hash_values(entry["digest"], whole.captions)
        described.append(entry)
    return described


def data_differences(current: list[dict[str, Any]], workdir: Path) -> list[str]:
    """Descriptions of how the training data differs from that of the workdir's checkpoints."""
    path = workdir / DATA_FILE
    if not (path.exists() and checkpoint.complete_steps(workdir)):
        return []
    before = read_json(path, list)
    if len(before) != len(current):
        return [f"{len(before)} sources there, {len(current)} now"]
    differences = []
    for old, new in zip(before, current):
        if not is_data_entry(old):
            raise UserError(
                f"{path} is damaged: expected an object for each source, with files as lists; remove it to train on "
                "this data"
            )
        if old.get("digest") == new["digest"]:
            continue
        name = (
            new["source"]
            if old.get("source") in (None, new["source"])
            else f"{old['source']} there, {new['source']} now"
        )
        differences.append(f"{name}: {old.get('samples')} samples there, {new['samples']} now")
        if old.get("samples") == new["samples"] and not old.get("files"):
            differences[-1] += ", with other contents"
        files = [{f[0]: f[1:] for f in entry.get("files") or ()} for entry in (old, new)]
        for reason, names in (
            ("missing", files[0].keys() - files[1].keys()),
            ("new", files[1].keys() - files[0].keys()),
            ("other content", {name for name in files[0].keys() & files[1].keys() if files[0][name] != files[1][name]}),
        ):
            if names:
                shown = ", ".join(sorted(names)[:MAX_NAMED]) + (", …" if len(names) > MAX_NAMED else "")
                differences[-1] += f"; {reason}: {len(names)} shards ({shown})"
    return differences


def is_data_entry(entry: Any) -> bool:
    """Whether an entry of data.json has the form that `describe_data` gives it, as far as differences are described."""
    if not isinstance(entry, dict):
        return False
    files = entry.get("files", [])
    return isinstance(files, list) and all(isinstance(file, list) and file and type(file[0]) is str for file in files)


def write_data(specs: Sequence[str], sources: Sequence[Source], workdir: Path) -> None:
    """Writes data.json, which describes the data of the workdir's checkpoints. Call it after `check_data`.

    Raises:
        StorageError: the file cannot be written.
    """
    if distributed.is_main():
        write_json(workdir / DATA_FILE, describe_data(specs, sources))


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
