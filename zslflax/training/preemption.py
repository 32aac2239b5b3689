"""Requests to stop a run: SIGTERM from a scheduler, Ctrl-C, or SIGHUP of a terminal that is closed."""

import logging
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from zslflax import distributed

log = logging.getLogger("zslflax")


class _Interrupted(BaseException):
    """Ends the function that `StopRequest.run_interruptible` runs."""


class StopRequest:
    """A context manager that turns SIGTERM, SIGINT (Ctrl-C) and SIGHUP into a request to stop after the current step.

    A second signal of the same kind has its previous effect: it ends the process. Where SIGHUP is ignored, as below
    nohup, it stays so.

    In a multi-process run any process may receive SIGTERM. The coordination service of jax passes it on, and all
    processes stop at the same step. SIGINT and SIGHUP are forwarded as SIGTERM.
    """

    def __init__(self) -> None:
        self._requested, self._interruptible = False, False
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python delivers signals to the main thread only
        numbers = [signal.SIGINT]
        if not distributed.is_multi_process():  # otherwise jax handles SIGTERM
            numbers.append(signal.SIGTERM)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self._previous_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        signal.signal(number, self._previous_handlers[number])
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            log.warning("%s: saving after this step, then stopping; once more stops at once, without saving", name)
        else:
            log.warning("%s: saving after this step, then stopping", name)
        if distributed.is_multi_process():
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self._requested = True
        if self._interruptible:
            raise _Interrupted

    def requested(self, step: int) -> bool:
        """Whether to stop after this step. All processes must ask at every step, and get the same answer."""
        return distributed.preemption_requested(step) if distributed.is_multi_process() else self._requested

    def run_interruptible(self, function: Callable[..., Any], *args: Any) -> Any:
        """Returns function(*args), or None as soon as a stop is requested. Multi-process runs finish the function."""
        try:
            self._interruptible = not distributed.is_multi_process()
            return None if self._requested else function(*args)
        except _Interrupted:
            return None
        finally:
            self._interruptible = False
