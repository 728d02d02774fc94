"""A run's events from a cursor on: from the journal while it is behind, then as they are published."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

import anyio
import anyio.to_thread

from events.bus import Bus
from events.errors import CursorError
from events.journal_reader import JournalReader
from events.messages import Event
from events.sink import Delivery
from events.subscription import Subscription

_JOURNAL_POLL_S = 0.02
_READ_LIMIT = 1_024


class LocalEventStream:
    """The `events.protocol.EventStream` of a run in this process. Create and use it in the run's event loop.

    A consumer that is too slow loses nothing as long as the run has a journal: what its queue dropped is read from
    there. Without a journal only the bus's recent history can be caught up with.

    Args:
        bus: The run's bus.
        journal_dir: The run's journal; None if it has none.
        journal_settled: Whether the journal has nothing more to write of what was delivered so far.
        since: Cursor: events with a greater ``seq`` are returned. None: those from now on.
        types: Only these types; None for all that the journal keeps.

    Raises:
        CursorError: without a journal, when events after ``since`` are not in memory any more.
    """

    def __init__(
        self,
        bus: Bus,
        journal_dir: Path | None,
        journal_settled: Callable[[], bool],
        since: int | None,
        types: Iterable[type[Event]] | None,
    ) -> None:
        self._types = frozenset(types) if types is not None else None
        self._cursor = bus.last_seq if since is None else since
        self._reader = JournalReader(journal_dir, since=self._cursor) if journal_dir is not None else None
        self._journal_settled = journal_settled
        self._limiter = anyio.CapacityLimiter(1)  # our own: the host's may be taken by whatever the host does
        self._ready: deque[Event] = deque()
        self._live: list[Event] = []
        self._bus = bus
        self._subscription: Subscription | None = None
        self._dropped = 0
        if not bus.closing:
            delivery = Delivery(types=self._types, latency_s=0.02)
            self._subscription = bus.subscribe("run.events", delivery)
        self._behind = self._cursor < bus.last_seq
        if self._behind and self._reader is None:
            self._live = self._recent(bus, self._cursor)
            self._behind = False

    @property
    def cursor(self) -> int:
        """``seq`` of the last event that was returned, or passed over because of its type."""
        return self._ready[0].seq - 1 if self._ready else self._cursor

    async def receive(self) -> list[Event]:
        """Wait for the next batch, at least one event.

        Raises:
            anyio.EndOfStream: the run's last event was returned before, or the stream was closed.
        """
        if self._ready:
            batch = list(self._ready)
            self._ready.clear()
            return batch
        while True:
            batch = await self._catch_up() if self._behind else await self._next_live()
            batch = [event for event in batch if event.seq > self._cursor]
            if batch:
                self._cursor = batch[-1].seq
                batch = [event for event in batch if self._types is None or type(event) in self._types]
            if batch:
                return batch

    def __aiter__(self) -> LocalEventStream:
        return self

    async def __anext__(self) -> Event:
        if not self._ready:
            try:
                self._ready.extend(await self.receive())
            except anyio.EndOfStream:
                raise StopAsyncIteration from None
        return self._ready.popleft()

    async def aclose(self) -> None:
        """Stop receiving; the rest is let go."""
        self._ready.clear()
        self._live = []
        self._behind = False
        if self._subscription is not None:
            self._bus.unsubscribe(self._subscription)
            self._subscription.discard()
            self._subscription = None

    async def _catch_up(self) -> list[Event]:
        """Read from the journal; leave that mode once it holds nothing that this stream lacks."""
        assert self._reader is not None
        settled = self._journal_settled()  # asked before reading: what is written later must not be missed
        batch = await anyio.to_thread.run_sync(self._reader.read, _READ_LIMIT, limiter=self._limiter)
        if not batch and settled:
            self._behind = False
        elif not batch:
            await anyio.sleep(_JOURNAL_POLL_S)
        return batch

    async def _next_live(self) -> list[Event]:
        if self._live:
            batch, self._live = self._live, []
            return batch
        if self._subscription is None:
            raise anyio.EndOfStream
        batch = [event for event, _ in await self._subscription.receive()]
        dropped = self._subscription.statistics.dropped
        if dropped > self._dropped and self._reader is not None:
            # Older events than these were dropped from the queue: the journal has them.
            self._dropped = dropped
            self._live = batch
            self._behind = True
            return []
        return batch

    @staticmethod
    def _recent(bus: Bus, since: int) -> list[Event]:
        recent = [event for event in bus.history if event.seq > since]
        if not recent or recent[0].seq > since + 1:
            oldest = recent[0].seq if recent else bus.last_seq + 1
            raise CursorError(
                f"events after seq {since} are not kept: the run has no journal and the oldest event in memory is"
                f" seq {oldest}; pass since={oldest - 1} or later, or run with journal=True"
            )
        return recent
