"""Exported models: a folder that predicts without its run, with neither pickles nor Orbax."""

import json
import shutil
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from zslflax.config_json import read_config
from zslflax.data.text import Tokenizer
from zslflax.errors import MissingFileError, UserError
from zslflax.models.import_weights.locate import locate

TEXT_FOLDER = "text_encoder"  # of workdirs and exports: the tokenizer, and the text encoder's config.json
IDENTITY = "identity.json"  # in that folder, of the tokenizer
WEIGHTS = "model.safetensors"
PREDICTING = ("templates", "resize", "batch_size")  # fields of `config.eval` that a prediction depends on
CARD = """\
---
library_name: zslflax
pipeline_tag: zero-shot-image-classification
---

# {name}

Names images with words that it was given no labels for: a {image} image tower at {size} pixels and a text
tower were trained with zslflax (objective {objective}, step {step}) into one space of {width} dimensions.

```python
from zslflax.predict import Predictor

predictor = Predictor.restore("this folder, or its id on the Hugging Face Hub")
predictor.classify("picture.jpg", ["a cat", "a dog"])
```

Prompts: {templates}. `{weights}` has the weights, `config.json` the sizes and prompts, `text_encoder/` the
tokenizer.
"""


def save_model(folder: Path, config, variables: dict, step: int) -> None:
    """Writes model.safetensors, config.json and README.md.

    Tensors are called by their path, such as params/image/projection/kernel. The config is only what
    prediction needs: the data and the folders of the machine that trained the model stay behind.

    Args:
        variables: {"params", "batch_stats"}, arrays of any kind.
        step: of the checkpoint.
    """
    tensors = {name: np.asarray(x, order="C") for name, x in flatten_dict(variables, sep="/").items()}
    save_file(tensors, folder / WEIGHTS, {"format": "np", "step": str(step)})  # readable by its writer alone
    kept = {name: config[name] for name in ("name", "compute_dtype")}
    kept["model"] = model = config.model.to_dict()
    model["image"]["pretrained"] = ""  # its weights are in the tensors
    model["text"]["tokenizer"] = TEXT_FOLDER
    model["text"]["pretrained"] = TEXT_FOLDER if config.model.text.pretrained else ""
    kept["objective"] = config.objective.to_dict()
    kept["eval"] = {name: config.eval[name] for name in PREDICTING}
    (folder / "config.json").write_text(json.dumps(kept, indent=1, sort_keys=True))
    card = CARD.format(
        name=config.name,
        image=config.model.image.name,
        size=config.model.image.size,
        objective=config.objective.name,
        step=step,
        width=config.model.embed_dim,
        templates=", ".join(f'"{template}"' for template in config.eval.templates),
        weights=WEIGHTS,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / WEIGHTS).chmod((folder / "README.md").stat().st_mode)


def load_model(folder: Path) -> tuple:
    """What `save_model` wrote: config, variables (NumPy), step.

    Raises:
        ValueError: another kind of model, or a damaged file.
    """
    try:
        config = read_config(folder / "config.json")
        with safe_open(folder / WEIGHTS, "numpy") as file:
            step = int(file.metadata()["step"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (KeyError, TypeError, SafetensorError) as error:
        raise UserError(
            f"{folder} is no model that zslflax exported, or its {WEIGHTS} is damaged: {type(error).__name__}: {error}"
        ) from error
    return config, {"batch_stats": {}} | unflatten_dict(tensors, sep="/"), step


def save_text_encoder(config, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes what a text tower needs besides weights: the tokenizer, its identity, the encoder's sizes."""
    tokenizer.save(folder)
    (folder / IDENTITY).write_text(json.dumps(tokenizer.identity, indent=1))
    if config.model.text.pretrained:
        shutil.copyfile(locate(config.model.text.pretrained) / "config.json", folder / "config.json")


def use_text_encoder(config, folder: Path) -> None:
    """Names in a config the folder that `save_text_encoder` wrote, instead of what the run began with."""
    config.model.text.tokenizer = str(folder)
    if config.model.text.pretrained:
        config.model.text.pretrained = str(folder)


def check_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Refuses a tokenizer that is not the one that `save_text_encoder` wrote there."""
    path = folder / IDENTITY
    if not path.is_file():
        raise MissingFileError(f"{path} is missing, which tells which tokenizer the model was trained with")
    trained = json.loads(path.read_text())
    if tokenizer.identity != trained:
        raise UserError(
            f"the tokenizer in {folder} is not the one that the model was trained with, and would give "
            f"it other tokens: expected {trained}, found {tokenizer.identity}; put the original files back"
        )
