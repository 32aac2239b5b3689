"""How long the training captions are, from the first of them."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from zslflax.data.images import BadSample
from zslflax.data.packing import SAMPLE
from zslflax.data.pairs import global_order, own_threads
from zslflax.data.samples import AUGMENTATION_STREAM, draw_caption


def count_lengths(
    sources: Sequence,
    weights: Sequence[float],
    tokenizer,
    *,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 0,
) -> np.ndarray:
    """How many of the first training captions have 0, 1, … max_tokens tokens: int64 [max_tokens + 1].

    Of the first `SAMPLE` positions of the global order, or of one epoch if that is fewer, host h of H reads
    h, h + H, …; the sum of what all hosts return does not depend on how many they are. Samples that cannot
    be read are left out.

    Args:
        sources, weights, tokenizer, seed: as `train_batches` takes them.
        process_index, process_count: h and H.
        threads: that read; 0: `own_threads()`.
    """
    sizes = [len(source) for source in sources]
    order = global_order(sizes, weights, seed)

    def caption(position: int) -> str | None:
        source, index = order[position]
        try:
            rng = np.random.default_rng([AUGMENTATION_STREAM, seed, position])
            return draw_caption(sources[source][index], rng)
        except BadSample:
            return None

    positions = range(process_index, min(SAMPLE, sum(sizes)), process_count)
    with ThreadPoolExecutor(threads or own_threads()) as pool:
        captions = [caption for caption in pool.map(caption, positions) if caption is not None]
    _, mask = tokenizer(captions)
    return np.bincount(mask.sum(axis=1), minlength=mask.shape[1] + 1)
