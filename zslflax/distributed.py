"""Devices and processes: the one place that names pmap's mapping, the hosts, and what goes from host to device."""

import collections
import json
import os
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"  # the mapped axis: the global batch is spread over its devices


def start(compilation_cache: str = "") -> None:
    """Joins the other processes where the environment says that there are some; must come before any other use of jax.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` describe processes started by hand; TPU pods and
    SLURM jobs are recognised by jax itself when `ZSLFLAX_DISTRIBUTED=1`, which the scripts in launch/ set.
    """
    if compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(compilation_cache))
    if address := os.environ.get("JAX_COORDINATOR_ADDRESS"):
        jax.distributed.initialize(address, int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"]))
    elif os.environ.get("ZSLFLAX_DISTRIBUTED"):
        jax.distributed.initialize()


def is_main() -> bool:
    """Whether this process is the one that writes reports."""
    return jax.process_index() == 0


def is_multi_process() -> bool:
    """Whether there are other processes."""
    return jax.process_count() > 1


def preempted(step: int) -> bool:
    """Whether any process was sent SIGTERM; of several, all get True at the same step. All must ask at every step."""
    return multihost_utils.reached_preemption_sync_point(step)


def all_hosts(ok: bool) -> bool:
    """Whether all processes say so; the slowest is waited for."""
    return bool(np.all(gather_hosts(np.asarray([ok]))))


def replicate(tree, devices: int | None = None):
    """Puts arrays whole on each of this host's devices (default: all), as `TrainStep` returns them."""
    return jax.device_put(tree, NamedSharding(local_mesh(devices), PartitionSpec()))


def local_mesh(devices: int | None = None) -> Mesh:
    return Mesh(np.array(jax.local_devices()[:devices]), (AXIS,))


def map_embed(function):
    """Maps (variables, arrays with a leading axis of this host's devices) over those devices; nothing is exchanged."""
    return jax.pmap(function, in_axes=(None, 0), devices=jax.local_devices())


def in_batches(function, variables, arrays, size: int) -> np.ndarray:
    """Applies what `map_embed` returned to arrays [n, …] in batches of `size`, the last filled up: NumPy [n, …]."""
    outputs, total = [], len(jax.tree.leaves(arrays)[0])
    for start in range(0, total, size):
        rows = np.minimum(np.arange(start, start + size), total - 1)
        embedded = np.asarray(function(variables, shard(jax.tree.map(lambda x, rows=rows: x[rows], arrays))))
        outputs.append(embedded.reshape(size, *embedded.shape[2:]))
    return np.concatenate(outputs)[:total]


def shard(arrays):
    """Splits the leading axis of every array over this host's devices: [b, …] → [devices, b / devices, …]."""
    devices = jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), arrays)


def to_devices(batches: Iterator, size: int = 2) -> Iterator:
    """Yields (arrays on the devices, the rest) while up to `size` batches are on their way.

    A batch is a dict of arrays, sharded as `shard` does; the entry `errors`, if any, stays on the host.
    """
    sharding = NamedSharding(local_mesh(), PartitionSpec(AXIS))
    queue = collections.deque()
    for batch in batches:
        errors = batch.pop("errors", ())
        queue.append((jax.device_put(shard(batch), sharding), errors))
        if len(queue) >= size:
            yield queue.popleft()
    yield from queue


def to_global(tree):
    """The replicated state as global arrays, which Orbax saves; what pmap returns is local to a process's devices."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.host_local_array_to_global_array(tree, global_mesh(), PartitionSpec())


def to_local(tree):
    """Undoes `to_global`: the state is placed as `TrainStep` returns it."""
    if jax.process_count() == 1:
        return tree
    return multihost_utils.global_array_to_host_local_array(tree, global_mesh(), PartitionSpec())


def global_mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), (AXIS,))


def replicated() -> NamedSharding:
    """The sharding of an array that every device of every process holds whole."""
    return NamedSharding(global_mesh(), PartitionSpec())


def gather_hosts(tree):
    """Concatenates every process's arrays [b, …] along the first axis, in the order of the processes; NumPy."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def from_main(array: np.ndarray | None) -> np.ndarray | None:
    """The main process's fp32 array or None, in every process; the others' are ignored."""
    shape = gather_json(None if array is None else array.shape)[0]
    if shape is None or jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array if is_main() else np.zeros(shape, np.float32)))


def check_same_on_hosts(what: str, value) -> None:
    """Raises a ValueError, in every process, where processes see different values of what JSON can hold."""
    values = gather_json(value)
    if any(other != values[0] for other in values):
        raise ValueError(f"the processes differ in {what}: {values}; they must see the same files")


def gather_json(value) -> list:
    """Every process's value, of any size but of what JSON can hold, in the order of the processes."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = gather_hosts(np.asarray([len(data)]))
    padded = np.pad(data, (0, sizes.max() - len(data)))
    rows = gather_hosts(padded).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]
