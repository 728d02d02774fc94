"""The CPU time of threads, read from another thread."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator


class CpuTime:
    """The total CPU time of some threads: of those that run, and of those that have ended.

    Any thread. Where the system does not tell one thread another's time (macOS, Windows), a thread counts when it ends.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ended_ns = 0
        self._running: dict[int, tuple[int | None, int]] = {}  # by thread: its clock, and what that showed at first

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count the CPU time of the calling thread from here to the end of the block."""
        thread = threading.get_ident()
        get_clock = getattr(time, "pthread_getcpuclockid", None)
        began = time.thread_time_ns()
        with self._lock:
            self._running[thread] = get_clock(thread) if get_clock is not None else None, began
        try:
            yield
        finally:
            with self._lock:
                del self._running[thread]
                self._ended_ns += time.thread_time_ns() - began

    def read_ns(self) -> int:
        """Return the nanoseconds that were counted up to now."""
        with self._lock:  # so that no thread ends meanwhile, and its clock with it
            return self._ended_ns + sum(
                time.clock_gettime_ns(clock) - began for clock, began in self._running.values() if clock is not None
            )
