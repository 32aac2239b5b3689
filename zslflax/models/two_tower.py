"""The image tower, the text tower, and their projections to the joint space."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class Side(nn.Module):
    """A tower and the linear projection after it, or None where the tower is as wide as the joint space."""

    tower: nn.Module
    projection: nn.Module | None

    def __call__(self, *inputs, train: bool) -> jax.Array:
        return self.project(self.features(*inputs, train=train))

    def features(self, *inputs, train: bool) -> jax.Array:
        return self.tower(*inputs, train=train)

    def packed_features(self, *inputs, train: bool) -> jax.Array:
        return self.tower.packed(*inputs, train=train)

    def project(self, features: jax.Array) -> jax.Array:
        """[b, f] → unit vectors fp32 [b, d]."""
        x = features.astype(jnp.float32)
        if self.projection is not None:
            x = self.projection(x)
        # Not x / norm(x), whose gradient at 0 is NaN, also where a mask takes the row out of the loss.
        return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x**2, axis=-1, keepdims=True), 1e-12))


class TwoTower(nn.Module):
    """Images and texts to unit vectors in one space.

    Parameters are {"image": {"tower", "projection"}, "text": {"tower", "projection"}}. Everything is
    available as `model.apply(variables, …, method="encode_image")` and so on.

    Attributes:
        image, text: the two sides.
        mean, std: of the pixels in [0, 1], per channel, as the image tower expects them.
    """

    image: Side
    text: Side
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __call__(self, image: jax.Array, text: jax.Array, text_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.encode_image(image), self.encode_text(text, text_mask)

    def image_features(self, image: jax.Array, train: bool = False) -> jax.Array:
        """uint8 [b, s, s, 3] → the image tower's output fp32 [b, f]."""
        pixels = image.astype(jnp.float32) / 255.0
        return self.image.features((pixels - jnp.asarray(self.mean)) / jnp.asarray(self.std), train=train)

    def text_features(self, text: jax.Array, text_mask: jax.Array, train: bool = False) -> jax.Array:
        """int32 [b, t], bool [b, t] → the text tower's output fp32 [b, f]."""
        return self.text.features(text, text_mask, train=train)

    def packed_text_features(
        self, text: jax.Array, segment: jax.Array, position: jax.Array, texts: int, train: bool = False
    ) -> jax.Array:
        """The same of texts that share rows, int32 [rows, t] each → fp32 [texts, f]; see `Bert.packed`."""
        return self.text.packed_features(text, segment, position, texts, train=train)

    def project_image(self, features: jax.Array) -> jax.Array:
        """The image tower's output → unit vectors fp32 [b, d]."""
        return self.image.project(features)

    def project_text(self, features: jax.Array) -> jax.Array:
        """The text tower's output → unit vectors fp32 [b, d]."""
        return self.text.project(features)

    def encode_image(self, image: jax.Array, train: bool = False) -> jax.Array:
        """uint8 [b, s, s, 3] → unit vectors fp32 [b, d]; without `train`, each from its image alone."""
        return self.project_image(self.image_features(image, train))

    def encode_text(self, text: jax.Array, text_mask: jax.Array, train: bool = False) -> jax.Array:
        """int32 [b, t], bool [b, t] → unit vectors fp32 [b, d]."""
        return self.project_text(self.text_features(text, text_mask, train))
