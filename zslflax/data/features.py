"""Outputs of the text tower, kept for texts that come again."""

import copy

import jax
import numpy as np

from zslflax import distributed

WIDTH = 8  # tokens; texts are padded to a multiple of it instead of to the maximum
DEFAULT_CAPACITY = 1 << 15  # texts; 100 MB at a width of 768
ROWS = 16  # texts in each call, on each device: one shape for each width, so that a text's output never varies


class TextFeatures:
    """The text tower's outputs, each text going through it once for as long as it stays the same.

    A tower that is frozen gives a caption the same output in every epoch, to student, teacher and evaluation.

    Args:
        model, variables: the `TwoTower` and what it is applied to; the text tower's parameters are enough.
        capacity: texts that are kept on the host, 4 · f bytes each; from then on new ones are computed every time.
        frozen: whether `with_variables` can count on the same text tower.
    """

    def __init__(self, model, variables, capacity: int, frozen: bool = False):
        apply = lambda variables, inputs: model.apply(variables, *inputs, method="text_features")
        self.function, self.variables = distributed.map_over_devices(apply), variables
        self.capacity, self.frozen = capacity, frozen
        self.places, self.kept = {}, None

    def with_variables(self, variables) -> "TextFeatures":
        """The outputs of the same model at another state, without compiling anything again."""
        if self.frozen:
            return self
        other = copy.copy(self)
        other.variables, other.places, other.kept = variables, {}, None
        return other

    def __call__(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """int32 [b, t], bool [b, t] → fp32 [b, f]; in each row the padding comes last."""
        lengths = mask.sum(axis=1)
        keys = [row[:length].tobytes() for row, length in zip(tokens, lengths)]
        new = {key: i for i, key in enumerate(keys) if key not in self.places}
        computed = dict(zip(new, self.compute(tokens, mask, lengths, np.array(list(new.values()), int))))
        self.keep(computed)
        return np.stack([computed[key] if key in computed else self.kept[self.places[key]] for key in keys])

    def compute(self, tokens, mask, lengths, rows: np.ndarray) -> list[np.ndarray]:
        """The outputs of some rows, texts of similar length together."""
        widths = np.minimum(-(-lengths[rows] // WIDTH) * WIDTH, tokens.shape[1])
        outputs = {}
        for width in np.unique(widths):
            own = rows[widths == width]
            inputs = tokens[own, :width], mask[own, :width]
            size = ROWS * jax.local_device_count()
            outputs |= zip(own.tolist(), distributed.map_in_batches(self.function, self.variables, inputs, size))
        return [outputs[row] for row in rows.tolist()]

    def keep(self, computed: dict[bytes, np.ndarray]) -> None:
        """Adds outputs to those that are kept, while there is room."""
        for key, output in list(computed.items())[: self.capacity - len(self.places)]:
            if self.kept is None:
                self.kept = np.empty((self.capacity, len(output)), np.float32)  # takes memory as it is written
            self.kept[len(self.places)] = output
            self.places[key] = len(self.places)
