"""Text transformers as sentence encoders: BERT and its relatives, those of CLIP, SigLIP and CoCa, ModernBERT."""

import dataclasses
import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zslflax.errors import UserError
from zslflax.models.transformer import Attention, Mlp, rotary_angles

MAX_DISTANCE = 128  # of tokens, beyond which MPNet's relative position bias is constant (as T5's, arXiv 1910.10683)


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a text transformer, and how it differs from BERT.

    Attributes:
        vocab_size: number of token ids.
        width: of the vectors between layers.
        layers: number of layers.
        heads: attention heads in each layer.
        hidden: width inside the perceptrons.
        positions: rows of the table of position embeddings; with `rotary`, the longest text.
        first_position: row of the first token's position embedding: 0 for BERT, pad id + 1 for RoBERTa.
        types: rows of the table of token types, of which only the first one is used; 0 for no such table.
        eps: of the layer norms.
        pool: "mean": the average over the tokens of a text; "cls": the vector of its first token; "last": of its last.
        dropout: probability that an element of the embeddings or of a sublayer's output becomes 0 in training.
        activation: of the perceptrons, one of `transformer.ACTIVATIONS`.
        pre_norm: whether the layer norms precede the sublayers, and one follows the last layer.
        embedding_norm: whether a layer norm follows the embeddings.
        causal: whether a token attends to no later ones.
        attends_padding: whether texts are padded to the maximum length with tokens that count as any other (SigLIP).
        class_token: whether the vector of a text is that of a learnt token after it and its padding by token 0 (CoCa).
            It has the last position, and reads the text and one token of padding.
        zero_padding: whether token 0 fills up all texts to `max_tokens` and counts as any other token, although the
            vector of a text is that of its own last token (MobileCLIP 2).
        buckets: of distances, each with a learnt bias of the attention (MPNet); 0 for none.
        rotary: ModernBERT's layers, each as (base of the rotary position embeddings, distance up to which a token
            attends to others, 0 for any); () for a table of positions.
        gated: whether the perceptrons are gated.
        use_bias, norm_bias: whether dense layers and layer norms have biases.
    """

    vocab_size: int = 30_522
    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    positions: int = 512
    first_position: int = 0
    types: int = 2
    eps: float = 1e-12
    dropout: float = 0.1
    pool: str = "mean"
    activation: str = "gelu"
    pre_norm: bool = False
    embedding_norm: bool = True
    causal: bool = False
    attends_padding: bool = False
    class_token: bool = False
    zero_padding: bool = False
    buckets: int = 0
    rotary: tuple[tuple[float, int], ...] = ()
    gated: bool = False
    use_bias: bool = True
    norm_bias: bool = True

    def __post_init__(self) -> None:
        if self.class_token and self.pool != "last":
            raise UserError(f'model.text.pool is {self.pool!r}; expected "" or last: this tower has one way to pool')

    @property
    def max_tokens(self) -> int:
        """The number of tokens of a text that have a position embedding."""
        return self.positions - self.first_position - int(self.class_token)


class Layer(nn.Module):
    """A post-norm layer, LN(x + Attention(x)), then LN(x + Mlp(x)), or a pre-norm one, x + Attention(LN(x)), …

    Attributes:
        config: of the transformer.
        dtype: of the computation.
        index: of the layer, from 0.
    """

    config: BertConfig
    dtype: Any
    index: int = 0

    @nn.compact
    def __call__(
        self, x: jax.Array, position: jax.Array, mask: jax.Array, bias: jax.Array | None, train: bool
    ) -> jax.Array:
        """Maps [b, t, w] → [b, t, w].

        Args:
            x: one vector per token.
            position: int32, broadcast to [b, t].
            mask, bias: as in `Attention`.
            train: whether dropout is applied.
        """
        c = self.config
        drop = nn.Dropout(c.dropout, deterministic=not train)
        norm = partial(nn.LayerNorm, epsilon=c.eps, dtype=self.dtype, use_bias=c.norm_bias)
        attention = Attention(c.heads, self.dtype, c.use_bias, name="attention")
        mlp = Mlp(c.hidden, self.dtype, c.activation, c.gated, c.use_bias, name="mlp")
        rotation = None
        if c.rotary:
            base, window = c.rotary[self.index]
            rotation = rotary_angles(position, c.width // c.heads, base)
            if window:
                mask = mask & (jnp.abs(distances(position)) <= window)[:, None]
        if not c.pre_norm:
            x = norm(name="norm1")(x + drop(attention(x, mask, bias, rotation)))
            return norm(name="norm2")(x + drop(mlp(x)))
        first = bool(c.rotary) and self.index == 0  # ModernBERT's embeddings have been normalised
        x = x + drop(attention(x if first else norm(name="norm1")(x), mask, bias, rotation))
        return x + drop(mlp(norm(name="norm2")(x)))


class Bert(nn.Module):
    """Maps a text to one vector: the last layer's mean over its tokens, or the vector of its first or last token.

    `__call__` takes one text per row; `packed` takes rows that hold several texts, and computes the same vectors.
    Dropout is applied to the embeddings and to the output of each sublayer, but not to attention weights.

    Attributes:
        config: the sizes.
        dtype: of the computation; parameters are fp32.
        remat: whether the backward pass recomputes the activations inside each layer instead of storing them.
    """

    config: BertConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def __call__(self, text: jax.Array, text_mask: jax.Array, train: bool = False) -> jax.Array:
        """Maps one text per row → fp32 [b, width].

        Args:
            text: token ids int32 [b, t].
            text_mask: bool [b, t], False at padding. A row without any token gives zeros.
            train: whether dropout is applied.

        Raises:
            UserError: the rows have more tokens than there are position embeddings.
        """
        c = self.config
        if text.shape[1] > c.max_tokens:
            raise UserError(
                f"texts of {text.shape[1]} tokens, but the encoder has {c.max_tokens} positions; "
                "lower model.text.max_tokens"
            )
        if c.class_token:
            return self.class_vector(text, text_mask, train)
        attended = text_mask
        if c.zero_padding:  # rows may be shorter than the texts of which the tower has learnt
            rest = (0, 0), (0, c.max_tokens - text.shape[1])
            text, text_mask = jnp.pad(jnp.where(text_mask, text, 0), rest), jnp.pad(text_mask, rest)
            attended = jnp.ones_like(text_mask)
        position = jnp.arange(text.shape[1], dtype=jnp.int32)[None]
        x = self.last_layer(text, position, attended[:, None, None, :], train)
        tokens = jnp.sum(text_mask, axis=1, keepdims=True)
        pooled = text_mask & self.pools(position, tokens)
        weight = pooled[:, :, None].astype(jnp.float32)
        return jnp.sum(x.astype(jnp.float32) * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1e-9)

    def class_vector(self, text: jax.Array, text_mask: jax.Array, train: bool) -> jax.Array:
        """Returns the vector of the class token after each text; the arguments and the result are those of a call."""
        c, t = self.config, text.shape[1]
        text = jnp.pad(jnp.where(text_mask, text, 0), ((0, 0), (0, int(t < c.max_tokens))))
        # The mask of CoCa's weights is one too late: a token is read unless the token before it is a zero.
        attended = jnp.pad(text != 0, ((0, 0), (1, 0)), constant_values=True)
        position = jnp.append(jnp.arange(text.shape[1], dtype=jnp.int32), c.positions - 1)[None]
        x = self.last_layer(text, position, attended[:, None, None, :], train)[:, -1].astype(jnp.float32)
        return jnp.where(jnp.any(text_mask, axis=1, keepdims=True), x, 0.0)

    def packed(
        self, text: jax.Array, segment: jax.Array, position: jax.Array, texts: int, train: bool = False
    ) -> jax.Array:
        """Maps texts that share rows → fp32 [texts, width]. A token attends only to tokens of its own text.

        Args:
            text: token ids int32 [rows, t].
            segment: int32 [rows, t], the number of the token's text, 1 … `texts`; 0 for padding.
            position: int32 [rows, t], the position of the token in its text, from 0.
            texts: number of texts. A text without any token gives zeros.
            train: whether dropout is applied.

        Raises:
            UserError: padding is part of each text.
        """
        if self.config.zero_padding or self.config.class_token:
            raise UserError(
                "model.text.pack_length: this text tower reads padding, which packed rows lack; set it to 0"
            )
        same_text = segment[:, None, :, None] == segment[:, None, None, :]
        x = self.last_layer(text, position, same_text, train).astype(jnp.float32)
        # Padding gets an index out of range, which segment_sum drops; thousands of additions to one row would be slow.
        owner = jnp.where(segment > 0, segment - 1, texts)
        total = lambda x, of: jax.ops.segment_sum(x, of.reshape(-1), num_segments=texts)
        tokens = total(jnp.ones(segment.size, jnp.float32), owner)
        if self.config.pool != "mean":
            last = jnp.concatenate([tokens, jnp.zeros(1)])[owner]
            owner = jnp.where(self.pools(position, last), owner, texts)
            tokens = jnp.minimum(tokens, 1.0)
        return total(x.reshape(-1, x.shape[-1]), owner) / jnp.maximum(tokens[:, None], 1e-9)

    def pools(self, position: jax.Array, tokens: jax.Array) -> jax.Array:
        """Whether the vector of a token is part of its text's: bool, from its position and the text's length."""
        return {"mean": position >= 0, "cls": position == 0, "last": position == tokens - 1}[self.config.pool]

    @nn.compact
    def last_layer(self, text: jax.Array, position: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        """Returns the vector of every token after the last layer, [rows, t, width]; `mask` as in `Attention`."""
        c = self.config
        norm = partial(nn.LayerNorm, epsilon=c.eps, use_bias=c.norm_bias)
        table = partial(nn.Embed, features=c.width, embedding_init=nn.initializers.normal(0.02))
        x = table(c.vocab_size, name="word")(text)
        if c.class_token:
            token = self.param("cls_token", nn.initializers.normal(0.02), (c.width,))
            x = jnp.concatenate([x, jnp.broadcast_to(token, (x.shape[0], 1, c.width))], axis=1)
        if not c.rotary:
            x = x + table(c.positions, name="position")(position + c.first_position)
        if c.types:
            x = x + table(c.types, name="type")(jnp.zeros((1, 1), jnp.int32))
        x = (norm(name="norm")(x) if c.embedding_norm else x).astype(self.dtype)
        x = nn.Dropout(c.dropout, deterministic=not train)(x)
        if c.causal:
            mask = mask & (distances(position) <= 0)[:, None]
        bias = None
        if c.buckets:
            bucket_bias = table(c.buckets, features=c.heads, name="distance")
            bias = bucket_bias(distance_bucket(distances(position), c.buckets)).transpose(0, 3, 1, 2).astype(self.dtype)
        layer = nn.remat(Layer, static_argnums=(5,)) if self.remat else Layer  # argument 5 is `train`
        for i in range(c.layers):
            x = layer(c, self.dtype, i, name=f"layer_{i}")(x, position, mask, bias, train)
        return norm(name="last_norm", dtype=self.dtype)(x) if c.pre_norm else x


def distances(position: jax.Array) -> jax.Array:
    """Returns how many tokens another token (third axis) comes after a token (second axis): [b, t] → [b, t, t]."""
    return position[:, None, :] - position[:, :, None]


def distance_bucket(distance: jax.Array, buckets: int) -> jax.Array:
    """Returns the number of the bucket of each distance: exact where it is short, then on a logarithmic scale (T5).

    >>> distance_bucket(jnp.array([0, -1, 1, -1000]), 32).tolist()
    [0, 1, 17, 15]
    """
    half = buckets // 2
    exact = half // 2
    n = np.arange(MAX_DISTANCE + 1, dtype=np.float32)
    # On the host, in the order of the original: the rounding of a device may choose the next bucket.
    far = exact + (np.log(np.maximum(n, 1) / exact) / math.log(MAX_DISTANCE / exact) * (half - exact)).astype(int)
    table = jnp.asarray(np.where(n < exact, n, np.minimum(far, half - 1)), jnp.int32)
    return jnp.where(distance > 0, half, 0) + table[jnp.minimum(jnp.abs(distance), MAX_DISTANCE)]
