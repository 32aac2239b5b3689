"""Applies a function to any number of rows on this process's devices, in batches that fit into their memory."""

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from zslflax.distributed import Tree, shard
from zslflax.errors import DeviceMemoryError, is_out_of_memory

log = logging.getLogger("zslflax")


class MappedFunction:
    """A function mapped over this process's devices, which exchange nothing.

    Called with a tree as `distributed.replicate` returns it and arrays [devices, b, …], it returns an array of the same
    leading axes, and does not wait for it.

    Args:
        function: (replicated tree, arrays [b, …]) → an array [b, …]. A row's output must not depend on other rows.

    Attributes:
        max_rows: rows of the largest batch that may still fit into the devices' memory.
    """

    def __init__(self, function: Callable[[Tree, Tree], jax.Array]):
        self.mapped = jax.pmap(function, in_axes=(None, 0), devices=jax.local_devices())
        self.max_rows = sys.maxsize

    def __call__(self, replicated: Tree, arrays: Tree) -> jax.Array:
        return self.mapped(replicated, arrays)

    def in_batches(self, replicated: Tree, arrays: Tree, size: int) -> np.ndarray:
        """Applies the function to arrays [n, …] in batches of one shape, halved where one does not fit into memory.

        Args:
            replicated: the function's first argument.
            arrays: a tree of arrays on the host. The last batch is filled up with copies of the last row.
            size: rows in a batch, a multiple of the number of this process's devices.

        Returns:
            The function's outputs [n, …], on the host.

        Raises:
            DeviceMemoryError: a device's memory does not suffice for one row.
        """
        outputs, start, total = [], 0, len(jax.tree.leaves(arrays)[0])
        while start < total:
            size = min(size, self.max_rows)
            rows = np.minimum(np.arange(start, start + size), total - 1)
            try:
                output = self.mapped(replicated, shard(jax.tree.map(lambda x: x[rows], arrays)))
                output = np.asarray(jax.block_until_ready(output))
            except Exception as error:
                self.halve(size, error)
                continue
            outputs.append(output.reshape(size, *output.shape[2:]))
            start += size
        return np.concatenate(outputs)[:total]

    def halve(self, size: int, error: Exception) -> None:
        """Sets `max_rows` to half of a batch that did not fit into the devices' memory.

        Args:
            size: rows of that batch.
            error: what the batch raised; raised again if it is another error.

        Raises:
            DeviceMemoryError: the batch had one row for each device.
        """
        if not is_out_of_memory(error):
            raise error
        devices = jax.local_device_count()
        if size <= devices:
            raise DeviceMemoryError(error, "not even one row at a time fits; use another device or a smaller model")
        self.max_rows = size // 2 // devices * devices
        log.warning("batches of %d do not fit into the devices' memory: going on with %d", size, self.max_rows)


@functools.lru_cache(maxsize=16)
def map_method(model: Any, method: str) -> MappedFunction:
    """Maps a method of a Flax model: (replicated variables, arrays) → an array.

    Equal models share one function, so that a second predictor of a model compiles nothing.

    Args:
        model: a Flax module.
        method: the name of one of its methods, which takes the arrays, a tuple, as its arguments.
    """
    return MappedFunction(lambda variables, arrays: model.apply(variables, *arrays, method=method))
