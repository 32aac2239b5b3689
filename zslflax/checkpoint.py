"""Orbax: save, resume, and restore the parameters alone.

A checkpoint has two items: `state`, the arrays, and `run`, JSON with a fingerprint of each of the state's
attributes and the metrics of the steps since the last report. Orbax notices damage to its own tables, but not
every flipped bit of the arrays (0.12.8: zstd frames without checksums); the fingerprints do.
"""

import contextlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from zslflax import distributed
from zslflax.errors import StorageError, UserError

log = logging.getLogger("zslflax")

FOLDER, SET_ASIDE = "checkpoints", "damaged"


def manager(workdir: str | Path, best: str = "", read_only: bool = False) -> ocp.CheckpointManager:
    """The manager of `workdir`/checkpoints: asynchronous; keeps the newest two, and the best by the metric `best`."""
    kept = [checkpoint_managers.LatestN(2)]
    best_fn = None
    if best:
        best_fn = lambda metrics: metrics.get(best, -math.inf)  # older ones lack it where `best` was another
        kept.append(checkpoint_managers.BestN(get_metric_fn=best_fn, n=1, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept),
        best_fn=best_fn,
        create=not read_only,
        read_only=read_only,
        enable_async_checkpointing=not read_only,
    )
    return ocp.CheckpointManager((Path(workdir) / FOLDER).absolute(), options=options)


@contextlib.contextmanager
def open_manager(workdir: Path, best: str = ""):
    """The `manager`, closed at the end; an error that ends the run is not replaced by one of a save that fails then."""
    checkpoints = manager(workdir, best)
    try:
        yield checkpoints
    except BaseException:
        try:
            close(checkpoints)
        except OSError as error:
            log.error("%s", error)
        raise
    close(checkpoints)


def close(checkpoints: ocp.CheckpointManager) -> None:
    """Waits for what is being written, and raises the error if it could not be."""
    with explained(checkpoints):
        checkpoints.close()


def save(
    checkpoints: ocp.CheckpointManager,
    state: Any,
    metrics: dict[str, float] | None = None,
    recent: list[dict] = (),
) -> None:
    """Starts writing the state under its own step; an error of the save before surfaces here.

    Args:
        checkpoints: from `manager`.
        state: at any step; one that is there already is replaced if it now has been evaluated.
        metrics: of its evaluation.
        recent: of the steps since the last report, oldest first.
    """
    step = int(state.step)
    if step in checkpoints.all_steps():
        if not metrics:
            return
        checkpoints.delete(step)
    recent = [{name: value.item() for name, value in of_step.items()} for of_step in jax.device_get(list(recent))]
    arguments = ocp.args.Composite(
        state=ocp.args.StandardSave(distributed.to_global(state)),
        run=ocp.args.JsonSave({"fingerprints": fingerprints(vars(state)), "recent": recent}),
    )
    with explained(checkpoints):
        checkpoints.save(step, args=arguments, metrics=metrics or None)


def raise_errors(checkpoints: ocp.CheckpointManager) -> None:
    """Raises the error of a save that has failed in the background; waits for none."""
    with explained(checkpoints):
        checkpoints.check_for_errors()


def finish(checkpoints: ocp.CheckpointManager) -> None:
    """Waits until all is written, and raises the error if it could not be."""
    with explained(checkpoints):
        checkpoints.wait_until_finished()


@contextlib.contextmanager
def explained(checkpoints: ocp.CheckpointManager):
    """Whatever Orbax and TensorStore raise becomes an OSError, which says what it means for the run."""
    try:
        yield
    except Exception as error:
        steps = ", ".join(map(str, available(Path(checkpoints.directory).parent))) or "none"
        raise StorageError(
            f"a checkpoint could not be written to {checkpoints.directory}; whole are those of steps: "
            f"{steps}. {type(error).__name__}: {str(error)[:300]}"
        ) from error


def restore(checkpoints: ocp.CheckpointManager, like: Any, step: int | None = None) -> Any:
    """The state of a step (default: the newest), whatever the number of devices or processes that wrote it.

    Raises:
        ValueError: the arrays are not those that were saved. Orbax raises other kinds on other damage.
    """
    step = checkpoints.latest_step() if step is None else step
    sharding = distributed.replicated()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
    arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    state = distributed.to_local(checkpoints.restore(step, args=arguments).state)
    check(vars(state), Path(checkpoints.directory) / str(step))
    return state


