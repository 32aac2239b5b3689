"""Loads a model from the workdir of a run, an exported folder, a published CLIP or SigLIP, or the Hugging Face Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from zslflax import distributed
from zslflax.config import compute_dtype, is_classifier
from zslflax.config_json import read_config
from zslflax.data.text import Tokenizer
from zslflax.errors import MissingFileError, UserError
from zslflax.files import local_path
from zslflax.inference.export import (
    IMAGE_FOLDER,
    TEXT_FOLDER,
    WEIGHTS,
    SavedModel,
    check_tokenizer,
    load_model,
    read_saved_config,
    use_encoders,
)
from zslflax.inference.model_checks import (
    check_finite,
    check_image_encoder,
    check_saved_config,
    check_shapes,
    check_text_encoder,
    use_own_places,
    variable_shapes,
    wrong_types,
)
from zslflax.inference.published import config_path, is_published, load_published, published_config
from zslflax.models.build import build_classifier, build_two_tower, text_config
from zslflax.models.import_weights.locate import WEIGHTS_ALONE, locate
from zslflax.models.partition import combine
from zslflax.models.two_tower import TwoTower


class RestoredModel(NamedTuple):
    """A trained model, ready for use.

    Attributes:
        config: of the run that trained it.
        model: the `TwoTower`.
        variables: {"params", "batch_stats"}, NumPy arrays.
        tokenizer: with which it was trained; None for a classifier.
        step: of the checkpoint; 0 of a published model.
    """

    config: ConfigDict
    model: TwoTower
    variables: dict[str, Any]
    tokenizer: Tokenizer | None
    step: int


def restore_model(source: str | Path, step: int | None = None, use: str = "teacher") -> RestoredModel:
    """Loads a trained model; arguments and errors are those of `Predictor.restore`."""
    if use not in ("teacher", "student"):
        raise UserError(f'use is {use!r}, expected "teacher" or "student"')
    folder = locate(source) if isinstance(source, str) else local_path(source, "the model")
    if is_published(folder):
        return restore_published(folder, step, use)
    check_has_config(folder)
    exported = (folder / WEIGHTS).is_file()
    if exported and (step is not None or use != "teacher"):
        raise UserError(f"{folder} is an exported model, which has no steps and no student beside it")
    config = read_saved_config(folder) if exported else read_run_config(folder)
    use_encoders(config, folder)
    check_image_encoder(config, folder / IMAGE_FOLDER / "config.json")
    if not is_classifier(config):
        check_text_encoder(config, folder / TEXT_FOLDER / "config.json")
    try:
        model, tokenizer = build_model(config)
    except UserError as error:
        raise type(error)(f"the model of {folder / 'config.json'} cannot be built: {error}") from error
    if tokenizer is not None:
        check_tokenizer(tokenizer, folder / TEXT_FOLDER)
    expected = variable_shapes(model, config, folder / "config.json")
    saved = load_model(folder, config, expected) if exported else read_run(folder, config, expected, step, use)
    return RestoredModel(config, model, saved.variables, tokenizer, saved.step)


def restore_published(folder: Path, step: int | None = None, use: str = "teacher") -> RestoredModel:
    """Loads a CLIP or SigLIP as Hugging Face or open_clip publishes it; arguments as `restore_model` takes them."""
    if step is not None or use != "teacher":
        raise UserError(f"{folder} is a published model, which has no steps and no student beside it")
    path = config_path(folder)
    with wrong_types(path):
        config = published_config(folder)
    check_saved_config(config, path)
    check_text_encoder(config, path)
    check_image_encoder(config, path)
    with wrong_types(path):
        model, tokenizer = build_model(config)
    variables = load_published(folder, config, model)
    check_finite(flatten_dict(variables, sep="/"), folder)
    return RestoredModel(config, model, variables, tokenizer, 0)


def check_has_config(folder: Path) -> None:
    """Raises a MissingFileError where a folder has no config.json."""
    if not (folder / "config.json").is_file():
        raise MissingFileError(
            f"{folder} has no config.json: expected the --workdir of a training run, an exported model, or a published "
            f"CLIP or SigLIP. {WEIGHTS_ALONE}"
        )


def read_run_config(workdir: Path) -> ConfigDict:
    """Reads the config of a training run, with the places of this machine.

    Raises:
        MissingFileError: there is none.
        UserError: a field cannot be used.
    """
    check_has_config(workdir)
    config = read_config(workdir / "config.json")
    check_saved_config(config, workdir / "config.json")
    use_own_places(config)
    return config


def read_run(
    workdir: Path, config: ConfigDict, expected: Mapping[str, tuple[int, ...]], step: int | None, use: str
) -> SavedModel:
    """Reads the variables and the step of a checkpoint of a training run.

    Args:
        workdir: of the run.
        config: from `read_run_config`.
        expected: the shapes of the model's variables, from `variable_shapes`.
        step, use: as in `Predictor.restore`.

    Raises:
        MissingFileError: there is no complete checkpoint of that step.
        UserError: the checkpoint is damaged, or has other arrays than the model.
    """
    from zslflax import checkpoint  # imports Orbax, which an exported model does not need

    steps = checkpoint.complete_steps(workdir)
    if not steps or step not in (None, *steps):
        found = f"found steps {', '.join(map(str, steps))}" if steps else "found none"
        raise MissingFileError(f"{workdir} has no complete checkpoint{f' of step {step}' if step else ''}; {found}")
    step = steps[-1] if step is None else step
    names = ("params", "frozen_params", "batch_stats", "teacher_params", "teacher_batch_stats")
    saved = checkpoint.restore_parts(workdir, step, names if use == "teacher" else names[:3])
    params, batch_stats = saved["params"], saved["batch_stats"]
    if use == "teacher" and saved["teacher_params"]:
        params = {**params, **saved["teacher_params"]}  # the teacher has no parameters of the objective
        batch_stats = saved["teacher_batch_stats"]
    variables = {"params": combine(params, saved["frozen_params"]), "batch_stats": batch_stats}
    arrays, checkpoint_folder = flatten_dict(variables, sep="/"), workdir / checkpoint.FOLDER / str(step)
    check_shapes(expected, {name: tuple(x.shape) for name, x in arrays.items()}, checkpoint_folder)
    check_finite(arrays, checkpoint_folder)
    return SavedModel(config, variables, step)


def build_model(config: ConfigDict) -> tuple[TwoTower, Tokenizer | None]:
    """Builds the model that a config describes, without its parameters, and its tokenizer, which a classifier lacks.

    Raises:
        UserError: the tokenizer has ids for which the text tower has no embedding.
    """
    if is_classifier(config):
        return build_classifier(config.model, dtype=compute_dtype(config), axis_name=distributed.AXIS), None
    text = config.model.text
    sizes = text_config(text)
    folder = locate(text.tokenizer or text.pretrained)
    tokenizer, rows = Tokenizer.from_folder(folder, text.max_tokens, sizes.attends_padding), sizes.vocab_size
    if tokenizer.vocab_size > rows:
        raise UserError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, but the text tower's table has {rows} rows; "
            f"nearest that works: model.text.scratch.vocab_size={tokenizer.vocab_size}, or the tokenizer of the "
            "pretrained encoder"
        )
    return build_two_tower(config.model, dtype=compute_dtype(config), axis_name=distributed.AXIS), tokenizer
