"""Calls on a few daemon threads of our own, with their results in order: a bounded number of them is under way."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Generic, TypeVar

T = TypeVar("T")


class _Call(Generic[T]):
    def __init__(self, function: Callable[[], T]) -> None:
        self._function: Callable[[], T] | None = function
        self._finished = threading.Event()
        self._values: list[T] = []
        self._error: BaseException | None = None

    def run(self) -> None:
        assert self._function is not None
        try:
            self._values.append(self._function())
        except BaseException as error:  # a thread's border: raised by `result`
            self._error = error
        self._function = None  # it holds the bytes that it has written
        self._finished.set()

    def result(self) -> T:
        self._finished.wait()
        if self._error is not None:
            raise self._error
        return self._values.pop()


def in_order(calls: Iterable[Callable[[], T]], threads: int, name: str) -> Generator[T]:
    """Make calls on threads, and yield what they return, in the order of the calls.

    No more than ``threads`` calls are taken from ``calls`` before the first of them has been yielded, so no more are
    under way, or keep memory. When a call raises, so does this, and takes no further ones. Whichever way it ends, none
    is under way any more: close it (`contextlib.closing`) where the loop over it may raise.

    Args:
        calls: Iterated on the caller's thread.
        name: Of the threads.
    """
    jobs: queue.SimpleQueue[_Call[T] | None] = queue.SimpleQueue()
    waiting: deque[_Call[T]] = deque()
    workers: list[threading.Thread] = []
    try:
        for function in calls:
            call = _Call(function)
            del function
            waiting.append(call)
            if len(workers) < threads:
                _start(workers, jobs, name)
            if workers:
                jobs.put(call)
            else:
                call.run()
            if len(waiting) >= threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for _ in workers:
            jobs.put(None)
        for worker in workers:
            worker.join()


def _start(workers: list[threading.Thread], jobs: queue.SimpleQueue[_Call[T] | None], name: str) -> None:
    thread = threading.Thread(target=_work, args=(jobs,), name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the system has no more threads: those there are do it, or the caller's own
        return
    workers.append(thread)


def _work(jobs: queue.SimpleQueue[_Call[T] | None]) -> None:
    while (call := jobs.get()) is not None:
        call.run()
        del call  # or what it returned would stay in memory until the next one
