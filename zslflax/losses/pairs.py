"""The image-text pairs of a batch: which of them are a pair's positives, and which it is compared with."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict


class Embeddings(NamedTuple):
    """Unit embeddings of the same pairs, fp32 [b, d]."""

    image: jax.Array
    text: jax.Array


class PairIds(NamedTuple):
    """Hashes of the pairs' contents, uint32 [b, 2]: equal images have equal ids, and so have equal captions."""

    image: jax.Array
    text: jax.Array


class Pairs(NamedTuple):
    """Image-text pairs: the global batch (n of them), a device's share (b), or a chunk of that (c).

    Attributes:
        position: int32 [c], of each pair in the global batch.
        valid: bool [c]; an invalid pair is neither a positive nor a negative.
        student: the student's embeddings [c, d].
        teacher: the teacher's embeddings, of any width; None where the objective needs none.
        ids: of images and captions, [c, 2] each; None where duplicates are negatives.
    """

    position: jax.Array
    valid: jax.Array
    student: Embeddings
    teacher: Embeddings | None
    ids: PairIds | None = None


def find_columns(config: ConfigDict, rows: Pairs, batch: Pairs) -> tuple[jax.Array, jax.Array]:
    """The columns that are a row's positives, 1 in fp32 [c, n], and those that take part, bool [n] or [c, n].

    A duplicate of a pair is another valid pair with the same image or the same caption. By `config.duplicates` it is a
    "negative", like all others; a "positive", like the pair itself; or "ignored", and does not take part.
    """
    positives, valid = rows.position[:, None] == batch.position, batch.valid
    if config.duplicates != "negative":
        assert rows.ids is not None and batch.ids is not None
        same = lambda own, others: jnp.all(own[:, None] == others, axis=-1)
        duplicates = ~positives & (same(rows.ids.image, batch.ids.image) | same(rows.ids.text, batch.ids.text))
        if config.duplicates == "positive":
            positives |= duplicates & valid
        else:
            valid &= ~duplicates
    return positives.astype(jnp.float32), valid


def soft_label_columns(config: ConfigDict, rows: Pairs, batch: Pairs) -> jax.Array:
    """Which columns may carry a row's soft labels, bool [c, n].

    Those that take part; without the row's positives, where the config removes them.
    """
    positives, valid = find_columns(config, rows, batch)
    if config.remove_diagonal:
        return valid & (positives == 0)
    return jnp.broadcast_to(valid, positives.shape)
