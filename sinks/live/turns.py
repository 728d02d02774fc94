"""Turns of threads that read runs: few at a time, each for a short time, so that long reads do not delay short ones."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import threading
import time
from collections.abc import Iterator

MOST_AT_ONCE = 1
"""Maximum turns at a time: threads that decode journals delay the event loop."""
TURN_S = 0.02
"""Seconds of a turn after which `Turns.pass_on` ends it."""
OVERTIME_S = 0.05
"""Seconds after which a turn is not counted: its thread probably waits for a disk, and must not delay others."""
_LATER_S = 0.25
"""Seconds per past turn by which a read is placed behind new reads..."""
_MOST_LATER_S = 5.0
"""...and their maximum, so that a long read is not starved."""


class Turns:
    """Limits the threads that work at a time. Any thread."""

    def __init__(self, most_at_once: int = MOST_AT_ONCE) -> None:
        self._most_at_once = most_at_once
        self._changed = threading.Condition()
        self._began: dict[int, float] = {}  # current turns, by thread
        self._had: dict[int, int] = {}  # past turns of the read on a thread
        self._waiting: list[tuple[float, int]] = []  # the next one first
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Wait for a turn, and hold it. The read with the fewest past turns is first."""
        thread = threading.get_ident()
        self._had[thread] = 0
        try:
            self._begin(time.monotonic())
            try:
                yield
            finally:
                self._end()
        finally:
            del self._had[thread]

    def pass_on(self) -> None:
        """End this thread's turn if it has lasted `TURN_S`, and wait for the next. Does nothing without a turn."""
        thread = threading.get_ident()
        began = self._began.get(thread)
        if began is not None and (now := time.monotonic()) - began >= TURN_S:
            self._had[thread] += 1
            self._end()
            self._begin(now + min(_LATER_S * self._had[thread], _MOST_LATER_S))

    def _begin(self, rank: float) -> None:
        mine, wait_s = (rank, next(self._numbers)), 0.0
        with self._changed:
            bisect.insort(self._waiting, mine)
            try:
                while mine is not self._waiting[0] or (wait_s := self._wait_s()) > 0:
                    self._changed.wait(wait_s if mine is self._waiting[0] else None)
            finally:
                self._waiting.remove(mine)
                self._changed.notify_all()
            self._began[threading.get_ident()] = time.monotonic()

    def _end(self) -> None:
        with self._changed:
            self._began.pop(threading.get_ident(), None)
            self._changed.notify_all()

    def _wait_s(self) -> float:
        """Return the maximum seconds until a turn is free; 0 if one is."""
        now = time.monotonic()
        left = sorted(began + OVERTIME_S - now for began in self._began.values() if began + OVERTIME_S > now)
        return left[-self._most_at_once] if len(left) >= self._most_at_once else 0.0


READING = Turns()
"""Of all threads of this process that read runs for clients."""
