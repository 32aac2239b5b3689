"""Converts published position embeddings: tables of another size, and rotary channels in another order."""

import jax.numpy as jnp
import numpy as np

from zslflax.errors import UserError
from zslflax.models.vit import interpolate_positions


def resize_positions(table: np.ndarray, side: int, antialias: bool = True, tokens: int = 1) -> np.ndarray:
    """Resizes the position embeddings of a ViT, [1, 1 + s², w] or [1, s², w], to those of `side`² patches.

    The class token keeps its embedding, or gets zeros where the table has none: timm adds it to the token itself in
    networks with registers.

    Args:
        table: as published.
        side: number of patches along a side of the image.
        antialias: antialiased bicubic interpolation as in timm; otherwise `interpolate_bicubic`.
        tokens: 1 with a class token, 0 without.

    Returns:
        [1, tokens + side², w].
    """
    side_of = lambda count: round(count**0.5) if round(count**0.5) ** 2 == count else 0
    if tokens and side_of(table.shape[1]) and table.shape[1] > 1:
        table = np.concatenate([np.zeros_like(table[:, :1]), table], axis=1)
    old = side_of(table.shape[1] - tokens)
    if not old:
        raise UserError(
            f"position embeddings {table.shape}: expected those of a square, with or without one for the class token"
        )
    if old == side:
        return table
    if antialias:
        return np.array(interpolate_positions(jnp.asarray(table), (side, side), tokens))
    grid = interpolate_bicubic(table[:, tokens:].reshape(1, old, old, -1), side)
    return np.concatenate([table[:, :tokens], grid.reshape(1, side**2, -1)], axis=1)


def interpolate_bicubic(grid: np.ndarray, side: int) -> np.ndarray:
    """Resizes [b, s, s, w] → [b, side, side, w] as PyTorch's bicubic interpolation does without antialiasing.

    The kernel is that of Keys (1981) with a = −0.75; pixels beyond the border are those at the border.
    """
    old, a = grid.shape[1], -0.75
    x = (np.arange(side) + 0.5) * old / side - 0.5
    first = np.floor(x).astype(int) - 1
    weights = np.zeros((side, old))
    for tap in range(4):
        d = np.abs(x - first - tap)
        near, far = (a + 2) * d**3 - (a + 3) * d**2 + 1, a * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(weights, (np.arange(side), np.clip(first + tap, 0, old - 1)), np.where(d <= 1, near, far))
    return np.einsum("ih,jw,bhwc->bijc", weights, weights, grid).astype(grid.dtype)


def pair_halves(value: np.ndarray, heads: int, columns_first: bool) -> np.ndarray:
    """Reorders the channels of a projection whose rotary pairs are neighbours, as in EVA-02 and PE-Core.

    There, channels 2i and 2i + 1 of a head are a point in a plane; in `transformer.rotate`, i and i + w / 2 are.

    >>> pair_halves(np.array(["y0", "y0'", "y1", "y1'", "x0", "x0'", "x1", "x1'"]), heads=1, columns_first=False)
    array(['y0', 'y1', 'x0', 'x1', "y0'", "y1'", "x0'", "x1'"], dtype='<U3')

    Args:
        value: [..., heads · w], of queries or keys.
        heads: of the attention.
        columns_first: whether the first half of a head turns with the column of a patch; here it is the row.
    """
    axes = value.reshape(*value.shape[:-1], heads, 2, -1, 2)  # (…, heads, row or column, frequency, side of the pair)
    if columns_first:
        axes = np.flip(axes, axis=-3)
    return np.moveaxis(axes, -1, -3).reshape(value.shape)
