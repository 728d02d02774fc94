"""Runs observers so that none of them can kill a run by accident, or hang its end.

Each observer has a task here, and a thread of its own if it blocks. Deliveries are made one at a time; a failure is
published, and answered as the `Delivery` says. While an observer is failing, its circuit is open: nothing is delivered
but one attempt after each growing pause, and its queue follows the overflow policy.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import anyio
import anyio.abc

from events.backlog import Published
from events.bus import Bus
from events.log import logger
from events.messages import Event, ObserverFailed, ObserverRecovered, ObserverSlow
from events.protocol import ObserverReport
from events.sink import Delivery, RunInfo, Sink, SinkWriter
from events.subscription import Subscription
from events.worker import Worker

OnFatal = Callable[[BaseException], None]


class Target(Protocol):
    """What a supervised observer does; `SinkTarget` and the callbacks of `trainer` are the two kinds."""

    payloads: bool
    """Whether it needs the payloads beside the events."""
    blocking: bool
    """Whether `deliver` and `close` are plain functions, to be run on a thread. Known once `open` has returned."""

    def open(self) -> None:
        """Get ready; on the observer's thread."""
        ...

    def deliver(self, batch: Sequence[Published], /) -> Any:
        """Handle a batch, or what is left of it when it is delivered again."""
        ...

    def close(self) -> Any:
        """Flush and let go."""
        ...

    @property
    def progress(self) -> tuple[str, int | None]:
        """What it is doing now, in a word, and how many events of the batch in hand are done (None: all or nothing)."""
        ...


class SinkTarget:
    """A sink as the supervisor sees it."""

    payloads = False
    blocking = True

    def __init__(self, sink: Sink, run: RunInfo) -> None:
        self._sink = sink
        self._run = run
        self.writer: SinkWriter | None = None

    def open(self) -> None:
        self.writer = self._sink.open(self._run)
        self.blocking = not inspect.iscoroutinefunction(self.writer.write)

    def deliver(self, batch: Sequence[Published], /) -> Any:
        assert self.writer is not None
        events: list[Event] = [event for event, _ in batch]
        return self.writer.write(events)

    def close(self) -> Any:
        return self.writer.close() if self.writer is not None else None

    @property
    def progress(self) -> tuple[str, int | None]:
        return ("write" if self.writer is not None else "open"), None


class _Stopped(Exception):
    """The observer gets nothing more."""


