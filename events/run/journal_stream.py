"""A run's events from a cursor on, where its loop is in another process: read from its journal, while that grows."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable

import anyio
import anyio.to_thread

from events.errors import CursorError
from events.journal.reader import JournalReader, last_whole_seq
from events.messages import Event
from events.run.stream import BatchedStream

_POLL_S = 0.05
_READ_LIMIT = 1_024


class JournalEventStream(BatchedStream):
    """The `events.protocol.EventStream` of a run whose journal somebody else writes. One consumer.

    However slow the consumer is, nothing is lost and nothing is kept in memory: the journal is the queue. It is read on
    threads, never in the event loop; only the opening, when it is to begin now, reads the journal's last few kilobytes
    on the calling thread.

    Args:
        journal_dir: The run's journal; it may not exist yet.
        attempt: The attempt that is watched: what earlier ones wrote is history, what later ones write is not returned.
        over: Whether the attempt is, so that nothing more is written to the journal. Any thread.
        since: Cursor: events with a greater ``seq`` are returned. None: those that are not in the journal yet.
        types: Only these types; None for all.

    Raises:
        CursorError: one of the types is never in the journal.
        OSError: the journal exists but cannot be read.
    """

    def __init__(
        self,
        journal_dir: str | os.PathLike[str],
        attempt: int,
        over: Callable[[], bool],
        since: int | None,
        types: Iterable[type[Event]] | None,
    ) -> None:
        super().__init__()
        self._types = frozenset(types) if types is not None else None
        unkept = sorted(one.__name__ for one in self._types or () if not one.journalled)
        if unkept:
            raise CursorError(
                f"{', '.join(unkept)} cannot be watched from another process: the journal, through which the events"
                f" come, does not keep such events; leave them out, or watch them in the run's own process"
            )
        self._attempt = attempt
        self._over = over
        self._cursor = last_whole_seq(journal_dir) if since is None else since
        self._reader = JournalReader(journal_dir, since=self._cursor)
        self._reading = threading.Lock()
        self._read: deque[Event] = deque()  # filled by a thread, emptied here
        self._limiter = anyio.CapacityLimiter(1)  # our own: the host's may be taken by whatever the host does
        self._ended = False

    @property
    def cursor(self) -> int:
        """``seq`` of the last event that was returned, or passed over because of its type."""
        return self._ready[0].seq - 1 if self._ready else self._cursor

    async def _next_batch(self) -> list[Event]:
        while not self._ended:
            over = self._over()  # asked before reading: what is written later must not be missed
            if not self._read:
                await anyio.to_thread.run_sync(self._read_on, limiter=self._limiter)
            found = bool(self._read)
            batch = self._take()
            if batch:
                return batch
            if not found:
                if over:
                    break
                await anyio.sleep(_POLL_S)
        self._ended = True
        raise anyio.EndOfStream

    async def aclose(self) -> None:
        """Stop receiving; the rest is let go, and `cursor` stays where it is."""
        self._cursor = self.cursor
        self._ready.clear()
        self._ended = True

    def _take(self) -> list[Event]:
        """Those of the events read that are wanted."""
        batch: list[Event] = []
        while self._read:
            event = self._read.popleft()
            if event.attempt > self._attempt:  # the run has been taken up again since
                self._ended = True
                break
            self._cursor = event.seq
            if self._types is None or type(event) in self._types:
                batch.append(event)
        return batch

    def _read_on(self) -> None:
        """On a thread. Asyncio's `task.cancel` leaves it behind: what it reads is kept, the next one waits for it."""
        with self._reading:
            self._read.extend(self._reader.read(_READ_LIMIT))
