"""Sends a run's metrics and figures to Weights & Biases, where `config.wandb` names a project."""

import json
import secrets
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from zslflax.config_json import to_json
from zslflax.data.addresses import hide_credentials
from zslflax.errors import MissingLibraryError, UserError
from zslflax.files import read_json
from zslflax.saving import write_json

ID_FILE = "wandb.json"  # in the workdir: the id under which a resumed run continues


class WandbRun:
    """A run of Weights & Biases, which continues when the training run is resumed.

    Where it is sent, and whether at all, is decided by the variables of wandb's own: WANDB_API_KEY, WANDB_MODE=offline.

    Args:
        config: the whole config; it is sent without passwords.
        workdir: the folder of the run, in which wandb keeps its files.

    Raises:
        MissingLibraryError: wandb is not installed.
        UserError: wandb refuses to start.
    """

    def __init__(self, config: ConfigDict, workdir: Path):
        try:
            import wandb
        except ImportError as error:
            raise MissingLibraryError(f'{error}; pip install "zslflax[wandb]", or set wandb=""') from error
        path = workdir / ID_FILE
        run_id = read_json(path)["id"] if path.is_file() else secrets.token_hex(4)
        write_json(path, {"id": run_id})
        self.image = wandb.Image
        try:
            self.run = wandb.init(
                project=config.wandb,
                id=run_id,
                name=config.name,
                dir=workdir,
                resume="allow",
                config=json.loads(hide_credentials(to_json(config))),
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:  # no key, no such project, no connection
            raise UserError(
                f"config: wandb is {config.wandb!r}, and Weights & Biases says: {str(error).partition(chr(10))[0]} "
                'Give WANDB_API_KEY or WANDB_MODE=offline, or set wandb=""'
            ) from error

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Sends the metrics of a step; None stands for a value that is not finite, and is left out."""
        self.run.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def log_figure(self, step: int, name: str, path: Path) -> None:
        """Sends an image file."""
        self.run.log({name: self.image(str(path))}, step=step)

    def finish(self) -> None:
        """Waits until everything is sent."""
        self.run.finish()
