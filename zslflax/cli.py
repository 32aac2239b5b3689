"""What all commands share: the log on standard error, and user errors without a traceback."""

import argparse
import contextlib
import io
import logging
import os
import re
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import absl.logging
import jax
from tqdm import tqdm

from zslflax import distributed
from zslflax.compilation import COMPILATION_CACHE, keep_compiled
from zslflax.errors import UserError, explain_machine_error
from zslflax.interrupts import (
    INTERRUPTED,
    MESSAGE,
    TERMINATED,
    Terminated,
    find_interrupt,
    interrupt_again,
    raise_on_interrupt,
)

log = logging.getLogger("zslflax")

EXIT_SECONDS = 30.0  # that a process may wait for its threads when it ends
SHUTDOWN_SECONDS = 300.0  # more, in which jax waits at the end for the other processes of a run


def start_logging() -> None:
    """Writes the package's log to standard error, one line per record, without breaking progress bars."""
    handler = logging.StreamHandler(_TqdmStream())
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    log.handlers[:] = [handler]
    log.setLevel(logging.INFO)
    log.propagate = False
    hide_repeated_errors()


def hide_repeated_errors() -> None:
    """Hides what Orbax logs and prints of a save or restore that failed, beside the error that it raises.

    On a full disk that is the same error from each of its threads, and from each of hundreds of writes that end after
    asyncio's loop was closed. It also logs twenty lines for each checkpoint, and warnings of files that are missing.
    """
    absl.logging.set_verbosity(absl.logging.WARNING)
    absl.logging.get_absl_logger().addFilter(lambda record: "/orbax/" not in record.pathname)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)


def show_unraisable(found: "sys.UnraisableHookArgs") -> None:
    """Shows an exception that cannot be raised, as Python does, except from reads and writes that Orbax has left.

    Some are of event loops of asyncio that were interrupted while they were made. A KeyboardInterrupt is raised a
    moment later instead.
    """
    if interrupt_again(found):
        return
    files = [frame.filename for frame in traceback.extract_tb(found.exc_traceback)]
    if not any("/orbax/" in file or "/asyncio/" in file for file in files):
        sys.__unraisablehook__(found)


class _TqdmStream:
    """A stream that clears the progress bars before it writes, and draws them again."""

    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr, end="")

    def flush(self) -> None:
        sys.stderr.flush()


def prepare_inference() -> None:
    """Prepares jax for a command without the config of a run; it must be called before any other use of jax.

    Compiled programs are kept in `COMPILATION_CACHE`, unless another folder was chosen, as by the environment variable
    JAX_COMPILATION_CACHE_DIR.
    """
    hide_repeated_errors()
    share_gpu()
    chosen: Any = jax.config
    if not chosen.jax_compilation_cache_dir:
        keep_compiled(COMPILATION_CACHE)


def share_gpu() -> None:
    """Takes a GPU's memory as it is needed, where jax would take three quarters at once, which a run may have already.

    The environment variable that says so stays as it is if it is set.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --workdir, which `zslflax evaluate` calls --model where it is no training run: both names are one argument.

    The value is that of `Predictor.restore`.
    """
    parser.add_argument(
        "--workdir",
        "--model",
        required=True,
        metavar="MODEL",
        help="a training run's folder, an exported or published model, or a Hub id",
    )


def number_from(least: int) -> Callable[[str], int]:
    """A `type` of argparse's arguments: a whole number of at least `least`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, found {text!r}")
        return int(text)

    return parse


@contextlib.contextmanager
def exit_on_error() -> Iterator[None]:
    """Ends the program with the message of a `UserError`, and with the traceback of any other exception.

    Errors of the machine, such as a full disk or no memory, end with their message as well.

    A reader that closes the pipe of standard output, such as `head`, ends the program quietly.

    With the environment variable ZSLFLAX_TRACEBACK=1, all errors show their traceback.

    In a multi-process run the process exits at once. A normal exit would wait for the other processes, which in turn
    wait for this one's part of a step. Otherwise it ends at the latest `EXIT_SECONDS` after the block, whatever its
    threads wait for, such as a file system or a server that does not answer.
    """
    open_standard_streams()
    sys.unraisablehook = show_unraisable
    limit = ExitLimit()
    raise_on_interrupt()
    try:
        yield
        sys.stdout.flush()  # an error of the last lines is raised here
        limit.status = 0
    except BrokenPipeError:
        # Python flushes again when it ends, which would print the error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        limit.status = 0
    except SystemExit as error:
        limit.status = error.code if isinstance(error.code, int) else int(error.code is not None)
        raise
    except (KeyboardInterrupt, Exception) as error:
        if isinstance(interrupt := find_interrupt(error), Terminated):
            end_process("zslflax: terminated", TERMINATED, limit)
        if interrupt:
            end_process(MESSAGE, INTERRUPTED, limit)
        if isinstance(error, FileNotFoundError) and not working_directory_exists():
            end_process("zslflax: the working directory was removed; change to one that exists", 1, limit)
        message = str(error) if isinstance(error, UserError) else explain_machine_error(error)
        if message and not os.environ.get("ZSLFLAX_TRACEBACK"):
            end_process(f"zslflax: {message}", 1, limit)
        if jax.distributed.is_initialized():
            end_process(traceback.format_exc(), 1, limit)
        raise


def end_process(message: str, status: int, limit: "ExitLimit") -> NoReturn:
    """Prints a message and ends the process: at once, if it is one of several, and otherwise with a `SystemExit`."""
    limit.status = status
    if status == 1 and not jax.distributed.is_initialized():
        sys.exit(message)  # prints it
    with contextlib.suppress(OSError):  # nobody reads it, or its disk is full
        print(message, file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        distributed.leave(message)
        os._exit(status)
    sys.exit(status)


def open_standard_streams() -> None:
    """Replaces standard streams that are closed by /dev/null. Otherwise the next file gets the number of one of them.

    A library that logs to standard error would write into that file.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    sys.stdout = sys.stdout or open(os.devnull, "w")
    sys.stderr = sys.stderr or open(os.devnull, "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where names have letters that its encoding lacks


def working_directory_exists() -> bool:
    """Whether relative paths mean anything."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


class ExitLimit:
    """Ends the process `EXIT_SECONDS` after its main thread, if other threads still hold it.

    Attributes:
        status: the exit status that the process then has.
    """

    def __init__(self) -> None:
        self.status = 1
        threading.Thread(target=self._run, name="zslflax-exit", daemon=True).start()

    def _run(self) -> None:
        threading.main_thread().join()
        time.sleep(EXIT_SECONDS + (SHUTDOWN_SECONDS if jax.distributed.is_initialized() else 0.0))
        os._exit(self.status)
