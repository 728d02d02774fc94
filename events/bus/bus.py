"""The event bus: any thread publishes without waiting, one task in the event loop delivers.

The path of an event: `Bus.publish` appends it to a ring on the publisher's thread. The pump (`Bus.run`) drains the
ring, numbers the events, has the numbers that are still on the device read in one call, and offers each event to every
`Subscription` that wants its type.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

import anyio
from msgspec.structs import force_setattr

from events.bus.backlog import Item, Payload, Published, item_of
from events.bus.cpu_time import CpuTime
from events.bus.spill import Spill
from events.bus.subscription import Subscription
from events.bus.wakeup import Wakeup
from events.bus.worker import Worker
from events.errors import BusClosed
from events.health import Health
from events.messages import EVENT_TYPES, Event, ObserverDropped
from events.origin import Origin
from events.sink import Delivery

# A tick costs the process a few hundred microseconds, most of them in caches that have gone cold: so seldom if nobody
# listens, and else as often as the most impatient subscription asks of those who take what comes at every step.
_UNHEARD_TICK_S = 0.25
_DEVICE_POLL_S = 0.002  # how often a read from the device that is under way is looked at
_LOSS_REPORT_S = 1.0


class Readback(Protocol):
    """Turns the deferred numbers of a batch (`Event.deferred`) into host numbers, without holding up either loop."""

    def start(self, batch: list[Published], /) -> Callable[[], bool]:
        """Begin; the returned function says, without waiting, whether all events of the batch are complete now."""
        ...


class Bus:
    """Carries the events of one run.

    Args:
        origin: Gives the header of the bus's own events.
        readback: Completes events whose numbers are still on the device; without one they stay as they are.
        capacity: Events that the ring holds while the event loop does not drain it.
        capacity_bytes: Bytes of payload that the ring holds before the loop is told to wait: of events that may be
            dropped, and as many of others.
        reserve: Events which are not droppable that are kept beyond ``capacity`` before the loop is told to wait.
        history: Most recent events kept in memory for late subscribers.
        first_seq: ``seq`` of the first event.
        spill_dir: Folder of spill files; None for the system's temporary folder.

    Thread safety: `publish`, `post`, `flush` and what the loop asks (`wanted`, `gated`, `wait_for_room`) may be
    called from any thread; everything else belongs to the event loop's thread.
    """

    # With this many attributes a dictionary would cost `publish` half a microsecond of cache misses.
    # fmt: off
    __slots__ = (
        "_blocked", "_bytes_in", "_bytes_out", "_capacity", "_capacity_bytes", "_drained", "_dropped_reported",
        "_gate_at", "_kept", "_kept_bytes_in", "_kept_bytes_out", "_losses_due", "_more", "_must_keep", "_next_seq",
        "_posted", "_prompt", "_readback", "_reading", "_reserve", "_ring", "_ring_lock", "_room", "_routes",
        "_sleeping", "_spill_dir", "_subscriptions", "_tick_s", "_urgent", "_wakeup", "alive", "closing", "cpu_time",
        "dropped", "gated", "health", "history", "last_seq", "origin", "payload_receivers", "wanted",
    )
    # fmt: on

    def __init__(
        self,
        origin: Origin,
        *,
        readback: Readback | None = None,
        capacity: int = 16_384,
        capacity_bytes: int = 256 * 2**20,
        reserve: int = 4_096,
        history: int = 0,
        first_seq: int = 1,
        spill_dir: str | None = None,
    ) -> None:
        self.origin = origin
        self.wanted: frozenset[type[Event]] = frozenset()
        """Event types that somebody subscribes to."""
        self.payload_receivers: dict[type[Event], list[str]] = {}
        """Names of those who get the payload of an event type, for each type that somebody gets with its payload."""
        self.history: deque[Event] = deque(maxlen=history)
        self.dropped = 0
        """Events that the ring dropped."""
        self.health = Health()
        """What is unhealthy about the run, of what was delivered so far."""
        self.last_seq = first_seq - 1
        """``seq`` of the last event that was delivered to the subscriptions."""
        self.cpu_time = CpuTime()
        """What the threads of the pump and of the observers use of the processor, and of the interpreter."""
        self.alive = True
        """False once the pump has ended: nothing is delivered any more."""
        self._readback = readback
        self._capacity = capacity
        self._gate_at = max(1, capacity * 3 // 4)
        self._capacity_bytes = capacity_bytes
        self._reserve = reserve
        self._next_seq = first_seq
        self._spill_dir = spill_dir
        self._ring: deque[Published] = deque()
        self._kept: deque[Published] = deque()  # older than everything in the ring, and not droppable
        self._ring_lock = threading.Lock()  # between dropping and draining; publish never waits for it
        # Bytes of payloads that went in (written by the loop's thread alone) and out (written under `_ring_lock`): of
        # events that may be dropped to make room, and of those that may not.
        self._bytes_in = self._kept_bytes_in = 0
        self._bytes_out = self._kept_bytes_out = 0
        self._posted: deque[Callable[[], object]] = deque()
        self._reading: deque[tuple[list[Published], Callable[[], bool]]] = deque()
        self._subscriptions: tuple[Subscription, ...] = ()
        self._routes: dict[type[Event], tuple[Subscription, ...]] = {}
        self.gated = False
        """Whether the loop must wait at its step boundary, so that nothing is lost that must not be."""
        self._blocked: frozenset[Subscription] = frozenset()
        self._must_keep = False
        self._room = threading.Event()
        self._wakeup = Wakeup()
        self._sleeping = False
        self._urgent = False
        self._more = False  # whether the ring held more than one helping
        self._tick_s = _UNHEARD_TICK_S
        self._prompt: frozenset[type[Event]] = frozenset()  # types that are delivered at once, not at the next tick
        self._drained = anyio.Event()
        self.closing = False
        """True once `close` was called: nobody can subscribe any more."""
        self._dropped_reported = 0
        self._losses_due = 0.0

    # ------------------------------------------------------------------------------------ from any thread

    def publish(self, event: Event, payload: Payload | None = None) -> None:
        """Hand an event to the pump. Takes about a microsecond and waits for nothing.

        The bus owns the event from here on: it must not be published twice. When the ring is full, the oldest droppable
        events go, and are counted. ``payload`` with bytes in it may come from the loop's thread only.
        """
        ring = self._ring
        ring.append((event, payload))
        if payload is not None and payload.nbytes:
            if event.droppable:
                self._bytes_in += payload.nbytes
            else:
                self._kept_bytes_in += payload.nbytes
            if self._is_heavy:
                self._crowd()
        if len(ring) > self._gate_at:
            self._crowd()
        if type(event) in self._prompt:
            self.flush()
        # The pump sets the flag first and looks at the ring again before it waits: one of the two sees the other.
        if self._sleeping:
            self._sleeping = False
            self._wakeup.set()

    def flush(self) -> None:
        """Have the pump deliver now instead of at its next tick. Never waits."""
        self._urgent = True
        self._wakeup.set()

    def post(self, function: Callable[[], object]) -> None:
        """Run a function in the event loop's thread soon. Any thread; never waits. It must not raise."""
        self._posted.append(function)
        self._wakeup.set()

    @property
    def blocked_by(self) -> list[str]:
        """Who the loop is waiting for: observers, or ``bus`` when the event loop itself does not deliver."""
        return sorted(subscription.name for subscription in self._blocked) or ["bus"]

    def wait_for_room(self, timeout_s: float) -> bool:
        """Wait on the loop's thread until it is not gated; False after ``timeout_s``. `release` ends the wait early."""
        self._room.clear()
        if not self.gated or not self.alive:
            return True
        self._wakeup.set()
        self._room.wait(timeout_s)
        return not self.gated or not self.alive

    def release(self) -> None:
        """End a `wait_for_room` that is under way, because the loop has something else to look at. Any thread."""
        self._room.set()

    def _update_gate(self) -> None:
        self.gated = bool(
            self._blocked
            or (self._must_keep and len(self._ring) > self._gate_at)
            or len(self._kept) > self._reserve
            or self._is_heavy
        )
        if not self.gated:
            self._room.set()

    @property
    def _is_heavy(self) -> bool:
        """Whether the ring holds more bytes than it should, of either kind."""
        held, kept = self._bytes_in - self._bytes_out, self._kept_bytes_in - self._kept_bytes_out
        return held > self._capacity_bytes or kept > self._capacity_bytes

    def _crowd(self) -> None:
        """The ring is filling up: hold the loop, or drop, according to who listens. On the publisher's thread."""
        self.flush()  # before anything has to go, if the event loop is only waiting for its next tick
        self._make_room()
        self._update_gate()

    def _make_room(self) -> None:
        if self._must_keep and len(self._ring) < 2 * self._capacity:
            return  # the loop waits at its next boundary, so that nothing has to go
        if not self._ring_lock.acquire(blocking=False):
            return  # the pump is draining at this moment
        try:
            while self._ring and (
                len(self._ring) > self._capacity or self._bytes_in - self._bytes_out > self._capacity_bytes
            ):
                event, payload = self._ring.popleft()
                if event.droppable:
                    self.dropped += 1
                    if payload is not None:
                        self._bytes_out += payload.nbytes
                        if payload.fence is not None:
                            payload.fence.keep(set())  # nobody will run its hooks
                else:
                    self._kept.append((event, payload))
        finally:
            self._ring_lock.release()

    # ----------------------------------------------------------------------------- in the event loop's thread

    def subscribe(self, name: str, delivery: Delivery, *, payloads: bool = False) -> Subscription:
        """Add a receiver of events that are delivered from now on.

        Raises:
            BusClosed: the run is over.
        """
        if self.closing or not self.alive:
            raise BusClosed(f"cannot subscribe {name!r}: the run is over and delivers no more events")
        spill = None
        if delivery.overflow == "spill":
            worker = Worker(f"stagecast-spill-{name}", self.post, self.cpu_time)
            spill = Spill(worker, delivery.spill_bytes, delivery.capacity_bytes, self._spill_dir)
        subscription = Subscription(name, delivery, payloads=payloads, spill=spill, on_credit=self._set_blocked)
        self._set_subscriptions([*self._subscriptions, subscription])
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Offer it nothing more. What it holds is not touched: see `Subscription.finish` and `discard`."""
        self._set_subscriptions([other for other in self._subscriptions if other is not subscription])
        self._set_blocked(subscription, False)

    async def drain(self) -> None:
        """Wait until everything published before this call has been offered to the subscriptions."""
        if not self.alive:
            return  # nothing more will be
        if self._drained.is_set():
            self._drained = anyio.Event()
        self.flush()
        await self._drained.wait()

    def close(self) -> None:
        """End what is still subscribed, after what it has queued in memory, and let `run` return.

        Drain first; what waits on disk must have been received, because the pump carries the disk's answers.
        """
        self.closing = True
        for subscription in self._subscriptions:
            subscription.finish()
        self.flush()

    def discard(self) -> None:
        """Let go of what the constructor opened, because the pump will not run."""
        self.alive = False
        self._wakeup.close()

    async def run(self) -> None:
        """The pump. Runs until `close`; cancelling it leaves what is in the ring undelivered."""
        with self.cpu_time.counting():
            await self._run()

    async def _run(self) -> None:
        due = 0.0
        try:
            while True:
                self._run_posted()
                now = time.monotonic()
                if now >= due or self._urgent or self.closing:
                    busy = await self._pump()
                    if self._reading:
                        due = now + _DEVICE_POLL_S
                    else:
                        due = now if self._more or self._urgent else now + self._tick_s
                    if not busy:
                        if self.closing and not self._posted:
                            return
                        await self._sleep()
                        due = 0.0
                        continue
                await self._wakeup.wait(max(0.0, due - time.monotonic()))
        finally:
            self.alive = False
            self._room.set()
            self._drained.set()
            for subscription in self._subscriptions:
                subscription.finish()  # or their receivers would wait for ever
            self._wakeup.close()

    async def _sleep(self) -> None:
        self._sleeping = True
        if not self._ring and not self._kept and not self._posted and not self._urgent:
            await self._wakeup.wait(None)
        self._sleeping = False

    def _run_posted(self) -> None:
        while self._posted:
            self._posted.popleft()()

    async def _pump(self) -> bool:
        """Drain and deliver once; False when there was nothing to do."""
        batch: list[Published] = []
        if not self._reading:
            self._urgent = False  # not while a read is under way: what is urgent would wait for the tick after it
            batch = self._take()
        busy = bool(batch) or bool(self._reading)
        if batch:
            poll = self._readback.start(batch) if self._readback is not None else None
            self._reading.append((batch, poll or (lambda: True)))
        while self._reading and self._reading[0][1]():
            self._deliver(self._reading.popleft()[0])
            await anyio.lowlevel.checkpoint()  # a long backlog must not hold up the host's event loop
        self._update_gate()  # not before the subscriptions have been offered what the ring held: they may be full now
        self._report_losses()
        if not self._reading and not self._ring and not self._kept:
            self._drained.set()
        return busy

    def _take(self, limit: int = 2_048) -> list[Published]:
        batch: list[Published] = []
        with self._ring_lock:
            for queue in (self._kept, self._ring):
                batch += [queue.popleft() for _ in range(min(len(queue), limit - len(batch)))]
            if self._bytes_in != self._bytes_out or self._kept_bytes_in != self._kept_bytes_out:
                for event, payload in batch:
                    if payload is None:
                        pass
                    elif event.droppable:
                        self._bytes_out += payload.nbytes
                    else:
                        self._kept_bytes_out += payload.nbytes
        self._more = bool(self._ring) and len(batch) == limit  # go on at once, after the host's other tasks
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
            if payload.fence is not None:  # whoever was disabled in the meantime does not hold up the loop
                payload.fence.keep({subscription.name for subscription in targets if subscription.payloads})
            item, bare = item_of(published), item_of((event, None))
            for subscription in targets:
                offers.setdefault(subscription, []).append(item if subscription.payloads else bare)
        for subscription, items in offers.items():
            subscription.offer(items)
        if self.history.maxlen:
            self.history.extend([event for event, _ in batch])
        self.last_seq = batch[-1][0].seq

    def _report_losses(self) -> None:
        now = time.monotonic()
        if now < self._losses_due:
            return
        self._losses_due = now + _LOSS_REPORT_S
        self.report_losses()

    def report_losses(self) -> None:
        """Publish `ObserverDropped` for whoever lost events since the last report."""
        # Not by name: all of a run's streams have the same.
        losses = [(subscription.name, *subscription.take_losses()) for subscription in self._subscriptions]
        losses.append(("bus", self.dropped - self._dropped_reported, 0))
        self._dropped_reported = self.dropped
        for name, dropped, conflated in losses:
            if dropped or conflated:
                self.publish(ObserverDropped(*self.origin.header(), name, dropped, conflated))

    def _set_subscriptions(self, subscriptions: Iterable[Subscription]) -> None:
        # Replaced, never changed: the loop's thread reads `wanted` at any time.
        self._subscriptions = tuple(subscriptions)
        self._routes = {
            kind: tuple(
                subscription
                for subscription in self._subscriptions
                if (kind.journalled if subscription.delivery.types is None else kind in subscription.delivery.types)
            )
            for kind in EVENT_TYPES
        }
        self.wanted = frozenset(kind for kind, targets in self._routes.items() if targets)
        receivers = {kind: [s.name for s in targets if s.payloads] for kind, targets in self._routes.items()}
        self.payload_receivers = {kind: names for kind, names in receivers.items() if names}
        self._must_keep = any(s.delivery.overflow == "block" for s in self._subscriptions)
        # Who takes nothing of what comes at every step must not make the pump tick for it: what he waits for wakes it.
        before_s = self._tick_s
        self._tick_s = min(
            (s.delivery.latency_s for kind, targets in self._routes.items() if kind.droppable for s in targets),
            default=_UNHEARD_TICK_S,
        )
        self._prompt = frozenset(
            kind for kind, targets in self._routes.items() if any(s.delivery.latency_s < self._tick_s for s in targets)
        )
        if self._tick_s < before_s:
            self.flush()  # or the new one would wait for the end of the tick that was

    def _set_blocked(self, subscription: Subscription, full: bool) -> None:
        if full != (subscription in self._blocked):
            self._blocked = self._blocked | {subscription} if full else self._blocked - {subscription}
            self._update_gate()
