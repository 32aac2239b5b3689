"""Checkpoints with Orbax: saves train states, and restores them on any number of devices.

A train state is any object whose attributes (`vars(state)`) are pytrees of arrays, among them the scalar `step`. A
checkpoint has two items: `state`, the arrays, and `run`, JSON with a fingerprint of each attribute, the metrics of the
steps since the last report, and a hash of both.
"""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from zslflax import distributed
from zslflax.checkpoint_checks import (
    MismatchError,
    check_fingerprints,
    check_structure,
    fingerprints,
    read_run_item,
    run_item,
)
from zslflax.errors import StorageError, UserError

log = logging.getLogger("zslflax")

Metrics = dict[str, Any]  # scalars by name

FOLDER, DAMAGED_FOLDER = "checkpoints", "damaged"  # in the workdir


def create_manager(workdir: str | Path, best_metric: str = "") -> ocp.CheckpointManager:
    """A manager of the checkpoints in `workdir`/checkpoints, which saves in the background.

    It keeps the newest two, and the one with the highest value of `best_metric` if that is given.

    Raises:
        UserError: the path has one of [, ] and \\: Orbax takes it for a pattern, saves and can never restore.
    """
    if unsafe := sorted(set(str(Path(workdir).absolute())) & set("[]\\")):
        raise UserError(
            f"{workdir} has {' and '.join(unsafe)} in its path: checkpoints that are saved there cannot be read again; "
            "choose a --workdir without [, ] and \\"
        )
    kept: list[Any] = [checkpoint_managers.LatestN(2)]
    best_fn = None
    if best_metric:
        # A checkpoint from before `best_metric` was changed lacks the metric.
        best_fn = lambda metrics: metrics.get(best_metric, -math.inf)
        kept.append(checkpoint_managers.BestN(get_metric_fn=best_fn, n=1, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept), best_fn=best_fn
    )
    return ocp.CheckpointManager((Path(workdir) / FOLDER).absolute(), options=options)


@contextlib.contextmanager
def open_manager(workdir: Path, best_metric: str = "") -> Iterator[ocp.CheckpointManager]:
    """A manager as `create_manager` returns it, closed at the end.

    If the block raises, an error of a save that is still in progress is logged and does not replace the block's error.
    """
    manager = create_manager(workdir, best_metric)
    try:
        yield manager
    except BaseException:
        try:
            close(manager)
        except Exception as error:
            log.error("%s", error)
        raise
    close(manager)


def close(manager: ocp.CheckpointManager) -> None:
    """Waits for saves in progress and closes the manager. Raises a StorageError if one of them failed."""
    with save_errors(manager):
        manager.close()


def save(
    manager: ocp.CheckpointManager,
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
        manager.save(step, args=items, metrics=eval_metrics or None)


def check_for_errors(manager: ocp.CheckpointManager) -> None:
    """Raises a StorageError if a save in the background has failed. Does not wait."""
    with save_errors(manager):
        manager.check_for_errors()


def wait_until_finished(manager: ocp.CheckpointManager) -> None:
    """Waits for saves in progress. Raises a StorageError if one of them failed."""
    with save_errors(manager):
        manager.wait_until_finished()


@contextlib.contextmanager
def save_errors(manager: ocp.CheckpointManager) -> Iterator[None]:
    """Turns errors of a save into a StorageError that names the checkpoints that are complete."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:  # TensorStore raises ValueError for a full disk
        steps = ", ".join(map(str, complete_steps(Path(manager.directory).parent))) or "none"
        raise StorageError(
            f"a checkpoint could not be written to {manager.directory}; complete are those of steps: "
            f"{steps}. {type(error).__name__}: {str(error)[:300]}"
        ) from error


def complete_steps(workdir: str | Path) -> list[int]:
    """The steps of the complete checkpoints in a workdir, in ascending order."""
    folder = Path(workdir) / FOLDER
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def restore(manager: ocp.CheckpointManager, like: Any, step: int | None = None) -> Any:
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


def restore_newest(manager: ocp.CheckpointManager, like: Any) -> Any:
    """Restores the newest checkpoint that can be read. Newer ones are damaged: they are logged and moved to damaged/.

    Raises:
        MismatchError: no checkpoint can be restored, because they have other arrays than `like`. Nothing is moved.
        UserError: no checkpoint can be restored, because of damage. Nothing is moved.
    """
    reasons: dict[int, str] = {}
    mismatch: MismatchError | None = None
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            state = restore(manager, like, step)
        except Exception as error:  # Orbax, TensorStore and their parsers raise many kinds
            reasons[step] = f"{type(error).__name__}: {str(error)[:300]}"
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


def move_damaged(manager: ocp.CheckpointManager, steps: Sequence[int], reasons: dict[int, str]) -> None:
    """Moves damaged checkpoints to the workdir's folder damaged/, so that their steps can be saved again."""
    if not steps:
        return
    folder = Path(manager.directory)
    for step in steps:
        target = folder.parent / DAMAGED_FOLDER / str(step)
        while target.exists():
            target = target.with_name(target.name + "+")
        reason = reasons.get(step, "another process cannot read it")
        log.error("the checkpoint %s is damaged, moved to %s, and not used: %s", folder / str(step), target, reason)
        distributed.wait_for_hosts()  # all processes have chosen the target
        if distributed.is_main():
            target.parent.mkdir(exist_ok=True)
            (folder / str(step)).rename(target)
    distributed.wait_for_hosts()
    manager.reload()


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
        raise UserError(f"the checkpoint {folder} cannot be read: {error}") from error
    return {name: restored.get(name, {}) for name in names}


def recent_metrics(workdir: str | Path, step: int) -> list[Metrics]:
    """The metrics of the steps since the last report that `save` was given: int32 and fp32 NumPy scalars."""
    scalar = lambda value: np.int32(value) if isinstance(value, int) else np.float32(value)
    saved = read_run_item(Path(workdir) / FOLDER / str(step))["recent_metrics"]
    return [{name: scalar(value) for name, value in metrics.items()} for metrics in saved]
