"""The `Predictor`: a trained model as notebooks and applications use it."""

import copy
import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

import zslflax
from zslflax import distributed
from zslflax.data.text import Tokenizer
from zslflax.data.text_features import DEFAULT_CAPACITY, TextFeatures
from zslflax.data.views import evaluation_view
from zslflax.device_batches import map_method
from zslflax.files import hash_arrays
from zslflax.inference.class_cache import ClassCache
from zslflax.inference.class_embeddings import cached_class_embeddings
from zslflax.inference.export import SavedModel, export_model
from zslflax.inference.image_input import ImageInput, is_array, preprocess_images, read_image, to_numpy
from zslflax.inference.model_card import CardFacts
from zslflax.inference.probabilities import class_probabilities
from zslflax.inference.prompts import check_queries, read_class_names, read_templates
from zslflax.inference.restore import restore_model
from zslflax.inference.top_k import top_k_or_all
from zslflax.models.build import text_config
from zslflax.models.two_tower import TwoTower

Images = ImageInput | Iterable[ImageInput]
Names = str | Sequence[str]


class Predictor:
    """A trained model that embeds images and texts, classifies images and searches them by a sentence.

    It runs on all local devices. An embedding depends only on its image or text, up to the rounding of batches of
    different sizes.

    ```python
    from zslflax import Predictor

    predictor = Predictor.restore("runs/demo")
    predictor.classify(["one.jpg", "two.jpg"], ["a red circle", "a blue square"], top_k=1)
    # [[("a red circle", 0.31)], [("a blue square", 0.28)]]
    ```

    Attributes:
        config: of the run that trained the model.
        model: the `TwoTower`.
        variables: {"params", "batch_stats"} on the devices.
        tokenizer: the `Tokenizer` with which the model was trained; None for a `Classifier`.
        step: of the checkpoint.
        text_features: the features of recent texts; None for a `Classifier`.
        class_cache: the class embeddings on disk. Only `restore` enables it: class embeddings of a model in training
            would never be used again.
        allow_urls: whether images may be http(s) addresses.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: TwoTower,
        variables: Any,
        tokenizer: Tokenizer | None,
        step: int = 0,
        text_features: TextFeatures | None = None,
    ):
        self.config, self.model, self.tokenizer, self.step = config, model, tokenizer, step
        self.variables, self.class_cache = distributed.replicate(variables), ClassCache()
        self.allow_urls = False
        if text_features is None and tokenizer is not None:
            text_features = TextFeatures(model, self.variables, DEFAULT_CAPACITY)
        self.text_features = text_features

    def with_variables(self, variables: Any, step: int) -> "Predictor":
        """Returns a predictor with other variables of the same model; nothing is compiled again."""
        other = copy.copy(self)
        other.variables, other.step, other.class_cache = variables, step, ClassCache()
        if self.text_features is not None:
            other.text_features = self.text_features.with_variables(variables)
        return other

    @classmethod
    def restore(
        cls,
        source: str | Path,
        *,
        step: int | None = None,
        use: str = "teacher",
        cache: str | None = None,
        allow_urls: bool = False,
    ) -> "Predictor":
        """Loads a trained model; the number and kind of devices that trained it do not matter.

        Args:
            source: the workdir of a training run, a folder that `export` wrote, a CLIP or SigLIP as Hugging Face or
                open_clip publishes it, or the id of such a folder on the Hugging Face Hub, such as
                "openai/clip-vit-base-patch32".
            step: of a checkpoint in a workdir; default: the newest.
            use: "teacher" for the EMA teacher of a run (or the student where there is none), or "student". An exported
                folder has only one model.
            cache: folder of class embeddings, "" for none; default: ~/.cache/zslflax/classes, or none where the run
                had none. A model's config never names the folder.
            allow_urls: whether images may be http(s) addresses, which are then fetched.

        Raises:
            MissingFileError: there is no model, or no complete checkpoint of that step.
            UserError: `use` has another value, an export is asked for a step or a student, a file is damaged or says
                what cannot be (`zslflax.inference.model_checks`), or the tokenizer is not the one with which the model
                was trained.
        """
        from zslflax.inference.classifier import Classifier  # a subclass of this class

        restored = restore_model(source, step, use)
        predictor = (Classifier if restored.tokenizer is None else cls)(*restored)
        cache = restored.config.eval.class_cache if cache is None else cache
        predictor.class_cache = ClassCache(cache, predictor.text_encoder_identity)
        predictor.allow_urls = allow_urls
        return predictor

    def export(self, folder: str | Path, *, onnx: bool = False, facts: CardFacts | None = None) -> None:
        """Writes the model into a new folder that `restore` reads and that can be uploaded to the Hugging Face Hub.

        The folder has the weights (safetensors), config.json with the prompts, the tokenizer and a model card.

        Args:
            folder: new, or empty.
            onnx: whether to write both towers as ONNX as well, see `zslflax.inference.onnx_export`.
            facts: what the model card says beyond the config.

        Raises:
            FolderExistsError: the folder exists and is not empty.
            UserError: the folder is an address, such as gs://bucket/folder.
            StorageError: the folder cannot be made.
            MissingLibraryError: a library that `onnx` needs is not installed.
        """
        export_model(SavedModel(self.config, self.variables, self.step), self.tokenizer, folder, onnx, facts)

    def encode_image(self, images: Images) -> np.ndarray:
        """Embeds images, as unit vectors fp32 [b, d].

        Args:
            images: one image, or several of any sizes in a sequence or an iterator: paths, bytes or open files, PIL
                images of any mode, or arrays (NumPy, jax, PyTorch) [h, w], [h, w, 3] or [h, w, 4], uint8 or
                floating-point numbers in [0, 1]. With `allow_urls` also http(s) addresses. Transparent pixels become
                white, and EXIF orientation is applied. A folder stands for the images below it, in the order of
                `find_images`. Or an array uint8 [b, s, s, 3] of preprocessed images. There may be none.

        Raises:
            MissingFileError: a file does not exist.
            UserError: a file is not an image or is damaged, or an array has another shape or type.
        """
        return self._apply_to_images("encode_image", images)

    def image_outputs(self, images: Images) -> dict[str, np.ndarray]:
        """Returns the outputs of the image side for images, as `encode_image` takes them.

        Returns:
            "features", of the image tower, fp32 [b, f], and "embedding", unit vectors in the joint space, fp32 [b, d].
        """
        features = self._apply_to_images("image_features", images)
        return {"features": features, "embedding": self.project_image(features)}

    def project_image(self, features: np.ndarray) -> np.ndarray:
        """Projects outputs of the image tower, fp32 [b, f], to unit vectors fp32 [b, d]."""
        return self._apply_in_batches("project_image", features)

    def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
        """Embeds texts, as unit vectors fp32 [b, d]. Texts are truncated to `model.text.max_tokens`."""
        assert self.text_features is not None and self.tokenizer is not None
        texts = [texts] if isinstance(texts, str) else list(texts)
        features = self.text_features(*self.tokenizer(texts)) if texts else np.empty((0, 1), np.float32)
        return self._apply_in_batches("project_text", features)

    @overload
    def classify(
        self, images: Images, class_names: Names, *, templates: Names | None = None, top_k: int = 5
    ) -> list[list[tuple[str, float]]]: ...

    @overload
    def classify(
        self, images: Images, class_names: Names, *, templates: Names | None = None, top_k: int = 5, probabilities: bool
    ) -> list[list[tuple[str, float, float]]]: ...

    def classify(
        self, images: Any, class_names: Any, *, templates: Any = None, top_k: int = 5, probabilities: bool = False
    ) -> Any:
        """Returns for each image the `top_k` best class names (at most all), best first, with cosine similarities.

        Args:
            images: as in `encode_image`.
            class_names: any words, as a sequence; or a string: a file with one a line, or "a cat,a dog".
            templates: prompts with `{}` in place of the class name; default: `eval.templates` of the config.
            top_k: number of class names per image.
            probabilities: gives (name, similarity, probability) instead of (name, similarity); see
                `zslflax.inference.probabilities.class_probabilities`.

        Raises:
            MissingFileError: a file does not exist.
            UserError: an image, class name or template cannot be used; a string is neither a file nor a list.
        """
        class_names = as_list(class_names)
        class_emb, image_emb = self.class_embeddings(class_names, templates), self.encode_image(images)
        scores, ids = top_k_or_all(image_emb, class_emb, top_k)
        columns = [scores, self.probabilities(image_emb, class_emb, scores)] if probabilities else [scores]
        return [[(class_names[i], *map(float, values)) for i, *values in zip(*row)] for row in zip(ids, *columns)]

    def probabilities(self, image_emb: np.ndarray, class_emb: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Returns the probabilities [n, k] of cosine similarities [n, k], as `class_probabilities` defines them."""
        objective_params = jax.device_get(self.variables["params"].get("objective", {}))
        return class_probabilities(objective_params, image_emb, class_emb, scores)

    @overload
    def search(  # type: ignore[overload-overlap]  # a str is a sequence too
        self, query: str, images: Images, *, top_k: int = 5
    ) -> list[tuple[int, float]]: ...

    @overload
    def search(self, query: Sequence[str], images: Images, *, top_k: int = 5) -> list[list[tuple[int, float]]]: ...

    def search(self, query: Any, images: Any, *, top_k: int = 5) -> Any:
        """Returns the `top_k` images (at most all) that fit a sentence best: their indices and cosine similarities.

        Args:
            query: the sentence; no prompt template is applied. Or several sentences, which give a list for each.
            images: as in `encode_image`, or the embeddings fp32 [b, d] that it returned.
            top_k: number of images.

        Raises:
            UserError: a sentence is empty, or as `encode_image`.
        """
        queries = [query] if isinstance(query, str) else list(query)
        check_queries(queries)
        images = to_numpy(images) if is_array(images) else images
        embedded = isinstance(images, np.ndarray) and images.ndim == 2 and images.dtype == np.float32
        image_emb = images if embedded else self.encode_image(images)
        answers: list[list[tuple[int, float]]] = [[] for _ in queries]
        if len(image_emb) and queries:
            scores, ids = top_k_or_all(self.encode_text(queries), image_emb, top_k)
            answers = [[(int(i), float(s)) for i, s in zip(*row)] for row in zip(ids, scores)]
        return answers[0] if isinstance(query, str) else answers

    def class_embeddings(self, class_names: Names, templates: Names | None = None) -> np.ndarray:
        """Returns one unit embedding per class name, averaged over the prompt templates: fp32 [c, d].

        The arguments are those of `classify`.

        With several processes all of them must call it (and `classify`) with the same class names.
        """
        if templates is None:
            templates = tuple(self.config.eval.templates)
        elif isinstance(templates, str):
            templates = read_templates(templates)
        return cached_class_embeddings(self.class_cache, self.encode_text, as_list(class_names), tuple(templates))

    def preprocess(self, image: ImageInput) -> np.ndarray:
        """Resizes and crops one image, as in `encode_image`, to the input of the image tower: uint8 [s, s, 3]."""
        return evaluation_view(self.config)(read_image(image, self.allow_urls), index=0, view=0)

    def text_encoder_identity(self) -> dict[str, Any]:
        """Returns what the embedding of a text depends on besides the text, as a JSON value, for `ClassCache`."""
        assert self.tokenizer is not None
        params = flatten_dict(jax.device_get(self.variables["params"]["text"]), sep="/")
        sizes = dataclasses.asdict(text_config(self.config.model.text))
        return {
            "weights": hash_arrays(params),
            "sizes": json.loads(json.dumps(sizes)),  # JSON has no tuples
            "compute_dtype": self.config.compute_dtype,
            "tokenizer": self.tokenizer.identity,
            "version": zslflax.__version__,
        }

    def _apply_to_images(self, method: str, images: Any) -> np.ndarray:
        """Applies a method of the model to the images that `encode_image` takes."""
        preprocessed = preprocess_images(images, self.config.model.image.size, self.preprocess)
        chunks = [self._apply_in_batches(method, chunk) for chunk in preprocessed]
        return np.concatenate(chunks) if chunks else np.empty((0, self.config.model.embed_dim), np.float32)

    def _apply_in_batches(self, method: str, array: np.ndarray) -> np.ndarray:
        """Applies a method of the model to [b, …] in batches of one of a few sizes, so that few shapes are compiled."""
        if not len(array):
            return np.empty((0, self.config.model.embed_dim), np.float32)
        devices = jax.local_device_count()
        largest = max(devices, self.config.eval.batch_size // jax.process_count() // devices * devices)
        size = devices
        while size < min(len(array), largest):
            size *= 2
        return map_method(self.model, method).in_batches(self.variables, (array,), min(size, largest))


def as_list(class_names: str | Sequence[str]) -> list[str]:
    """Class names as a list; a string is a file or names with commas between them, as `read_class_names` takes it."""
    return read_class_names(class_names) if isinstance(class_names, str) else list(class_names)
