"""One observer's queue: bounded in count and bytes, with a stated rule for what happens there."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import anyio
import msgspec

from events.backlog import Backlog, Item, Published
from events.sink import Delivery
from events.spill import Spill


class Statistics(msgspec.Struct):
    """Counters of one subscription. ``published == delivered + dropped + conflated + queued`` at all times."""

    published: int = 0
    """Events that were meant for it."""
    delivered: int = 0
    """Events whose delivery has returned."""
    dropped: int = 0
    """Events that it will never get, by its overflow policy or because it was disabled."""
    conflated: int = 0
    """Events replaced by a newer one of the same key."""
    spilled: int = 0
    """Events that went through the disk; they are also counted as what became of them."""
    queued: int = 0
    """Events waiting, on disk, or in a delivery that has not returned."""


class Subscription:
    """A queue between the pump and one receiver, used in the event loop's thread only.

    Stated bounds: ``drop_oldest``, ``latest`` and ``spill`` hold at most ``capacity`` events and
    ``capacity_bytes`` in memory
    (twice that if events that are not droppable fill it alone). ``block`` holds at most that, and what the bus's ring
    held when the loop was told to wait.

    Batches are handed to a waiting receiver through an anyio memory object stream without a buffer; what nobody waits
    for stays in the backlog, where the overflow policy rules. A batch counts as queued until the receiver asks for
    the next one.
    """

    def __init__(
        self,
        name: str,
        delivery: Delivery,
        *,
        payloads: bool = False,
        spill: Spill | None = None,
        on_credit: Callable[[Subscription, bool], None] = lambda subscription, full: None,
    ) -> None:
        self.name = name
        self.delivery = delivery
        self.payloads = payloads
        """Whether the receiver gets the payloads; without them tensors are let go at the pump."""
        self.statistics = Statistics()
        self.ended = False
        self._spill = spill
        self._on_credit = on_credit
        self._backlog = Backlog()
        self._in_flight: list[Item] = []
        self._in_flight_bytes = 0
        self._reported = (0, 0)
        self._send, self._receive = anyio.create_memory_object_stream[list[Item]](0)

    # ------------------------------------------------------------------------------------- the pump's side

    def offer(self, items: list[Item]) -> None:
        """Take events from the pump and apply the overflow policy. Never waits."""
        self.statistics.published += len(items)
        if self.ended:
            self._lose(items, "dropped")
            return
        self.statistics.queued += len(items)
        if self._spill is not None and (self._spill.count or self._is_full(items)):
            self._spill.write(items, self._spilled)
        else:
            self._backlog.extend(items)
            if self.delivery.overflow == "block":
                self._on_credit(self, self.is_full)
            elif self.is_full:
                self._overflow()
        if len(self._backlog) and self._send.statistics().tasks_waiting_receive:
            self._send.send_nowait(self._take())

    def finish(self) -> None:
        """No more events will be offered: the receiver gets what is queued, then the end of the stream."""
        if not self.ended:
            self.ended = True
            self._send.close()

    def discard(self) -> None:
        """Drop all that waits and end the stream; the loop is released from fences and from waiting for room."""
        self.finish()
        self._lose([*self._in_flight, *self._backlog.take(len(self._backlog))], "dropped", queued=True)
        self._in_flight, self._in_flight_bytes = [], 0
        if self._spill is not None:
            self._spill.close()
        self.statistics.dropped += self.statistics.queued  # what was on disk
        self.statistics.queued = 0
        self._receive.close()
        self._on_credit(self, False)

    def take_losses(self) -> tuple[int, int]:
        """Events dropped and conflated since the last call."""
        before, self._reported = self._reported, (self.statistics.dropped, self.statistics.conflated)
        return self._reported[0] - before[0], self._reported[1] - before[1]

    @property
    def is_full(self) -> bool:
        """Whether more waits in memory than the delivery allows."""
        return self._is_full(())

    @property
    def queued_bytes(self) -> int:
        """Bytes of memory that waiting events hold."""
        return self._backlog.nbytes + self._in_flight_bytes + (self._spill.memory_bytes if self._spill else 0)

    def _is_full(self, extra: Iterable[Item]) -> bool:
        count = len(self._backlog) + len(self._in_flight)
        nbytes = self.queued_bytes
        for item in extra:
            count += 1
            nbytes += item[2]
        return count > self.delivery.capacity or nbytes > self.delivery.capacity_bytes

    def _overflow(self) -> None:
        if self.delivery.overflow == "latest":
            self._lose(self._backlog.conflate(), "conflated", queued=True)
        room = self.delivery.capacity - len(self._in_flight)
        room_bytes = self.delivery.capacity_bytes - self._in_flight_bytes
        self._lose(self._backlog.drop_oldest(max(room, 0), max(room_bytes, 0)), "dropped", queued=True)

    def _lose(self, items: list[Item], how: str, *, queued: bool = False) -> None:
        statistics = self.statistics
        setattr(statistics, how, getattr(statistics, how) + len(items))
        if queued:
            statistics.queued -= len(items)
        for _, payload, _ in items:
            if payload is not None and payload.fence is not None:
                payload.fence.release(self.name)

    def _spilled(self, written: int, lost: int) -> None:
        """The spill has dealt with a chunk."""
        self.statistics.spilled += written
        if not self.ended or self.statistics.queued:
            self.statistics.dropped += lost
            self.statistics.queued -= lost

    # --------------------------------------------------------------------------------- the receiver's side

    async def receive(self) -> list[Published]:
        """Wait for the next batch, at least one event; counts the batch before it as delivered.

        Raises:
            anyio.EndOfStream: everything has been received, and no more will come.
        """
        self.done()
        while not (items := self._take()):
            if self._spill is not None and self._spill.count:
                self._backlog.extend(await self._spill.read(self.delivery.batch))
                continue
            items = await self._receive.receive()
            break
        return [(event, payload) for event, payload, _ in items]

    def done(self, count: int | None = None) -> None:
        """The batch in hand is delivered; or its first ``count`` events are, and the rest is dropped."""
        items, self._in_flight = self._in_flight, []
        self._in_flight_bytes = 0
        if not items:
            return
        delivered = len(items) if count is None else count
        self.statistics.delivered += delivered
        self.statistics.queued -= delivered
        self._lose(items[delivered:], "dropped", queued=True)
        if self.delivery.overflow == "block":
            self._on_credit(self, self.is_full)

    def _take(self) -> list[Item]:
        self._in_flight = self._backlog.take(self.delivery.batch)
        self._in_flight_bytes = sum(item[2] for item in self._in_flight)
        return self._in_flight
