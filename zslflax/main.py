"""Entry point: `python -m zslflax.main --config=configs/demo.py [--workdir=DIR] [--config.FIELD=VALUE …]`."""

import sys
from pathlib import Path

import jax
from absl import app, flags
from ml_collections import config_flags

from zslflax import distributed
from zslflax.cli import exit_on_error, start_logging
from zslflax.config import check_devices, check_overrides, validate
from zslflax.evaluation.zero_shot import evaluate_run
from zslflax.inference.prompts import resolve_templates
from zslflax.training.loop import train

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/, with an argument after a colon if it takes one."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where the run writes, and where it resumes. Default: runs/<config.name>."
)
MODE = flags.DEFINE_enum("mode", "train", ["train", "evaluate"], "evaluate: the newest checkpoint, without training.")
STEP = flags.DEFINE_integer("step", None, "With --mode=evaluate: the step of the checkpoint.")
CHANGED = flags.DEFINE_bool("changed", False, "Go on in a workdir whose checkpoints are another config's.")
STOPPED_STATUS = flags.DEFINE_integer(
    "stopped_status",
    0,
    "The exit status of a run that was asked to stop before its last step: for launchers that start it again.",
    lower_bound=0,
    upper_bound=255,
)
flags.mark_flag_as_required("config")


def parse(arguments: list[str]) -> list[str]:
    """absl's parser, with an error that names the nearest field where an override's field does not exist."""
    try:
        return flags.FLAGS(arguments)
    except (AttributeError, KeyError):
        flags.FLAGS.unparse_flags()
        sys.argv = [argument for argument in arguments if not argument.lstrip("-").startswith("config.")]
        flags.FLAGS(sys.argv)  # without the overrides, which ml_collections looks up in sys.argv
        check_overrides(CONFIG.value, arguments)
        raise
    except (flags.Error, OSError) as error:
        sys.exit(f"zslflax: {error}")


def main(_) -> int:
    start_logging()
    config = CONFIG.value
    workdir = Path(WORKDIR.value or f"runs/{config.name}").expanduser().absolute()
    resolve_templates(config)
    validate(config)
    distributed.start(config.compilation_cache)
    check_devices(config, jax.device_count())
    if MODE.value == "evaluate":
        evaluate_run(config, workdir, STEP.value)
        return 0
    return 0 if train(config, workdir, CHANGED.value) else STOPPED_STATUS.value


def run() -> None:
    with exit_on_error():
        app.run(main, flags_parser=parse)


if __name__ == "__main__":
    run()
