"""The event loop's side of the bus: one task drains the ring and delivers to the subscriptions.

The path of an event: `Ring.publish` appends it on the publisher's thread. `Pump.run` drains the ring, numbers the
events, has the numbers that are still on the device read in one call, and offers each event to every `Subscription`
that wants its type.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

import anyio
from msgspec.structs import force_setattr, replace

from events.bus.backlog import Item, Published, item_of
from events.bus.catch_up import WrittenJournal
from events.bus.ring import Audience, Ring
from events.bus.subscription import Subscription
from events.errors import BusClosed
from events.health import Health
from events.messages import EVENT_TYPES, Event, ObserverDropped
from events.sink import Delivery

# A tick costs the process a few hundred microseconds, most of them in caches that have gone cold. So it is rare without
# subscriptions, and otherwise as frequent as the smallest ``latency_s`` of those that take events of every step.
_UNHEARD_TICK_S = 0.25
_DEVICE_POLL_S = 0.002
"""Seconds between two looks at a read from the device."""
_LOSS_REPORT_S = 1.0
_BATCH = 2_048
"""Maximum events per delivery: the host's other tasks run in between."""


class Readback(Protocol):
    """Turns the deferred numbers of a batch (`Event.deferred`) into host numbers, without blocking either loop."""

    def start(self, batch: list[Published], /) -> Callable[[], bool]:
        """Start the read; the returned function tells, without waiting, whether the batch is complete."""
        ...


