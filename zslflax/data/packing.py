"""Packed captions: several share a row of fixed length, so that the text tower computes on little padding.

The number of rows follows from the lengths of the training captions alone; shapes never change during a run.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from zslflax.data.images import BadSample
from zslflax.data.pipeline import global_order, own_threads
from zslflax.data.preprocess import AUGMENTATION_STREAM, draw_caption
from zslflax.errors import UserError

SAMPLE = 4_096  # captions whose lengths are looked at
SIGMAS = 6.0  # above the mean; a normal variable is higher once in a billion draws


def rows_needed(counts: np.ndarray, captions: int, width: int) -> int:
    """Rows that practically always hold so many captions whole.

    A caption of ℓ tokens takes the share 1 / ⌊width / ℓ⌋ of a row, as if only such captions were in it, which
    allows for what remains free at the ends of rows. With m and s the mean and the standard deviation of the
    share over K captions, b further ones need

        ⌈b · m + 6 · s · √(b · (1 + b / K))⌉

    rows, where b / K is for the error of m itself; and never more than if all had the largest length.

    Args:
        counts: int [t + 1], of how many captions with 0 … t tokens were seen.
        captions: b, those that share the rows.
        width: tokens in a row, at least t.
    """
    lengths = np.arange(len(counts))
    share = np.where(lengths > 0, 1 / (width // np.maximum(lengths, 1)), 0.0)
    most, least = math.ceil(captions * share[-1]), math.ceil(captions / width)
    seen = counts.sum()
    if not seen:  # the pipeline will say why none could be read
        return most
    mean = counts @ share / seen
    deviation = math.sqrt(counts @ (share - mean) ** 2 / seen)
    rows = captions * mean + SIGMAS * deviation * math.sqrt(captions * (1 + captions / seen))
    return min(max(math.ceil(rows - 1e-9), least), most)  # 1e-9: rounding is no further row


def place(lengths: np.ndarray, rows: int, width: int) -> tuple[np.ndarray, np.ndarray] | None:
    """First fit, longest first: each text's row and its first column there; None where one does not fit."""
    row, column = np.zeros_like(lengths), np.zeros_like(lengths)
    free = np.full(rows, width)
    for length in np.unique(lengths[lengths > 0])[::-1]:
        own = np.flatnonzero(lengths == length)
        until = np.minimum(np.cumsum(free // length), len(own))  # of these are in the rows up to this one
        if until[-1] < len(own):
            return None
        taken = np.diff(until, prepend=0)
        row[own] = np.repeat(np.arange(rows), taken)
        before = np.arange(len(own)) - np.repeat(until - taken, taken)  # others of this length in its row
        column[own] = width - free[row[own]] + before * length
        free -= taken * length
    return row, column


def pack(text: np.ndarray, mask: np.ndarray, rows: int, width: int) -> dict[str, np.ndarray]:
    """Puts texts [b, t], in each of which the padding comes last, into `rows` rows of `width` tokens.

    Where they do not all fit, the longest are cut to the largest common length with which they do. Like one
    that the tokenizer cuts, such a text keeps its last token, the separator.

    Returns:
        `text`, `text_segment` and `text_position`, int32 [rows, width]: tokens, 1 + the number of the text
        that a token belongs to, its place in that text from 0, all 0 at padding; and `text_truncated`,
        bool [b].

    Raises:
        ValueError: not even one token of each text fits.
    """
    if len(text) > rows * width:
        raise UserError(f"{len(text)} texts do not fit into {rows} rows of {width} tokens")
    lengths = mask.sum(axis=1)
    limit = int(lengths.max(initial=0))
    while (places := place(np.minimum(lengths, limit), rows, width)) is None:
        limit -= 1
    row, column = places
    kept = np.minimum(lengths, limit)
    owner = np.repeat(np.arange(len(text)), kept)  # of every kept token, text after text
    position = np.arange(len(owner)) - np.repeat(np.cumsum(kept) - kept, kept)
    source = np.where(position == kept[owner] - 1, lengths[owner] - 1, position)
    at = row[owner], column[owner] + position
    packed = {name: np.zeros((rows, width), np.int32) for name in ("text", "text_segment", "text_position")}
    packed["text"][at] = text[owner, source]
    packed["text_segment"][at] = owner + 1
    packed["text_position"][at] = position
    return packed | {"text_truncated": lengths > limit}


def pack_batches(batches: Iterator[dict], rows: int, width: int, parts: int) -> Iterator[dict]:
    """The same batches with `pack`ed text, in `parts` equal parts, one after another, of `rows` rows each."""
    for batch in batches:
        texts, masks = np.split(batch["text"], parts), np.split(batch.pop("text_mask"), parts)
        packed = [pack(text, mask, rows, width) for text, mask in zip(texts, masks)]
        yield batch | {name: np.concatenate([part[name] for part in packed]) for name in packed[0]}


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
