"""TensorBoard events, which a run can do without."""

import contextlib
import logging
import socket
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger("zslflax")


class Events:
    """Writes curves and images for TensorBoard, in the caller's thread.

    After an error it warns once and writes nothing more.

    tensorboardX's own writer has a thread. After an error that thread ends, and the next value waits for it for ever.

    Args:
        folder: where the file of events is created.
        step: the step at which a run starts. TensorBoard hides events of later steps, of a run that was killed.
    """

    def __init__(self, folder: Path, step: int):
        self.folder, self.library = folder, import_tensorboard()
        self.writer: Any = None
        session_log = self.library.SessionLog
        with self._given_up_on_error():
            name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}"
            self.writer = self.library.RecordWriter(str(folder / name))
            self._write_event(wall_time=time.time(), file_version="brain.Event:2")
            # As tensorboardX's own writer does for its `purge_step`.
            self._write_event(step=step + 1, file_version="brain.Event:2")
            self._write_event(step=step + 1, session_log=session_log(status=session_log.START))
            self.writer.flush()

    def write(self, step: int, values: dict[str, float]) -> None:
        """Writes a point of each curve."""
        if self.writer is None:
            return
        with self._given_up_on_error():
            for name, value in values.items():
                summary = self.library.scalar(name.replace("@", "_at_"), value)
                self._write_event(step=step, wall_time=time.time(), summary=summary)
            self.writer.flush()

    def write_image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an image, uint8 [h, w, 3]."""
        if self.writer is None:
            return
        with self._given_up_on_error():
            summary = self.library.image(name, image, dataformats="HWC")
            self._write_event(step=step, wall_time=time.time(), summary=summary)
            self.writer.flush()

    def close(self) -> None:
        """Closes the file."""
        if self.writer is not None:
            with self._given_up_on_error():
                self.writer.close()
            self.writer = None

    def _write_event(self, **fields: Any) -> None:
        """Writes an event with these fields."""
        self.writer.write(self.library.Event(**fields).SerializeToString())

    @contextlib.contextmanager
    def _given_up_on_error(self) -> Iterator[None]:
        """Turns an error of the file into the warning."""
        try:
            yield
        except OSError as error:
            log.warning("TensorBoard events in %s are given up, and the run goes on without: %s", self.folder, error)
            writer, self.writer = self.writer, None
            if writer is not None:
                with contextlib.suppress(OSError):  # what waits to be written is lost
                    writer.close()


def import_tensorboard() -> types.SimpleNamespace:
    """What `Events` needs of tensorboardX.

    tensorboardX imports PyTorch where it is installed, to recognise its tensors. That takes seconds and memory, and no
    tensor comes here, so the import is made to fail.
    """
    hide_torch = "torch" not in sys.modules
    modules: dict[str, Any] = sys.modules
    if hide_torch:
        modules["torch"] = None
    try:
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter
        from tensorboardX.summary import image, scalar
    finally:
        if hide_torch:
            del modules["torch"]
    return types.SimpleNamespace(
        RecordWriter=RecordWriter, Event=Event, SessionLog=SessionLog, scalar=scalar, image=image
    )
