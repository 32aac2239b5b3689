"""Worker processes that load chunks of batches.

The arrays come back through shared memory that has no name and no limit of its own (`memfd_create`), so that the size
of /dev/shm does not matter. A worker is started by a command and not by `multiprocessing`: it imports neither jax nor
the main script, which therefore needs no `__main__` guard and may be a notebook. It ends when its connection closes,
which also happens when its parent is killed.
"""

import concurrent.futures
import contextlib
import errno
import mmap
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

import cloudpickle

from zslflax.data.cores import NO_WORKERS
from zslflax.errors import UserError

READY_CHUNKS = 2  # of each worker, that wait to be taken, beside one for each of its threads
ALIGNMENT = 64  # bytes, of the arrays in shared memory
STOP_SECONDS = 5.0  # that workers have to end before they are killed


class WorkerPool:
    """Loads chunks in worker processes and yields them in order.

    The arrays of a chunk lie in shared memory that is used again: they are valid until the next chunk is taken.

    Args:
        load: turns a chunk's samples into what is yielded, such as a dict of arrays. It is pickled.
        chunks: the samples of each chunk.
        workers: processes.
        threads: in each worker, each of which loads a chunk at a time.
        setting: the config field that chooses the number of workers, for messages; "" where there is none.

    Raises:
        UserError: the limit of open files is too low for so many workers; or, while iterating, a worker was killed.
        Exception: while iterating, what `load` raised; earlier chunks are yielded before.
    """

    def __init__(
        self,
        load: Callable[[Any], Any],
        chunks: Iterator[Sequence[Any]],
        workers: int,
        threads: int,
        setting: str = "data.workers",
    ):
        self._chunks, self._setting = enumerate(chunks), setting
        self._results: dict[int, tuple[Worker, int, Any]] = {}  # by chunk: where it is and what it holds
        self._next, self._outstanding = 0, 0
        self._taken: tuple[Worker, int] | None = None
        self.workers: list[Worker] = []
        raise_open_file_limit()
        slots, load_file = threads + READY_CHUNKS, shared_memory_file()
        try:
            with open(load_file, "wb", closefd=False) as file:
                file.write(cloudpickle.dumps(load))
            for _ in range(workers):
                self.workers.append(Worker(load_file, slots, threads))
            for slot in range(slots):  # the first chunks go to different workers
                for worker in self.workers:
                    self._assign(worker, slot)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError) and error.errno == errno.EMFILE:
                raise UserError(
                    f"{workers} data workers need more open files than `ulimit -n` allows, "
                    f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]}; raise it{setting and f', or lower {setting}'}"
                ) from None
            raise
        finally:
            os.close(load_file)

    def __iter__(self) -> "WorkerPool":
        return self

    def __next__(self) -> Any:
        if self._taken:
            self._assign(*self._taken)
            self._taken = None
        if not self._outstanding:
            raise StopIteration
        while self._next not in self._results:
            self._receive()
        worker, slot, result = self._results.pop(self._next)
        self._next += 1
        self._outstanding -= 1
        self._taken = worker, slot
        if isinstance(result, BaseException):
            raise result
        return result

    def _assign(self, worker: "Worker", slot: int) -> None:
        """Gives the next chunk to a worker, if there is one."""
        for number, samples in self._chunks:
            self._outstanding += 1
            try:
                worker.connection.send((number, slot, samples))
            except OSError:
                raise self._error_of(worker) from None
            return

    def _receive(self) -> None:
        """Waits until workers have loaded chunks, and notes them."""
        by_connection: dict[Any, Worker] = {worker.connection: worker for worker in self.workers}
        for connection in wait(list(by_connection)):
            worker = by_connection[connection]
            try:
                number, slot, message = worker.connection.recv()
            except (EOFError, OSError):
                raise self._error_of(worker) from None
            self._results[number] = worker, slot, worker.read(message)

    def _error_of(self, worker: "Worker") -> Exception:
        """The error of a worker that has ended."""
        status = worker.process.wait()
        if status >= 0:
            return RuntimeError(f"a data worker ended with status {status}; its own message is above")
        name = signal.Signals(-status).name
        reason = "; the kernel sends it when memory is used up" if -status == signal.SIGKILL else ""
        fewer = f"Set {self._setting} below {len(self.workers)}, or to {NO_WORKERS} for threads instead of workers"
        return UserError(
            f"a data worker was killed by {name}{reason}. {fewer if self._setting else 'Start the command again'}"
        )

    def close(self) -> None:
        """Ends the workers. Chunks that were not taken are gone."""
        for worker in self.workers:
            worker.connection.close()
        for worker in self.workers:
            worker.close()
        self._results.clear()
        self._taken, self.workers = None, []