class Pump:
    """Delivers the events of one run. Belongs to the event loop's thread, its constructor to any.

    Args:
        ring: The events.
        readback: Completes events whose numbers are still on the device; without one they stay as they are.
        history: Most recent events kept in memory for late subscribers.
        first_seq: ``seq`` of the first event.
        journal: The run's, for subscriptions that catch up; None if it keeps none.
    """

    def __init__(
        self,
        ring: Ring,
        *,
        readback: Readback | None = None,
        history: int = 0,
        first_seq: int = 1,
        journal: WrittenJournal | None = None,
    ) -> None:
        self.ring = ring
        self.journal = journal
        self.history: deque[Event] = deque(maxlen=history)
        self.health = Health()
        """Problems of the run, as far as its events were delivered."""
        self.last_seq = first_seq - 1
        """``seq`` of the last event that was offered to the subscriptions."""
        self.closing = False
        """True once `close` was called: no subscription can be added."""
        self._readback = readback
        self._reading: deque[tuple[list[Published], Callable[[], bool]]] = deque()
        self._next_seq = first_seq
        self._subscriptions: tuple[Subscription, ...] = ()
        self._routes: dict[type[Event], tuple[Subscription, ...]] = {}
        self._tick_s = _UNHEARD_TICK_S
        self._more = False  # whether the ring held more than one batch
        self._drained = anyio.Event()
        self._losses_due = 0.0
        self._dropped_reported = 0  # of the ring's

    def subscribe(self, name: str, delivery: Delivery, *, payloads: bool = False) -> Subscription:
        """Add a receiver of events that are delivered from now on.

        Raises:
            BusClosed: the run is over.
            ValueError: it is to catch up, and the run keeps no journal.
        """
        if self.closing or not self.ring.alive:
            raise BusClosed(f"cannot subscribe {name!r}: the run is over and delivers no more events")
        subscription = Subscription(
            name,
            delivery,
            payloads=payloads,
            journal=self.journal,
            after=self.last_seq,
            on_credit=self._set_blocked,
            on_finish=self._unsubscribe,
        )
        self._set_subscriptions([*self._subscriptions, subscription])
        return subscription

    async def drain(self) -> None:
        """Wait until everything published before this call has been offered to the subscriptions."""
        if not self.ring.alive:
            return
        if self._drained.is_set():
            self._drained = anyio.Event()
        self.ring.flush()
        await self._drained.wait()

    def close(self) -> None:
        """End what is still subscribed, after what it has queued, and let `run` return. Drain first."""
        self.closing = True
        for subscription in self._subscriptions:
            subscription.finish()
        self.ring.flush()

    async def run(self) -> None:
        """Deliver until `close`; cancelling it leaves what is in the ring undelivered."""
        try:
            with self.ring.cpu_time.counting():
                await self._run()
        finally:
            self.ring.close()
            self._drained.set()
            for subscription in self._subscriptions:
                subscription.finish()  # or their receivers would wait for ever

    async def _run(self) -> None:
        ring = self.ring
        due = 0.0
        while True:
            ring.run_posted()
            now = time.monotonic()
            if now >= due or ring.is_urgent or self.closing:
                busy = await self._deliver_next()
                if self._reading:
                    due = now + _DEVICE_POLL_S
                else:
                    due = now if self._more or ring.is_urgent else now + self._tick_s
                if not busy:
                    if self.closing and not ring.has_posted:
                        return
                    await ring.wait(None)
                    due = 0.0
                    continue
            await ring.wait(max(0.0, due - time.monotonic()))

    async def _deliver_next(self) -> bool:
        """Take and deliver once; False when there was nothing to do."""
        batch: list[Published] = []
        if not self._reading:  # or an urgent event would wait for the tick after the read
            batch = self._take()
        busy = bool(batch) or bool(self._reading)
        if batch:
            poll = self._readback.start(batch) if self._readback is not None else None
            self._reading.append((batch, poll or (lambda: True)))
        while self._reading and self._reading[0][1]():
            self._deliver(self._reading.popleft()[0])
            await anyio.lowlevel.checkpoint()  # a long backlog must not block the host's event loop
        self.ring.update_gate()  # after the subscriptions were offered what the ring held: they may be full now
        if time.monotonic() >= self._losses_due:
            self._losses_due = time.monotonic() + _LOSS_REPORT_S
            self.report_losses()
        if not self._reading and self.ring.is_empty:
            self._drained.set()
        return busy

    def _take(self) -> list[Published]:
        batch = self.ring.take(_BATCH)
        self._more = len(batch) == _BATCH and not self.ring.is_empty
        for seq, (event, _) in enumerate(batch, self._next_seq):
            force_setattr(event, "seq", seq)
        self._next_seq += len(batch)
        return batch

    def _deliver(self, batch: list[Published]) -> None:
        routes, health = self._routes, self.health
        offers: dict[Subscription, list[Item]] = {}
        for published in batch:
            event, payload = published
            if type(event) in health.types:
                health.add(event)
            targets = routes.get(type(event), ())
            if payload is None:
                if targets:
                    item = item_of(published)
                    for subscription in targets:
                        offers.setdefault(subscription, []).append(item)
                continue
            if payload.fence is not None:  # an observer that was disabled meanwhile must not hold the loop
                payload.fence.keep({subscription.name for subscription in targets if subscription.payloads})
            item, bare = item_of(published), item_of((event, None))
            for subscription in targets:
                offers.setdefault(subscription, []).append(item if subscription.payloads else bare)
        for subscription, items in offers.items():
            subscription.offer(items)
        if self.history.maxlen:
            self.history.extend([event for event, _ in batch])
        self.last_seq = batch[-1][0].seq

    def report_losses(self) -> None:
        """Publish `ObserverDropped` for each receiver that lost events since the last report, and for the ring."""
        # Not by name: all streams of a run have the same one.
        losses = [(subscription.name, *subscription.take_losses()) for subscription in self._subscriptions]
        dropped = self.ring.counters.dropped
        losses.append(("bus", dropped - self._dropped_reported, 0))
        self._dropped_reported = dropped
        for name, dropped, conflated in losses:
            if dropped or conflated:
                header = self.ring.origin.header()
                self.ring.publish(ObserverDropped(*header, observer=name, dropped=dropped, conflated=conflated))

    def _set_subscriptions(self, subscriptions: Iterable[Subscription]) -> None:
        self._subscriptions = tuple(subscriptions)
        routes = {
            kind: tuple(subscription for subscription in self._subscriptions if subscription.wants(kind))
            for kind in EVENT_TYPES
        }
        self._routes = routes
        # A subscription to rare events alone does not set the tick: its events wake the pump.
        before_s = self._tick_s
        self._tick_s = min(
            (s.delivery.latency_s for kind, targets in routes.items() if kind.droppable for s in targets),
            default=_UNHEARD_TICK_S,
        )
        receivers = {kind: [s.name for s in targets if s.payloads] for kind, targets in routes.items()}
        self.ring.set_audience(
            Audience(
                wanted=frozenset(kind for kind, targets in routes.items() if targets),
                payload_receivers={kind: names for kind, names in receivers.items() if names},
                must_keep=any(s.delivery.overflow == "block" for s in self._subscriptions),
                blocked=self.ring.audience.blocked,
            ),
            prompt=frozenset(
                kind for kind, targets in routes.items() if any(s.delivery.latency_s < self._tick_s for s in targets)
            ),
        )
        if self._tick_s < before_s:
            self.ring.flush()  # or the new tick would only start after the old one

    def _unsubscribe(self, subscription: Subscription) -> None:
        self._set_subscriptions([other for other in self._subscriptions if other is not subscription])
        self._set_blocked(subscription, False)

    def _set_blocked(self, subscription: Subscription, full: bool) -> None:
        audience = self.ring.audience
        if full != (subscription in audience.blocked):
            blocked = audience.blocked | {subscription} if full else audience.blocked - {subscription}
            self.ring.audience = replace(audience, blocked=blocked)
            self.ring.update_gate()