class Observer:
    """One supervised observer. Created by `Supervisor.add`."""

    def __init__(self, name: str, target: Target, delivery: Delivery, bus: Bus, on_fatal: OnFatal) -> None:
        self.name = name
        self.circuit: Literal["closed", "open", "half_open", "disabled"] = "closed"
        self.error: str | None = None
        """Type and text of its last failure."""
        self.subscription: Subscription = bus.subscribe(name, delivery, payloads=target.payloads)
        self.target = target
        self._bus = bus
        self._on_fatal = on_fatal
        self._worker = Worker(f"stagecast-{name}", bus.post)
        self._draining = anyio.Event()
        self._finished = anyio.Event()
        self._close_failed = False

    async def run(self) -> None:
        """Open, deliver until the end of the stream, close."""
        try:
            await self._persist("open", self.target.open)
            while True:
                try:
                    batch = await self.subscription.receive()
                except anyio.EndOfStream:
                    break
                await self._persist(None, self.target.deliver, batch)
        except _Stopped:
            pass
        await self._close()
        self._worker.stop()
        self._finished.set()

    async def _persist(self, during: str | None, function: Callable[..., Any], *args: Any) -> None:
        """Make a call until it succeeds or the policy gives up (`_Stopped`)."""
        delivery = self.subscription.delivery
        failures = 0
        since = time.monotonic()
        while True:
            error = await self._attempt(during, function, *args)
            if error is None:
                if self.circuit != "closed":
                    self.circuit = "closed"
                    outage_s = time.monotonic() - since
                    self._publish(ObserverRecovered, self.name, failures, outage_s)
                return
            failures += 1
            self.error = describe(error)
            if delivery.on_error != "retry" or failures > delivery.retries:
                self._give_up(error, during, failures)
                raise _Stopped
            if failures == 1:
                self._fail(error, during, "retrying", failures)
            self.circuit = "open"
            await self._back_off(min(delivery.backoff_s * 2 ** min(failures - 1, 60), delivery.max_backoff_s))
            self.circuit = "half_open"

    async def _attempt(
        self, during: str | None, function: Callable[..., Any], *args: Any
    ) -> BaseException | None:
        """Make a call once; returns what it raised. Says so when it takes long."""
        delivery = self.subscription.delivery
        if self.target.blocking or during == "open":
            job = self._worker.submit(function, *args)
            if not await self._finishes(job.finished, during):
                # The call cannot be ended, and a second one beside it would break its order: the circuit is open
                # until it returns.
                self._fail(TimeoutError(_timed_out(delivery.timeout_s)), during, "retrying", 1)
                self.circuit = "open"
                await job.finished.wait()
            return job.error
        try:
            with anyio.fail_after(delivery.timeout_s):
                await function(*args)
        except TimeoutError as error:
            return TimeoutError(str(error) or _timed_out(delivery.timeout_s))
        except Exception as error:  # the supervisor's border: reported by `_persist`
            return error
        return None

    async def _finishes(self, finished: anyio.Event, during: str | None) -> bool:
        """Wait for a call within its timeout; publish `ObserverSlow` once it is slow."""
        delivery = self.subscription.delivery
        timeout_s = delivery.timeout_s if delivery.timeout_s is not None else float("inf")
        slow_s = min(delivery.slow_s, timeout_s)
        with anyio.move_on_after(slow_s):
            await finished.wait()
            return True
        if slow_s < timeout_s:
            self._publish(ObserverSlow, self.name, self._doing(during), slow_s)
            with anyio.move_on_after(timeout_s - slow_s):
                await finished.wait()
        return finished.is_set()

    async def _back_off(self, pause_s: float) -> None:
        with anyio.move_on_after(pause_s):
            await self._draining.wait()
            # The run is over: what is left is tried in quick succession until the drain's deadline.
            await anyio.sleep(min(pause_s, 0.1))

    def _give_up(self, error: BaseException, during: str | None, failures: int) -> None:
        fatal = self.subscription.delivery.on_error == "fatal"
        self.circuit = "disabled"
        self._fail(error, during, "fatal" if fatal else "disabled", failures)
        if fatal:
            self._on_fatal(error)  # before the fences fall: the loop must not take another step
        self._bus.unsubscribe(self.subscription)
        _, done = self.target.progress
        self.subscription.done(done or 0)
        self.subscription.discard()

    async def _close(self) -> None:
        error = await self._attempt("close", self.target.close)
        if error is not None:
            self.error = describe(error)
            self._close_failed = True
            self._fail(error, "close", "disabled", 1)

    def _doing(self, during: str | None) -> str:
        return during or self.target.progress[0]

    def _fail(
        self,
        error: BaseException,
        during: str | None,
        action: Literal["fatal", "disabled", "retrying"],
        failures: int,
    ) -> None:
        doing = self._doing(during)
        self.error = describe(error)
        self._publish(ObserverFailed, self.name, self.error, doing, action, failures)
        logger.warning(
            f"observer {self.name} failed in {doing} ({action}): {self.error}", exc_info=error
        )

    def _publish(self, kind: type[Event], *fields: Any) -> None:
        self._bus.publish(kind(*self._bus.origin.header(), *fields))

    def drain(self) -> None:
        """No more events will come: deliver what is queued, then close."""
        self.subscription.finish()
        self._draining.set()

    async def finished(self) -> None:
        """Wait until it is closed."""
        await self._finished.wait()

    def report(self) -> ObserverReport:
        """What became of its events; then lets go of those that are left."""
        statistics = self.subscription.statistics
        state: Literal["closed", "disabled", "stuck", "failed"] = "closed"
        if not self._finished.is_set():
            state = "stuck"
            self.error = self.error or f"still in {self._doing(None)} at the end of the drain"
        elif self.circuit == "disabled":
            state = "disabled"
        elif self._close_failed:
            state = "failed"
        report = ObserverReport(
            observer=self.name,
            state=state,
            published=statistics.published,
            delivered=statistics.delivered,
            dropped=statistics.dropped,
            conflated=statistics.conflated,
            spilled=statistics.spilled,
            left=statistics.queued,
            error=self.error,
        )
        self.subscription.discard()
        return report


class Supervisor:
    """All observers of a run. Used in the event loop's thread only.

    Args:
        bus: The bus whose events they get.
        on_fatal: Told when an observer with the policy ``fatal`` has failed, with what it raised.
    """

    def __init__(self, bus: Bus, on_fatal: OnFatal) -> None:
        self._bus = bus
        self._on_fatal = on_fatal
        self.observers: list[Observer] = []

    def add(self, name: str, target: Target, delivery: Delivery) -> Observer:
        """Subscribe an observer; `start` runs it. A name that is taken gets a number."""
        taken = {observer.name for observer in self.observers}
        unique = next(n for n in (name, *(f"{name}-{i}" for i in range(2, 1_000))) if n not in taken)
        observer = Observer(unique, target, delivery, self._bus, self._on_fatal)
        self.observers.append(observer)
        return observer

    def start(self, tasks: anyio.abc.TaskGroup) -> None:
        """Run every observer in the task group."""
        for observer in self.observers:
            tasks.start_soon(observer.run, name=f"stagecast {observer.name}")

    async def drain(self, observers: Sequence[Observer], timeout_s: float) -> list[ObserverReport]:
        """Deliver what these observers still have queued, close them, and report; no longer than ``timeout_s``."""
        await self._bus.drain()
        for observer in observers:
            observer.drain()
        with anyio.move_on_after(timeout_s):
            for observer in observers:
                await observer.finished()
        self._bus.report_losses()
        for observer in observers:
            self._bus.unsubscribe(observer.subscription)
        return [observer.report() for observer in observers]


def describe(error: BaseException) -> str:
    """An exception in one line: its type and its text."""
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _timed_out(timeout_s: float | None) -> str:
    return f"no answer within {timeout_s:g} s" if timeout_s is not None else "timed out"
