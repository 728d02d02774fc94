"""A run's events from a cursor on: from the journal while it is behind, then as they are published."""

from __future__ import annotations

import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from typing import Self

import anyio
import anyio.to_thread

from events.bus.pump import Pump
from events.bus.subscription import Subscription
from events.errors import CursorError
from events.journal.reader import JournalReader
from events.messages import Event
from events.sink import Delivery

_JOURNAL_POLL_S = 0.02
_READ_LIMIT = 1_024


class BatchedStream(ABC):
    """What all `events.protocol.EventStream` have in common: batches, or one event after the other."""

    def __init__(self) -> None:
        self._ready: deque[Event] = deque()  # of a batch that is handed out one by one

    @abstractmethod
    async def _next_batch(self) -> list[Event]:
        """Wait for the next batch, at least one event. Raises `anyio.EndOfStream` where there is none any more."""

    async def receive(self) -> list[Event]:
        """Wait for the next batch, at least one event. A call that is cancelled loses nothing.

        Raises:
            anyio.EndOfStream: the last event was returned before, or the stream was closed.
            Exception: where the events come from cannot be read; it may be called again.
        """
        if self._ready:
            batch = list(self._ready)
            self._ready.clear()
            return batch
        return await self._next_batch()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        if not self._ready:
            try:
                self._ready.extend(await self.receive())
            except anyio.EndOfStream:
                raise StopAsyncIteration from None
        return self._ready.popleft()


class LocalEventStream(BatchedStream):
    """The `events.protocol.EventStream` of a run in this process. Create and use it in the run's event loop.

    A consumer that is too slow loses nothing as long as the run has a journal: what its queue dropped is read from
    there. The exceptions are types that the journal does not keep, and what the journal itself cannot write for the
    time being. Without a journal the oldest events go when the queue is full, and only the bus's recent history can be
    caught up with. Types that the journal does not keep are never caught up with: they come from the opening on.

    Args:
        pump: The run's.
        journal_dir: The run's journal; None if it has none.
        journal_settled: Whether the journal has nothing more to write of what was delivered so far.
        since: Cursor: events with a greater ``seq`` are returned. None: those from now on.
        types: Only these types; None for all that the journal keeps.
        capacity: Events that may wait in memory for the consumer.

    Raises:
        CursorError: without a journal, when events after ``since`` are not in memory any more.
    """

    def __init__(
        self,
        pump: Pump,
        journal_dir: str | os.PathLike[str] | None,
        journal_settled: Callable[[], bool],
        since: int | None,
        types: Iterable[type[Event]] | None,
        *,
        capacity: int = 16_384,
    ) -> None:
        super().__init__()
        self._types = frozenset(types) if types is not None else None
        self._cursor = pump.last_seq if since is None else since
        self._reader = JournalReader(journal_dir, since=self._cursor) if journal_dir is not None else None
        self._journal_settled = journal_settled
        self._reading = threading.Lock()
        self._read: deque[Event] = deque()  # filled by a thread, emptied here
        self._limiter = anyio.CapacityLimiter(1)  # our own: the host's may be taken by whatever the host does
        self._live: list[Event] = []
        self._pump = pump
        self._subscription: Subscription | None = None
        self._dropped = 0
        self._behind = self._cursor < pump.last_seq
        self._behind_until = pump.last_seq  # from there on, the queue has everything
        if self._behind and self._reader is None:
            self._live = self._recent(pump, self._cursor)
            self._behind = False
        if pump.ring.alive and not pump.closing:
            delivery = Delivery(types=self._types, latency_s=0.02, capacity=capacity)
            self._subscription = pump.subscribe("run.events", delivery)
            self._subscription.recoverable = self._reader is not None
            # For who leaves the stream without closing it; on whatever thread that is noticed.
            weakref.finalize(self, pump.ring.post, self._subscription.discard).atexit = False

    @property
    def cursor(self) -> int:
        """``seq`` of the last event that was returned, or passed over because of its type."""
        if self._ready:
            return self._ready[0].seq - 1
        live = self._subscription
        if live is None or self._behind or self._live or live.statistics.dropped > self._dropped or not live.is_empty:
            return self._cursor
        return max(self._cursor, self._pump.last_seq)  # none of the events since was meant for this stream

    async def _next_batch(self) -> list[Event]:
        while True:
            batch = await self._catch_up() if self._behind else await self._next_live()
            batch = [event for event in batch if event.seq > self._cursor]
            if batch:
                self._cursor = batch[-1].seq
                batch = [event for event in batch if self._wants(event)]
            if batch:
                return batch

    async def aclose(self) -> None:
        """Stop receiving; the rest is let go, and `cursor` stays where it is."""
        self._cursor = self.cursor
        self._ready.clear()
        self._read.clear()
        self._live = []
        self._behind = False
        if self._subscription is not None:
            self._subscription.discard()
            self._subscription = None

    def _wants(self, event: Event) -> bool:
        return event.journalled if self._types is None else type(event) in self._types

    async def _catch_up(self) -> list[Event]:
        """Read from the journal; leave that mode where the queue takes over, or once there is nothing more to read."""
        settled = self._journal_settled()  # asked before reading: what is written later must not be missed
        if not self._read:
            await anyio.to_thread.run_sync(self._read_on, limiter=self._limiter)
        batch: list[Event] = []
        # What lies behind that stays here, in case that the queue drops it.
        while self._read and self._read[0].seq <= self._behind_until:
            batch.append(self._read.popleft())
        reached = bool(batch) and batch[-1].seq == self._behind_until
        beyond = bool(self._read) and self._read[0].seq > self._behind_until
        if reached or beyond or (settled and not batch):
            self._behind = False
        elif not batch:
            await anyio.sleep(_JOURNAL_POLL_S)
        return batch

    def _read_on(self) -> None:
        """On a thread. Asyncio's `task.cancel` leaves it behind: what it reads is kept, the next one waits for it."""
        assert self._reader is not None
        with self._reading:
            self._read.extend(self._reader.read(_READ_LIMIT))

    async def _next_live(self) -> list[Event]:
        if self._live:
            batch, self._live = self._live, []
            return batch
        live = self._subscription
        if live is None:
            raise anyio.EndOfStream
        try:
            batch = [event for event, _ in await live.receive()]
        except anyio.EndOfStream:
            self._subscription = None
            batch = []
        if live.statistics.dropped > self._dropped and self._reader is not None:
            # Events before these, between them, or soon after them were dropped from the queue: the journal has them.
            self._dropped = live.statistics.dropped
            self._live = batch
            self._behind = True
            self._behind_until = self._pump.last_seq
            return []
        return batch

    @staticmethod
    def _recent(pump: Pump, since: int) -> list[Event]:
        recent = [event for event in pump.history if event.seq > since]
        if not recent or recent[0].seq > since + 1:
            oldest = recent[0].seq if recent else pump.last_seq + 1
            raise CursorError(
                f"events after seq {since} are not kept: the run has no journal and the oldest event in memory is"
                f" seq {oldest}; pass since={oldest - 1} or later, or run with journal=True"
            )
        return recent
