"""Items that are made in a thread: order, limits, errors, and the end of the thread."""

import threading
import time

import pytest

from zslflax.background import BackgroundIterator


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "zslflax-background"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not threads()


def test_items_come_in_order_and_never_more_than_the_size_wait():
    made = []

    def items():
        for i in range(20):
            made.append((i, threading.current_thread().name))
            yield i

    with BackgroundIterator(items(), size=3) as background:
        assert not made  # before the first use
        for i in range(20):
            assert background.wait() and next(background) == i
            time.sleep(0.01 if i < 5 else 0)
            assert len(made) <= i + 1 + 3
        with pytest.raises(StopIteration):
            next(background)
    assert made == [(i, "zslflax-background") for i in range(20)]


def test_items_are_made_while_the_caller_is_busy():
    with BackgroundIterator(iter(range(5)), size=2) as background:
        assert next(background) == 0
        deadline = time.monotonic() + 10
        while len(background._waiting) < 2:
            assert time.monotonic() < deadline
        assert next(background) == 1


@pytest.mark.parametrize("error", [ValueError("bad"), KeyboardInterrupt()])
def test_an_error_comes_after_the_items_before_it_and_once(error):
    def items():
        yield from range(3)
        raise error

    with BackgroundIterator(items(), size=10) as background:
        assert [next(background) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(type(error)) as raised:
            next(background)
        assert raised.value is error
        with pytest.raises(StopIteration):
            next(background)


def test_closing_ends_the_iterator_in_its_thread_while_it_waits_for_room():
    closed_in = []

    def items():
        try:
            while True:
                yield 0
        finally:
            closed_in.append(threading.current_thread().name)

    background = BackgroundIterator(items(), size=2)
    next(background)
    background.close()
    assert closed_in == ["zslflax-background"]
    with pytest.raises(StopIteration):
        next(background)
    background.close()


def test_waiting_ends_after_its_time():
    go_on = threading.Event()

    def items():
        go_on.wait()
        yield 0

    with BackgroundIterator(items(), size=1) as background:
        assert not background.wait(0.0) and not background.wait(0.05)
        go_on.set()
        assert background.wait(10.0) and next(background) == 0


def test_one_that_was_never_used_needs_no_thread():
    background = BackgroundIterator(iter([1]), size=1)
    background.close()
    with pytest.raises(StopIteration):
        next(background)
