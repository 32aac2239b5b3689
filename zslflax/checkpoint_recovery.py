"""What a run does with checkpoints that are damaged, copied, renamed or linked before it resumes."""

import errno
import functools
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zslflax import checkpoint, distributed
from zslflax.checkpoint import CheckpointManager
from zslflax.checkpoint_checks import MismatchError, MisplacedError, cause_of, read_run_item
from zslflax.errors import UserError
from zslflax.saving import storage_errors

log = logging.getLogger("zslflax")

DAMAGED_FOLDER = "damaged"  # in the workdir


def restore_newest(manager: CheckpointManager, like: Any) -> Any:
    """Restores the newest checkpoint that can be read. Newer ones are damaged: they are logged and moved to damaged/.

    A checkpoint that was renamed gets its name back, and a copy of another is moved to damaged/ as well.

    Raises:
        MismatchError: no checkpoint can be restored, because they have other arrays than `like`. Nothing is moved.
        UserError: no checkpoint can be restored, because of damage. Nothing is moved. Or one is a link.
        StorageError: a checkpoint cannot be moved.
    """
    distributed.on_main(lambda: put_in_place(Path(manager.directory)))
    manager.reload()
    reasons: dict[int, str] = {}
    mismatch: MismatchError | None = None
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            state = checkpoint.restore(manager, like, step)
        except Exception as error:  # Orbax, TensorStore and their parsers raise many kinds
            reasons[step] = cause_of(error)
            mismatch = error if mismatch is None and isinstance(error, MismatchError) else mismatch
        if distributed.all_hosts(step not in reasons):
            move_damaged(manager, [newer for newer in manager.all_steps() if newer > step], reasons)
            return state
    if mismatch is not None:
        raise mismatch
    described = "\n  ".join(f"{step}: {reason}" for step, reason in reasons.items())
    raise UserError(
        f"none of the checkpoints in {manager.directory} can be restored; nothing has been changed there. "
        f"Replace them by copies, or choose another --workdir:\n  {described}"
    )


def put_in_place(folder: Path) -> None:
    """Names each checkpoint in the folder after the step that it holds, or moves it to damaged/ if it is a copy.

    Under a higher number, Orbax would take it for the newest and save no step below that number.

    Raises:
        UserError: a checkpoint is a symbolic link, which Orbax cannot remove when it is too old.
        StorageError: a checkpoint cannot be moved.
    """
    for step in checkpoint.complete_steps(folder.parent):
        place = folder / str(step)
        if place.is_symlink():
            raise UserError(f"{place} is a symbolic link; replace it by the folder to which it leads, or remove it")
        try:
            read_run_item(place)
        except MisplacedError as error:
            held = folder / str(error.step)
            if not held.exists():
                move(place, held)
                log.warning("%s holds step %d and has been renamed to it", place, error.step)
            else:
                target = place_of_damaged(place)
                move(place, target)
                log.error("%s is a copy of step %d, moved to %s, and not used", place, error.step, target)
        except Exception:  # a damaged checkpoint, which is moved only if there is another to use instead
            continue


def move_damaged(manager: CheckpointManager, steps: Sequence[int], reasons: dict[int, str]) -> None:
    """Moves damaged checkpoints to the workdir's folder damaged/, so that their steps can be saved again.

    Raises:
        StorageError: a checkpoint cannot be moved.
    """
    if not steps:
        return
    for step in steps:
        place = Path(manager.directory) / str(step)
        target = place_of_damaged(place)
        reason = reasons.get(step, "another process cannot read it")
        log.error("the checkpoint %s is damaged, moved to %s, and not used: %s", place, target, reason)
        distributed.wait_for_hosts()  # all processes have chosen the target
        distributed.on_main(functools.partial(move, place, target))
    manager.reload()


def place_of_damaged(place: Path) -> Path:
    """A path in the workdir's folder damaged/ that does not exist, for a checkpoint."""
    target = place.parent.parent / DAMAGED_FOLDER / place.name
    while target.exists():
        target = target.with_name(target.name + "+")
    return target


def move(place: Path, target: Path) -> None:
    """Moves a checkpoint.

    Raises:
        StorageError: it cannot be moved.
    """
    with storage_errors(target):
        target.parent.mkdir(exist_ok=True)
        try:
            place.rename(target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            shutil.move(place, target)  # the folder of checkpoints may be a link to another file system
