"""A place where the loop waits until hooks have returned."""

from __future__ import annotations

import threading
from collections.abc import Iterable


class Fence:
    """Counts the observers that the loop waits for at one event.

    Created by the loop, released by the observers' threads or by the bus when an observer will not run any more.
    """

    def __init__(self, observers: Iterable[str]) -> None:
        self._lock = threading.Lock()
        self._waiting = set(observers)
        self._released = threading.Event()
        if not self._waiting:
            self._released.set()

    @property
    def waiting(self) -> list[str]:
        """Names of the observers that have not returned yet."""
        with self._lock:
            return sorted(self._waiting)

    def release(self, observer: str) -> None:
        """Stop waiting for an observer that has returned, failed or been disabled. Any thread; may be repeated."""
        with self._lock:
            self._waiting.discard(observer)
            if not self._waiting:
                self._released.set()

    def keep(self, observers: set[str]) -> None:
        """Release all observers but these, because no other will run the hook."""
        for observer in self.waiting:
            if observer not in observers:
                self.release(observer)

    def wait(self, timeout_s: float) -> bool:
        """Wait on the loop's thread; True once every observer is released."""
        return self._released.wait(timeout_s)
