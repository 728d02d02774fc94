"""A run's events from a cursor on: in its process, or in another one, from its journal."""

from __future__ import annotations

import os
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable
from typing import Self

import anyio

from events.bus.pump import Pump
from events.bus.subscription import Subscription
from events.errors import CursorError
from events.journal.follow import Follower
from events.journal.tail import journal_tail
from events.messages import Event
from events.sink import Delivery, Overflow

_POLL_S = 0.02


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


def journalled_types(types: Iterable[type[Event]] | None) -> frozenset[type[Event]] | None:
    """The types of a stream that is read from a journal; None for all.

    Raises:
        CursorError: One of the types is never in the journal.
    """
    kinds = None if types is None else frozenset(types)
    if unkept := sorted(kind.__name__ for kind in kinds or () if not kind.journalled):
        raise CursorError(
            f"{', '.join(unkept)} cannot be watched from another process, because the journal does not keep such"
            f" events; remove them, or watch them in the run's own process"
        )
    return kinds


class JournalEventStream(BatchedStream):
    """The `events.protocol.EventStream` of a run whose journal another process writes. One consumer.

    However slow the consumer is, nothing is lost and nothing is kept in memory: the journal is the queue. It is read on
    threads, never in the event loop; only the opening, with ``since=None``, reads the journal's last kilobytes on the
    calling thread.

    Args:
        journal_dir: The run's journal; it may not exist yet.
        attempt: The attempt that is watched: events of earlier ones are history, those of later ones end the stream.
        over: Whether the attempt is, so that nothing more is written to the journal.
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
        self._types = journalled_types(types)
        self._attempt = attempt
        self._cursor = journal_tail(journal_dir, chunk=2**13).last_seq if since is None else since
        self._ended = False
        self._follower = Follower(journal_dir, self._cursor, over=lambda: self._ended or over(), poll_s=_POLL_S)

    @property
    def cursor(self) -> int:
        """``seq`` of the last event that was returned, or passed over because of its type."""
        return self._ready[0].seq - 1 if self._ready else self._cursor

    async def _next_batch(self) -> list[Event]:
        batch: list[Event] = []
        while not batch and not self._ended:
            for event in await self._follower.receive():
                if self._ended or event.attempt > self._attempt:  # the run was resumed since
                    self._ended = True
                    break
                self._cursor = event.seq
                if self._types is None or type(event) in self._types:
                    batch.append(event)
        if not batch:
            raise anyio.EndOfStream
        return batch

    async def aclose(self) -> None:
        """Stop receiving and drop the rest; `cursor` keeps its value."""
        self._cursor = self.cursor
        self._ready.clear()
        self._ended = True
        self._follower.wake()  # for a task that still waits in `receive`


class LocalEventStream(BatchedStream):
    """The `events.protocol.EventStream` of a run in this process. Create and use it in the run's event loop.

    A consumer that is too slow loses nothing if the run has a journal: it catches up from there. The exceptions are
    types that the journal does not keep, and events that the journal itself cannot write. Without a journal the oldest
    events are dropped when the queue is full, and only the pump's recent history can be caught up with. Events of types
    that the journal does not keep are returned from the opening on.

    Args:
        pump: The run's.
        since: Cursor: events with a greater ``seq`` are returned. None: those from now on.
        types: Only these types; None for all that the journal keeps.
        capacity: Maximum events that wait in memory for the consumer.

    Raises:
        CursorError: without a journal, when events after ``since`` are not in memory any more.
    """

    def __init__(
        self, pump: Pump, since: int | None, types: Iterable[type[Event]] | None, *, capacity: int = 16_384
    ) -> None:
        super().__init__()
        self._types = frozenset(types) if types is not None else None
        self._cursor = pump.last_seq if since is None else since
        self._pump = pump
        self._subscription: Subscription | None = None
        self._past: Follower | None = None  # until the history up to the opening was returned
        self._past_until = pump.last_seq
        self._recent: list[Event] = []
        if self._cursor < pump.last_seq and pump.journal is not None:
            self._past = Follower(pump.journal.folder, self._cursor)
        elif self._cursor < pump.last_seq:
            self._recent = _recent(pump, self._cursor)
        if pump.ring.alive and not pump.closing:
            overflow: Overflow = "catch_up" if pump.journal is not None else "drop_oldest"
            delivery = Delivery(types=self._types, overflow=overflow, latency_s=0.02, capacity=capacity)
            self._subscription = pump.subscribe("run.events", delivery)
            # For a stream that is left without being closed; on whatever thread that is noticed.
            weakref.finalize(self, pump.ring.post, self._subscription.discard).atexit = False

    @property
    def cursor(self) -> int:
        """``seq`` of the last event that was returned, or passed over because of its type."""
        if self._ready:
            return self._ready[0].seq - 1
        live = self._subscription
        if live is None or self._past is not None or self._recent or not live.is_empty:
            return self._cursor
        return max(self._cursor, self._pump.last_seq)  # none of the events since was meant for this stream

    async def _next_batch(self) -> list[Event]:
        while True:
            if self._past is not None:
                batch = await self._next_of_past(self._past)
            elif self._recent:
                batch, self._recent = self._recent, []
            elif self._subscription is not None:
                try:
                    batch = [event for event, _ in await self._subscription.receive()]
                except anyio.EndOfStream:
                    self._subscription = None
                    continue
            else:
                raise anyio.EndOfStream
            batch = [event for event in batch if event.seq > self._cursor]
            if batch:
                self._cursor = batch[-1].seq
                batch = [event for event in batch if self._wants(event)]
            if batch:
                return batch

    async def aclose(self) -> None:
        """Stop receiving and drop the rest; `cursor` keeps its value."""
        self._cursor = self.cursor
        self._ready.clear()
        self._recent = []
        self._past = None
        if self._subscription is not None:
            self._subscription.discard()
            self._subscription = None

    def _wants(self, event: Event) -> bool:
        return event.journalled if self._types is None else type(event) in self._types

    async def _next_of_past(self, past: Follower) -> list[Event]:
        """Read the history; what was published since the opening is in the queue."""
        assert self._pump.journal is not None
        settled = (
            self._pump.journal.settled()
        )  # asked before reading: an event that is written later must not be missed
        batch = await past.read()
        if past.cursor >= self._past_until or (settled and not batch):
            self._past = None
        elif not batch:
            await anyio.sleep(_POLL_S)
        return [event for event in batch if event.seq <= self._past_until]


def _recent(pump: Pump, since: int) -> list[Event]:
    recent = [event for event in pump.history if event.seq > since]
    if not recent or recent[0].seq > since + 1:
        oldest = recent[0].seq if recent else pump.last_seq + 1
        raise CursorError(
            f"events after seq {since} are not kept: the run has no journal and the oldest event in memory is"
            f" seq {oldest}; pass since={oldest - 1} or later, or run with journal=True"
        )
    return recent
