"""One observer's queue: bounded in count and bytes, with a stated rule for what happens there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import anyio
import msgspec
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from events.bus.backlog import Backlog, Item, Published
from events.bus.catch_up import CatchUp, WrittenJournal
from events.messages import Event
from events.sink import Delivery


class Statistics(msgspec.Struct):
    """Counters of one subscription. ``published == delivered + dropped + conflated + queued`` at all times."""

    published: int = 0
    """Events that were meant for it."""
    delivered: int = 0
    """Events whose delivery has returned."""
    dropped: int = 0
    """Events that it will not receive, because of its overflow policy or because it was disabled."""
    conflated: int = 0
    """Events replaced by a newer one of the same key."""
    queued: int = 0
    """Events that wait in memory or in the journal, or are in a delivery that has not returned."""


class Subscription:
    """A queue between the pump and one receiver, used in the event loop's thread only.

    Stated bounds, the batch in delivery included: ``drop_oldest`` and ``latest`` hold at most ``capacity`` events (two,
    where that is 1) and ``capacity_bytes`` in memory, or twice that if events that are not droppable fill it alone.
    ``catch_up`` holds at most ``capacity`` events and ``capacity_bytes``, and one read of the journal (64 events).
    ``block`` holds at most that, and what the ring held when it gated the loop. One event may exceed the bytes by
    itself: it is delivered, not dropped.

    The pump sends a batch through an anyio memory object stream to a receiver that waits. While the receiver is busy,
    events stay in the backlog, where the overflow policy applies. A batch is at most half of what the queue may hold,
    or the newest events would find no room while it is delivered. It counts as queued until the receiver asks for the
    next one.

    Args:
        journal: Where ``catch_up`` reads the events that do not fit into memory.
        after: ``seq`` of the last event before those that will be offered.
        on_credit: Told whether a subscription with the policy ``block`` is full, whenever that may have changed.
        on_finish: Called when the subscription takes no more events.
    """

    def __init__(
        self,
        name: str,
        delivery: Delivery,
        *,
        payloads: bool = False,
        journal: WrittenJournal | None = None,
        after: int = 0,
        on_credit: Callable[[Subscription, bool], None] = lambda subscription, full: None,
        on_finish: Callable[[Subscription], None] = lambda subscription: None,
    ) -> None:
        self.name = name
        self.delivery = delivery
        self.payloads = payloads
        """Whether the receiver gets the payloads; otherwise the pump releases their tensors."""
        self.statistics = Statistics()
        self.ended = False
        self._catch_up: CatchUp | None = None
        if delivery.overflow == "catch_up":
            if journal is None:
                raise ValueError(
                    f"Delivery(overflow='catch_up') of {name!r} reads the journal, and the run has none; keep the"
                    f" journal, or choose 'drop_oldest'"
                )
            self._catch_up = CatchUp(journal, after, lambda event: self.wants(type(event)), self.statistics)
        self._on_credit = on_credit
        self._on_finish = on_finish
        self._backlog = Backlog()
        self._in_flight: list[Item] = []  # sent, or in the receiver's hand
        self._in_flight_bytes = 0
        self._in_hand = False  # whether the receiver has got what is in flight
        self._stream: tuple[MemoryObjectSendStream[list[Item]], MemoryObjectReceiveStream[list[Item]]] | None = None
        self._waiting = False  # whether the receiver waits for the stream
        self._reported = (0, 0)

    # ------------------------------------------------------------------------------------- the pump's side

    def offer(self, items: list[Item]) -> None:
        """Take events from the pump and apply the overflow policy. Never waits."""
        self.statistics.published += len(items)
        if self.ended:
            self._lose(items, "dropped")
            return
        self.statistics.queued += len(items)
        if self._catch_up is not None:
            fitting = 0 if self._catch_up.count else self._fitting(items)
            self._backlog.extend(items[:fitting])
            self._lose(self._catch_up.leave(items[fitting:]), "dropped", queued=True)
        else:
            self._backlog.extend(items)
            if self.delivery.overflow == "block":
                self._on_credit(self, self.is_full)
            elif self.is_full:
                self._overflow()
        if self._waiting and self._stream is not None and not self.is_empty:
            self._waiting = False
            # An empty batch if the journal has the next events.
            self._stream[0].send_nowait(self._take())

    def finish(self) -> None:
        """Be offered no more events: the receiver gets what is queued, then the end of the stream."""
        if not self.ended:
            self.ended = True
            self._on_finish(self)
        self._close_stream()

    def discard(self) -> None:
        """Drop all that waits and end the stream; releases the loop from fences and from waiting for room."""
        self.finish()
        self._lose([*self._in_flight, *self._backlog.take(len(self._backlog))], "dropped", queued=True)
        self._in_flight, self._in_flight_bytes = [], 0
        if self._catch_up is not None:
            self._catch_up.discard()
        self.statistics.dropped += self.statistics.queued  # in the journal
        self.statistics.queued = 0
        self._on_credit(self, False)

    def take_losses(self) -> tuple[int, int]:
        """Events dropped and conflated since the last call."""
        before, self._reported = self._reported, (self.statistics.dropped, self.statistics.conflated)
        return self._reported[0] - before[0], self._reported[1] - before[1]

    @property
    def is_full(self) -> bool:
        """Whether more waits in memory than the delivery allows."""
        count = len(self._backlog) + len(self._in_flight)
        return count > self.delivery.capacity or self.queued_bytes > self.delivery.capacity_bytes

    @property
    def is_empty(self) -> bool:
        """Whether the receiver has been handed everything there is."""
        handed = self._in_hand or not self._in_flight
        return handed and not len(self._backlog) and not (self._catch_up is not None and self._catch_up.count)

    @property
    def oldest(self) -> Event | None:
        """The event that has waited longest; None if none waits."""
        return self._in_flight[0][0] if self._in_flight else self._backlog.oldest

    @property
    def queued_bytes(self) -> int:
        """Bytes of memory that waiting events hold."""
        return self._backlog.nbytes + self._in_flight_bytes

    def wants(self, kind: type[Event]) -> bool:
        """Whether it receives events of this type."""
        return kind.journalled if self.delivery.types is None else kind in self.delivery.types

    def _fitting(self, items: list[Item]) -> int:
        """Count the events, from the first on, that still fit into memory."""
        room = self.delivery.capacity - len(self._backlog) - len(self._in_flight)
        room_bytes = self.delivery.capacity_bytes - self.queued_bytes
        for index, item in enumerate(items):
            room_bytes -= item[2]
            if index >= room or room_bytes < 0:
                return index
        return len(items)

    def _overflow(self) -> None:
        if self.delivery.overflow == "latest":
            self._lose(self._backlog.conflate(), "conflated", queued=True)
        # The newest event always has room, whatever is being delivered.
        capacity, capacity_bytes = self.delivery.capacity, self.delivery.capacity_bytes
        flying, flying_bytes = len(self._in_flight), self._in_flight_bytes
        limits = max(capacity - flying, 1), max(capacity_bytes - flying_bytes, 0)
        hard_limits = max(2 * capacity - flying, 1), max(2 * capacity_bytes - flying_bytes, 0)
        self._lose(self._backlog.drop_oldest(*limits, *hard_limits), "dropped", queued=True)

    def _lose(self, items: list[Item], how: Literal["dropped", "conflated"], *, queued: bool = False) -> None:
        statistics = self.statistics
        setattr(statistics, how, getattr(statistics, how) + len(items))
        if queued:
            statistics.queued -= len(items)
        self._release(items)

    def _release(self, items: list[Item]) -> None:
        """Release the fences of events whose hooks will not run."""
        for _, payload, _ in items:
            if payload is not None and payload.fence is not None:
                payload.fence.release(self.name)

    # --------------------------------------------------------------------------------- the receiver's side

    async def receive(self) -> list[Published]:
        """Wait for the next batch, at least one event; counts the batch before it as delivered.

        A call that is cancelled loses nothing: what it would have returned is returned by the next one.

        Raises:
            anyio.EndOfStream: everything has been received, and no more will come.
        """
        self.done()
        while not (self._in_flight or self._take()):
            if self._catch_up is not None and self._catch_up.count:
                self._backlog.extend(await self._catch_up.read(self._batch))
            elif self.ended:
                raise anyio.EndOfStream
            else:
                await self._wait()
        self._in_hand = True
        return [(event, payload) for event, payload, _ in self._in_flight]

    def done(self, count: int | None = None) -> None:
        """Count the batch in hand as delivered; or its first ``count`` events, and drop the rest."""
        if not self._in_hand:
            return
        items, self._in_flight, self._in_flight_bytes, self._in_hand = self._in_flight, [], 0, False
        delivered = len(items) if count is None else count
        self.statistics.delivered += len(items[:delivered])
        self.statistics.queued -= len(items[:delivered])
        self._lose(items[delivered:], "dropped", queued=True)
        if self.delivery.overflow == "block" and not self.ended:
            self._on_credit(self, self.is_full)

    @property
    def _batch(self) -> int:
        return min(self.delivery.batch, (self.delivery.capacity + 1) // 2)

    def _take(self) -> list[Item]:
        self._in_flight = self._backlog.take(self._batch, self.delivery.capacity_bytes // 2)
        self._in_flight_bytes = sum(item[2] for item in self._in_flight)
        return self._in_flight

    async def _wait(self) -> None:
        """Wait for a batch from the pump, or for the end."""
        if self._stream is None:
            # With room for one: a receiver that does not wait yet, or is being cancelled, cannot take it directly.
            self._stream = anyio.create_memory_object_stream[list[Item]](1)
        self._waiting = True
        try:
            self._in_flight = await self._stream[1].receive()
        except (anyio.EndOfStream, anyio.ClosedResourceError):
            pass  # ended; a batch that was sent just before is still in `_in_flight`
        except BaseException:
            self._close_stream()  # cancelled: the stream may hold a batch, which the next call finds in `_in_flight`
            raise
        finally:
            self._waiting = False

    def _close_stream(self) -> None:
        if self._stream is not None:
            for end in self._stream:
                end.close()
            self._stream = None
