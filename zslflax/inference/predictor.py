"""Predictor: a trained model as notebooks and applications use it; as a program, it names images.

python -m zslflax.predict cat.jpg dog.jpg --workdir=runs/demo --names="a cat,a dog"
python -m zslflax.predict --workdir=runs/demo --export=FOLDER
"""

import copy
import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from PIL import Image

import zslflax
from zslflax import checkpoint, distributed
from zslflax.config import compute_dtype
from zslflax.config_json import read_config
from zslflax.data import images
from zslflax.data.features import DEFAULT_CAPACITY, TextFeatures
from zslflax.data.text import Tokenizer
from zslflax.errors import MissingFileError, UserError
from zslflax.inference import export
from zslflax.inference.class_embeddings import ClassCache, class_embeddings
from zslflax.inference.top_k import top_k
from zslflax.models import two_tower
from zslflax.models.build import build_two_tower, text_config
from zslflax.models.import_weights.locate import locate
from zslflax.models.partition import combine


class Predictor:
    """Embeds images and texts, and names images, with one model on the devices that are there.

    An embedding depends on its image or text alone, up to the rounding of batches of different sizes.

    Attributes:
        config: the run's config.
        model, variables: the `TwoTower` and what it is applied to.
        tokenizer: the `Tokenizer` that it was trained with.
        step: the step of the checkpoint.
        class_cache: where class embeddings of many names are kept; `restore` sets it, because only a model that
            stays as it is can ask for them again.
    """

    def __init__(self, config, model, variables, tokenizer: Tokenizer, step: int = 0, text_features=None):
        self.config, self.model, self.tokenizer, self.step = config, model, tokenizer, step
        self.variables, self.class_cache = distributed.replicate(variables), ClassCache()
        self.text_features = text_features or TextFeatures(model, self.variables, DEFAULT_CAPACITY)
        map_method = lambda method: distributed.map_over_devices(lambda variables, x: model.apply(variables, x, method=method))
        self._encode_image, self._project_text = map_method("encode_image"), map_method("project_text")

    def with_variables(self, variables, step: int) -> "Predictor":
        """The same model at another state, without compiling anything again."""
        other = copy.copy(self)
        other.variables, other.step, other.class_cache = variables, step, ClassCache()
        other.text_features = self.text_features.with_variables(variables)
        return other

    @classmethod
    def restore(
        cls, source: str | Path, *, step: int | None = None, use: str = "teacher", cache: str | None = None
    ) -> "Predictor":
        """Loads a model, on any device.

        Args:
            source: the workdir of a training run, a folder that `export` wrote, or, as a string, the id of
                such a folder on the Hugging Face Hub.
            step: of a workdir's checkpoints; default: the newest.
            use: of a run, "teacher": its EMA, or the student where it has none; or "student". An exported
                folder holds one of them only.
            cache: the folder of the `ClassCache`, "" for none; default: the config's `eval.class_cache`.

        Raises:
            FileNotFoundError: there is neither, or no complete checkpoint of that step.
            ValueError: `use` is neither "teacher" nor "student", a step or the student of an export, a
                damaged file, or a tokenizer that is not the one that the model was trained with.
        """
        if use not in ("teacher", "student"):
            raise UserError(f'use is {use!r}, expected "teacher" or "student"')
        folder = locate(source) if isinstance(source, str) else source.expanduser()
        if not (folder / "config.json").is_file():
            raise MissingFileError(
                f"{folder} has no config.json: expected the --workdir of a training run, or an exported model"
            )
        if (folder / export.WEIGHTS).is_file():
            if step is not None or use != "teacher":
                raise UserError(f"{folder} is an exported model, which has no steps and no student beside it")
            config, variables, step = export.load_model(folder)
        else:
            config, variables, step = read_run(folder, step, use)
        export.use_text_encoder(config, folder / export.TEXT_FOLDER)
        model, tokenizer = build_model(config)
        export.check_tokenizer(tokenizer, folder / export.TEXT_FOLDER)
        predictor = cls(config, model, variables, tokenizer, step)
        predictor.class_cache = ClassCache(config.eval.class_cache if cache is None else cache, predictor.identify_text)
        return predictor

    def export(self, folder: str | Path) -> None:
        """Writes the model into a new folder that `restore` reads, fit for the Hugging Face Hub.

        It holds the weights in safetensors, config.json with the prompts, the tokenizer and a model card.

        Raises:
            FileExistsError: the folder exists and is not empty.
        """
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError(f"{folder} is not empty; an export goes into a new folder")
        export.save_text_encoder(self.config, self.tokenizer, folder / export.TEXT_FOLDER)
        export.save_model(folder, self.config, jax.device_get(self.variables), self.step)

    def encode_image(self, pictures) -> np.ndarray:
        """Unit embeddings of images, fp32 [b, d].

        Args:
            pictures: one or several of: a path, a PIL image of any mode, an array uint8 [h, w], [h, w, 3] or
                [h, w, 4] (any sizes; what is transparent becomes white); or an array uint8 [b, s, s, 3] of
                images that are already as large as the model takes them. None at all is fine.

        Raises:
            FileNotFoundError: no such file.
            ValueError: no image, a damaged one, or an array of another shape or type.
        """
        size = self.config.model.image.size
        if isinstance(pictures, np.ndarray) and pictures.ndim == 4:
            if pictures.dtype != np.uint8 or pictures.shape[1:] != (size, size, 3):
                raise UserError(
                    f"expected prepared images uint8 [b, {size}, {size}, 3], found {pictures.dtype} "
                    f"{list(pictures.shape)}; images of other sizes go into a list"
                )
            return self._in_batches(self._encode_image, pictures)
        one = isinstance(pictures, (str, Path, Image.Image, np.ndarray))
        prepared = [self.prepare(picture) for picture in ([pictures] if one else pictures)]
        return self._in_batches(self._encode_image, np.stack(prepared) if prepared else np.empty((0, size, size, 3)))

    def encode_text(self, texts: str | Sequence[str]) -> np.ndarray:
        """Unit embeddings of texts, fp32 [b, d]; texts beyond the maximum number of tokens are truncated."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        features = self.text_features(*self.tokenizer(texts)) if texts else np.empty((0, 1))
        return self._in_batches(self._project_text, features)

    def classify(
        self, pictures, names: Sequence[str], *, templates: Sequence[str] | None = None, top_k: int = 5
    ) -> list[list[tuple[str, float]]]:
        """The `top_k` best of `names` (at most all) for each image, best first, with cosine similarities.

        Args:
            pictures: as `encode_image` takes them.
            names: class names, any words.
            templates: prompts with a {} for the name; the default is the config's.
        """
        classes = self.class_embeddings(names, templates)
        scores, ids = nearest(self.encode_image(pictures), classes, top_k)
        return [[(names[i], float(s)) for i, s in zip(*row)] for row in zip(ids, scores)]

    def search(self, query: str, pictures, *, top_k: int = 5) -> list[tuple[int, float]]:
        """The `top_k` images (at most all) that fit a sentence best: their numbers and cosine similarities.

        Args:
            query: the sentence, as it is; no prompt is put around it.
            pictures: as `encode_image` takes them, or their embeddings, as it returns them.
        """
        embedded = isinstance(pictures, np.ndarray) and pictures.dtype == np.float32
        image_emb = pictures if embedded else self.encode_image(pictures)
        if not len(image_emb):
            return []
        scores, ids = nearest(self.encode_text(query), image_emb, top_k)
        return [(int(i), float(s)) for i, s in zip(ids[0], scores[0])]

    def class_embeddings(self, names: Sequence[str], templates: Sequence[str] | None = None) -> np.ndarray:
        """Unit embedding of each name, averaged over the prompts: fp32 [c, d]."""
        names, templates = list(names), tuple(self.config.eval.templates if templates is None else templates)
        class_emb = self.class_cache.read(names, templates)
        if class_emb is None:
            class_emb = class_embeddings(self.encode_text, names, templates)
            self.class_cache.write(names, templates, class_emb)
        return class_emb

    def identify_text(self) -> dict:
        """What the embedding of a text depends on, for `ClassCache`."""
        params = flatten_dict(jax.device_get(self.variables["params"]["text"]), sep="/")
        weights = hashlib.sha256()
        for name, array in sorted(params.items()):
            weights.update(f"{name} {array.dtype} {array.shape} ".encode())
            weights.update(np.ascontiguousarray(array))
        sizes = dataclasses.asdict(text_config(self.config.model.text))
        return {
            "weights": weights.hexdigest(),
            "sizes": sizes,
            "compute_dtype": self.config.compute_dtype,
            "tokenizer": self.tokenizer.identity,
            "version": zslflax.__version__,
        }

    def prepare(self, picture) -> np.ndarray:
        """One image, as `encode_image` takes it, as large as the model takes it: uint8 [s, s, 3]."""
        size = self.config.model.image.size
        return images.resize_center_crop(read_image(picture), size, round(size * self.config.eval.resize_factor))

    def _in_batches(self, function, array: np.ndarray) -> np.ndarray:
        """Applies a mapped function to batches of one of a few sizes, so that few shapes are compiled."""
        if not len(array):
            return np.empty((0, self.config.model.embed_dim), np.float32)
        devices = jax.local_device_count()
        largest = max(devices, self.config.eval.batch_size // jax.process_count() // devices * devices)
        size = devices
        while size < min(len(array), largest):
            size *= 2
        return distributed.map_in_batches(function, self.variables, array, min(size, largest))


def nearest(queries: np.ndarray, keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`top_k`, of all where there are fewer."""
    return top_k(queries, keys, min(k, len(keys)))


