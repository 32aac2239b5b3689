"""Finds and loads config files. The message for one that cannot be loaded says where the error is, and what it is."""

import linecache
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from zslflax.config import default_config, eval_set
from zslflax.config_names import check_field, field_names
from zslflax.errors import UserError, nearest_names

CONFIGS = Path(__file__).parent / "configs"  # what is shipped
# How its own messages start, for errors of a config file. They hold the traceback.
OF_ML_COLLECTIONS = ("Error whilst parsing config file", "Configuration is not available")


class ConfigFileError(Exception):
    """A config file cannot be loaded.

    It is no ValueError, which absl would take for a wrong value of the flag.
    """


def shipped_configs() -> list[str]:
    """The names of the configs that are installed with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def find_config_file(arguments: list[str]) -> list[str]:
    """The same arguments, in which the name of a shipped config after --config is replaced by its path.

    Ends the program where there is neither such a file nor such a config, for which absl has no clear message.
    """
    found = list(arguments)
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag not in ("-config", "--config"):
            continue
        at = i if equals else i + 1
        given, colon, config_argument = (value if equals else "".join(arguments[at : at + 1])).partition(":")
        path = CONFIGS / f"{given}.py" if re.fullmatch(r"\w+", given) and not Path(given).is_file() else Path(given)
        if not path.is_file():
            names = shipped_configs()
            near = f"; nearest of the shipped configs {', '.join(names)}: {nearest_names(Path(given).stem, names)}"
            sys.exit(f"zslflax: {flag}={given}: there is no such file{near}")
        if path != Path(given):
            found[at] = f"{flag}={path}{colon}{config_argument}" if equals else f"{path}{colon}{config_argument}"
    return found


class ConfigParser(flags.ArgumentParser):
    """Loads a config file, and adds the test sets whose data the command line gives by `--config.eval.sets.NAME.data`.

    In an evaluation, the command line may give any of their fields: which test sets there are is known from its run.

    Args:
        parser: that of ml_collections.

    Attributes:
        arguments: of the command.
        evaluating: whether they ask for an evaluation.
    """

    def __init__(self, parser: flags.ArgumentParser):
        self.parser, self.arguments, self.evaluating = parser, list[str](), False

    def parse(self, argument: str) -> ConfigDict:
        loaded = load_config(self.parser.parse, argument)
        field = r"\w+" if self.evaluating else "data"
        pattern = re.compile(rf"--?config\.eval\.sets\.([^.=]+)\.{field}(=|$)")
        names = [found[1] for argument in self.arguments if (found := pattern.match(argument))]
        with loaded.unlocked():
            loaded.eval.sets.update({name: eval_set() for name in names if name not in loaded.eval.sets})
        return loaded

    def flag_type(self) -> str:
        return self.parser.flag_type()


def load_config(parse: Callable[[str], object], argument: str) -> ConfigDict:
    """Loads a config, and checks that it has all fields.

    Args:
        parse: the parser of ml_collections.
        argument: FILE or FILE:ARGUMENT.

    Raises:
        ConfigFileError: the file cannot be loaded, or what it returns is no config of this package.
    """
    file = argument.partition(":")[0]
    try:
        loaded = parse(argument)
        if not isinstance(loaded, ConfigDict):
            getattr(loaded, "name", None)  # raises the error, which ml_collections keeps until the config is used
    except Exception as error:
        raise ConfigFileError(explain_config_error(error, file)) from error
    if not isinstance(loaded, ConfigDict):
        raise ConfigFileError(f"{file}: expected get_config() to return an ml_collections.ConfigDict, found {loaded!r}")
    found = set(field_names(loaded))
    names = (name for name in field_names(default_config()) if not name.startswith("eval.sets."))
    if missing := [name for name in names if name not in found]:
        raise ConfigFileError(
            f"{file}: the config has no field {', '.join(missing[:3])}{', …' * (len(missing) > 3)}; let get_config() "
            "start with zslflax.config.default_config(), which has all fields"
        )
    return loaded


def explain_config_error(error: Exception, file: str) -> str:
    """The line of a config file where an exception was raised, and its reason."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}"
    if isinstance(error, AttributeError) and error.name == "get_config":
        return f"{file}: the file has no function get_config, which returns the config; see configs/"
    first = error.__cause__ or error.__context__
    if str(error).startswith(OF_ML_COLLECTIONS) and isinstance(first, Exception):
        error = first
    frames = traceback.extract_tb(error.__traceback__)
    paths = [frame for frame in frames if Path(frame.filename) == Path(file)]
    if not paths:
        return f"{file}: {type(error).__name__}: {error}"
    number = paths[-1].lineno or 0
    return f"{file}, line {number}: {explain_field(error, linecache.getline(paths[-1].filename, number))}"


def explain_field(error: Exception, line: str) -> str:
    """The reason of an exception at a line, which names the nearest field where there is no such field.

    ml_collections lists all fields with their values there.
    """
    reason = error.args[0] if error.args and isinstance(error.args[0], KeyError) else error
    text = (
        str(reason.args[0] if isinstance(reason, KeyError) and reason.args else reason)
        .strip()
        .partition("\n")[0]
        .partition(" Other fields present")[0]
    )
    field = re.match(r"\s*\w+\.([\w.]+)", line)  # config.optimizer.name = "adamw"
    if field and isinstance(reason, KeyError):
        try:
            check_field(default_config(), field[1])
        except UserError as unknown:
            return str(unknown).removeprefix("--config.")
    if converted := re.match(
        r"Could not override field '(.*?)' .*original type <class '(.*)'> .* <class '(.*)'>", text
    ):
        _, found, expected = converted.groups()
        kind = "a group of fields" if expected.endswith("ConfigDict") else f"the type {expected}"
        return f"{field[1] if field else converted[1]}: expected {kind}, found the type {found}"
    return f"{type(error).__name__}: {text[:300]}"
