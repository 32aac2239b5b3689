"""Checkpoints with Orbax: saves train states, and restores them on any number of devices.

A train state is any object whose attributes (`vars(state)`) are pytrees of arrays, among them the scalar `step`. A
checkpoint has two items: `state`, the arrays, and `run`, JSON with a fingerprint of each attribute, the metrics of the
steps since the last report, and a hash of both. A checkpoint's step is what its `run` says, and its folder's name.
"""

import contextlib
import logging
import math
import os
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from zslflax import distributed
from zslflax.checkpoint_checks import (
    cause_of,
    check_fingerprints,
    check_structure,
    fingerprints,
    read_run_item,
    run_item,
)
from zslflax.errors import StorageError, UserError

log = logging.getLogger("zslflax")

Metrics = dict[str, Any]  # scalars by name

FOLDER = "checkpoints"  # in the workdir
CLOSE_SECONDS = 300.0  # that a run which fails waits for its last save


class CheckpointManager(ocp.CheckpointManager):
    """Orbax's manager, which also knows what of this run's saves has been found on the disk.

    Attributes:
        unproved: the step of the last save until `prove_save` has found it; None otherwise.
        samples: attributes that `prove_save` reads of the first save, a small part of it; none after that.
    """

    unproved: int | None = None
    samples: Sequence[str] | None = None


def check_path(workdir: str | Path) -> None:
    """Refuses a path with one of [, ] and \\: Orbax takes it for a pattern, saves there and can never restore.

    It also refuses one that is no text in UTF-8, as the letters of other languages are in Python's C locale: Orbax
    cannot write there.

    Raises:
        UserError: the path is such a one.
    """
    try:
        str(workdir).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"checkpoints cannot be saved in {os.fsencode(workdir)!r}, which is no text in UTF-8 here; set "
            "LC_ALL=C.UTF-8 or PYTHONUTF8=1, or choose another --workdir"
        ) from None
    if unsafe := sorted(set(str(Path(workdir).absolute())) & set("[]\\")):
        raise UserError(
            f"{workdir} has {' and '.join(unsafe)} in its path: checkpoints that are saved there cannot be read again; "
            "choose a --workdir without [, ] and \\"
        )


def create_manager(workdir: str | Path, best_metric: str = "") -> CheckpointManager:
    """A manager of the checkpoints in `workdir`/checkpoints, which saves in the background.

    It keeps the newest two, and the one with the highest value of `best_metric` if that is given.

    Raises:
        UserError: as `check_path`.
    """
    check_path(workdir)
    kept: list[Any] = [checkpoint_managers.LatestN(2)]
    best_fn = None
    if best_metric:
        # A checkpoint from before `best_metric` was changed lacks the metric.
        best_fn = lambda metrics: metrics.get(best_metric, -math.inf)
        kept.append(checkpoint_managers.BestN(get_metric_fn=best_fn, n=1, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept), best_fn=best_fn
    )
    return CheckpointManager((Path(workdir) / FOLDER).absolute(), options=options)


@contextlib.contextmanager
def open_manager(workdir: Path, best_metric: str = "") -> Iterator[CheckpointManager]:
    """A manager as `create_manager` returns it, closed at the end.

    If the block raises, an error of a save that is still in progress is logged and does not replace the block's error.
    Such a save is waited for, at most `CLOSE_SECONDS`.
    """
    manager = create_manager(workdir, best_metric)
    try:
        yield manager
    except BaseException as error:
        closing = threading.Thread(target=close_and_log, args=(manager, str(error)), name="zslflax-close", daemon=True)
        closing.start()
        closing.join(CLOSE_SECONDS)
        if closing.is_alive():
            log.error("the save in progress has not ended within %.0f s and is given up", CLOSE_SECONDS)
        raise
    close(manager)


def close_and_log(manager: CheckpointManager, known: str) -> None:
    """Closes the manager, and logs the error of a save in progress if its message is another than the known one."""
    try:
        close(manager)
    except Exception as error:
        if str(error) != known:
            log.error("%s", error)


def close(manager: CheckpointManager) -> None:
    """Waits for saves in progress and closes the manager. Raises a StorageError as `wait_until_finished`."""
    with save_errors(manager):
        manager.close()
    prove_save(manager)


def save(
    manager: CheckpointManager,
    state: Any,
    eval_metrics: Metrics | None = None,
    recent_metrics: Sequence[Metrics] = (),
) -> None:
    """Starts to save a state under its step. It replaces a checkpoint of the same step if it has been evaluated since.

    Args:
        manager: from `create_manager`.
        state: the train state.
        eval_metrics: metrics of the step, if the state was evaluated.
        recent_metrics: metrics of the steps since the last report, oldest first.

    Raises:
        StorageError: the previous save failed, or this one could not start.
    """
    wait_until_finished(manager)  # Orbax would wait as well
    step = int(state.step)
    if step in manager.all_steps():
        if not eval_metrics:
            return
        manager.delete(step)
    recent = [
        {name: value.item() for name, value in metrics.items()} for metrics in jax.device_get(list(recent_metrics))
    ]
    items = ocp.args.Composite(
        state=ocp.args.StandardSave(distributed.to_global(state)),
        run=ocp.args.JsonSave(run_item(fingerprints(vars(state)), recent)),
    )
    with save_errors(manager):
        if not manager.save(step, args=items, metrics=eval_metrics or None):
            raise OSError(f"step {step} is not saved where later steps are: {manager.all_steps()}")
    manager.unproved = step
    if manager.samples is None:
        manager.samples = small_attributes(state)


