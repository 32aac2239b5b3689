"""A cache of text features: a frozen text tower computes each caption once."""

import copy
from typing import Any

import jax
import numpy as np
from flax import linen

from zslflax import distributed

Tree = Any

WIDTH_MULTIPLE = 8  # tokens; texts are padded to a multiple of it instead of to the maximum length
BATCH_SIZE = 16  # texts per device in a call; one shape per width, so that a text's features never vary
DEFAULT_CAPACITY = 1 << 15  # texts; 100 MB at a width of 768


class TextFeatures:
    """Computes the features of texts, and caches them as long as the text tower stays the same.

    Args:
        model: a `TwoTower`.
        variables: its variables; the parameters of the text tower are enough.
        capacity: texts to cache on the host, 4 · f bytes each. When the cache is full, other texts are computed at
            each call.
        frozen: whether the text tower never changes, so that `with_variables` may keep the cache.
    """

    def __init__(self, model: linen.Module, variables: Tree, capacity: int, frozen: bool = False):
        apply = lambda variables, inputs: model.apply(variables, *inputs, method="text_features")
        self.apply_fn, self.variables = distributed.map_over_devices(apply), variables
        self.capacity, self.frozen = capacity, frozen
        self._clear()

    def _clear(self) -> None:
        self.slots: dict[bytes, int] = {}  # from a text's tokens to its row in the cache
        self.cache: np.ndarray | None = None  # fp32 [capacity, f]

    def with_variables(self, variables: Tree) -> "TextFeatures":
        """The features of the same model with other variables; nothing is compiled again."""
        if self.frozen:
            return self
        other = copy.copy(self)
        other.variables = variables
        other._clear()
        return other

    def __call__(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The features of texts, fp32 [b, f].

        Args:
            tokens: int32 [b, t]; in each row the padding comes last.
            mask: bool [b, t], False at padding.
        """
        lengths = mask.sum(axis=1)
        keys = [row[:length].tobytes() for row, length in zip(tokens, lengths)]
        missing = {key: i for i, key in enumerate(keys) if key not in self.slots}
        rows = np.array(list(missing.values()), int)
        computed = dict(zip(missing, self.compute(tokens[rows], mask[rows], lengths[rows])))
        self.add_to_cache(computed)
        return np.stack([computed[key] if key in computed else self.cached(key) for key in keys])

    def compute(self, tokens: np.ndarray, mask: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """The features of each text, fp32 [f]; texts of similar length share a batch.

        Args:
            tokens, mask: as `__call__` takes them.
            lengths: int [b], tokens of each text.
        """
        widths = np.minimum(-(-lengths // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, tokens.shape[1])
        features: dict[int, np.ndarray] = {}
        for width in np.unique(widths):
            rows = np.flatnonzero(widths == width)
            inputs = tokens[rows, :width], mask[rows, :width]
            size = BATCH_SIZE * jax.local_device_count()
            features |= zip(rows.tolist(), distributed.map_in_batches(self.apply_fn, self.variables, inputs, size))
        return [features[row] for row in range(len(lengths))]

    def add_to_cache(self, computed: dict[bytes, np.ndarray]) -> None:
        """Caches features while there is room."""
        for key, features in list(computed.items())[: self.capacity - len(self.slots)]:
            if self.cache is None:
                self.cache = np.empty((self.capacity, len(features)), np.float32)  # takes memory as it is written
            self.cache[len(self.slots)] = features
            self.slots[key] = len(self.slots)

    def cached(self, key: bytes) -> np.ndarray:
        """The cached features of a text, fp32 [f]."""
        assert self.cache is not None
        return self.cache[self.slots[key]]
