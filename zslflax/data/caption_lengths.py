"""Counts the lengths of training captions, which determine the number of rows that packed captions need."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from zslflax.data.cores import choose_threads
from zslflax.data.images import BadSample
from zslflax.data.packing import COUNTED_CAPTIONS
from zslflax.data.pipeline import global_order
from zslflax.data.preprocess import choose_caption
from zslflax.data.sources.base import Source
from zslflax.data.streams import AUGMENTATION_STREAM


def count_lengths(
    sources: Sequence[Source],
    weights: Sequence[float],
    tokenize: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]],
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 0,
) -> np.ndarray:
    """How many of the first training captions have 0, 1, … max_tokens tokens: int64 [max_tokens + 1].

    Counts the first `COUNTED_CAPTIONS` positions of the global order, or one epoch if that is shorter. Host h of H
    reads the positions h, h + H, …; the sum over all hosts does not depend on their number. Samples that cannot be
    read are left out.

    Args:
        sources, weights, seed: as in `train_batches`.
        tokenize: the tokenizer.
        process_index, process_count: h and H.
        threads: that read; 0: automatic.
    """
    sizes = [len(source) for source in sources]
    order = global_order(sizes, weights, seed)

    def read_caption(position: int) -> str | None:
        source, index = order[position]
        try:
            rng = np.random.default_rng([AUGMENTATION_STREAM, seed, position])
            return choose_caption(sources[source][index], rng)
        except BadSample:
            return None

    positions = range(process_index, min(COUNTED_CAPTIONS, sum(sizes)), process_count)
    with ThreadPoolExecutor(choose_threads(threads)) as pool:
        captions = [caption for caption in pool.map(read_caption, positions) if caption is not None]
    _, mask = tokenize(captions)
    return np.bincount(mask.sum(axis=1), minlength=mask.shape[1] + 1)
