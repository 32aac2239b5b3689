"""Trains or evaluates: `zslflax train --config=demo [--workdir=DIR] [--config.FIELD=VALUE …]`."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from ml_collections import config_flags

from zslflax import config, distributed
from zslflax.cli import exit_on_error, share_gpu, start_logging
from zslflax.config_checks import check_devices, validate
from zslflax.config_file import ConfigFileError, ConfigParser, find_config_file, shipped_configs
from zslflax.config_names import check_overrides
from zslflax.data.cores import available_cores
from zslflax.errors import UserError
from zslflax.files import local_path
from zslflax.inference.prompts import resolve_templates
from zslflax.training.evaluate import evaluate_model, evaluate_run
from zslflax.training.loop import train

CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "The config: the name of one that is shipped, such as demo, or a file of your own; NAME:ARGUMENT or FILE:ARGUMENT "
    "passes an argument to its get_config.",
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The folder that the run writes to and resumes from. Default: runs/<config.name>."
)
MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "evaluate"],
    "evaluate: evaluates the newest checkpoint of the workdir on the test sets of its run, and on those that "
    "--config.eval.sets.NAME.data=… adds; trains nothing.",
)
STEP = flags.DEFINE_integer("step", None, "With --mode=evaluate: the step of the checkpoint instead of the newest.")
MODEL = flags.DEFINE_string(
    "model",
    "",
    "With --mode=evaluate: a published CLIP or SigLIP or an exported model instead of the workdir's, as a folder or an "
    "id on the Hugging Face Hub, on the test sets of --config.eval.sets.NAME.data=… or --config. Its results go into "
    "--workdir; default: runs/<its name>.",
)
CHANGED = flags.DEFINE_bool("changed", False, "Resume although the workdir's run had another config.")
STOPPED_STATUS = flags.DEFINE_integer(
    "stopped_status",
    0,
    "The exit status of a run that was asked to stop before its last step, for launchers that start it again.",
    lower_bound=0,
    upper_bound=255,
)
TYPES = {"int": "a whole number", "float": "a number", "bool": "true or false"}  # of config fields, as absl calls them
flags.mark_flag_as_required("config")


def parse(arguments: list[str]) -> list[str]:
    """Parses the flags with absl.

    Ends the program with a one-line message where a flag is wrong. The message for an override of a field that does not
    exist names the nearest field.
    """
    sys.argv[:] = arguments = find_config_file(arguments)  # ml_collections reads the overrides in sys.argv
    evaluating = bool(re.search(r"(^| )--?mode[= ]evaluate( |$)", " ".join(arguments)))
    if evaluating and not any(re.match("--?config(=|$)", argument) for argument in arguments):
        arguments = [arguments[0], f"--config={config.__file__}", *arguments[1:]]  # all else is in the workdir
    flag = flags.FLAGS["config"]
    parser = flag.parser if isinstance(flag.parser, ConfigParser) else ConfigParser(flag.parser)
    flag.parser, parser.arguments, parser.evaluating = parser, arguments, evaluating
    try:
        return flags.FLAGS(arguments)
    except ConfigFileError as error:
        if os.environ.get("ZSLFLAX_TRACEBACK"):
            raise
        sys.exit(f"zslflax: --config: {error}")
    except (AttributeError, KeyError):
        # Parse again without the overrides, which ml_collections looks up in sys.argv, to know the config's fields.
        flags.FLAGS.unparse_flags()
        sys.argv = [argument for argument in arguments if not argument.lstrip("-").startswith("config.")]
        flags.FLAGS(sys.argv)
        check_overrides(CONFIG.value, arguments)
        raise
    except flags.Error as error:
        sys.exit(f"zslflax: {explain(error)}")


def explain(error: flags.Error) -> str:
    """The message for a wrong flag: absl's own, except where it does not say what to change."""
    message = str(error)
    if re.match(r"Unknown command line flag 'config\.|flag --config=None:", message):  # no config has defined fields
        return f"--config=NAME is missing, such as --config=photos; shipped configs: {', '.join(shipped_configs())}"
    if found := re.match(r"flag --(config\.[^=]+)=(.*?): ", message, re.DOTALL):
        name, value = found.groups()
        if (kind := flags.FLAGS[name].flag_type()) in TYPES:
            return f"--{name}={value}: expected {TYPES[kind]}, found {value!r}"
        if "ConfigDict" in message:
            return (
                f"--{name}={value}: {name.removeprefix('config.')} is a group of fields; set one: --{name}.FIELD=VALUE"
            )
    return message


def run(_: Any) -> int:
    """Runs what the flags ask for, and returns the exit status."""
    start_logging()
    run_config, evaluating = CONFIG.value, MODE.value == "evaluate"
    name = Path(MODEL.value).name or run_config.name
    workdir = local_path(WORKDIR.value or f"runs/{name}", "--workdir").absolute()
    if evaluating:
        share_gpu()
        distributed.initialize(run_config.compilation_cache)
        evaluate(workdir)
        return 0
    if MODEL.value:
        raise UserError(
            f"--model={MODEL.value} is for --mode=evaluate; a run starts with a model by --config.init_from"
        )
    validate(run_config)
    resolve_templates(run_config)
    batch_sizes = run_config.batch_size, run_config.eval.batch_size
    # With micro-batches, the number of devices is part of what a batch normalisation computes.
    cores = 1.0 if run_config.micro_batch else available_cores()
    distributed.initialize(run_config.compilation_cache, distributed.choose_cpu_devices(cores, *batch_sizes))
    check_devices(run_config, jax.device_count())
    return 0 if train(run_config, workdir, CHANGED.value) else STOPPED_STATUS.value


def evaluate(workdir: Path) -> None:
    """Evaluates the model of --model, or a checkpoint of the workdir."""
    flag = flags.FLAGS["config"]
    overrides = config_flags.get_override_values(flag)
    given = CONFIG.value if config_flags.get_config_filename(flag) != config.__file__ else None
    if MODEL.value:
        if STEP.value is not None:
            raise UserError("--step is that of a checkpoint of --workdir, and --model has none; give one of the two")
        evaluate_model(MODEL.value, workdir, overrides, given)
        return
    if not WORKDIR.value and given is None:
        raise UserError("what is to be evaluated? Give --workdir, a training run, or --model, another model")
    evaluate_run(workdir, overrides, STEP.value)


def main() -> None:
    """The command."""
    with exit_on_error():
        app.run(run, flags_parser=parse)


if __name__ == "__main__":
    main()
