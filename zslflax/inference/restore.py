"""Loads a trained model from the workdir of a run, an exported folder or the Hugging Face Hub."""

from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from zslflax import distributed
from zslflax.config import compute_dtype
from zslflax.config_json import read_config
from zslflax.data.text import Tokenizer
from zslflax.errors import MissingFileError, UserError
from zslflax.files import local_path
from zslflax.inference.export import (
    TEXT_FOLDER,
    WEIGHTS,
    SavedModel,
    check_tokenizer,
    load_model,
    use_text_encoder,
)
from zslflax.models.build import build_two_tower, text_config
from zslflax.models.import_weights.locate import locate
from zslflax.models.partition import combine
from zslflax.models.two_tower import TwoTower


class RestoredModel(NamedTuple):
    """A trained model, ready for use.

    Attributes:
        config: of the run that trained it.
        model: the `TwoTower`.
        variables: {"params", "batch_stats"}, NumPy arrays.
        tokenizer: with which it was trained.
        step: of the checkpoint.
    """

    config: ConfigDict
    model: TwoTower
    variables: dict[str, Any]
    tokenizer: Tokenizer
    step: int


def restore_model(source: str | Path, step: int | None = None, use: str = "teacher") -> RestoredModel:
    """Loads a trained model; arguments and errors are those of `Predictor.restore`."""
    if use not in ("teacher", "student"):
        raise UserError(f'use is {use!r}, expected "teacher" or "student"')
    folder = locate(source) if isinstance(source, str) else local_path(source, "the model")
    if not (folder / "config.json").is_file():
        raise MissingFileError(
            f"{folder} has no config.json: expected the --workdir of a training run, or an exported model"
        )
    if (folder / WEIGHTS).is_file():
        if step is not None or use != "teacher":
            raise UserError(f"{folder} is an exported model, which has no steps and no student beside it")
        saved = load_model(folder)
    else:
        saved = read_run(folder, step, use)
    use_text_encoder(saved.config, folder / TEXT_FOLDER)
    model, tokenizer = build_model(saved.config)
    check_tokenizer(tokenizer, folder / TEXT_FOLDER)
    return RestoredModel(saved.config, model, saved.variables, tokenizer, saved.step)


def read_run(workdir: Path, step: int | None, use: str) -> SavedModel:
    """Reads the config, the variables and the step of a checkpoint of a training run.

    Raises:
        MissingFileError: there is no complete checkpoint of that step.
        UserError: the checkpoint is damaged.
    """
    from zslflax import checkpoint  # imports Orbax, which an exported model does not need

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
        params = {**params, **saved["teacher_params"]}  # the teacher has no parameters of the objective
        batch_stats = saved["teacher_batch_stats"]
    variables = {"params": combine(params, saved["frozen_params"]), "batch_stats": batch_stats}
    return SavedModel(config, variables, step)


def build_model(config: ConfigDict) -> tuple[TwoTower, Tokenizer]:
    """Builds the model that a config describes, without its parameters, and its tokenizer.

    Raises:
        UserError: the tokenizer has ids for which the text tower has no embedding.
    """
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