def small_attributes(state: Any) -> list[str]:
    """The step, and of the attributes that hold more than single numbers the smallest one."""
    sizes = {name: sum(x.size for x in jax.tree.leaves(tree)) for name, tree in vars(state).items()}
    larger = [name for name, tree in vars(state).items() if any(x.ndim for x in jax.tree.leaves(tree))]
    return ["step", *sorted(larger, key=lambda name: sizes[name])[:1]]


def check_for_errors(manager: CheckpointManager) -> None:
    """Raises a StorageError if a save in the background has failed or left nothing. Waits for no save.

    After the first save it reads a small part of it again.
    """
    with save_errors(manager):
        manager.check_for_errors()
    if not manager.is_saving_in_progress():
        prove_save(manager)


def wait_until_finished(manager: CheckpointManager) -> None:
    """Waits for saves in progress. Raises a StorageError if one of them failed or left nothing that can be read."""
    with save_errors(manager):
        manager.wait_until_finished()
    prove_save(manager)


def prove_save(manager: CheckpointManager) -> None:
    """Proves in the main process that the last save, which must be finished, is on the disk.

    Of the manager's first save some arrays are read as well. A place from which nothing can be restored, whatever the
    reason, ends the run there and not at the next start.

    Raises:
        StorageError: there is no such checkpoint, or its arrays cannot be read.
    """
    step, manager.unproved = manager.unproved, None
    if step is not None and distributed.is_main():
        check_saved(manager, step, manager.samples or ())
        manager.samples = ()


def check_saved(manager: CheckpointManager, step: int, names: Sequence[str] = ()) -> None:
    """Raises a StorageError if the checkpoint of a step is not on the disk, or attributes of it cannot be read."""
    folder = Path(manager.directory) / str(step)
    try:
        read_run_item(folder)
        if names:
            restore_parts(folder.parent.parent, step, names)
    except UserError as error:
        raise StorageError(
            f"step {step} was saved to {folder}, but cannot be read from there; is it on a file system that keeps what "
            f"is written, and does nothing else remove it? {error}"
        ) from error


@contextlib.contextmanager
def save_errors(manager: CheckpointManager) -> Iterator[None]:
    """Turns errors of a save into a StorageError that names the checkpoints that are complete."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # TensorStore raises ValueError for a full disk
        manager.unproved = None
        steps = ", ".join(map(str, complete_steps(Path(manager.directory).parent))) or "none"
        raise StorageError(
            f"a checkpoint could not be written to {manager.directory}: {cause_of(error)}. Complete are those of "
            f"steps: {steps}; when the cause is removed, the same command continues"
        ) from error


def complete_steps(workdir: str | Path) -> list[int]:
    """The steps of the complete checkpoints in a workdir, in ascending order, by the names of their folders.

    Orbax writes a checkpoint under another name and renames it when it is complete.
    """
    folder = Path(workdir) / FOLDER
    names = [entry.name for entry in folder.iterdir() if entry.is_dir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def restore(manager: CheckpointManager, like: Any, step: int | None = None) -> Any:
    """Restores a state, replicated over the devices, regardless of the number of devices and processes that saved it.

    Args:
        manager: from `create_manager`.
        like: a state with the same attributes, shapes and dtypes.
        step: of the checkpoint; the newest by default.

    Raises:
        MismatchError: the checkpoint has other arrays than `like`.
        UserError: the arrays are not those that were saved. Orbax raises other exceptions for other damage.
    """
    step = manager.latest_step() if step is None else step
    folder = Path(manager.directory) / str(step)
    check_structure(folder, like)
    sharding = distributed.replicated_sharding()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
    items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    state = distributed.to_local(manager.restore(step, args=items).state)
    check_fingerprints(vars(state), folder)
    return state


def restore_parts(workdir: str | Path, step: int, names: Sequence[str]) -> dict[str, Any]:
    """Some attributes of a saved state as NumPy arrays. The others are not read. Works on any number of devices.

    Args:
        workdir: the workdir of the run that saved the state.
        step: of the checkpoint.
        names: the attributes. An attribute without arrays is returned as {}.

    Raises:
        UserError: the checkpoint is damaged.
    """
    folder = (Path(workdir) / FOLDER / str(step)).absolute()
    try:
        # `ocp.Checkpointer` would log a warning, because an item's metadata is stored with the whole checkpoint's.
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            saved = handler.metadata(folder / "state").tree
            item = {name: saved[name] for name in names if name in saved}
            arguments = ocp.args.PyTreeRestore(
                item=item,
                partial_restore=True,
                restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item),
            )
            restored = handler.restore(folder / "state", args=arguments)
        check_fingerprints(restored, folder)
    except Exception as error:  # Orbax, TensorStore and their parsers raise many kinds
        raise UserError(f"the checkpoint {folder} cannot be read: {cause_of(error)}") from error
    return {name: restored.get(name, {}) for name in names}


def recent_metrics(workdir: str | Path, step: int) -> list[Metrics]:
    """The metrics of the steps since the last report that `save` was given: int32 and fp32 NumPy scalars."""
    scalar = lambda value: np.int32(value) if isinstance(value, int) else np.float32(value)
    saved = read_run_item(Path(workdir) / FOLDER / str(step))["recent_metrics"]
    return [{name: scalar(value) for name, value in metrics.items()} for metrics in saved]
