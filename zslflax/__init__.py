"""Data-efficient, language-supervised zero-shot image recognition in JAX and Flax."""

__version__ = "0.1.0"
