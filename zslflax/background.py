"""Work that threads do ahead of its use: the items of an iterator, and chunks of things to load."""

import collections
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Chunk = TypeVar("Chunk", bound=Iterable[Any])

JOIN_SECONDS = 30.0  # that `close` waits for an item that is being made, as one that is read over a network


class BackgroundIterator(Iterator[T], Generic[T]):
    """Takes items from an iterator in a thread, which starts with the first use, and hands them on in order.

    An exception of the iterator is raised after the items before it.

    >>> with BackgroundIterator(iter("abc"), size=2) as letters:
    ...     print(*letters)
    a b c

    Args:
        items: the iterator. It is closed in the thread, if it can be closed.
        size: the number of items that may wait. No further item is taken before there is room for it.
    """

    def __init__(self, items: Iterator[T], size: int):
        self._items, self._size = items, size
        self._waiting: collections.deque[T] = collections.deque()
        self._ended, self._closed = False, False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="zslflax-background", daemon=True)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits until an item, the end or an exception has come, at most `timeout` seconds. Returns whether it has."""
        with self._changed:
            if self._thread.ident is None and not self._closed:
                self._thread.start()
            return self._changed.wait_for(lambda: bool(self._waiting) or self._ended or self._closed, timeout)

    def __next__(self) -> T:
        self.wait()
        with self._changed:
            if self._waiting and not self._closed:
                self._changed.notify_all()
                return self._waiting.popleft()
            error, self._error = self._error, None
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Ends the thread. The items that wait are dropped."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join(JOIN_SECONDS)

    def __enter__(self) -> "BackgroundIterator[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        """Fills the queue until the iterator ends or the queue is closed."""
        error: BaseException | None = None
        try:
            while self._wait_for_room():
                try:
                    item = next(self._items)
                except StopIteration:
                    break
                with self._changed:
                    if not self._closed:
                        self._waiting.append(item)
                    self._changed.notify_all()
                del item  # the caller alone decides how long it lives
        except BaseException as raised:
            error = raised
        try:
            if hasattr(self._items, "close"):
                self._items.close()
        except BaseException as raised:
            error = error or raised
        with self._changed:
            self._error, self._ended = error, True
            self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """Waits until an item may be taken; False if the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._waiting) < self._size or self._closed)
            return not self._closed


def load_ahead(pool: Executor, load: Callable[[Any], T], chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, list[T]]]:
    """Yields (chunk, load(element) of each element); the next chunk is loaded meanwhile.

    >>> from concurrent.futures import ThreadPoolExecutor
    >>> with ThreadPoolExecutor() as pool:
    ...     list(load_ahead(pool, str.upper, ["ab", "c"]))
    [('ab', ['A', 'B']), ('c', ['C'])]
    """
    ahead: list[tuple[Chunk, list[Future[T]]]] = []
    for chunk in chunks:
        ahead.append((chunk, [pool.submit(load, element) for element in chunk]))
        if len(ahead) > 1:
            first, futures = ahead.pop(0)
            yield first, [future.result() for future in futures]
    for first, futures in ahead:
        yield first, [future.result() for future in futures]
