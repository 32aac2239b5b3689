"""How the commands end: with an exit status in time, whatever their threads wait for, and with closed streams."""

import subprocess
import sys
import time

import pytest

from tests.testing.configs import process_environment

WAITING = """
import sys, threading, time
from zslflax import cli
from zslflax.errors import UserError
cli.EXIT_SECONDS = 0.5
threading.Thread(target=time.sleep, args=(300,)).start()
with cli.exit_on_error():
    print("begun", flush=True)
    {end}
"""
LONG = f"File name too long: '{'a' * 300}'"
FULL_DEVICE = (
    "a device's memory does not suffice (Out of memory allocating 4503599627370496 bytes): end other programs that use "
    "it, or choose a smaller model or batch"
)
FULL_MEMORY = (
    "the machine's memory does not suffice (Unable to allocate 256. PiB for an array with shape (36028797018963968,) "
    "and data type float64): end other programs that use it, or allow this one more (ulimit -v, the limit of its job "
    "or container)"
)
CLOSED = """
import sys
from zslflax import cli
with cli.exit_on_error():
    file = open(sys.argv[1], "w")
    cli.start_logging()
    cli.log.warning("a warning")
    print("a result")
    file.write("content")
    raise SystemExit(0 if file.fileno() > 2 else 9)
"""
IN_CALLBACK = """
import gc, signal, time
from zslflax import cli
with cli.exit_on_error():
    gc.callbacks.append(lambda phase, _: signal.raise_signal(signal.SIGINT) if phase == "stop" else None)
    gc.collect()
    gc.callbacks.clear()
    time.sleep(60)
"""
IN_EVENT_LOOP = """
import asyncio, gc, socket
from zslflax import cli
def interrupted():
    raise KeyboardInterrupt
with cli.exit_on_error():
    cli.prepare_inference()
    socket.socketpair = interrupted  # an event loop makes one
    try:
        asyncio.run(asyncio.sleep(1))
    finally:
        gc.collect()  # the loop, which lacks attributes that its end needs
"""
WRITING = """
import os, signal, sys
from pathlib import Path
from zslflax import cli
from zslflax.saving import new_folder, write_atomically
def write(path):
    path.write_text("a part")
    {signal}
    path.write_text("whole")
with cli.exit_on_error():
    with new_folder(Path(sys.argv[1]) / "model"):
        write_atomically(Path(sys.argv[1]) / "model" / "weights", write)
"""
IN_IMPORT = """
import signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "numpy":
            signal.raise_signal(signal.SIGINT)
sys.meta_path.insert(0, Finder())
from zslflax import commands
sys.argv = ["zslflax", "predict"]
commands.main()
"""
IN_EXTENSION = """
from zslflax import cli
with cli.exit_on_error():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt as error:
        raise ImportError("initialization failed") from error
"""


def start(code: str, *arguments: str, shell: str = "") -> subprocess.Popen:
    environment = process_environment()
    environment.pop("PYTHONUNBUFFERED", None)
    command = ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_process_ends_after_its_main_thread_although_a_thread_waits():
    ends = {
        "raise UserError('wrong')": (1, "zslflax: wrong"),
        "raise KeyError('a bug')": (1, "KeyError: 'a bug'"),
        "open('a' * 300)": (1, f"zslflax: [Errno 36] {LONG}"),
        "import numpy; numpy.ones(1 << 55)": (1, f"zslflax: {FULL_MEMORY}"),
        "sys.exit(143)": (143, ""),
        "import jax; jax.numpy.ones(1 << 50)": (1, f"zslflax: {FULL_DEVICE}"),
        "raise KeyboardInterrupt": (130, "zslflax: interrupted"),
        "pass": (0, ""),
    }
    processes = [start(WAITING.format(end=end)) for end in ends]
    for process, (status, last) in zip(processes, ends.values()):
        assert process.stdout.readline() == "begun\n"
        began = time.monotonic()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == status and time.monotonic() - began < 30
        assert errors.strip().rpartition("\n")[2] == last


@pytest.mark.parametrize("code", [IN_CALLBACK, IN_IMPORT, IN_EXTENSION, IN_EVENT_LOOP])
def test_ctrl_c_ends_a_command_with_one_line_wherever_it_comes(code):
    process = start(code)
    output, errors = process.communicate(timeout=60)
    assert (output, errors, process.returncode) == ("", "zslflax: interrupted\n", 130)


@pytest.mark.parametrize("name, status", [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("in_callback", [False, True])
def test_signals_leave_nothing_that_is_half_written(name, status, in_callback, tmp_path):
    sent = f"signal.raise_signal(signal.{name})"
    if in_callback:  # where Python drops the exception
        sent = f"import gc, time; f = lambda *_: {sent}; gc.callbacks.append(f); gc.collect(); time.sleep(60)"
        sent = sent.replace("gc.collect()", "gc.collect(); gc.callbacks.clear()")
    process = start(WRITING.format(signal=sent), str(tmp_path))
    _, errors = process.communicate(timeout=60)
    message = {143: "zslflax: terminated\n", 130: "zslflax: interrupted\n"}[status]
    assert (errors, process.returncode, list(tmp_path.iterdir())) == (message, status, [])


@pytest.mark.parametrize("shell", [">&- 2>&-", "<&- >&- 2>&-", ">/dev/full 2>/dev/full"])
def test_no_file_takes_the_place_of_a_closed_stream(tmp_path, shell):
    process = start(CLOSED, str(tmp_path / "file"), shell=shell)
    process.communicate(timeout=60)
    assert process.returncode == (0 if "full" not in shell else 120)  # Python's, where its own last flush fails
    assert (tmp_path / "file").read_text() == "content"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_names_are_printed_whatever_letters_standard_output_has(encoding, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    process = start("from zslflax import cli\nwith cli.exit_on_error(): print('caf\u00e9 \u9ce5')")
    process.stdout.reconfigure(encoding=encoding)
    output, errors = process.communicate(timeout=60)
    expected = "caf\u00e9 \u9ce5".encode(encoding, "backslashreplace").decode(encoding)
    assert (output.strip(), errors, process.returncode) == (expected, "", 0)


def test_a_working_directory_that_was_removed_is_named(tmp_path):
    command = "import pathlib\nfrom zslflax import cli\nwith cli.exit_on_error(): pathlib.Path('runs').absolute()"
    folder = tmp_path / "gone"
    folder.mkdir()
    process = start(f"import os; os.chdir({str(folder)!r}); os.rmdir({str(folder)!r})\n{command}")
    _, errors = process.communicate(timeout=60)
    expected = "zslflax: the working directory was removed; change to one that exists"
    assert (errors.strip(), process.returncode) == (expected, 1)
