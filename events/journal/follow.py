"""Following a journal while it grows: the events from a cursor on, read on threads."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable

import anyio
import anyio.to_thread

from events.journal.reader import JournalReader, SkippedLine
from events.messages import Event

BATCH = 1_024
"""Maximum events per read, where a caller sets none."""


class Follower:
    """Reads a journal from a cursor on, so that the disk never blocks the event loop. One task uses it.

    Args:
        folder: The journal; it may not exist yet.
        after: Events with a greater ``seq`` are returned.
        over: Whether nothing more is written. Asked before each read of `receive`, in the event loop.
        poll_s: Seconds between two reads while there are no more events.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        after: int = 0,
        *,
        over: Callable[[], bool] = lambda: False,
        poll_s: float = 0.02,
    ) -> None:
        self.cursor = after
        """``seq`` of the last event that was returned."""
        self._reader = JournalReader(folder, after)
        self._over = over
        self._poll_s = poll_s
        self._woken = anyio.Event()
        self._at_end = False  # what is left at the end of the journal counts, though it may be unfinished
        self._ready: deque[Event] = deque()  # a thread fills it, `read` empties it
        self._reading = threading.Lock()
        self._limiter = anyio.CapacityLimiter(1)  # our own: the host may have exhausted the default one

    @property
    def skipped(self) -> list[SkippedLine]:
        """Lines that are not events: the newest thousand."""
        return self._reader.skipped

    async def read(self, limit: int = BATCH) -> list[Event]:
        """Return the next events; none if there are no more yet. A call that is cancelled loses nothing.

        Raises:
            OSError: The journal cannot be read. It may be called again.
        """
        if not self._ready:
            await anyio.to_thread.run_sync(self._fill, limit, limiter=self._limiter)
        events = [self._ready.popleft() for _ in range(len(self._ready))]
        if events:
            self.cursor = events[-1].seq
        return events

    async def receive(self, limit: int = BATCH) -> list[Event]:
        """Wait for the next events, at least one. A call that is cancelled loses nothing.

        Raises:
            anyio.EndOfStream: The journal is over, and everything in it was returned.
            OSError: The journal cannot be read. It may be called again.
        """
        while True:
            self._woken = anyio.Event()
            over = self._over()  # asked before reading: an event that is written later must not be missed
            if events := await self.read(limit):
                return events
            if not over:
                with anyio.move_on_after(self._poll_s):
                    await self._woken.wait()
            elif self._at_end:
                raise anyio.EndOfStream
            else:
                self._at_end = True

    def wake(self) -> None:
        """Have a `receive` that waits look again now."""
        self._woken.set()

    def _fill(self, limit: int) -> None:
        # Asyncio's `task.cancel` leaves this thread behind: the next call waits for it, and returns what it has read.
        with self._reading:
            if not self._ready:
                self._ready.extend(self._reader.read(limit) or (self._reader.finish() if self._at_end else []))
