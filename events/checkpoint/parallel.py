"""Calls on daemon threads, or on the caller's where the system has no more threads."""

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
        self._function = None  # it holds the bytes of the call
        self._finished.set()

    def result(self) -> T:
        self._finished.wait()
        if self._error is not None:
            raise self._error
        return self._values.pop()


def beside(function: Callable[[], T], name: str) -> Callable[[], T]:
    """Start a call on a thread of this name; return a function that waits for its end and returns its value."""
    call = _Call(function)
    thread = _start(call.run, name)
    if thread is None:
        call.run()

    def result() -> T:
        if thread is not None:
            thread.join()
        return call.result()

    return result


def in_order(calls: Iterable[Callable[[], T]], threads: int, name: str) -> Generator[T]:
    """Run calls on threads, and yield their results in order.

    At most ``threads`` calls are pending, or hold memory. The first exception propagates and starts no further call. No
    call is pending once the generator ends: close it (`contextlib.closing`) where the loop over it may raise.

    Args:
        calls: Iterated on the caller's thread.
        name: Name of the threads.
    """
    jobs: queue.SimpleQueue[_Call[T] | None] = queue.SimpleQueue()
    waiting: deque[_Call[T]] = deque()
    workers: list[threading.Thread] = []

    def work() -> None:
        while (call := jobs.get()) is not None:
            call.run()
            del call  # releases its result before the next call

    try:
        for function in calls:
            call = _Call(function)
            del function
            waiting.append(call)
            if len(workers) < threads and (thread := _start(work, name)) is not None:
                workers.append(thread)
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


def _start(target: Callable[[], None], name: str) -> threading.Thread | None:
    thread = threading.Thread(target=target, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the system has no more threads
        return None
    return thread
