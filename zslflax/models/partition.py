"""Splits a two-tower model's parameters into trained ones and frozen towers, and puts them together again."""

from collections.abc import Iterable
from typing import Any

Tree = Any  # a nested dict of arrays

MODALITIES = ("image", "text")


def partition(params: Tree, frozen: Iterable[str]) -> tuple[Tree, Tree]:
    """Takes the towers of the modalities in `frozen` out of the parameters.

    Returns:
        The other parameters, and the frozen ones as {modality: {"tower": …}}.

    >>> params = {"image": {"tower": 1, "projection": 2}, "text": {"tower": 3, "projection": 4}, "objective": {}}
    >>> partition(params, ["text"])
    ({'image': {'tower': 1, 'projection': 2}, 'text': {'projection': 4}, 'objective': {}}, {'text': {'tower': 3}})
    """
    frozen = tuple(frozen)
    trained = {
        group: {name: value for name, value in entries.items() if name != "tower" or group not in frozen}
        for group, entries in params.items()
    }
    return trained, {modality: {"tower": params[modality]["tower"]} for modality in frozen}


def combine(params: Tree, frozen_params: Tree) -> Tree:
    """Undoes `partition`. Where both have a tower, that of `params` is taken.

    >>> combine({"image": {"tower": 1}, "text": {"projection": 4}}, {"image": {"tower": 5}, "text": {"tower": 3}})
    {'image': {'tower': 1}, 'text': {'tower': 3, 'projection': 4}}
    """
    return {group: {**frozen_params.get(group, {}), **entries} for group, entries in params.items()}
