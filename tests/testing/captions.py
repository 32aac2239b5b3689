"""Captions as padded token ids."""

import numpy as np

TOKENS = 12  # of the longest caption


def padded(lengths, seed=0, tokens=TOKENS):
    """Captions of given lengths: random ids int32 [b, tokens] from 2 to 49, 1 at padding, and their mask."""
    mask = np.arange(tokens) < np.asarray(lengths)[:, None]
    ids = np.random.default_rng(seed).integers(2, 50, mask.shape)
    return np.where(mask, ids, 1).astype(np.int32), mask
