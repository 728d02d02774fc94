"""Supervision of one observer, so that it can neither kill a run by accident nor hang its end.

An observer has a task here, and a thread of its own if it blocks. Deliveries are made one at a time. `ObserverFailed`
reports a failure, and the error policy of the `Delivery` decides what follows. While an observer fails, its circuit is
open: the supervisor tries one delivery after each growing pause, and the queue follows the overflow policy. A call that
exceeds its timeout counts as failed, but is not repeated while it may still succeed.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from typing import Literal

import anyio
import anyio.abc

from events.bus.target import Source, Target
from events.bus.worker import AsyncJob, ThreadJob, Worker
from events.errors import SinkMisconfigured
from events.log import logger
from events.messages import (
    Event,
    ObserverFailed,
    ObserverHealth,
    ObserverRecovered,
    ObserverSlow,
)
from events.origin import Origin
from events.protocol import ObserverReport
from events.tracebacks import describe

OnFatal = Callable[[BaseException], None]

LAST_TRIES_S = 3.0
"""Maximum seconds for which a failing call is repeated once the run is over, however many retries are left: a disk that
is full or read-only then must not use up the whole drain. Progress within the call restarts them."""


class _Stopped(Exception):
    """The observer receives no more events."""


class Observer:
    """One supervised observer. Belongs to the event loop's thread.

    Args:
        source: Its events.
        target: Handles them.
        worker: Its thread, named for it. `run` stops it.
        origin: Source of the headers of the events about it.
        publish: Receives these events.
        on_fatal: Receives the exception when its policy is ``fatal`` and it has failed.
    """

    def __init__(
        self,
        source: Source,
        target: Target,
        *,
        worker: Worker,
        origin: Origin,
        publish: Callable[[Event], object],
        on_fatal: OnFatal,
    ) -> None:
        self.name = source.name
        self.circuit: Literal["closed", "open", "half_open", "disabled"] = "closed"
        self.error: str | None = None
        """Type and text of its last failure."""
        self.source = source
        self.target = target
        self._worker = worker
        self._origin = origin
        self._publish = publish
        self._on_fatal = on_fatal
        self._during: str | None = None
        self._late: ThreadJob | AsyncJob | None = None  # a call that has exceeded its timeout and has not returned
        self._draining = anyio.Event()
        self._drained_since = math.inf
        self._finished = anyio.Event()
        self._close_failed = False

    async def run(self) -> None:
        """Open, deliver until the end of the stream, close."""
        try:
            try:
                await self._persist("open", self.target.open)
                await self._deliver()
            except _Stopped:
                pass
            await self._close()
            self._finished.set()
        finally:
            self._worker.stop()  # also when cancelled: an idle thread would wait for its next call for ever

    async def _deliver(self) -> None:
        while True:
            try:
                batch = await self.source.receive()
            except anyio.EndOfStream:
                return
            await self._persist(None, self.target.deliver, batch)
            del batch  # or its tensors would stay in memory until the next batch

    async def _persist(self, during: str | None, function: Callable[..., object], *args: object) -> None:
        """Make a call until it succeeds or the policy gives up (`_Stopped`)."""
        delivery = self.source.delivery
        failures = 0
        done: int | None = None
        since = time.monotonic()
        while (error := await self._attempt(during, function, *args)) is not None:
            self._raise_if_disabled()
            if failures and self.target.progress[1] != done:
                self._recover(failures, since)  # it made progress: this is another failure, not the same one again
                failures, since = 0, time.monotonic()
            done = self.target.progress[1]
            failures += 1
            hopeless = delivery.on_error != "retry" or isinstance(error, SinkMisconfigured)
            too_late = time.monotonic() - max(since, self._drained_since) > LAST_TRIES_S
            if hopeless or failures > delivery.retries or too_late:
                self._give_up(error, failures)
                raise _Stopped
            self.error = describe(error)
            if failures == 1:
                self._fail(error, "retrying", failures)
            self.circuit = "open"
            if await self._succeeds_late():
                break
            await self._back_off(min(delivery.backoff_s * 2.0 ** min(failures - 1, 64), delivery.max_backoff_s))
            self._raise_if_disabled()
            self.circuit = "half_open"
        self._raise_if_disabled()
        if failures:
            self._recover(failures, since)

    def _recover(self, failures: int, since: float) -> None:
        self.circuit = "closed"
        outage_s = time.monotonic() - since
        self._report(ObserverRecovered, observer=self.name, failures=failures, outage_s=outage_s)

    async def _attempt(
        self, during: str | None, function: Callable[..., object], *args: object
    ) -> BaseException | None:
        """Make a call once; returns the exception that it raised, or `TimeoutError` if it did not return in time."""
        self._during = during
        limit_s = self.source.delivery.timeout_s if during != "close" else None
        call: ThreadJob | AsyncJob
        if self.target.blocking or during is not None:
            call = self._worker.submit(function, *args)
        else:
            call = AsyncJob(function, *args)
        try:
            in_time = await self._finishes(call, limit_s)
            if in_time and inspect.isawaitable(call.value):  # an async `close`, or a `write` that is not declared async
                call = AsyncJob(_same, call.value)
                in_time = await self._finishes(call, limit_s)
        finally:
            call.cancel()
        if in_time:
            return call.error
        self._late = call
        return TimeoutError(f"no answer within {limit_s:g} s")

    async def _finishes(self, call: ThreadJob | AsyncJob, limit_s: float | None) -> bool:
        """Wait for a call within its timeout; publish `ObserverSlow` once it is slow.

        The timeout restarts whenever the batch makes progress: a hundred short hooks are not one long one.
        """
        timeout_s = limit_s if limit_s is not None else math.inf
        slow_s = min(self.source.delivery.slow_s, timeout_s)
        announced = slow_s == timeout_s
        done, left_s = self.target.progress[1], slow_s
        while True:
            with anyio.move_on_after(left_s):
                await call.finished.wait()
            if call.finished.is_set():
                return True
            if (now_done := self.target.progress[1]) != done:
                done, left_s = now_done, timeout_s if announced else slow_s
            elif announced:
                return False
            else:
                self._report(ObserverSlow, observer=self.name, during=self.doing, running_s=slow_s)
                announced, left_s = True, timeout_s - slow_s

    async def _succeeds_late(self) -> bool:
        """Wait for the call that has exceeded its timeout, if there is one; no second call is made meanwhile."""
        call = self._late
        if call is None:
            return False
        await call.finished.wait()
        if inspect.isawaitable(call.value):
            call = self._late = AsyncJob(_same, call.value)
            try:
                await call.finished.wait()
            finally:
                call.cancel()
        self._late = None
        return call.error is None

    async def _back_off(self, pause_s: float) -> None:
        with anyio.move_on_after(pause_s):
            await self._draining.wait()
            # The run is over: retries follow in quick succession.
            await anyio.sleep(min(pause_s, 0.1))

    def _give_up(self, error: BaseException, failures: int) -> None:
        fatal = self.source.delivery.on_error == "fatal"
        self.circuit = "disabled"
        self._fail(error, "fatal" if fatal else "disabled", failures)
        if fatal:
            self._on_fatal(error)  # before fences are released: the loop must not take another step
        self._abandon()

    def disable(self, error: str) -> None:
        """Deliver nothing more to it, because it has failed elsewhere, where that was published.

        Args:
            error: Type and text of the exception.
        """
        if self.circuit != "disabled":
            self.circuit, self.error = "disabled", error
            self._abandon()

    def _raise_if_disabled(self) -> None:
        if self.circuit == "disabled":
            raise _Stopped

    def _abandon(self) -> None:
        self.target.abandon()
        _, done = self.target.progress
        self.source.done(done or 0)
        self.source.discard()

    async def _close(self) -> None:
        self._skip_drain()
        await self._succeeds_late()  # the target is called once at a time
        error = await self._attempt("close", self.target.close)
        if error is not None:
            self._close_failed = True
            self._fail(error, "disabled", 1)

    @property
    def doing(self) -> str:
        """The call in progress, or the last one."""
        return self._during or self.target.progress[0]

    def _fail(self, error: BaseException, action: Literal["fatal", "disabled", "retrying"], failures: int) -> None:
        self.error = describe(error)
        fields = {"observer": self.name, "error": self.error, "during": self.doing}
        self._report(ObserverFailed, **fields, action=action, failures=failures)
        logger.warning(
            f"observer {self.name} failed in {self.doing} ({action}): {self.error}", exc_info=error, published=True
        )

    def _report(self, kind: Callable[..., Event], **fields: object) -> None:
        self._publish(kind(*self._origin.header(), **fields))

    def drain(self) -> None:
        """No more events will come: deliver what is queued, then close."""
        self.source.finish()
        self._drained_since = time.monotonic()
        self._draining.set()
        self._skip_drain()

    def _skip_drain(self) -> None:
        """Let the drain skip an observer that was disabled because it hangs."""
        if self._draining.is_set() and self.circuit == "disabled" and self._late is not None:
            self._finished.set()

    @property
    def is_failing(self) -> bool:
        """Whether its last call failed, or it is disabled. Any thread."""
        return self.circuit != "closed"

    @property
    def is_finished(self) -> bool:
        """Whether it is closed."""
        return self._finished.is_set()

    async def finished(self) -> None:
        """Wait until it is closed."""
        await self._finished.wait()

    def health(self) -> ObserverHealth:
        """Return its state and counts now."""
        statistics, oldest = self.source.statistics, self.source.oldest
        return ObserverHealth(
            observer=self.name,
            state="ok" if self.circuit == "closed" else "disabled" if self.circuit == "disabled" else "failing",
            queued=statistics.queued,
            lag_s=None if oldest is None else max(0.0, time.time() - oldest.time),
            delivered=statistics.delivered,
            dropped=statistics.dropped,
            conflated=statistics.conflated,
        )

    def report(self) -> ObserverReport:
        """Return what became of its events, and discard those that are left."""
        statistics = self.source.statistics
        state: Literal["closed", "disabled", "stuck", "failed"] = "closed"
        if not self._finished.is_set():
            state = "stuck"
            self.target.abandon()
            still = f"still in {self.doing} at the end of the drain"
            self.error = still if self.circuit == "closed" else f"{still}, after {self.error}"
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
            left=statistics.queued,
            error=self.error,
        )
        self.source.discard()
        return report


def _same(awaitable: object) -> object:
    return awaitable
