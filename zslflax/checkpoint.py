"""Orbax: save, resume, and restore the parameters alone."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from zslflax import parallel
from zslflax.state import TrainState

FOLDER = "checkpoints"


def manager(workdir: str | Path, best: str = "", read_only: bool = False) -> ocp.CheckpointManager:
    """The manager of `workdir`/checkpoints: asynchronous; keeps the newest two, and the best by the metric `best`."""
    kept = [checkpoint_managers.LatestN(2)]
    best_fn = None
    if best:
        best_fn = lambda metrics: metrics[best]
        kept.append(checkpoint_managers.BestN(get_metric_fn=best_fn, n=1, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept),
        best_fn=best_fn,
        create=not read_only,
        read_only=read_only,
        enable_async_checkpointing=not read_only,
    )
    return ocp.CheckpointManager((Path(workdir) / FOLDER).absolute(), options=options)


def save(checkpoints: ocp.CheckpointManager, state: TrainState, metrics: dict[str, float] | None = None) -> None:
    """Starts writing the state under its own step; an error of the save before surfaces here."""
    step = int(state.step)
    if step not in checkpoints.all_steps():
        checkpoints.save(step, args=ocp.args.StandardSave(parallel.to_global(state)), metrics=metrics or None)


def restore(checkpoints: ocp.CheckpointManager, like: TrainState, step: int | None = None) -> TrainState:
    """The state of a step (default: the newest), whatever the number of devices or processes that wrote it."""
    step = checkpoints.latest_step() if step is None else step
    sharding = parallel.replicated()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
    return parallel.to_local(checkpoints.restore(step, args=ocp.args.StandardRestore(abstract)))


def available(workdir: str | Path) -> list[int]:
    """The steps of the complete checkpoints in a workdir, ascending."""
    folder = Path(workdir) / FOLDER
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.is_dir() else []


def restore_parts(workdir: str | Path, step: int, names: tuple[str, ...]) -> dict[str, Any]:
    """Some of the state's attributes as NumPy arrays on the host, wherever they were written; the rest is not read."""
    folder = (Path(workdir) / FOLDER / str(step) / "default").absolute()
    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata.tree
        item = {name: saved[name] for name in names if name in saved}
        arguments = ocp.args.PyTreeRestore(
            item=item,
            partial_restore=True,
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item),
        )
        restored = checkpointer.restore(folder, args=arguments)
    return {name: restored.get(name, {}) for name in names}


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file such that a reader sees either the old or the new one whole."""
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(value if isinstance(value, str) else json.dumps(value, indent=1))
    partial.replace(path)
