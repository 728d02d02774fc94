"""Events made by hand, and a bus that is pumped for as long as a test needs it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest

from events.bus.backlog import Published
from events.bus.pump import Pump
from events.bus.ring import Ring, RingLimits
from events.bus.subscription import Subscription
from events.messages import Event, MetricsLogged, RunEnded, TrainStepEnded
from events.origin import Origin
from events.sink import Delivery


class Make:
    """Builds events that can be told apart by their ``global_step``."""

    def __init__(self) -> None:
        self._count = itertools.count(1)
        self.origin = Origin("run")

    def event(self, kind: type[Event], *fields: Any, at: int | None = None, **named: Any) -> Any:
        place = next(self._count) if at is None else at
        return kind("run", 1, 0, 0.0, 0, place, 0, None, *fields, **named)

    def step(self, at: int | None = None, **fields: Any) -> TrainStepEnded:
        """An event that may be dropped."""
        return self.event(TrainStepEnded, at=at, **fields)

    def ended(self, at: int | None = None) -> RunEnded:
        """An event that must not be dropped."""
        return self.event(RunEnded, "finished", at=at)

    def metrics(self, at: int | None = None, key: str | None = None, **metrics: float) -> MetricsLogged:
        return self.event(MetricsLogged, metrics, key, at=at)

    def pump(self, **options: Any) -> Pump:
        """A pump and its ring."""
        limits = {name: options.pop(name) for name in RingLimits.__struct_fields__ if name in options}
        return Pump(Ring(self.origin, RingLimits(**limits)), **options)

    def delivery(self, **options: Any) -> Delivery:
        """One that is delivered at once."""
        return Delivery(**{"latency_s": 1e-6, **options})


@pytest.fixture
def make() -> Make:
    return Make()


@pytest.fixture
def pumping() -> Callable[[Pump], Any]:
    """``async with pumping(pump) as tasks``: the pump runs; at the end everything is delivered and the bus closed."""

    @asynccontextmanager
    async def run(pump: Pump) -> AsyncIterator[anyio.abc.TaskGroup]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pump.run)
            yield tasks
            await pump.drain()
            pump.close()

    return run


@pytest.fixture
def receive_all() -> Callable[[Subscription], Any]:
    """Receive until the end of the stream."""

    async def receive(subscription: Subscription) -> list[Event]:
        events: list[Event] = []
        while True:
            try:
                batch: list[Published] = await subscription.receive()
            except anyio.EndOfStream:
                return events
            events += [event for event, _ in batch]

    return receive


@pytest.fixture
def in_threads() -> Callable[..., Any]:
    """Run functions in threads of their own, at once, without holding up the event loop."""

    async def run(pump: Pump, *functions: Callable[[], object]) -> None:
        finished = anyio.Event()
        left = itertools.count(len(functions) - 1, -1)
        errors: list[BaseException] = []

        def target(function: Callable[[], object]) -> None:
            try:
                function()
            except BaseException as error:
                errors.append(error)
            if next(left) == 0:
                pump.ring.post(finished.set)

        threads = [threading.Thread(target=target, args=(function,)) for function in functions]
        for thread in threads:
            thread.start()
        await finished.wait()
        for thread in threads:
            thread.join()
        assert not errors, errors

    return run
