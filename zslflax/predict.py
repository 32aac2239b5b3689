"""Predictor: a trained model as notebooks and applications use it."""

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from zslflax import checkpoint, parallel
from zslflax.config import compute_dtype, from_json
from zslflax.data import images
from zslflax.data.text import Tokenizer
from zslflax.features import TextFeatures
from zslflax.models import two_tower
from zslflax.models.pretrained import locate
from zslflax.state import merge
from zslflax.step import AXIS
from zslflax.zeroshot.classifier import class_embeddings, top_k

KEPT_TEXTS = 1 << 15  # texts whose features a predictor remembers; 100 MB at a width of 768
TEXT_FOLDER = "text_encoder"  # in the workdir: the tokenizer's files and the text encoder's config.json


class Predictor:
    """Embeds images and texts, and names images, with one model on the devices that are there.

    Attributes:
        config: the run's config.
        model, variables: the `TwoTower` and what it is applied to.
        tokenizer: the `Tokenizer` that it was trained with.
        step: the step of the checkpoint.
    """

    def __init__(self, config, model, variables, tokenizer: Tokenizer, step: int = 0, text_features=None):
        self.config, self.model, self.tokenizer, self.step = config, model, tokenizer, step
        self.variables = parallel.replicate(variables)
        self.text_features = text_features or TextFeatures(model, self.variables, KEPT_TEXTS)
        map_method = lambda method: parallel.map_embed(lambda variables, x: model.apply(variables, x, method=method))
        self._encode_image, self._project_text = map_method("encode_image"), map_method("project_text")

    def with_variables(self, variables, step: int) -> "Predictor":
        """The same model at another state, without compiling anything again."""
        other = copy.copy(self)
        other.variables, other.step = variables, step
        other.text_features = self.text_features.with_variables(variables)
        return other

    @classmethod
    def restore(cls, workdir: str | Path, *, step: int | None = None, use: str = "teacher") -> "Predictor":
        """Loads a run's model, on any device: its EMA teacher, or the student with `use="student"`.

        A run without an EMA has a student only, which `use="teacher"` then gives as well. The default step is the newest.

        Raises:
            FileNotFoundError: the folder is no workdir, or has no complete checkpoint of that step.
            ValueError: `use` is neither "teacher" nor "student".
        """
        workdir = Path(workdir).expanduser()
        if use not in ("teacher", "student"):
            raise ValueError(f'use is {use!r}, expected "teacher" or "student"')
        if not (workdir / "config.json").is_file():
            raise FileNotFoundError(f"{workdir} has no config.json: expected the --workdir of a training run")
        steps = checkpoint.available(workdir)
        if not steps or step not in (None, *steps):
            found = f"found steps {', '.join(map(str, steps))}" if steps else "found none"
            raise FileNotFoundError(f"{workdir} has no complete checkpoint{f' of step {step}' if step else ''}; {found}")
        step = steps[-1] if step is None else step
        config = from_json((workdir / "config.json").read_text())
        model, tokenizer = build_model(config, workdir / TEXT_FOLDER)
        return cls(config, model, restore_variables(workdir, step, use), tokenizer, step)

    def encode_image(self, pictures) -> np.ndarray:
        """Unit embeddings of images, fp32 [b, d].

        Args:
            pictures: one or several of: a path, a PIL image, an array uint8 [h, w, 3] (any sizes); or an array
                uint8 [b, s, s, 3] of already prepared images.
        """
        if isinstance(pictures, np.ndarray) and pictures.ndim == 4:
            prepared = pictures
        else:
            one = isinstance(pictures, (str, Path, Image.Image, np.ndarray))
            prepared = np.stack([self._prepare(picture) for picture in ([pictures] if one else pictures)])
        return self._in_batches(self._encode_image, prepared)

    def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
        """Unit embeddings of texts, fp32 [b, d]; texts beyond the maximum number of tokens are truncated."""
        tokens, mask = self.tokenizer([texts] if isinstance(texts, str) else list(texts))
        return self._in_batches(self._project_text, self.text_features(tokens, mask))

    def classify(
        self, pictures, names: Sequence[str], *, templates: Sequence[str] | None = None, top_k: int = 5
    ) -> list[list[tuple[str, float]]]:
        """The `top_k` best of `names` for each image, best first, with their cosine similarities.

        Args:
            pictures: as `encode_image` takes them.
            names: class names, any words.
            templates: prompts with a {} for the name; the default is the config's.
        """
        classes = self.class_embeddings(names, templates)
        scores, ids = _top_k(self.encode_image(pictures), classes, min(top_k, len(names)))
        return [[(names[i], float(s)) for i, s in zip(*row)] for row in zip(ids, scores)]

    def class_embeddings(self, names: Sequence[str], templates: Sequence[str] | None = None) -> np.ndarray:
        """Unit embedding of each name, averaged over the prompts: fp32 [c, d]."""
        templates = tuple(self.config.eval.templates if templates is None else templates)
        return np.asarray(class_embeddings(self.encode_text, list(names), templates, self.config.eval.batch_size))

    def _prepare(self, picture) -> np.ndarray:
        if isinstance(picture, (str, Path)):
            picture = images.decode(Path(picture).expanduser().read_bytes())
        elif isinstance(picture, Image.Image):
            picture = np.asarray(picture.convert("RGB"))
        size = self.config.model.image.size
        return images.resize_center_crop(picture, size, round(size * self.config.eval.resize))

    def _in_batches(self, function, array: np.ndarray) -> np.ndarray:
        """Applies a mapped function to batches of one of a few sizes, so that few shapes are compiled."""
        if not len(array):
            return np.empty((0, self.config.model.embed_dim), np.float32)
        devices = jax.local_device_count()
        largest = max(devices, self.config.eval.batch_size // jax.process_count() // devices * devices)
        size = devices
        while size < min(len(array), largest):
            size *= 2
        return parallel.in_batches(function, self.variables, array, min(size, largest))


_top_k = top_k


def build_model(config, text_folder: Path | None = None) -> tuple[two_tower.TwoTower, Tokenizer]:
    """The model that a config describes, without its parameters, and its tokenizer.

    `text_folder` is where a run has kept its tokenizer and its text encoder's sizes; without it, they come from where the
    config says.
    """
    text = config.model.text
    model_config = config.model.copy_and_resolve_references()
    if text_folder is None:
        tokenizer = Tokenizer.from_folder(locate(text.tokenizer or text.pretrained), text.max_tokens)
    else:
        tokenizer = Tokenizer.from_folder(text_folder, text.max_tokens)
        if text.pretrained:
            model_config.text.pretrained = str(text_folder)
    return two_tower.build(model_config, dtype=compute_dtype(config), axis_name=AXIS), tokenizer


def keep_text_encoder(config, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes into a run's folder what `build_model` needs to restore it elsewhere, without the pretrained weights."""
    tokenizer.save(folder)
    if config.model.text.pretrained:
        shutil.copyfile(locate(config.model.text.pretrained) / "config.json", folder / "config.json")


def restore_variables(workdir: Path, step: int, use: str) -> dict:
    """What the model is applied to, read from a checkpoint onto the host."""
    names = ("params", "batch_stats", "teacher_params", "teacher_batch_stats")
    saved = checkpoint.restore_parts(workdir, step, names if use == "teacher" else names[:2])
    if use == "teacher" and saved["teacher_params"]:
        return {
            "params": merge(saved["params"], saved["teacher_params"]),
            "batch_stats": saved["teacher_batch_stats"],
        }
    return {"params": saved["params"], "batch_stats": saved["batch_stats"]}
