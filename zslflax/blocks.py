"""Visiting a matrix block by block, so that it never exists whole; reductions, here and over devices."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Reductions(NamedTuple):
    """How to reduce over the parts of a set of columns."""

    largest: functools.partial
    smallest: functools.partial
    total: functools.partial


ALONG_FIRST = Reductions(*(functools.partial(f, axis=0) for f in (jnp.max, jnp.min, jnp.sum)))


def over_devices(axis_name: str) -> Reductions:
    collectives = (jax.lax.pmax, jax.lax.pmin, jax.lax.psum)
    return Reductions(*(functools.partial(f, axis_name=axis_name) for f in collectives))


def split(tree, block: int):
    """[b, …] → [blocks, at most `block`, …]: blocks of one length, the last padded with zeros."""

    def blocks(x):
        count = -(-x.shape[0] // block)
        length = -(-x.shape[0] // count)
        x = jnp.pad(x, [(0, count * length - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(count, length, *x.shape[1:])

    return jax.tree.map(blocks, tree)


def sweep(visit, block: int, rows: dict, columns: dict, row_sums, column_sums, totals=()):
    """Visits every block of a matrix: what accumulates for each row, for each column and in all.

    Args:
        visit: (rows, columns, row_sums, column_sums, totals), each of one block → the last three, updated.
        rows, row_sums: pytrees of arrays [b, …].
        columns, column_sums: [n, …].
        totals: of any shape.

    Returns:
        row_sums [b, …], column_sums [n, …] and totals after all visits.
    """

    def over_rows(carry, row):
        def over_columns(carry, column):
            row_sums, column_sums, totals = visit(row[0], column[0], carry[0], column[1], carry[1])
            return (row_sums, totals), column_sums

        column_sums, totals = carry
        (row_sums, totals), column_sums = jax.lax.scan(over_columns, (row[1], totals), (columns, column_sums))
        return (column_sums, totals), row_sums

    def join(tree, length):
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:length], tree)

    b, n = rows["valid"].shape[0], columns["valid"].shape[0]
    rows, columns, row_sums, column_sums = (split(tree, block) for tree in (rows, columns, row_sums, column_sums))
    (column_sums, totals), row_sums = jax.lax.scan(over_rows, (column_sums, totals), (rows, row_sums))
    return join(row_sums, b), join(column_sums, n), totals


def log_sum(x: jax.Array, over: Reductions) -> jax.Array:
    """log Σ exp(x)."""
    top = over.largest(x)
    return top + jnp.log(over.total(jnp.exp(x - top)))
