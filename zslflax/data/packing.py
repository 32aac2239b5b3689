"""Packed captions: several share a row of fixed length, so that the text tower spends little work on padding.

The number of rows follows from the lengths of the training captions alone; the shapes never change during a run.
"""

import math
from collections.abc import Iterator
from typing import cast

import numpy as np

from zslflax.data.batch import Batch
from zslflax.errors import UserError

COUNTED_CAPTIONS = 4_096  # whose lengths determine the number of rows
SIGMAS = 6.0  # above the mean: a normal variable exceeds it once in a billion draws


def rows_needed(counts: np.ndarray, captions: int, width: int) -> int:
    """The number of rows into which a given number of captions practically always fits whole.

    A caption of ℓ tokens is taken to need the share 1 / ⌊width / ℓ⌋ of a row, as if all captions in its row were as
    long, which allows for the free space at the ends of rows. With m and s the mean and the standard deviation of
    this share over K counted captions, b further captions need

        ⌈b · m + 6 · s · √(b · (1 + b / K))⌉

    rows, where b / K accounts for the error of m itself; and never more than if all had the largest length.

    >>> counts = np.zeros(61, int)
    >>> counts[12] = 4_096  # all captions have 12 tokens, so that 10 fit into a row
    >>> rows_needed(counts, captions=64, width=128)
    7

    Args:
        counts: int [t + 1], how many of the counted captions have 0 … t tokens.
        captions: b, the captions that share the rows.
        width: tokens in a row, at least t.
    """
    lengths = np.arange(len(counts))
    share = np.where(lengths > 0, 1 / (width // np.maximum(lengths, 1)), 0.0)
    most, least = math.ceil(captions * share[-1]), math.ceil(captions / width)
    total = counts.sum()
    if not total:  # no caption could be read: the pipeline will say why
        return most
    mean = counts @ share / total
    deviation = math.sqrt(counts @ (share - mean) ** 2 / total)
    rows = captions * mean + SIGMAS * deviation * math.sqrt(captions * (1 + captions / total))
    return min(max(math.ceil(rows - 1e-9), least), most)  # 1e-9: a rounding error does not need another row


def place_texts(lengths: np.ndarray, rows: int, width: int) -> tuple[np.ndarray, np.ndarray] | None:
    """First-fit decreasing: each text's row and its first column there, int [b]; None if not all texts fit."""
    row, column = np.zeros_like(lengths), np.zeros_like(lengths)
    free = np.full(rows, width)
    for length in np.unique(lengths[lengths > 0])[::-1]:
        texts = np.flatnonzero(lengths == length)
        placed = np.minimum(np.cumsum(free // length), len(texts))  # how many are in the rows up to each one
        if placed[-1] < len(texts):
            return None
        taken = np.diff(placed, prepend=0)
        row[texts] = np.repeat(np.arange(rows), taken)
        before = np.arange(len(texts)) - np.repeat(placed - taken, taken)  # others of this length in the same row
        column[texts] = width - free[row[texts]] + before * length
        free -= taken * length
    return row, column


def pack(text: np.ndarray, mask: np.ndarray, rows: int, width: int) -> dict[str, np.ndarray]:
    """Packs texts into `rows` rows of `width` tokens.

    If they do not all fit, the longest are cut to the largest common length at which they do. A text that is cut
    keeps its last token, the separator, as if the tokenizer had cut it.

    >>> text = np.array([[5, 6, 7], [8, 9, 0], [4, 0, 0]])
    >>> packed = pack(text, text > 0, rows=2, width=4)
    >>> packed["text"].tolist()
    [[5, 6, 7, 4], [8, 9, 0, 0]]
    >>> packed["text_segment"].tolist()
    [[1, 1, 1, 3], [2, 2, 0, 0]]
    >>> packed["text_position"].tolist()
    [[0, 1, 2, 0], [0, 1, 0, 0]]

    Args:
        text: int32 [b, t], token ids; in each row the padding comes last.
        mask: bool [b, t], False at padding.
        rows: of the result.
        width: tokens in a row.

    Returns:
        `text`, `text_segment` and `text_position`, int32 [rows, width]: token ids, 1 + the index of the text to which
        a token belongs, and its position in that text from 0; all are 0 at padding. `text_truncated`, bool [b].

    Raises:
        UserError: not even one token of each text fits.
    """
    if len(text) > rows * width:
        raise UserError(f"{len(text)} texts do not fit into {rows} rows of {width} tokens")
    lengths = mask.sum(axis=1)
    limit = int(lengths.max(initial=0))
    while (places := place_texts(np.minimum(lengths, limit), rows, width)) is None:
        limit -= 1
    row, column = places
    kept = np.minimum(lengths, limit)
    owner = np.repeat(np.arange(len(text)), kept)  # the text of every kept token, text after text
    position = np.arange(len(owner)) - np.repeat(np.cumsum(kept) - kept, kept)
    source = np.where(position == kept[owner] - 1, lengths[owner] - 1, position)
    at = row[owner], column[owner] + position
    packed = {name: np.zeros((rows, width), np.int32) for name in ("text", "text_segment", "text_position")}
    packed["text"][at] = text[owner, source]
    packed["text_segment"][at] = owner + 1
    packed["text_position"][at] = position
    return packed | {"text_truncated": lengths > limit}


def pack_batches(batches: Iterator[Batch], rows: int, width: int, parts: int) -> Iterator[Batch]:
    """The same batches with `pack`ed text: `parts` equal parts, one after another, each packed into `rows` rows."""
    for batch in batches:
        texts, masks = np.split(batch["text"], parts), np.split(batch["text_mask"], parts)
        packed = [pack(text, mask, rows, width) for text, mask in zip(texts, masks)]
        joined = {name: np.concatenate([part[name] for part in packed]) for name in packed[0]}
        rest = {key: value for key, value in batch.items() if key != "text_mask"}
        yield cast(Batch, rest | joined)
