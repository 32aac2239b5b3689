"""Uploads an exported model to the Hugging Face Hub."""

import re
from pathlib import Path

from zslflax.errors import StorageError, UserError


def check_repository(repository: str) -> str:
    """Returns the id of a repository on the Hub.

    Raises:
        UserError: it is not of the form USER/NAME.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"the repository is {repository!r}, expected USER/NAME, such as me/birds")
    return repository


def push_folder(folder: Path, repository: str, private: bool) -> str:
    """Uploads a folder as a model to the Hub, in one commit, and returns its address there.

    The repository is made if it does not exist. The token is the one of `hf auth login`, or HF_TOKEN's.

    Args:
        folder: its files.
        repository: USER/NAME.
        private: whether a repository that is made is private.

    Raises:
        StorageError: the Hub cannot be reached, or refuses.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(check_repository(repository), private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload the model")
    except Exception as error:  # the Hub's errors, and those of its HTTP library, which are of no common type
        raise StorageError(
            f"the Hugging Face Hub did not take {repository}: {type(error).__name__}: {error}. "
            "Log in with `hf auth login`, or set HF_TOKEN, with a token that may write; the model stays in "
            f"{folder}"
        ) from error
    return f"{api.endpoint}/{repository}"
