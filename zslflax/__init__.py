"""Data-efficient, language-supervised zero-shot image recognition in JAX and Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zslflax.inference.predictor import Predictor

__version__ = "0.2.0"
__all__ = ["Predictor", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports `Predictor` when it is first used, so that importing the package costs nothing."""
    if name == "Predictor":
        from zslflax.inference.predictor import Predictor

        return Predictor
    raise AttributeError(f"module 'zslflax' has no attribute {name!r}")
