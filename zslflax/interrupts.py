"""Ctrl-C and SIGTERM: also during imports and in callbacks, where a KeyboardInterrupt does not end a program quietly.

It imports nothing that takes time, because the command `zslflax` uses it before it imports anything else.
"""

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # exit status after Ctrl-C
MESSAGE = "zslflax: interrupted"
TERMINATED = 143  # exit status after SIGTERM
RAISE_AGAIN_SECONDS = 0.1


class Terminated(KeyboardInterrupt):
    """Raised by SIGTERM as Ctrl-C raises its base class, so that files that are half written are removed."""


def end_on_interrupt() -> None:
    """Lets Ctrl-C end the process at once from now on, with one line, where there is nothing to clean up.

    Otherwise a KeyboardInterrupt shows the tracebacks of the libraries that are being imported.
    Where SIGINT is ignored, as in a shell's background, it stays so.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_on_interrupt() -> None:
    """Lets Ctrl-C raise a KeyboardInterrupt again, as Python does, and SIGTERM a `Terminated`."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)


def _end(_: int, __: FrameType | None) -> NoReturn:
    with contextlib.suppress(OSError):  # standard error is closed
        os.write(2, f"{MESSAGE}\n".encode())
    os._exit(INTERRUPTED)


def _terminate(_: int, __: FrameType | None) -> NoReturn:
    raise Terminated


def find_interrupt(error: BaseException | None) -> KeyboardInterrupt | None:
    """The KeyboardInterrupt that an exception is, or because of which it was raised; None if there is none.

    A library in C++ that is interrupted while it is imported raises an ImportError.
    """
    while error:
        if isinstance(error, KeyboardInterrupt):
            return error
        error = error.__cause__ or error.__context__
    return None


def interrupt_again(found: "sys.UnraisableHookArgs") -> bool:
    """Whether the exception that cannot be raised is a KeyboardInterrupt. If so, its signal is sent again.

    Python drops exceptions of a callback, such as the one by which jax collects garbage, so that a Ctrl-C in it would
    have no effect. When the program ends there is nothing left to interrupt.
    """
    if not isinstance(found.exc_value, KeyboardInterrupt):
        return False
    if threading.main_thread().is_alive():
        number = signal.SIGTERM if isinstance(found.exc_value, Terminated) else signal.SIGINT
        timer = threading.Timer(RAISE_AGAIN_SECONDS, os.kill, (os.getpid(), number))
        timer.daemon = True
        with contextlib.suppress(KeyboardInterrupt):  # another one, while the thread that repeats the first begins
            timer.start()
    return True
