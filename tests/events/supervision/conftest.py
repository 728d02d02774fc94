"""Sinks that do as they are told, and a supervisor to look after them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import anyio
import pytest

from events.bus.backlog import Payload, Published
from events.bus.observer import Observer
from events.bus.pump import Pump
from events.bus.supervisor import Supervisor
from events.bus.target import SinkTarget
from events.messages import Event, ObserverFailed, ObserverRecovered, ObserverSlow, TrainStepEnded
from events.protocol import ObserverReport
from events.sink import RunInfo

WAIT_S = 20.0
"""How long anything that ought to happen may take on a busy machine."""
SHORT_S = 0.1
"""A limit that a call at a gate exceeds, and no other call does."""


def fail() -> None:
    raise OSError("disk full")


class Gate:
    """Where an observer stands until it is let through."""

    def __init__(self, pump: Pump, then: Callable[[], None]) -> None:
        self.reached = anyio.Event()
        self._pump = pump
        self._then = then
        self._opened = threading.Event()
        self._opened_async = anyio.Event()

    def __call__(self) -> None:
        """On a thread."""
        self._pump.ring.post(self.reached.set)
        assert self._opened.wait(WAIT_S)
        self._then()

    async def passed(self, *, shield: bool = False) -> None:
        """In the event loop."""
        self.reached.set()
        with anyio.CancelScope(shield=shield):
            await self._opened_async.wait()
        self._then()

    def open(self) -> None:
        self._opened.set()
        self._opened_async.set()


class Scripted:
    """A sink, and its own writer, whose calls follow a script: exceptions are raised, functions called, None works."""

    def __init__(self, **script: Iterable[BaseException | Callable[[], Any] | None]) -> None:
        self._script = {call: iter(acts) for call, acts in script.items()}
        self.calls: list[str] = []
        self.tried: list[list[int]] = []
        self.got: list[int] = []
        self.threads: set[threading.Thread] = set()

    def act(self, call: str) -> Any:
        self.threads.add(threading.current_thread())
        self.calls.append(call)
        act = next(self._script.get(call, iter(())), None)
        if isinstance(act, BaseException):
            raise act
        return act() if act is not None else None

    def open(self, run: RunInfo) -> Any:
        self.act("open")
        return self

    def write(self, events: Sequence[Event]) -> Any:
        self.tried.append([event.global_step for event in events])
        self.act("write")
        self.got += self.tried[-1]

    def close(self) -> Any:
        self.act("close")


class AsyncScripted(Scripted):
    """The same with async methods."""

    async def write(self, events: Sequence[Event]) -> None:
        self.tried.append([event.global_step for event in events])
        if (act := self.act("write")) is not None:
            await act
        self.got += self.tried[-1]

    async def close(self) -> None:
        if (act := self.act("close")) is not None:
            await act


class Mixed(AsyncScripted):
    """Plain methods that return what is to be awaited, as of a wrapped async client."""

    def write(self, events: Sequence[Event]) -> Awaitable[None]:  # type: ignore[override]
        self.threads.add(threading.current_thread())
        return super().write(events)

    def close(self) -> Awaitable[None]:  # type: ignore[override]
        return super().close()


class Hooks:
    """A target like a callback's: one hook for each event, taken up where it failed. The script goes by event."""

    payloads = True
    blocking = True

    def __init__(self, script: dict[int, Iterable[Callable[[], None]]]) -> None:
        self._script = {at: iter(acts) for at, acts in script.items()}
        self._batch: Sequence[Published] = ()
        self._done = 0
        self._abandoned = False
        self.ran: list[int] = []

    @property
    def progress(self) -> tuple[str, int | None]:
        return "on_something", self._done

    def open(self) -> None: ...

    def deliver(self, batch: Sequence[Published], /) -> None:
        if batch is not self._batch:
            self._batch, self._done = batch, 0
        for event, _ in batch[self._done :]:
            if self._abandoned:
                return
            self.ran.append(event.global_step)
            if (act := next(self._script.get(event.global_step, iter(())), None)) is not None:
                act()
            self._done += 1

    def abandon(self) -> None:
        self._abandoned = True

    def close(self) -> None: ...


class House:
    """A supervisor, its observers, and what is published about them."""

    def __init__(self, make: Any, tasks: anyio.abc.TaskGroup) -> None:
        self.pump: Pump = make.pump()
        self.fatal: list[BaseException] = []
        self.supervisor = Supervisor(self.pump, self.fatal.append)
        self.told: list[Any] = []
        self.gates: list[Gate] = []
        self.tasks = tasks
        self._make = make
        kinds = frozenset({ObserverFailed, ObserverRecovered, ObserverSlow})
        self._watch = self.pump.subscribe("watch", make.delivery(types=kinds))
        self._unread: deque[Event] = deque()

    def gate(self, then: Callable[[], None] = lambda: None) -> Gate:
        self.gates.append(Gate(self.pump, then))
        return self.gates[-1]

    def add(self, target: Any, name: str = "sink", **delivery: Any) -> Observer:
        quick = {"types": frozenset({TrainStepEnded}), "backoff_s": 1e-4, "max_backoff_s": 1e-3}
        if isinstance(target, Scripted):
            target = SinkTarget(target, RunInfo("run"))
        return self.supervisor.add(name, target, self._make.delivery(**(quick | delivery)))

    async def start(self, publish: int = 0, payload: Payload | None = None) -> None:
        """Publish one batch, and run the observers."""
        await self.publish(publish, payload)
        for observer in self.supervisor.observers:
            self.tasks.start_soon(observer.run)

    async def publish(self, count: int, payload: Payload | None = None) -> None:
        """In one batch, handed over when this returns."""
        for _ in range(count):
            self.pump.ring.publish(self._make.step(), payload)
        await self.pump.drain()

    async def until(self, kind: type[Event], during: str | None = None) -> Any:
        """Wait for the next event of a kind."""
        while True:
            while self._unread:
                self.told.append(event := self._unread.popleft())
                if type(event) is kind and during in (None, getattr(event, "during", None)):
                    return event
            self._unread.extend([event for event, _ in await self._watch.receive()])

    async def drain(self, timeout_s: float = WAIT_S) -> dict[str, ObserverReport]:
        reports = await self.supervisor.drain(self.supervisor.observers, timeout_s)
        await self.pump.drain()
        while not self._watch.is_empty:
            self._unread.extend([event for event, _ in await self._watch.receive()])
        self.told += self._unread
        for report in reports:
            assert report.published == report.delivered + report.dropped + report.conflated + report.left
        return {report.observer: report for report in reports}


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("stagecast-")]


@pytest.fixture
def supervising(make: Any) -> Callable[[], Any]:
    """``async with supervising() as house``: its bus is pumped; at the end no thread of it is left."""

    @asynccontextmanager
    async def run() -> AsyncIterator[House]:
        async with anyio.create_task_group() as tasks:
            house = House(make, tasks)
            tasks.start_soon(house.pump.run)
            try:
                yield house
            finally:
                for gate in house.gates:
                    gate.open()
                tasks.cancel_scope.cancel()
        for thread in threads():
            thread.join(WAIT_S)
        assert threads() == []

    return run


@pytest.fixture
def kit() -> Any:
    """What the tests of this folder share, by name."""
    return SimpleNamespace(
        WAIT_S=WAIT_S,
        SHORT_S=SHORT_S,
        fail=fail,
        Hooks=Hooks,
        Scripted=Scripted,
        AsyncScripted=AsyncScripted,
        Mixed=Mixed,
        plain_async_mixed={"plain": Scripted, "async": AsyncScripted, "mixed": Mixed},
        threads=threads,
    )