class Worker:
    """A worker process, as its parent sees it.

    Args:
        load_file: descriptor of a file with the pickled function.
        slots: chunks that it may hold, those that it is loading included.
        threads: of the worker.
    """

    def __init__(self, load_file: int, slots: int, threads: int):
        self.memory_file, self.memory = shared_memory_file(), memoryview(b"")
        self.connection, remote = Pipe()
        arguments = [remote.fileno(), load_file, self.memory_file, slots, threads]
        program = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import serve; serve(*{arguments})"
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},  # a source may import jax, which must not take a device
                pass_fds=(remote.fileno(), load_file, self.memory_file),
                start_new_session=True,  # Ctrl-C is for the main process alone
            )
        finally:
            remote.close()

    def read(self, message: Any) -> Any:
        """The chunk or the exception that the worker has sent."""
        if isinstance(message, Failure):
            return message.exception()
        pickled, spans, size = message
        if size > len(self.memory):
            self.memory = memoryview(mmap.mmap(self.memory_file, size))
        return pickle.loads(pickled, buffers=[self.memory[start:stop] for start, stop in spans])

    def close(self) -> None:
        """Waits for the end of the process, whose connection is closed, or kills it."""
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.memory_file)


def raise_open_file_limit() -> None:
    """Raises this process's limit of open files to what the system allows it. Each worker needs three."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # macOS refuses an unlimited number
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def shared_memory_file() -> int:
    """The descriptor of a new file in memory, without a name; on disk where the system has no such files."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("zslflax-worker")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


# The worker process.


class Failure:
    """An exception as a worker sends it."""

    def __init__(self, error: BaseException):
        self.text = "".join(traceback.format_exception(error))
        try:
            self.pickled: bytes | None = cloudpickle.dumps(error)
            pickle.loads(self.pickled)
        except Exception:
            self.pickled = None

    def exception(self) -> BaseException:
        """The same exception, with the worker's traceback as a note."""
        error = pickle.loads(self.pickled) if self.pickled else RuntimeError("a data worker failed")
        error.add_note(f"In a data worker:\n{self.text}")
        return error


class SlotWriter:
    """Writes chunks to the shared memory of a worker.

    All slots have the size that the first chunk needs, and a quarter more. A chunk that needs more is sent through the
    connection.

    Args:
        memory_file: descriptor of the memory.
        slots: how many there are.
    """

    def __init__(self, memory_file: int, slots: int):
        self.memory_file, self.slots, self.slot_size = memory_file, slots, 0
        self.memory: Any = None
        self.lock = threading.Lock()

    def write(self, slot: int, chunk: Any) -> tuple[bytes, list[tuple[int, int]], int]:
        """Returns the pickled chunk, the bytes (start, stop) of each of its buffers, and the memory's size."""
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(chunk, protocol=5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        needed = sum(-(-len(view) // ALIGNMENT) * ALIGNMENT for view in views)
        with self.lock:
            if self.memory is None and needed:
                self.slot_size = -(-needed * 5 // (4 * mmap.PAGESIZE)) * mmap.PAGESIZE
                os.ftruncate(self.memory_file, self.slots * self.slot_size)
                self.memory = memoryview(mmap.mmap(self.memory_file, self.slots * self.slot_size))
        if needed > self.slot_size:
            return pickle.dumps(chunk, protocol=5), [], 0
        spans, start = [], slot * self.slot_size
        for view in views:
            self.memory[start : start + len(view)] = view
            spans.append((start, start + len(view)))
            start += -(-len(view) // ALIGNMENT) * ALIGNMENT
        return pickled, spans, self.slots * self.slot_size


def serve(connection_file: int, load_file: int, memory_file: int, slots: int, threads: int) -> None:
    """Loads chunks until the connection closes. Signals that are for the run do not end the worker."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    connection, writer, lock = Connection(connection_file), SlotWriter(memory_file, slots), threading.Lock()
    load: Callable[[Any], Any] = unpickle(load_file)

    def answer(number: int, slot: int, samples: Any) -> None:
        try:
            message: Any = writer.write(slot, load(samples))
        except BaseException as error:
            message = Failure(error)
        with lock:
            try:
                connection.send((number, slot, message))
            except OSError:
                os._exit(0)

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        try:
            while True:
                pool.submit(answer, *connection.recv())
        except (EOFError, OSError):
            os._exit(0)  # does not wait for threads that are reading


def unpickle(file: int) -> Callable[[Any], Any]:
    """The function in a file; where it cannot be unpickled, one that raises the reason."""
    try:
        return pickle.loads(os.pread(file, os.fstat(file).st_size, 0))
    except Exception as error:
        reason = error

    def fail(_: Any) -> None:
        raise reason

    return fail
