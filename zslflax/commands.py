"""The command `zslflax`, which runs the command that its first argument names.

zslflax train --config=demo
zslflax train --help

Each command is a module that `python -m` runs too. It is imported when its name is known, so that `zslflax --help`
answers at once.
"""

import contextlib
import runpy
import sys
from typing import NamedTuple

from zslflax import __version__
from zslflax.errors import nearest_names
from zslflax.interrupts import end_on_interrupt


class Command(NamedTuple):
    """A command.

    Attributes:
        module: that `python -m` runs.
        description: what the command does.
        arguments: that come before those of the user.
    """

    module: str
    description: str
    arguments: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("zslflax.main", "trains a model, or resumes a run that was stopped"),
    "evaluate": Command("zslflax.main", "evaluates a checkpoint of a run, or another model", ("--mode=evaluate",)),
    "predict": Command("zslflax.predict", "classifies images by any class names"),
    "search": Command("zslflax.search", "finds the images that fit a sentence"),
    "export": Command("zslflax.export", "writes a model into a folder"),
    "data": Command("zslflax.data.__main__", "says what a data source holds"),
    "models": Command("zslflax.models.__main__", "lists the towers and published models that are read"),
    "noise": Command("zslflax.noise", "ranks the pairs of a dataset by how well they match"),
    "features": Command("zslflax.features", "computes the features of frozen towers before training"),
    "few-shot": Command("zslflax.few_shot", "measures how well a model tells new classes apart by a few images"),
    "clip-benchmark": Command("zslflax.inference.clip_benchmark", "evaluates a model with CLIP_benchmark's own code"),
    "app": Command("zslflax.app", "serves a page in the browser that classifies and finds images"),
}


def usage() -> str:
    """The list of all commands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.description}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: zslflax COMMAND [ARGUMENTS …]",
            "",
            *lines,
            "",
            "zslflax COMMAND --help lists the arguments of a command; zslflax --version prints the version.",
        ]
    )


def main() -> None:
    """Runs the command that `sys.argv` names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help", "--version"):
        with contextlib.suppress(BrokenPipeError):  # of a reader such as `head`
            print(f"zslflax {__version__}" if name == "--version" else usage(), flush=True)
    elif name in COMMANDS:
        command = COMMANDS[name]
        sys.argv[1:] = [*command.arguments, *arguments]
        end_on_interrupt()  # until it has imported its libraries
        runpy.run_module(command.module, run_name="__main__", alter_sys=True)
    else:
        print(f"zslflax: there is no command {name!r}; nearest: {nearest_names(name, COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
