"""Features of a frozen text tower: each caption is computed once, and kept in memory or on disk."""

import copy
import hashlib
import threading
from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np
from flax import linen

from zslflax.data.feature_files import KEY_BYTES
from zslflax.device_batches import map_method
from zslflax.models.partition import Tree

WIDTH_MULTIPLE = 8  # tokens; texts are padded to a multiple of it instead of to the maximum length
# Texts per device in a call. There is one shape per width, so that the features of a text never vary.
CPU_BATCH_SIZE, BATCH_SIZE = 16, 128
DEFAULT_CAPACITY = 1 << 15  # texts; 100 MB at a width of 768


class TextStore(Protocol):
    """Keeps the features of texts by keys: `MemoryTexts`, or `feature_files.TextFile` on disk."""

    def find(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The rows of keys, fp32 [b, f], and whether each was found, bool [b]."""

    def add(self, keys: Sequence[bytes], values: np.ndarray) -> np.ndarray:
        """Keeps rows fp32 [b, f]; returns them as `find` would."""


class MemoryTexts:
    """Keeps the features of texts in memory, while there is room.

    Args:
        capacity: texts, of 4 · f bytes each.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.slots: dict[bytes, int] = {}  # from a key to its row in the cache
        self.cache: np.ndarray | None = None  # fp32 [capacity, f]

    def find(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        slots = np.array([self.slots.get(key, -1) for key in keys], int)
        if self.cache is None or not len(keys):
            return np.empty((len(keys), 0), np.float32), np.zeros(len(keys), bool)
        return self.cache[slots], slots >= 0

    def add(self, keys: Sequence[bytes], values: np.ndarray) -> np.ndarray:
        for key, row in list(zip(keys, values))[: self.capacity - len(self.slots)]:
            if self.cache is None:
                self.cache = np.empty((self.capacity, len(row)), np.float32)  # takes memory as it is written
            self.cache[len(self.slots)] = row
            self.slots[key] = len(self.slots)
        return values


class TextFeatures:
    """Computes the features of texts, and keeps them as long as the text tower stays the same.

    Args:
        model: a `TwoTower`.
        variables: its variables; the parameters of the text tower are enough.
        capacity: texts to keep in memory, 4 · f bytes each. When there is no room left, other texts are computed at
            each call.
        frozen: whether the text tower never changes, so that `with_variables` may keep what was computed.
        store: keeps the features on disk instead, of a text tower that never changes.
    """

    def __init__(
        self,
        model: linen.Module,
        variables: Tree,
        capacity: int,
        frozen: bool = False,
        store: TextStore | None = None,
    ):
        self.apply_fn, self.variables = map_method(model, "text_features"), variables
        self.capacity, self.frozen = capacity, frozen
        self.store = MemoryTexts(capacity) if store is None else store
        self.lock = threading.Lock()  # training and evaluation share the features, in two threads

    def with_variables(self, variables: Tree) -> "TextFeatures":
        """The features of the same model with other variables; nothing is compiled again."""
        if self.frozen:
            return self
        other = copy.copy(self)
        other.variables, other.store = variables, MemoryTexts(self.capacity)
        return other

    def __call__(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """The features of texts, fp32 [b, f].

        Args:
            tokens: int32 [b, t]; in each row the padding comes last.
            mask: bool [b, t], False at padding.
        """
        lengths = mask.sum(axis=1)
        first: dict[bytes, int] = {}  # of the rows with the same text, by its key
        texts = [first.setdefault(text_key(row[:length]), i) for i, (row, length) in enumerate(zip(tokens, lengths))]
        keys, rows = list(first), np.array(list(first.values()), int)
        with self.lock:
            features = self.find_or_compute(keys, tokens[rows], mask[rows], lengths[rows])
        return features[np.searchsorted(rows, texts)]  # rows ascend, because dicts keep their order

    def find_or_compute(
        self, keys: list[bytes], tokens: np.ndarray, mask: np.ndarray, lengths: np.ndarray
    ) -> np.ndarray:
        """The features of texts by their keys, fp32 [b, f]; computes and keeps those that are not kept yet."""
        features, found = self.store.find(keys)
        if not found.all():
            missing = np.flatnonzero(~found)
            computed = self.compute(tokens[missing], mask[missing], lengths[missing])
            computed = self.store.add([keys[i] for i in missing], computed)
            if not found.any():
                features = np.empty((len(keys), computed.shape[1]), np.float32)
            features[missing] = computed
        return features

    def compute(self, tokens: np.ndarray, mask: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """The features of each text, fp32 [b, f]; texts of similar length share a batch.

        Args:
            tokens, mask: as `__call__` takes them.
            lengths: int [b], tokens of each text.
        """
        widths = np.minimum(-(-lengths // WIDTH_MULTIPLE) * WIDTH_MULTIPLE, tokens.shape[1])
        size = (CPU_BATCH_SIZE if jax.default_backend() == "cpu" else BATCH_SIZE) * jax.local_device_count()
        features: dict[int, np.ndarray] = {}
        for width in np.unique(widths):
            rows = np.flatnonzero(widths == width)
            inputs = tokens[rows, :width], mask[rows, :width]
            features |= zip(rows.tolist(), self.apply_fn.in_batches(self.variables, inputs, size))
        return np.stack([features[row] for row in range(len(lengths))])


def text_key(tokens: np.ndarray) -> bytes:
    """The hash of a text's tokens, int32 without padding."""
    return hashlib.blake2b(np.ascontiguousarray(tokens, "<i4").data, digest_size=KEY_BYTES).digest()
