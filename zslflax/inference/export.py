"""The format of an exported model: a folder that predicts without its run, without pickles and without Orbax.

`zslflax.safetensors` has the variables, `config.json` the sizes and the prompts, `README.md` is the model card, and
`text_encoder/` has the tokenizer. `image_encoder/` has the config.json of an image tower that has no name. A workdir
has these two folders as well.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from safetensors.numpy import save_file

from zslflax.config import default_config, is_classifier
from zslflax.config_json import read_config
from zslflax.data.text import Tokenizer
from zslflax.errors import MissingFileError, UserError
from zslflax.files import hash_arrays, local_path, open_tensors, read_json
from zslflax.inference.model_card import CardFacts, model_card
from zslflax.inference.model_checks import check_finite, check_saved_config, check_shapes
from zslflax.models.build import resolve_model
from zslflax.models.import_weights.architecture import read_architecture
from zslflax.models.import_weights.locate import locate
from zslflax.saving import new_folder, storage_errors, write_atomically, write_json, write_text

TEXT_FOLDER = "text_encoder"  # in workdirs and exports: the tokenizer, and the config.json of a pretrained text encoder
IMAGE_FOLDER = "image_encoder"  # likewise: the config.json of an image tower whose files describe it
IDENTITY = "identity.json"  # in TEXT_FOLDER: `Tokenizer.identity`
# Not model.safetensors: transformers would read a file of that name, find none of its tensors, and use random ones.
WEIGHTS = "zslflax.safetensors"
# Fields of `config.eval` that a prediction depends on.
EVAL_FIELDS = ("templates", "resize_factor", "interpolation", "batch_size")


class SavedModel(NamedTuple):
    """A model on disk: the config, {"params", "batch_stats"} as NumPy arrays, and the step of the checkpoint."""

    config: ConfigDict
    variables: dict[str, Any]
    step: int


def export_model(
    model: SavedModel,
    tokenizer: Tokenizer | None,
    folder: str | Path,
    onnx: bool = False,
    facts: CardFacts | None = None,
) -> None:
    """Writes a model into a new folder, as `Predictor.export` describes it, with its errors.

    Args:
        model: what is written; its arrays may be on devices.
        tokenizer: with which it was trained; None for a classifier.
        folder, onnx, facts: as in `Predictor.export`.
    """
    folder = local_path(folder, "the folder of the export")
    if onnx:
        from zslflax.inference.onnx_export import export_onnx, import_onnx_libraries

        import_onnx_libraries()  # an error comes before anything is written
    config, variables, step = model
    with new_folder(folder):
        if tokenizer is not None:
            save_text_encoder(config, tokenizer, folder / TEXT_FOLDER)
        save_image_encoder(config, folder / IMAGE_FOLDER)
        save_model(folder, config, jax.device_get(variables), step, model_card(config, step, facts, onnx))
        if onnx:
            export_onnx(config, variables, folder)


def save_model(folder: Path, config: ConfigDict, variables: dict[str, Any], step: int, card: str) -> None:
    """Writes zslflax.safetensors, config.json and README.md, each atomically.

    The name of a tensor is its path, such as params/image/projection/kernel; the metadata has a hash of them all. The
    config has only the fields that prediction needs: nothing about the data or about the folders of the machine that
    trained the model.

    Args:
        folder: exists.
        config: the whole config.
        variables: {"params", "batch_stats"}, arrays of any kind.
        step: of the checkpoint.
        card: the text of README.md.
    """
    write_json(folder / "config.json", prediction_fields(config))
    write_text(folder / "README.md", card)
    is_head = lambda name: name.startswith("params/objective/") and name.count("/") > 2  # used in training alone
    arrays = flatten_dict(variables, sep="/")
    tensors = {name: np.asarray(x, order="C") for name, x in arrays.items() if not is_head(name)}
    mode = (folder / "README.md").stat().st_mode

    def write_weights(partial: Path) -> None:
        save_file(tensors, partial, {"format": "np", "step": str(step), "sha256": hash_arrays(tensors)})
        partial.chmod(mode)  # save_file lets nobody else read the file

    with storage_errors(folder / WEIGHTS):
        write_atomically(folder / WEIGHTS, write_weights)


def prediction_fields(config: ConfigDict) -> dict[str, Any]:
    """Returns the fields of a config that prediction needs, with the paths that they have in the exported folder."""
    model = resolve_model(config.model, check=False).to_dict()
    # Its weights are among the tensors; only a tower without a name needs its config.json.
    model["image"]["pretrained"] = "" if config.model.image.name else IMAGE_FOLDER
    model["text"]["tokenizer"] = "" if is_classifier(config) else TEXT_FOLDER
    model["text"]["pretrained"] = TEXT_FOLDER if config.model.text.pretrained and not is_classifier(config) else ""
    return {
        "name": config.name,
        "compute_dtype": config.compute_dtype,
        "model": model,
        "objective": config.objective.to_dict() | {"sentences": ""},
        "eval": {name: config.eval[name] for name in EVAL_FIELDS},
    }


def read_saved_config(folder: Path) -> ConfigDict:
    """Reads the config.json that `save_model` wrote. Fields that prediction does not need have their defaults.

    Raises:
        UserError: the file is no config of an exported model, or a field cannot be used.
    """
    config = read_config(folder / "config.json")
    check_saved_config(config, folder / "config.json")
    kept = default_config()
    for section, values in prediction_fields(config).items():
        if isinstance(values, dict):
            kept[section].update(values)
        else:
            kept[section] = values
    return kept


def load_model(folder: Path, config: ConfigDict, expected: Mapping[str, tuple[int, ...]]) -> SavedModel:
    """Reads the weights that `save_model` wrote.

    Args:
        folder: of the exported model.
        config: from `read_saved_config`.
        expected: the shapes of the model's variables, from `variable_shapes`; compared before anything is read.

    Raises:
        UserError: the file has other arrays, is damaged, or has numbers that are not finite.
    """
    path = folder / WEIGHTS
    with open_tensors(path) as file:
        metadata = file.metadata() or {}
        if not str(metadata.get("step")).isdecimal() or "sha256" not in metadata:
            raise UserError(f"{path} is not of a model that zslflax exported: its metadata has no step or no sha256")
        check_shapes(expected, {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, path)
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if hash_arrays(tensors) != metadata["sha256"]:
        raise UserError(f"{path} is damaged: its arrays are not those that were exported; copy or download it again")
    check_finite(tensors, path)
    return SavedModel(config, {"batch_stats": {}} | unflatten_dict(tensors, sep="/"), int(metadata["step"]))


def save_text_encoder(config: ConfigDict, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes what a text tower needs besides weights: the tokenizer, its identity, and the encoder's config.json."""
    tokenizer.save(folder)
    write_json(folder / IDENTITY, tokenizer.identity)
    if config.model.text.pretrained:
        write_json(folder / "config.json", read_architecture(locate(config.model.text.pretrained)))


def save_image_encoder(config: ConfigDict, folder: Path) -> None:
    """Writes the config.json that describes an image tower without a name; nothing for another one."""
    if not config.model.image.name:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", read_architecture(locate(config.model.image.pretrained)))


def use_encoders(config: ConfigDict, folder: Path) -> None:
    """Makes a config use the files in `TEXT_FOLDER` and `IMAGE_FOLDER` of a folder, not those the run started from."""
    config.model.text.tokenizer = str(folder / TEXT_FOLDER)
    if config.model.text.pretrained:
        config.model.text.pretrained = str(folder / TEXT_FOLDER)
    if not config.model.image.name:
        config.model.image.pretrained = str(folder / IMAGE_FOLDER)


def check_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Refuses a tokenizer that differs from the one that `save_text_encoder` wrote into `folder`."""
    path = folder / IDENTITY
    if not path.is_file():
        raise MissingFileError(f"{path} is missing; it identifies the tokenizer that the model was trained with")
    trained = read_json(path)
    if tokenizer.identity != trained:
        raise UserError(
            f"the tokenizer in {folder} is not the one that the model was trained with, and would give "
            f"it other tokens: expected {trained}, found {tokenizer.identity}; put the original files back"
        )
