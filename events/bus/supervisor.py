"""The observers of a run together: their names, their drain within a deadline, and reports of their health."""

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
"""Maximum seconds for the drain of an observer that the run no longer waits for."""
_PUMP_S = 1.0
"""Minimum seconds that the pump has to deliver the events that were published before a drain."""


def unique_name(name: str, taken: Collection[str]) -> str:
    """The name, or, if it is taken, the first of ``NAME-2``, ``NAME-3``, ... that is not."""
    numbered = (f"{name}-{number}" for number in itertools.count(2))
    return next(unique for unique in itertools.chain([name], numbered) if unique not in taken)


class Supervisor:
    """All observers of a run. Used in the event loop's thread only.

    Args:
        pump: Delivers their events.
        on_fatal: Receives the exception of an observer with the policy ``fatal`` that has failed.
    """

    def __init__(self, pump: Pump, on_fatal: OnFatal) -> None:
        self._pump = pump
        self._on_fatal = on_fatal
        self.observers: list[Observer] = []
        self._names = {"bus"}
        self._limit_s = math.inf
        self._draining: anyio.CancelScope | None = None
        self._drained: list[Observer] = []  # now, or last
        self._left: set[Observer] = set()

    def add(self, name: str, target: Target, delivery: Delivery) -> Observer:
        """Subscribe an observer; the caller starts its `Observer.run`. A name that is taken gets a number."""
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
        """Reserve the name, or a numbered one if it is taken."""
        unique = unique_name(name, self._names)
        self._names.add(unique)
        return unique

    async def drain(self, observers: Sequence[Observer], timeout_s: float) -> list[ObserverReport]:
        """Deliver the events that these observers have queued, close them, and report; in at most ``timeout_s``."""
        if self._left.issuperset(observers):
            timeout_s = min(timeout_s, _LEAVING_S)
        self._drained = list(observers)
        deadline = anyio.current_time() + min(timeout_s, self._limit_s)
        # This is short, unless a device hangs: events in the ring belong in the counts.
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
        """Shorten the timeout of a drain to that of `hurry`."""
        return min(timeout_s, self._limit_s)

    def leave(self, observer: Observer) -> None:
        """Wait for this observer only for a moment, in the drain in progress or in its own."""
        self._left.add(observer)
        if self._draining is not None and self._drained == [observer]:
            self._draining.deadline = min(self._draining.deadline, anyio.current_time() + _LEAVING_S)

    def hurry(self, timeout_s: float) -> None:
        """Limit the drain in progress, and each that follows, to this time from now on."""
        self._limit_s = timeout_s
        if self._draining is not None:
            self._draining.deadline = min(self._draining.deadline, anyio.current_time() + timeout_s)


def health_at_end(report: ObserverReport) -> ObserverHealth:
    """Convert a report to the health that `ObserversReported` carries; events that are left count as queued."""
    state: Literal["ok", "disabled"] = "ok" if report.state == "closed" else "disabled"
    return ObserverHealth(
        observer=report.observer,
        state=state,
        queued=report.left,
        lag_s=None,
        delivered=report.delivered,
        dropped=report.dropped,
        conflated=report.conflated,
    )


async def report_observers(
    observers: Sequence[Observer], origin: Origin, publish: Callable[[Event], object], interval_s: float
) -> None:
    """Publish `ObserversReported` at each interval, until it is cancelled."""
    while observers:
        await anyio.sleep(min(interval_s, 1e9))  # infinity: never
        publish(ObserversReported(*origin.header(), observers=[observer.health() for observer in observers]))
