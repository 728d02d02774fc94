"""The loop's side of the bus: any thread publishes without waiting, the pump drains."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from events.bus.backlog import Payload, Published
from events.bus.cpu_time import CpuTime
from events.bus.wakeup import Wakeup
from events.messages import Event
from events.origin import Origin

if TYPE_CHECKING:
    from events.bus.subscription import Subscription


class RingLimits(msgspec.Struct, frozen=True):
    """Maximum events and bytes in a ring."""

    capacity: int = 16_384
    """Events that the ring holds while the event loop does not drain it."""
    capacity_bytes: int = 256 * 2**20
    """Bytes of payloads of droppable events, and as many of others, before the ring drops or the loop waits."""
    reserve: int = 4_096
    """Events that are not droppable beyond ``capacity`` before the loop waits."""


_LIMITS = RingLimits()


class RingCounters(msgspec.Struct):
    """Counters of a ring since its start. The loop's thread writes ``*_in``; the lock guards the others."""

    bytes_in: int = 0
    """Bytes of payloads of droppable events that were published."""
    bytes_out: int = 0
    """Of ``bytes_in``, bytes that were taken or dropped."""
    kept_bytes_in: int = 0
    """Bytes of payloads of other events that were published."""
    kept_bytes_out: int = 0
    """Of ``kept_bytes_in``, bytes that were taken."""
    dropped: int = 0
    """Events that were dropped because the ring was full."""


class Audience(msgspec.Struct, frozen=True):
    """Who receives. The pump replaces it as a whole, because the loop's thread reads it at any time."""

    wanted: frozenset[type[Event]] = frozenset()
    """Event types that a subscription receives."""
    payload_receivers: dict[type[Event], list[str]] = {}
    """Names of the subscriptions that receive the payload, for each event type with at least one."""
    must_keep: bool = False
    """Whether a subscription blocks the loop rather than lose an event."""
    blocked: frozenset[Subscription] = frozenset()
    """Subscriptions of that kind that are full."""


