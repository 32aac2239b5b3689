"""Devices and processes: initialisation, placing arrays on devices, and exchanging values between processes.

A process runs on each host and owns that host's devices. Mapped functions run on all devices under the axis `AXIS`.
"""

import atexit
import importlib.util
import json
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed as jax_distributed  # jax gives its client to nobody, but Orbax takes it there too
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from zslflax.background import BackgroundIterator
from zslflax.compilation import keep_compiled
from zslflax.errors import UserError
from zslflax.peers import Peers

log = logging.getLogger("zslflax")

Tree = Any  # a pytree of arrays

AXIS = "data"  # name of the mapped axis, over which the global batch is split
MAX_CPU_DEVICES = 4  # chosen automatically; each shares its work among several cores where there are more
CPU_FLAGS = {  # of XLA, where a CPU is several devices
    # Otherwise a device may start two collectives in another order than the others, and all wait (jaxlib 0.10).
    "xla_cpu_enable_concurrency_optimized_scheduler": "false",
    # XLA ends the process where a device waits longer for another one, as on a core with other work: after 40 s.
    "xla_cpu_collective_call_terminate_timeout_seconds": "1800",
}

_peers: Peers | None = None  # of a multi-process run


def initialize(compilation_cache: str = "", cpu_devices: int = 1) -> None:
    """Connects to the run's other processes, if there are any. It must be called before any other use of jax.

    `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` describe processes that were started one by one.
    With `ZSLFLAX_DISTRIBUTED=1`, which the scripts in launch/ set, jax detects a TPU pod or a SLURM job.

    Args:
        compilation_cache: the folder in which compiled programs are kept; "" for none.
        cpu_devices: number of devices that a CPU is divided into, unless the environment says it or there are several
            processes.
    """
    if compilation_cache:
        keep_compiled(compilation_cache)
    divide_cpu(cpu_devices)
    atexit.register(leave)
    try:
        if os.environ.get("JAX_COORDINATOR_ADDRESS"):
            jax.distributed.initialize(*read_process_variables())
        elif os.environ.get("ZSLFLAX_DISTRIBUTED"):
            jax.distributed.initialize()
        jax.device_count()
    except UserError:
        raise
    except (RuntimeError, ValueError, AssertionError) as error:  # the last where a platform has no device
        reason = str(error).rstrip(".") or f"there is no device for JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}"
        raise UserError(
            f"jax does not start: {reason}. The environment variables JAX_…, XLA_FLAGS and ZSLFLAX_DISTRIBUTED say "
            "on which devices it should run, and with which other processes, all of which must be started"
        ) from error
    if is_multi_process():
        global _peers
        _peers = Peers(jax.process_index(), jax.process_count())
        _peers.watch(jax_distributed.global_state.client)


def choose_cpu_devices(cores: float, *batch_sizes: int) -> int:
    """How many devices a CPU is divided into for training: one for each core, at most `MAX_CPU_DEVICES`.

    XLA computes much of a step by one core only, all convolutions with jax 0.10. On a device for each of two cores, a
    step of the quick start takes 0.61 of the time that it takes on one device.

    >>> choose_cpu_devices(2, 128, 512), choose_cpu_devices(16, 128, 512), choose_cpu_devices(4, 126, 512)
    (2, 4, 2)

    Args:
        cores: that this process may use.
        batch_sizes: which the devices share evenly.
    """
    return max(n for n in range(1, max(1, min(int(cores), MAX_CPU_DEVICES)) + 1) if not any(b % n for b in batch_sizes))


def divide_cpu(devices: int) -> None:
    """Makes jax divide a CPU into devices, unless that is chosen already, or there are several processes.

    If jax has started before, as by a config file that counts the devices, it keeps those that it has. Nothing changes
    where GPUs or TPUs may be used, whose libraries read `XLA_FLAGS` too.
    """
    if os.environ.get("JAX_PLATFORMS") != "cpu" and any(map(importlib.util.find_spec, ("jax_plugins", "libtpu"))):
        return
    chosen: Any = jax.config
    several = os.environ.get("JAX_COORDINATOR_ADDRESS") or os.environ.get("ZSLFLAX_DISTRIBUTED")
    flags = os.environ.get("XLA_FLAGS", "")
    by_flag = "xla_force_host_platform_device_count" in flags
    if devices > 1 and chosen.jax_num_cpu_devices < 0 and not several and not by_flag:
        try:
            jax.config.update("jax_num_cpu_devices", devices)
        except RuntimeError:
            return
    if chosen.jax_num_cpu_devices > 1 or by_flag:
        added = (f"--{name}={value}" for name, value in CPU_FLAGS.items() if name not in flags)
        os.environ["XLA_FLAGS"] = " ".join([flags, *added]).strip()


def read_process_variables() -> tuple[str, int, int]:
    """The coordinator's address, the number of processes, and which of them this is.

    Raises:
        UserError: one of the environment variables is missing, or is not what jax expects.
    """
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    address, count, process = (os.environ.get(name, "") for name in names)
    numbers = count.isdecimal() and process.isdecimal() and int(process) < int(count)
    if not (numbers and re.fullmatch(r".+:\d+", address)):
        found = ", ".join(f"{name}={os.environ.get(name, '')!r}" for name in names)
        raise UserError(
            f"expected the address HOST:PORT, a number of processes, and one from 0 below it; found {found}"
        )
    return address, int(count), int(process)


