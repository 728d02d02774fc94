"""The observers of a run together: named, drained within a deadline, and asked how they are doing."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Literal

import anyio
import anyio.abc

from events.bus.observer import Observer, OnFatal
from events.bus.pump import Pump
from events.bus.target import Target
from events.bus.worker import Worker
from events.messages import Event, ObserverHealth, ObserversReported
from events.origin import Origin
from events.protocol import ObserverReport
from events.sink import Delivery

_LEAVING_S = 0.5
"""How long an observer may take to end that nobody waits for any more."""
_PUMP_S = 1.0
"""How long the pump may take at least to deliver what was published before a drain."""


def unique_name(name: str, taken: Collection[str]) -> str:
    """The name, or, if it is taken, the first of ``NAME-2``, ``NAME-3``, ... that is not."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(unique for unique in itertools.chain([name], numbered) if unique not in taken)


class Supervisor:
    """All observers of a run. Used in the event loop's thread only.

    Args:
        pump: Delivers their events.
        on_fatal: Told when an observer with the policy ``fatal`` has failed, with what it raised.
    """

    def __init__(self, pump: Pump, on_fatal: OnFatal) -> None:
        self._pump = pump
        self._on_fatal = on_fatal
        self.observers: list[Observer] = []
        self._names = {"bus"}
        self._limit_s = math.inf
        self._draining: anyio.CancelScope | None = None
        self._drained: list[Observer] = []  # who is, or was last
        self._left: set[Observer] = set()

    def add(self, name: str, target: Target, delivery: Delivery) -> Observer:
        """Subscribe an observer, whose `Observer.run` is then to be started. A name that is taken gets a number."""
        ring, name = self._pump.ring, self.take_name(name)
        observer = Observer(
            self._pump.subscribe(name, delivery, payloads=target.payloads),
            target,
            worker=Worker(f"stagecast-{name}", ring.post, ring.cpu_time),
            origin=ring.origin,
            publish=ring.publish,
            on_fatal=self._on_fatal,
        )
        self.observers.append(observer)
        return observer

    def take_name(self, name: str) -> str:
        """The name, or a numbered one if it is taken; from now on it is."""
        unique = unique_name(name, self._names)
        self._names.add(unique)
        return unique

    async def drain(self, observers: Sequence[Observer], timeout_s: float) -> list[ObserverReport]:
        """Deliver what these observers still have queued, close them, and report; no longer than ``timeout_s``."""
        if self._left.issuperset(observers):
            timeout_s = min(timeout_s, _LEAVING_S)
        self._drained = list(observers)
        deadline = anyio.current_time() + min(timeout_s, self._limit_s)
        # The pump's own work, and short, unless a device hangs: what is in the ring belongs in the counts.
        with anyio.CancelScope(deadline=max(deadline, anyio.current_time() + _PUMP_S)):
            await self._pump.drain()
        self._pump.report_losses()
        for observer in observers:
            observer.drain()
        with anyio.CancelScope(deadline=min(deadline, anyio.current_time() + self._limit_s)) as self._draining:
            for observer in observers:
                await observer.finished()
        self._draining = None
        return [observer.report() for observer in observers]

    def limited(self, timeout_s: float) -> float:
        """How long a drain of so long may take, since somebody is in a hurry."""
        return min(timeout_s, self._limit_s)

    def leave(self, observer: Observer) -> None:
        """Wait no longer than a moment for this one, in the drain that is under way or when its turn comes."""
        self._left.add(observer)
        if self._draining is not None and self._drained == [observer]:
            self._draining.deadline = min(self._draining.deadline, anyio.current_time() + _LEAVING_S)

    def hurry(self, timeout_s: float) -> None:
        """Let the drain that is under way, and each that follows, take no longer than this from now on."""
        self._limit_s = timeout_s
        if self._draining is not None:
            self._draining.deadline = min(self._draining.deadline, anyio.current_time() + timeout_s)


def health_at_end(report: ObserverReport) -> ObserverHealth:
    """How an observer has ended, as `ObserversReported` carries it: what was left is still queued."""
    state: Literal["ok", "disabled"] = "ok" if report.state == "closed" else "disabled"
    return ObserverHealth(report.observer, state, report.left, None, report.delivered, report.dropped, report.conflated)


async def report_observers(
    observers: Sequence[Observer], origin: Origin, publish: Callable[[Event], object], interval_s: float
) -> None:
    """Publish `ObserversReported` at each interval, until it is cancelled."""
    while observers:
        await anyio.sleep(min(interval_s, 1e9))  # infinity: never
        publish(ObserversReported(*origin.header(), observers=[observer.health() for observer in observers]))