class Ring:
    """The events of one run between their publishers and the `Pump`.

    Any thread may call `publish`, `flush`, `post`, `wait_for_room` and `release`, and read the public attributes. The
    other methods belong to the pump.

    Args:
        origin: Source of the headers of the bus's own events.
        limits: Maximum events and bytes.
    """

    # `publish` finds the caches cold. Behind a dictionary or another object, what it reads would cost half a
    # microsecond of cache misses.
    # fmt: off
    __slots__ = (
        "_events", "_gate_at", "_kept", "_limits", "_lock", "_prompt", "_room", "_sleeping", "_wakeup",
        "alive", "audience", "counters", "cpu_time", "gated", "origin",
    )
    # fmt: on

    def __init__(self, origin: Origin, limits: RingLimits = _LIMITS) -> None:
        self.origin = origin
        self.audience = Audience()
        self.counters = RingCounters()
        self.cpu_time = CpuTime()
        """CPU time of the threads of the pump and of the observers."""
        self.alive = True
        """False once the pump has ended and delivers nothing any more."""
        self.gated = False
        """Whether the loop must wait at its step boundary, or an event that must not be dropped would be."""
        self._limits = limits
        self._gate_at = max(1, limits.capacity * 3 // 4)
        self._events: deque[Published] = deque()
        self._kept: deque[Published] = deque()  # older than all of `_events`, and not droppable
        self._lock = threading.Lock()  # between dropping and taking; `publish` never waits for it
        self._prompt: frozenset[type[Event]] = frozenset()
        self._room = threading.Event()
        self._wakeup = Wakeup()
        self._sleeping = False

    # ------------------------------------------------------------------------------------ from any thread

    def publish(self, event: Event, payload: Payload | None = None) -> None:
        """Hand an event to the pump. Takes about a microsecond and waits for nothing.

        The bus owns the event from here on: it must not be published twice. When the ring is full, the oldest droppable
        events are dropped and counted. Only the loop's thread may publish a ``payload`` that has bytes.
        """
        events = self._events
        events.append((event, payload))
        if payload is not None and payload.nbytes:
            if event.droppable:
                self.counters.bytes_in += payload.nbytes
            else:
                self.counters.kept_bytes_in += payload.nbytes
            if self._is_heavy:
                self._make_room()
        if len(events) > self._gate_at:
            self._make_room()
        if type(event) in self._prompt:
            self.flush()
        # The pump sets the flag first and looks at the ring again before it waits: one of the two sees the other.
        if self._sleeping:
            self._sleeping = False
            self._wakeup.set()

    def flush(self) -> None:
        """Have the pump deliver now instead of at its next tick. Never waits."""
        self._wakeup.urgent = True
        self._wakeup.set()

    def post(self, function: Callable[[], object]) -> None:
        """Run a function in the event loop's thread soon. Never waits. The function must not raise."""
        self._wakeup.post(function)

    @property
    def blocked_by(self) -> list[str]:
        """Names of the observers that gate the loop, or ``bus`` when the event loop itself does not deliver."""
        return sorted(subscription.name for subscription in self.audience.blocked) or ["bus"]

    def wait_for_room(self, timeout_s: float) -> bool:
        """Wait on the loop's thread until it is not gated; False after ``timeout_s``, or after `release`."""
        self._room.clear()
        if not self.gated or not self.alive:
            return True
        self._wakeup.set()
        self._room.wait(timeout_s)
        return not self.gated or not self.alive

    def release(self) -> None:
        """End a `wait_for_room` that is under way, because the loop has to look at something else."""
        self._room.set()

    @property
    def _is_heavy(self) -> bool:
        """Whether the payloads of either kind exceed the limit of bytes."""
        counters, limit = self.counters, self._limits.capacity_bytes
        return (
            counters.bytes_in - counters.bytes_out > limit or counters.kept_bytes_in - counters.kept_bytes_out > limit
        )

    def _make_room(self) -> None:
        """Gate the loop or drop events, because the ring fills up. On the publisher's thread."""
        self.flush()  # before an event is dropped, because the pump may only be waiting for its next tick
        # A loop that is gated waits at its next boundary, so a little more room is enough to drop nothing. If the lock
        # is taken, the pump makes room at this moment.
        spare = self.audience.must_keep and len(self._events) < 2 * self._limits.capacity
        if not spare and self._lock.acquire(blocking=False):
            try:
                self._drop()
            finally:
                self._lock.release()
        self.update_gate()

    def _drop(self) -> None:
        counters, limits = self.counters, self._limits
        while self._events and (
            len(self._events) > limits.capacity or counters.bytes_in - counters.bytes_out > limits.capacity_bytes
        ):
            event, payload = self._events.popleft()
            if not event.droppable:
                self._kept.append((event, payload))
                continue
            counters.dropped += 1
            if payload is not None:
                counters.bytes_out += payload.nbytes
                if payload.fence is not None:
                    payload.fence.keep(set())  # no observer will run its hooks

    # ------------------------------------------------------------------------------------------ for the pump

    @property
    def is_empty(self) -> bool:
        """Whether no event waits here."""
        return not self._events and not self._kept

    @property
    def is_urgent(self) -> bool:
        """Whether `flush` was called since the last `take`."""
        return self._wakeup.urgent

    @property
    def has_posted(self) -> bool:
        """Whether a posted function waits to be run."""
        return bool(self._wakeup.posted)

    def set_audience(self, audience: Audience, prompt: frozenset[type[Event]]) -> None:
        """Tell publishers who receives, and which types are delivered at once instead of at the next tick."""
        self.audience = audience
        self._prompt = prompt

    def update_gate(self) -> None:
        """Gate or release the loop, according to what waits."""
        self.gated = bool(
            self.audience.blocked
            or (self.audience.must_keep and len(self._events) > self._gate_at)
            or len(self._kept) > self._limits.reserve
            or self._is_heavy
        )
        if not self.gated:
            self._room.set()

    def take(self, limit: int) -> list[Published]:
        """Remove and return the oldest events."""
        self._wakeup.urgent = False
        batch: list[Published] = []
        counters = self.counters
        with self._lock:
            for queue in (self._kept, self._events):
                batch += [queue.popleft() for _ in range(min(len(queue), limit - len(batch)))]
            if counters.bytes_in != counters.bytes_out or counters.kept_bytes_in != counters.kept_bytes_out:
                for event, payload in batch:
                    if payload is None:
                        pass
                    elif event.droppable:
                        counters.bytes_out += payload.nbytes
                    else:
                        counters.kept_bytes_out += payload.nbytes
        return batch

    def run_posted(self) -> None:
        """Run the functions that were posted."""
        self._wakeup.run_posted()

    async def wait(self, timeout_s: float | None) -> None:
        """Wait for a posted function, a `flush`, or the timeout; None: also for the next event."""
        self._sleeping = timeout_s is None
        if not self._sleeping or (self.is_empty and not self.has_posted and not self.is_urgent):
            await self._wakeup.wait(timeout_s)
        self._sleeping = False

    def close(self) -> None:
        """Release the loop for good: nothing is delivered any more."""
        self.alive = False
        self._room.set()
        self._wakeup.close()
