"""Computes a function of many rows in chunks, so that memory depends on the size of a chunk."""

from collections.abc import Callable
from typing import Any

import jax

Tree = Any  # a pytree of arrays


def count_chunks(rows: int, columns: int, max_elements: int) -> int:
    """The smallest number of equal chunks of rows, each of at most `max_elements` of the rows × columns elements.

    A chunk has at least one row. With `max_elements` 0 there is one chunk.

    >>> count_chunks(rows=32_768, columns=32_768, max_elements=2**22)  # chunks of 128 rows
    256
    >>> count_chunks(rows=6, columns=24, max_elements=50)  # 2 rows of 24
    3
    """
    if not max_elements:
        return 1
    divisors = (chunks for chunks in range(1, rows + 1) if rows % chunks == 0)
    return next((chunks for chunks in divisors if rows // chunks * columns <= max_elements), rows)


def split(tree: Tree, num_chunks: int) -> Tree:
    """Reshapes every array [b, …] to [num_chunks, b / num_chunks, …]."""
    return jax.tree.map(lambda x: x.reshape(num_chunks, x.shape[0] // num_chunks, *x.shape[1:]), tree)


def join(tree: Tree) -> Tree:
    """Undoes `split`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def map_chunks(function: Callable[[Tree], Tree], tree: Tree, num_chunks: int) -> Tree:
    """function(tree), computed on one chunk of rows after another; the results are joined."""
    return function(tree) if num_chunks == 1 else join(jax.lax.map(function, split(tree, num_chunks)))
