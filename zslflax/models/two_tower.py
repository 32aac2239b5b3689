"""The two-tower model: an image tower, a text tower, and their projections into one joint space.

A classifier is the same model without text tower: the projection of its image tower gives logits of classes.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from zslflax.models.batch_norm import EPSILON, fold_batch_norms

# Pixels of the images that a CPU takes through an image tower at a time: 2 of 224 × 224, 8 of 112 × 112. The arrays
# between the layers then stay in the processor's caches.
CHUNK_PIXELS = 2 * 224**2


class MlpProjection(nn.Module):
    """Two dense layers with the exact GELU and dropout between them.

    Dropout acts where `apply` gets an rng called "dropout".

    Attributes:
        width: of the output.
        hidden: width between the two layers.
        dropout: probability that an element between the layers becomes 0.
    """

    width: int
    hidden: int
    dropout: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [b, f] → [b, width]."""
        x = nn.gelu(nn.Dense(self.hidden, name="fc1")(x), approximate=False)
        x = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x)
        return nn.Dense(self.width, name="fc2")(x)


class ProjectedTower(nn.Module):
    """A tower and the projection after it.

    Attributes:
        tower: maps inputs to features [b, f]; a text tower also has the method `packed`.
        projection: maps features [b, f] to [b, d]; None where f = d and the features are used as they are.
        unit: whether the projected vectors are divided by their norms; those of a classifier, its logits, are not.
    """

    tower: Any
    projection: nn.Module | None
    unit: bool = True

    def __call__(self, *inputs: Any, train: bool) -> jax.Array:
        """Maps the tower's inputs → unit vectors, or logits, fp32 [b, d]."""
        return self.project(self.features(*inputs, train=train))

    def features(self, *inputs: Any, train: bool) -> jax.Array:
        """Maps the tower's inputs → fp32 [b, f]."""
        return self.tower(*inputs, train=train)

    def packed_features(self, *inputs: Any, train: bool) -> jax.Array:
        """Maps packed texts → fp32 [texts, f]; see `Bert.packed`."""
        return self.tower.packed(*inputs, train=train)

    def project(self, features: jax.Array) -> jax.Array:
        """Maps features [b, f] → unit vectors, or logits, fp32 [b, d]."""
        x = features.astype(jnp.float32)
        if self.projection is not None:
            x = self.projection(x)
        if not self.unit:
            return x
        # The gradient of x / norm(x) at 0 is NaN, even for a row that a mask removes from the loss.
        return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-12))


class TwoTower(nn.Module):
    """Maps images and texts to unit vectors in one space.

    The parameters are {"image": {"tower", "projection"}, "text": {"tower", "projection"}}. Call a method with
    `model.apply(variables, …, method="encode_image")`.

    Attributes:
        image, text: the tower and the projection of each modality; `text` is None for a classifier, and `image` then
            gives logits instead of unit vectors.
        mean, std: per channel, of pixels in [0, 1]; the statistics with which the image tower was pretrained.
    """

    image: ProjectedTower
    text: ProjectedTower | None
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(
        self, image: jax.Array, text: jax.Array | None = None, text_mask: jax.Array | None = None
    ) -> tuple[jax.Array, ...]:
        """Maps b images and, unless it is a classifier, b texts → unit vectors fp32 [b, d] of each."""
        image_emb = self.encode_image(image)
        if text is None or text_mask is None:
            return (image_emb,)
        return image_emb, self.encode_text(text, text_mask)

    def image_features(self, image: jax.Array, train: bool = False) -> jax.Array:
        """Maps uint8 [b, s, s, 3] → the output of the image tower, fp32 [b, f].

        Without `train`, a CPU computes a few images at a time; elsewhere, batch normalisations are folded into the
        convolutions, which is no faster on a CPU.
        """
        if train or self.is_initializing():
            return self.image.features(self.normalise(image), train=train)
        tower, variables = self.image.tower.unbind()
        if jax.default_backend() != "cpu":
            variables = fold_batch_norms(variables, getattr(tower, "epsilon", EPSILON))
            return tower.apply(variables, self.normalise(image), train=False)
        features = lambda chunk: tower.apply(variables, self.normalise(chunk), train=False)
        return map_chunks(features, image, max(1, CHUNK_PIXELS // (image.shape[1] * image.shape[2])))

    def normalise(self, image: jax.Array) -> jax.Array:
        """Maps uint8 [b, s, s, 3] → the input of the image tower, fp32 [b, s, s, 3]."""
        pixels = image.astype(jnp.float32) / 255.0
        return (pixels - jnp.asarray(self.mean)) / jnp.asarray(self.std)

    def text_features(self, text: jax.Array, text_mask: jax.Array, train: bool = False) -> jax.Array:
        """Maps int32 [b, t], bool [b, t] → the output of the text tower, fp32 [b, f]."""
        assert self.text is not None
        return self.text.features(text, text_mask, train=train)

    def packed_text_features(
        self, text: jax.Array, segment: jax.Array, position: jax.Array, texts: int, train: bool = False
    ) -> jax.Array:
        """Maps texts that share rows, three int32 [rows, t] → fp32 [texts, f]; see `Bert.packed`."""
        assert self.text is not None
        return self.text.packed_features(text, segment, position, texts, train=train)

    def project_image(self, features: jax.Array) -> jax.Array:
        """Maps the output of the image tower [b, f] → unit vectors fp32 [b, d]."""
        return self.image.project(features)

    def project_text(self, features: jax.Array) -> jax.Array:
        """Maps the output of the text tower [b, f] → unit vectors fp32 [b, d]."""
        assert self.text is not None
        return self.text.project(features)

    def encode_image(self, image: jax.Array, train: bool = False) -> jax.Array:
        """Maps uint8 [b, s, s, 3] → unit vectors fp32 [b, d]; with `train`, they depend on the whole batch."""
        return self.project_image(self.image_features(image, train))

    def encode_text(self, text: jax.Array, text_mask: jax.Array, train: bool = False) -> jax.Array:
        """Maps int32 [b, t], bool [b, t] → unit vectors fp32 [b, d]."""
        return self.project_text(self.text_features(text, text_mask, train))


def map_chunks(function: Callable[[jax.Array], jax.Array], inputs: jax.Array, size: int) -> jax.Array:
    """Returns function(inputs), computed on `size` rows of `inputs` at a time, one chunk after the other.

    >>> map_chunks(lambda x: 2 * x, jnp.arange(5), 2)
    Array([0, 2, 4, 6, 8], dtype=int32)

    Args:
        function: maps [b, …] → [b, …], each row by itself.
        inputs: [b, …]; the last chunk has what `size` leaves over.
        size: rows in a chunk.
    """
    whole = len(inputs) // size * size
    if whole <= size:
        return function(inputs)
    outputs = jax.lax.map(function, inputs[:whole].reshape(-1, size, *inputs.shape[1:]))
    outputs = outputs.reshape(whole, *outputs.shape[2:])
    return outputs if whole == len(inputs) else jnp.concatenate([outputs, function(inputs[whole:])])
