"""Says which process of a multi-process run is gone. jax alone aborts the others, with a stack of C++ functions.

Each process gives signs of life in the key-value store of jax's coordination service, watches the next one, and reads
whether any is gone. Then all end with the same line. Where process 0 is gone, which has the store, jax aborts the
others at once, and a child process of each says what it means.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from typing import Any

POLL_SECONDS = 3.0
SILENT_POLLS = 20  # without a sign of life: 60 s, in which a library may hold the interpreter. jax aborts after 100 s.
ALIVE, GONE = "zslflax/alive/", "zslflax/gone/"  # folders of the store, with an entry for each process
DONE = "done"  # instead of a count: the process has come to its end
GO_ON = "The same command goes on from the newest checkpoint"
# Waits for a line or the end of standard input. The latter comes when the process ends without a word.
NOTE = 'trap "" INT TERM HUP; read -r _ || echo "$0" >&2'


class Peers:
    """The processes of a run, as one of them sees them.

    Args:
        process: the number of this process.
        processes: how many there are.
    """

    def __init__(self, process: int, processes: int):
        self.process, self.processes = process, processes
        self.client: Any = None
        aborted = ", or was aborted by jax because it lost process 0" if process else ""
        text = f"zslflax: process {process} of {processes} was killed{aborted}. The others end too. {GO_ON}"
        self.note: subprocess.Popen | None = None
        with contextlib.suppress(OSError):  # no shell, or no process more is allowed
            self.note = subprocess.Popen(["sh", "-c", NOTE, text], stdin=subprocess.PIPE, start_new_session=True)

    def watch(self, client: Any) -> None:
        """Starts to give signs of life and to watch the next process, in a thread, until the main thread ends.

        Args:
            client: jax's client of its coordination service, connected.
        """
        self.client = client
        # Python waits for it before it ends. A daemon thread that is inside jax's client then aborts the process.
        threading.Thread(target=self._run, name="zslflax-peers").start()

    def leave(self, error: str = "") -> None:
        """Notes that this process ends in order, or with an error, which the others then give as their reason to end.

        The client may be shut down already where there is no error.
        """
        if error and self.client is not None:
            lines = error.strip().splitlines()
            described = lines[-1] if lines[0].startswith("Traceback") else lines[0]
            self._end_all(f"process {self.process} of {self.processes} has failed: {described}")
            self._wait_for_readers()
        if self.note is not None and self.note.stdin is not None:
            with contextlib.suppress(OSError):
                self.note.stdin.write(b"\n")
                self.note.stdin.close()
            self.note = None

    def _run(self) -> None:
        """Polls the store."""
        following = (self.process + 1) % self.processes
        count, last, silent = 0, "", 0
        while True:
            threading.main_thread().join(POLL_SECONDS)
            count += 1
            ended = not threading.main_thread().is_alive()
            try:
                self.client.key_value_set(f"{ALIVE}{self.process}/count", DONE if ended else str(count), True)
                if ended:
                    return
                signs = self.client.key_value_dir_get(f"{ALIVE}{following}/")
                gone = self.client.key_value_dir_get(GONE)
            except Exception:  # process 0 ends in order, or jax aborts this process in a moment
                if ended:
                    return
                continue
            if reasons := [reason for key, reason in gone if key != f"{GONE}{self.process}"]:
                self._exit(reasons[0])
            current = signs[0][1] if signs else ""
            silent = 0 if current != last or current == DONE else silent + 1
            last = current
            if silent >= SILENT_POLLS:
                seconds = round(silent * POLL_SECONDS)
                reason = (
                    f"process {following} of {self.processes} has given no sign of life for {seconds} s: it was "
                    "killed, or its machine or network failed"
                )
                self._end_all(reason)
                self._exit(reason)

    def _end_all(self, reason: str) -> None:
        """Tells the others to end, and why."""
        with contextlib.suppress(Exception):  # the store is gone
            self.client.key_value_set(f"{GONE}{self.process}", reason, True)

    def _wait_for_readers(self) -> None:
        """Process 0, which has the store, ends after the others have read it."""
        if self.process == 0:
            time.sleep(2 * POLL_SECONDS)

    def _exit(self, reason: str) -> None:
        """Ends this process."""
        with contextlib.suppress(OSError):  # nobody reads it
            print(f"zslflax: {reason}. This process ends too. {GO_ON}", file=sys.stderr, flush=True)
        self._wait_for_readers()
        self.leave()
        os._exit(1)