def leave(error: str = "") -> None:
    """Notes that this process ends, so that the others need not find out. It does nothing in a run of one process."""
    if _peers is not None:
        _peers.leave(error)


def is_main() -> bool:
    """Whether this is the process that writes files other than checkpoints."""
    return jax.process_index() == 0


def is_multi_process() -> bool:
    """Whether the run has more than one process."""
    return jax.process_count() > 1


def local_processes() -> int:
    """How many of the run's processes share this process's cores, itself included. All processes must call it."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine
    machine = boot_id.read_text().strip() if boot_id.exists() else socket.gethostname()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    processes = gather_json([machine, cores])
    return sum(other == machine and not set(cores).isdisjoint(theirs) for other, theirs in processes)


# Arrays on devices


def local_mesh(devices: int | None = None) -> Mesh:
    """A mesh of this process's first `devices` devices (default: all)."""
    return Mesh(np.array(jax.local_devices()[:devices]), (AXIS,))


def global_mesh() -> Mesh:
    """A mesh of all processes' devices."""
    return Mesh(np.array(jax.devices()), (AXIS,))


def replicate(tree: Tree, devices: int | None = None) -> Tree:
    """Copies arrays to each of this process's first `devices` devices (default: all)."""
    return jax.device_put(tree, NamedSharding(local_mesh(devices), PartitionSpec()))


def replicated_sharding() -> NamedSharding:
    """The sharding of an array of which every device of every process has a copy."""
    return NamedSharding(global_mesh(), PartitionSpec())


def shard(tree: Tree) -> Tree:
    """Splits the leading axis of arrays over this process's devices: [b, …] → [devices, b / devices, …]."""
    devices = jax.local_device_count()
    return jax.tree.map(lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), tree)


def prefetch_to_devices(batches: Iterator[Any], size: int = 2) -> BackgroundIterator[tuple[dict[str, jax.Array], Any]]:
    """Makes batches and copies them to the devices in a thread, ahead of their use.

    Args:
        batches: dicts of arrays [b, …] on the host. The entry `errors`, if there is one, stays on the host.
        size: the number of batches that wait on the devices.

    Yields:
        (arrays [devices, b / devices, …], the entry `errors` or an empty tuple).
    """
    sharding = NamedSharding(local_mesh(), PartitionSpec(AXIS))

    def copy_batches() -> Iterator[tuple[dict[str, jax.Array], Any]]:
        for batch in batches:
            arrays = {key: value for key, value in batch.items() if key != "errors"}
            yield jax.device_put(shard(arrays), sharding), batch.get("errors", ())

    return BackgroundIterator(copy_batches(), size)


def to_global(tree: Tree) -> Tree:
    """Replicated arrays of this process as global arrays, which Orbax saves."""
    if not is_multi_process():
        return tree
    return multihost_utils.host_local_array_to_global_array(tree, global_mesh(), PartitionSpec())


def to_local(tree: Tree) -> Tree:
    """Undoes `to_global`."""
    if not is_multi_process():
        return tree
    return multihost_utils.global_array_to_host_local_array(tree, global_mesh(), PartitionSpec())


# Values exchanged between processes. Every process must call these functions, in the same order.


def preemption_requested(step: int) -> bool:
    """Whether any process has received SIGTERM: the same answer in all processes, which must ask at every step."""
    return multihost_utils.reached_preemption_sync_point(step)


def all_hosts(ok: bool) -> bool:
    """Whether `ok` is true in all processes. Waits for all of them."""
    return bool(np.all(gather_hosts(np.asarray([ok]))))


def wait_for_hosts() -> None:
    """Waits until all processes have come here."""
    all_hosts(True)


def gather_hosts(tree: Tree) -> Tree:
    """Concatenates all processes' arrays [b, …] along the first axis, in the order of the processes; NumPy."""
    if not is_multi_process():
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def gather_json(value: Any) -> list[Any]:
    """All processes' values, in the order of the processes. JSON must be able to hold them; their sizes may differ."""
    if not is_multi_process():
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = gather_hosts(np.asarray([len(data)]))
    padded = np.pad(data, (0, sizes.max() - len(data)))
    rows = gather_hosts(padded).reshape(len(sizes), -1)
    return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]


def on_main(function: Callable[[], Any]) -> Any:
    """What `function` returns in the main process, which alone calls it, in every process.

    JSON must be able to hold the value. A UserError is raised in all processes.
    """
    value: Any = None
    error: UserError | None = None
    if is_main():
        try:
            value = function()
        except UserError as raised:
            error = raised
    value, message = gather_json([value, str(error) if error else None])[0]
    if error:
        raise error
    if message is not None:
        raise UserError(message)
    return value


def broadcast_from_main(array: np.ndarray | None) -> np.ndarray | None:
    """The main process's fp32 array, or None, in every process. The other processes' arguments are ignored."""
    shape = gather_json(None if array is None else array.shape)[0]
    if shape is None or not is_multi_process():
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array if is_main() else np.zeros(shape, np.float32)))


def check_same_on_hosts(name: str, value: Any) -> None:
    """Raises a UserError in every process where their values differ, as those of files that not all of them see."""
    values = gather_json(value)
    if any(other != values[0] for other in values):
        raise UserError(f"the processes differ in {name}: {values}; they must see the same files")