def read_image(picture) -> np.ndarray:
    """A path, a PIL image or an array as `Predictor.encode_image` takes them: uint8 [h, w, 3]."""
    if isinstance(picture, (str, Path)):
        try:
            return images.decode(Path(picture).expanduser().read_bytes())
        except images.BadSample as error:
            raise images.BadSample(f"{picture}: {error}") from error
    if isinstance(picture, Image.Image):
        return np.array(images.to_rgb(picture))
    array = np.asarray(picture)
    if array.dtype != np.uint8 or not (array.ndim == 2 or array.ndim == 3 and array.shape[2] in (3, 4)):
        raise UserError(
            f"expected an image as uint8 [h, w], [h, w, 3] or [h, w, 4], found {array.dtype} {list(array.shape)}"
        )
    return array if array.shape[2:] == (3,) else np.array(images.to_rgb(Image.fromarray(array)))


def build_model(config) -> tuple[two_tower.TwoTower, Tokenizer]:
    """The model that a config describes, without its parameters, and its tokenizer."""
    text = config.model.text
    tokenizer = Tokenizer.from_folder(locate(text.tokenizer or text.pretrained), text.max_tokens)
    rows = text_config(text).vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the text tower's table has {rows} rows; "
            f"nearest that works: model.text.scratch.vocab_size={tokenizer.vocab_size}, or the tokenizer of the "
            "pretrained encoder"
        )
    return build_two_tower(config.model, dtype=compute_dtype(config), axis_name=distributed.AXIS), tokenizer


def read_run(workdir: Path, step: int | None, use: str) -> tuple:
    """Of a training run, for `Predictor.restore`: config, what the model is applied to (NumPy), step."""
    steps = checkpoint.complete_steps(workdir)
    if not steps or step not in (None, *steps):
        found = f"found steps {', '.join(map(str, steps))}" if steps else "found none"
        raise MissingFileError(f"{workdir} has no complete checkpoint{f' of step {step}' if step else ''}; {found}")
    step = steps[-1] if step is None else step
    config = read_config(workdir / "config.json")
    names = ("params", "frozen_params", "batch_stats", "teacher_params", "teacher_batch_stats")
    saved = checkpoint.restore_parts(workdir, step, names if use == "teacher" else names[:3])
    params, batch_stats = saved["params"], saved["batch_stats"]
    if use == "teacher" and saved["teacher_params"]:
        params = {**params, **saved["teacher_params"]}  # the objective has no average
        batch_stats = saved["teacher_batch_stats"]
    variables = {"params": combine(params, saved["frozen_params"]), "batch_stats": batch_stats}
    return config, variables, step
