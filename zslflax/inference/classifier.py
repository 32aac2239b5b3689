"""A trained classifier as notebooks and applications use it: a `Predictor` with classes of its own."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from zslflax.errors import UserError, nearest_names
from zslflax.inference.predictor import Images, Names, Predictor, as_list


class Classifier(Predictor):
    """A `Predictor` whose model has a linear head of fixed classes instead of a text tower.

    Its image embeddings are the probabilities of these classes, and a class embedding is 1 at the class. Whatever
    compares both, such as evaluation, compares probabilities. `Predictor.restore` returns one where the model has
    classes:

    ```python
    classifier = Predictor.restore("student")
    classifier.classify("image.jpg", top_k=1)  # [[("cat", 0.97)]]
    ```
    """

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the probabilities."""
        return tuple(self.config.model.class_names)

    def encode_image(self, images: Images) -> np.ndarray:
        """Returns the probabilities of the classes for images, as `Predictor.encode_image` takes them: fp32 [b, c]."""
        return np.asarray(jax.nn.softmax(super().encode_image(images)))

    def image_outputs(self, images: Images) -> dict[str, np.ndarray]:
        """Returns "features", of the image tower, fp32 [b, f], and "logits" of the classes, fp32 [b, c]."""
        outputs = super().image_outputs(images)
        return {"features": outputs["features"], "logits": outputs["embedding"]}

    def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
        """Returns a row for each class name, which is 1 at the class: fp32 [b, c].

        Raises:
            UserError: a text is not among the classes.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        index = {name: i for i, name in enumerate(self.class_names)}
        if unknown := [text for text in texts if text not in index]:
            raise UserError(
                f"this classifier has {len(index)} classes, and {unknown[0]!r} is not among them; nearest: "
                f"{nearest_names(unknown[0], index)}"
            )
        return np.eye(len(index), dtype=np.float32)[[index[text] for text in texts]]

    def class_embeddings(self, class_names: Names, templates: Names | None = None) -> np.ndarray:
        """Returns the rows of `encode_text`; templates are not used."""
        return self.encode_text(as_list(class_names))

    def probabilities(self, image_emb: np.ndarray, class_emb: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Returns the scores, which are probabilities already."""
        return scores

    def classify(
        self,
        images: Any,
        class_names: Any = None,
        *,
        templates: Any = None,
        top_k: int = 5,
        probabilities: bool = False,
    ) -> Any:
        """Returns for each image the `top_k` most probable classes, best first, with their probabilities.

        Args:
            images: as in `encode_image`.
            class_names: some of the classes; default: all.
            templates: not used.
            top_k: number of class names per image.
            probabilities: gives the probability twice, in place of the similarity too.
        """
        class_names = self.class_names if class_names is None else class_names
        return super().classify(images, class_names, top_k=top_k, probabilities=probabilities)

    def text_encoder_identity(self) -> dict[str, Any]:
        """There is no text encoder."""
        return {}