def restore_newest(checkpoints: ocp.CheckpointManager, like: Any) -> Any:
    """The newest state that can be read; newer ones are named in the log and moved to damaged/.

    Raises:
        ValueError: there are checkpoints, and none can be read. All stay where they are.
    """
    reasons = {}
    for step in sorted(checkpoints.all_steps(), reverse=True):
        try:
            state = restore(checkpoints, like, step)
        except Exception as error:  # Orbax, TensorStore and their parsers raise many kinds
            reasons[step] = f"{type(error).__name__}: {str(error)[:300]}"
        if distributed.all_hosts(step not in reasons):
            set_aside(checkpoints, [other for other in checkpoints.all_steps() if other > step], reasons)
            return state
    shown = "\n  ".join(f"{step}: {reason}" for step, reason in reasons.items())
    raise UserError(
        f"none of the checkpoints in {checkpoints.directory} can be restored; nothing has been changed there. "
        f"Put back a copy, take back what --changed let pass, or choose another --workdir:\n  {shown}"
    )


def set_aside(checkpoints: ocp.CheckpointManager, steps: list[int], reasons: dict[int, str]) -> None:
    """Moves checkpoints out of the way of those that will be written under the same steps."""
    if not steps:
        return
    folder = Path(checkpoints.directory)
    for step in steps:
        kept = folder.parent / SET_ASIDE / str(step)
        while kept.exists():
            kept = kept.with_name(kept.name + "+")
        reason = reasons.get(step, "another process cannot read it")
        log.error("the checkpoint %s is damaged, moved to %s, and not used: %s", folder / str(step), kept, reason)
        distributed.all_hosts(True)  # all know where to
        if distributed.is_main():
            kept.parent.mkdir(exist_ok=True)
            (folder / str(step)).rename(kept)
    distributed.all_hosts(True)  # all wait for the main process
    checkpoints.reload()


def recent_metrics(workdir: str | Path, step: int) -> list[dict]:
    """The metrics of the steps since the last report, as `save` was given them."""
    kind = lambda value: np.int32(value) if isinstance(value, int) else np.float32(value)
    recent = about(Path(workdir) / FOLDER / str(step))["recent"]
    return [{name: kind(value) for name, value in of_step.items()} for of_step in recent]


def about(folder: Path) -> dict:
    """What is in a checkpoint besides the arrays."""
    return json.loads((folder / "run" / "metadata").read_text())


@jax.jit
def _fingerprint(array: jax.Array) -> jax.Array:
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[array.dtype.itemsize]
    words = array.view(unsigned).astype(jnp.uint32).ravel()
    weights = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
    return jnp.sum(words * weights, dtype=jnp.uint32)


def fingerprints(parts: dict[str, Any]) -> dict[str, int]:
    """Σ over arrays and positions i of (2i + 1) · word_i mod 2³², of each tree's arrays; computed where they are.

    Weights that are odd have inverses mod 2³²: no change of a single word goes unnoticed, and of any other
    damage one in 2³². The sum does not depend on the order of the arrays, nor on the devices that hold them.
    """
    sums = jax.device_get({name: [_fingerprint(x) for x in jax.tree.leaves(tree)] for name, tree in parts.items()})
    return {name: sum(map(int, of_part)) % 2**32 for name, of_part in sums.items()}


def check(parts: dict[str, Any], folder: Path) -> None:
    """Raises ValueError if these attributes of a state are not what the checkpoint was written from."""
    saved = about(folder)["fingerprints"]
    if wrong := [name for name, value in fingerprints(parts).items() if value != saved[name]]:
        raise UserError(f"the checkpoint {folder} is damaged: {', '.join(wrong)} differ from what was saved")


def available(workdir: str | Path) -> list[int]:
    """The steps of the complete checkpoints in a workdir, ascending."""
    folder = Path(workdir) / FOLDER
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def restore_parts(workdir: str | Path, step: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Some of the state's attributes as NumPy arrays on the host, wherever written; the rest is not read.

    Raises:
        ValueError: the checkpoint is damaged.
    """
    folder = (Path(workdir) / FOLDER / str(step)).absolute()
    try:
        # A `Checkpointer` would warn that the item has no metadata of its own: they are the whole checkpoint's.
        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            saved = handler.metadata(folder / "state").tree
            item = {name: saved[name] for name in names if name in saved}
            arguments = ocp.args.PyTreeRestore(
                item=item,
                partial_restore=True,
                restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item),
            )
            restored = handler.restore(folder / "state", args=arguments)
        check(restored, folder)
    except Exception as error:  # Orbax, TensorStore and their parsers raise many kinds
        raise UserError(f"the checkpoint {folder} cannot be read: {error}") from error
    return {name: restored.get(name, {}) for name in names}
