"""Checks of a checkpoint: that its arrays fit the run, and that they are those that were saved.

Orbax detects damage to its own tables, but not every flipped bit of the arrays (0.12.8 writes zstd frames without
checksums). Therefore a fingerprint of each attribute of the state is saved with it.
"""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from zslflax.errors import UserError
from zslflax.files import read_json


class MismatchError(UserError):
    """A checkpoint has other arrays than the train state that it should be restored to."""


class MisplacedError(UserError):
    """A checkpoint was copied or renamed: it holds another `step` than its folder's name says."""

    def __init__(self, folder: Path, step: int):
        super().__init__(f"{folder} holds step {step}; it was copied or renamed. Rename it to {step}, or remove it")
        self.step = step


def cause_of(error: Exception) -> str:
    """What a message says of an exception that Orbax or TensorStore raised, without the settings that they append.

    >>> cause_of(ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device [os_error_code='28'] [...]"))
    'No space left on device'
    """
    if isinstance(error, UserError):
        return str(error)
    if found := re.search(r"([^:]+) \[os_error_code='\d+'\]", str(error)):
        return found[1].strip()
    return f"{type(error).__name__}: {str(error).partition(' [tensorstore_spec=')[0][:300]}"


def read_run_item(folder: Path) -> dict[str, Any]:
    """The item `run` of a checkpoint, which `run_item` made.

    Raises:
        UserError: it is not what was saved, or is of another step than the folder's name says.
    """
    item = read_json(folder / "run" / "metadata")
    if item != run_item(item.get("fingerprints"), item.get("recent_metrics")):
        raise UserError(f"the checkpoint {folder} is damaged: run/metadata is not what was saved")
    # The step is a single number with the weight 1, so that its fingerprint is the step.
    if (step := item["fingerprints"]["step"]) != int(folder.name):
        raise MisplacedError(folder, step)
    return item


def run_item(saved: Any, recent_metrics: Any) -> dict[str, Any]:
    """The item `run` of a checkpoint.

    Args:
        saved: from `fingerprints`.
        recent_metrics: the metrics of the steps since the last report, as JSON.

    Returns:
        {"fingerprints", "recent_metrics", "sha256"}, the last of the two before.
    """
    item = {"fingerprints": saved, "recent_metrics": recent_metrics}
    return {**item, "sha256": hashlib.sha256(json.dumps(item, sort_keys=True).encode()).hexdigest()}


def check_structure(folder: Path, like: Any) -> None:
    """Raises a MismatchError where the arrays of a checkpoint have other names or shapes than those of `like`."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        saved = shapes_by_name(handler.metadata(folder / "state").tree)
    expected = shapes_by_name(like)
    common = sorted(saved.keys() & expected.keys(), key=lambda name: (name.count("/"), name))
    reshaped = [f"{name} {saved[name]} and {expected[name]}" for name in common if saved[name] != expected[name]]
    differences = {
        "only the checkpoint has": unique_branches(saved, expected),
        "only this run has": unique_branches(expected, saved),
        "shapes differ for": reshaped,
    }
    some = lambda names: ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
    if described := [f"{kind} {some(names)}" for kind, names in differences.items() if names]:
        raise MismatchError(
            f"the checkpoint {folder} was written by an older version of zslflax or with another config, and does not "
            f"fit this run: {'; '.join(described)}. Choose another --workdir, use the version that wrote it, or take "
            "back what --changed let pass; nothing has been changed there"
        )


def shapes_by_name(tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each array by its path, such as "params/image/tower/kernel": of a state, or of Orbax's metadata."""
    return {name: tuple(array.shape) for name, array in ocp.tree.to_flat_dict(tree, sep="/").items()}


def unique_branches(names: Iterable[str], others: Iterable[str]) -> list[str]:
    """The shortest beginnings of `names`, up to a slash, with which none of `others` begins.

    >>> unique_branches(["params/a/bias", "params/b/bias", "params/b/kernel", "step"], ["params/a/bias", "steps"])
    ['params/b', 'step']
    """
    branches = lambda name: ["/".join(name.split("/")[: i + 1]) for i in range(name.count("/") + 1)]
    known = {branch for name in others for branch in branches(name)}
    unique = (next((branch for branch in branches(name) if branch not in known), None) for name in sorted(names))
    return list(dict.fromkeys(branch for branch in unique if branch))


def array_fingerprint(array: Any, xp: Any = np) -> Any:
    """Σ over positions i of (2i + 1) · word_i mod 2³², where words are the array's elements as unsigned integers.

    Args:
        array: with elements of 1, 2 or 4 bytes.
        xp: the module to compute with, `numpy` or `jax.numpy`.
    """
    unsigned = {1: xp.uint8, 2: xp.uint16, 4: xp.uint32}[array.dtype.itemsize]
    words = array.view(unsigned).astype(xp.uint32).ravel()
    weights = 2 * xp.arange(words.size, dtype=xp.uint32) + 1
    return xp.sum(words * weights, dtype=xp.uint32)


fingerprint_on_device = jax.jit(functools.partial(array_fingerprint, xp=jnp))


def fingerprints(trees: Mapping[str, Any]) -> dict[str, int]:
    """The sum of each tree's `array_fingerprint`s mod 2³², computed where the arrays are: on the devices or the host.

    Odd weights are invertible mod 2³². Therefore every change of a single word changes the fingerprint, and other
    damage goes unnoticed once in 2³² cases. The sum depends neither on the order of the arrays nor on the devices.
    """
    # NumPy computes at once what jax would first compile, for every shape.
    of_array = lambda x: fingerprint_on_device(x) if isinstance(x, jax.Array) else array_fingerprint(np.asarray(x))
    sums = jax.device_get({name: [of_array(x) for x in jax.tree.leaves(tree)] for name, tree in trees.items()})
    return {name: sum(map(int, of_tree)) % 2**32 for name, of_tree in sums.items()}


def check_fingerprints(trees: Mapping[str, Any], folder: Path) -> None:
    """Raises a UserError where attributes of a state differ from what was saved."""
    saved = read_run_item(folder)["fingerprints"]
    if wrong := [name for name, value in fingerprints(trees).items() if value != saved[name]]:
        raise UserError(f"the checkpoint {folder} is damaged: {', '.join(wrong)} differ from what was saved")
