"""BERT and RoBERTa as sentence encoders with pooling over the tokens (DeCLUTR, Sentence-BERT, MiniLM, BGE)."""

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zslflax.errors import UserError
from zslflax.models.transformer import Attention, Mlp

ROBERTAS = ("roberta", "xlm-roberta", "camembert")  # values of Hugging Face's model_type for one architecture
HF_SIZES = {  # field of BertConfig: field of a Hugging Face config.json
    "vocab_size": "vocab_size",
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "positions": "max_position_embeddings",
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT.

    Attributes:
        vocab_size: number of token ids.
        width: of the vectors between layers.
        layers: number of layers.
        heads: attention heads in each layer.
        hidden: width inside the perceptrons.
        positions: rows of the table of position embeddings.
        first_position: row of the first token's position embedding: 0 for BERT, pad id + 1 for RoBERTa.
        types: rows of the table of token types; only the first one is used.
        eps: of the layer norms.
        pool: "mean": the average over the tokens of a text; "cls": the vector of its first token.
        dropout: probability that an element of the embeddings or of a sublayer's output becomes 0 in training.
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

    @property
    def max_tokens(self) -> int:
        """The number of tokens that have a position embedding."""
        return self.positions - self.first_position

    @classmethod
    def from_hf(cls, values: dict[str, Any], dropout: float = 0.1) -> "BertConfig":
        """Reads the sizes from the contents of a Hugging Face config.json.

        >>> sizes = {"vocab_size": 30_522, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12}
        >>> sizes |= {"intermediate_size": 1536, "max_position_embeddings": 512}
        >>> BertConfig.from_hf({"model_type": "bert", **sizes}).max_tokens
        512

        Raises:
            UserError: `Bert` does not implement the architecture or one of its options.
        """
        kind = values.get("model_type")
        if kind != "bert" and kind not in ROBERTAS:
            raise UserError(f"config.json has model_type {kind!r}; expected bert or {', '.join(ROBERTAS)}")
        for field, wanted in (
            ("hidden_act", "gelu"),
            ("position_embedding_type", "absolute"),
            ("is_decoder", False),
        ):
            if values.get(field, wanted) != wanted:
                raise UserError(f"config.json has {field} {values[field]!r}; only {wanted!r} is implemented")
        missing = [field for field in HF_SIZES.values() if field not in values]
        if missing:
            raise UserError(f"config.json lacks {', '.join(missing)}; take the one published with the weights")
        return cls(
            **{ours: values[theirs] for ours, theirs in HF_SIZES.items()},
            first_position=values.get("pad_token_id", 1) + 1 if kind in ROBERTAS else 0,
            types=values.get("type_vocab_size", 2),
            eps=values.get("layer_norm_eps", 1e-12),
            dropout=dropout,
        )


class Layer(nn.Module):
    """A post-norm layer: LN(x + Attention(x)), then LN(x + Mlp(x))."""

    config: BertConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        """Maps [b, t, w] → [b, t, w]; `mask` as in `Attention`."""
        c = self.config
        drop = nn.Dropout(c.dropout, deterministic=not train)
        x = x + drop(Attention(c.heads, self.dtype, name="attention")(x, mask))
        x = nn.LayerNorm(epsilon=c.eps, dtype=self.dtype, name="norm1")(x)
        x = x + drop(Mlp(c.hidden, self.dtype, name="mlp")(x))
        return nn.LayerNorm(epsilon=c.eps, dtype=self.dtype, name="norm2")(x)


class Bert(nn.Module):
    """Maps a text to one vector: the last layer's mean over the tokens of the text, or its vector of the first token.

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
        position = jnp.arange(text.shape[1], dtype=jnp.int32)[None]
        x = self.last_layer(text, position, text_mask[:, None, None, :], train)
        pooled = text_mask & (position == 0) if c.pool == "cls" else text_mask
        weight = pooled[:, :, None].astype(jnp.float32)
        return jnp.sum(x.astype(jnp.float32) * weight, axis=1) / jnp.maximum(jnp.sum(weight, axis=1), 1e-9)

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
        """
        same_text = segment[:, None, :, None] == segment[:, None, None, :]
        x = self.last_layer(text, position, same_text, train).astype(jnp.float32)
        # Padding gets an index out of range, which segment_sum drops; thousands of additions to one row would be slow.
        pooled = (segment > 0) & (position == 0) if self.config.pool == "cls" else segment > 0
        owner = jnp.where(pooled, segment - 1, texts).reshape(-1)
        total = partial(jax.ops.segment_sum, segment_ids=owner, num_segments=texts)
        tokens = total(jnp.ones(segment.size, jnp.float32))
        return total(x.reshape(-1, x.shape[-1])) / jnp.maximum(tokens[:, None], 1e-9)

    @nn.compact
    def last_layer(self, text: jax.Array, position: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
        """Returns the vector of every token after the last layer, [rows, t, width]; `mask` as in `Attention`."""
        c = self.config
        table = partial(nn.Embed, features=c.width, embedding_init=nn.initializers.normal(0.02))
        x = table(c.vocab_size, name="word")(text)
        x = x + table(c.positions, name="position")(position + c.first_position)
        x = x + table(c.types, name="type")(jnp.zeros((1, 1), jnp.int32))
        x = nn.LayerNorm(epsilon=c.eps, name="norm")(x).astype(self.dtype)
        x = nn.Dropout(c.dropout, deterministic=not train)(x)
        layer = nn.remat(Layer, static_argnums=(3,)) if self.remat else Layer  # argument 3 is `train`
        for i in range(c.layers):
            x = layer(c, self.dtype, name=f"layer_{i}")(x, mask, train)
        return x
