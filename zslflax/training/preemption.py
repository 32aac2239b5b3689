"""Stopping a run from outside: a scheduler's SIGTERM, a person's Ctrl-C."""

import logging
import os
import signal
import threading
from collections.abc import Callable

from zslflax import distributed

log = logging.getLogger("zslflax")


class _Interrupted(BaseException):
    """Ends what `StopRequest.run_interruptible` runs."""


class StopRequest:
    """Notices, while it is entered, that the run is asked to stop; the same signal again does what it always did.

    In one process these are SIGTERM and SIGINT. Of several processes any one may be asked: jax's coordination
    service passes SIGTERM on and lets all stop at the same step; Ctrl-C becomes SIGTERM.
    """

    def __init__(self):
        self.asked, self._interruptible, self._before = False, False, {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is not threading.main_thread():
            return self  # Python gives signals to the main thread alone
        for number in (signal.SIGINT,) if distributed.is_multi_process() else (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        signal.signal(number, self._before[number])
        name = signal.Signals(number).name
        if number == signal.SIGINT:
            log.warning("%s: saving after this step, then stopping; once more stops at once, without saving", name)
        else:
            log.warning("%s: saving after this step, then stopping", name)
        if distributed.is_multi_process():
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.asked = True
        if self._interruptible:
            raise _Interrupted

    def requested(self, step: int) -> bool:
        """Whether to stop after this step: the same in all processes, which all must ask at every step."""
        return distributed.preempted(step) if distributed.is_multi_process() else self.asked

    def run_interruptible(self, function: Callable, *args):
        """function(*args), or None as soon as the run is asked to stop; several processes finish it first."""
        try:
            self._interruptible = not distributed.is_multi_process()
            return None if self.asked else function(*args)
        except _Interrupted:
            return None
        finally:
            self._interruptible = False
