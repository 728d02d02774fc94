"""Observers that raise: what is published, what is tried again, and what the others notice of it."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import anyio
import pytest

from events.bus.backlog import Payload, Published
from events.bus.cpu_time import CpuTime
from events.bus.fence import Fence
from events.bus.observer import Observer
from events.bus.subscription import Statistics
from events.bus.supervisor import Supervisor
from events.bus.target import SinkTarget
from events.bus.wakeup import Wakeup
from events.bus.worker import Worker
from events.messages import Event, ObserverFailed, ObserverRecovered
from events.protocol import ObserverReport
from events.sink import Delivery, RunInfo
from events.tracebacks import describe

pytestmark = [pytest.mark.anyio, pytest.mark.both_event_loops]


def failures(house: Any) -> list[tuple[str, str, int]]:
    return [(event.during, event.action, event.failures) for event in house.told if type(event) is ObserverFailed]


# ------------------------------------------------------------------------------------- what fails for good


@pytest.mark.parametrize("call", ["open", "write"])
@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("fatal", [("fatal", 1)]),
        ("disable", [("disabled", 1)]),
        ("retry", [("retrying", 1), ("disabled", 3)]),
    ],
)
async def test_one_that_fails_for_ever_is_given_up(
    kit: Any, supervising: Any, call: str, policy: Any, expected: list[tuple[str, int]]
) -> None:
    """As its policy says, announced; its queue is let go and counted; nobody else notices."""
    async with supervising() as house:
        sink, other = kit.Scripted(**{call: itertools.repeat(kit.fail)}), kit.Scripted()
        house.add(sink, on_error=policy, retries=2)
        house.add(other, "other")
        await house.start(publish=3)
        while (await house.until(ObserverFailed)).action == "retrying":
            pass
        await house.publish(2)
        reports = await house.drain()
    assert failures(house) == [(call, *rest) for rest in expected]
    assert {event.error for event in house.told} == {"OSError: disk full"}
    assert [describe(error) for error in house.fatal] == (["OSError: disk full"] if policy == "fatal" else [])
    assert sink.calls.count(call) == expected[-1][1]
    assert sink.calls.count("close") == (call == "write")  # what was never opened has nothing to close
    assert reports["sink"] == ObserverReport(
        observer="sink", state="disabled", published=3, dropped=3, error="OSError: disk full"
    )
    assert other.got == [1, 2, 3, 4, 5]
    assert reports["other"] == ObserverReport(observer="other", state="closed", published=5, delivered=5)


class Listed:
    """A source of an observer: events that are there already."""

    name, delivery = "sink", Delivery()

    def __init__(self, events: list[Event]) -> None:
        self.statistics = Statistics(published=len(events), queued=len(events))
        self._batches = [[(event, None)] for event in events]

    @property
    def oldest(self) -> None:
        return None

    async def receive(self) -> list[Published]:
        self.done()
        if not self._batches:
            raise anyio.EndOfStream
        return self._batches.pop()

    def done(self, count: int | None = None) -> None:
        self.statistics.delivered = self.statistics.published - len(self._batches)
        self.statistics.queued = len(self._batches)

    def finish(self) -> None: ...

    def discard(self) -> None: ...


async def test_an_observer_needs_no_bus(kit: Any, make: Any) -> None:
    """It takes batches from a source and reports to a function."""
    sink, told, wakeup = kit.Scripted(write=[OSError("disk full")]), [], Wakeup()
    source = Listed([make.step(2), make.step(1)])
    observer = Observer(
        source,
        SinkTarget(sink, RunInfo("run")),
        worker=Worker("stagecast-sink", wakeup.post, CpuTime()),
        origin=make.origin,
        publish=told.append,
        on_fatal=lambda error: None,
    )
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wakeup.serve)
        await observer.run()
        tasks.cancel_scope.cancel()
    assert sink.got == [1, 2]
    assert [type(event) for event in told] == [ObserverFailed, ObserverRecovered]
    assert observer.report() == ObserverReport(
        observer="sink", state="closed", published=2, delivered=2, error="OSError: disk full"
    )


async def test_an_async_open_is_refused_by_name(kit: Any, supervising: Any) -> None:
    """The mistake is named with what to do about it; no coroutine is left behind that nobody awaited."""

    class Eager(kit.Scripted):
        async def open(self, run: RunInfo) -> Any:  # type: ignore[override]
            raise AssertionError

    async with supervising() as house:
        house.add(Eager(), on_error="disable")
        await house.start()
        failed = await house.until(ObserverFailed)
    assert failed.during == "open"
    assert "Eager.open() is async" in failed.error
    assert "make it a plain function" in failed.error


class Odd(BaseException):
    """Not an `Exception`."""


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, asyncio.CancelledError, GeneratorExit, Odd])
@pytest.mark.parametrize("sink_type", ["plain", "async"])
async def test_no_exception_of_an_observer_ends_the_event_loop(
    kit: Any, supervising: Any, kind: type[BaseException], sink_type: str
) -> None:
    """A sink that calls sys.exit, or raises what means "cancelled", has failed like any other."""
    async with supervising() as house:
        sink = kit.plain_async_mixed[sink_type](open=[kind("o")], write=[kind("w")], close=[kind("c")])
        house.add(sink, retries=1)
        await house.start(publish=1)
        await house.until(ObserverRecovered)
        await house.until(ObserverRecovered)
        reports = await house.drain()
    assert failures(house) == [("open", "retrying", 1), ("write", "retrying", 1), ("close", "disabled", 1)]
    errors = [event.error for event in house.told if type(event) is ObserverFailed]
    assert errors == [f"{kind.__name__}: {text}" for text in "owc"]
    assert sink.got == [1]
    assert reports["sink"].state == "failed"


async def test_a_fatal_failure_is_told_before_fences_fall(kit: Any, supervising: Any) -> None:
    """Or the loop would take another step before it hears of the failure."""
    async with supervising() as house:
        fence = Fence(["sink"])
        waiting: list[list[str]] = []
        house.supervisor = Supervisor(house.pump, lambda error: waiting.append(fence.waiting))
        house.add(kit.Hooks({1: [kit.fail]}), on_error="fatal")
        await house.start(1, Payload(fence=fence))
        failed = await house.until(ObserverFailed)
        await house.drain()
    assert (failed.during, failed.action) == ("on_something", "fatal")
    assert waiting == [["sink"]]
    assert fence.waiting == []


@pytest.mark.parametrize("when", ["idle", "in a call", "in a call that fails", "before another try", "in another try"])
async def test_one_that_has_failed_elsewhere_gets_nothing_more(kit: Any, supervising: Any, when: str) -> None:
    """It is closed once its call has returned; nobody hears of it from here, because it was announced there."""
    async with supervising() as house:
        gate = house.gate(kit.fail if when == "in a call that fails" else lambda: None)
        writes = {"idle": [None], "before another try": [OSError("no")], "in another try": [OSError("no"), gate]}
        sink = kit.Scripted(write=writes.get(when, [gate]))
        pause_s = kit.WAIT_S if when == "before another try" else 1e-4
        observer = house.add(sink, retries=5, backoff_s=pause_s, max_backoff_s=pause_s)
        fence = Fence(["sink"])
        await house.start(1, Payload(fence=fence))
        if when == "idle":
            while not sink.got:
                await anyio.lowlevel.checkpoint()
        elif when == "before another try":
            await house.until(ObserverFailed)
        else:
            await gate.reached.wait()
        observer.disable("Boom: elsewhere")
        observer.disable("Boom: twice")
        assert fence.wait(0.0)
        gate.open()
        await house.publish(3)
        report = (await house.drain())["sink"]
        assert (report.state, report.error) == ("disabled", "Boom: elsewhere")
        assert sink.calls == ["open", *["write"] * (2 if when == "in another try" else 1), "close"]
        assert failures(house) == ([("write", "retrying", 1)] if "another" in when else [])
        assert not [event for event in house.told if type(event) is ObserverRecovered]


# ---------------------------------------------------------------------------------- what fails for a while


@pytest.mark.parametrize("call", ["open", "write"])
@pytest.mark.parametrize("times", [1, 3])
async def test_the_same_batch_is_delivered_again_until_it_is_taken(
    kit: Any, supervising: Any, call: str, times: int
) -> None:
    """Told once at the beginning and once at the end; every event arrives once and in order."""
    async with supervising() as house:
        sink = kit.Scripted(**{call: [kit.fail] * times})
        observer = house.add(sink, retries=3, batch=4)
        await house.start(publish=6)
        recovered = await house.until(ObserverRecovered)
        assert observer.circuit == "closed"
        await house.publish(6)
        reports = await house.drain()
    assert failures(house) == [(call, "retrying", 1)]
    assert (recovered.observer, recovered.failures) == ("sink", times)
    assert recovered.outage_s > 0
    assert sink.calls.count("open") == (times + 1 if call == "open" else 1)
    again = times + 1 if call == "write" else 1
    assert sink.tried[:again] == [[1, 2, 3, 4]] * again
    assert sink.tried[again] != [1, 2, 3, 4]
    assert sink.got == list(range(1, 13))
    report = reports["sink"]
    assert (report.state, report.delivered, report.dropped) == ("closed", 12, 0)


async def test_a_later_failure_is_counted_and_told_anew(kit: Any, supervising: Any) -> None:
    """What was overcome does not count against what comes later."""
    async with supervising() as house:
        sink = kit.Scripted(write=[kit.fail, None, kit.fail, None])
        house.add(sink, retries=1)
        await house.start()
        for _ in range(2):
            await house.publish(1)
            assert (await house.until(ObserverRecovered)).failures == 1
        await house.drain()
    assert failures(house) == [("write", "retrying", 1)] * 2
    assert sink.got == [1, 2]


async def test_pauses_grow_up_to_their_limit(kit: Any, supervising: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They double; also after a thousand failures the next one can be computed."""
    pauses: list[float] = []
    back_off = Observer._back_off

    async def note(self: Observer, pause_s: float) -> None:
        pauses.append(pause_s)
        await back_off(self, 0.0)

    monkeypatch.setattr(Observer, "_back_off", note)
    async with supervising() as house:
        house.add(kit.Scripted(write=[kit.fail] * 1_100), retries=1_100, backoff_s=0.1, max_backoff_s=0.5)
        await house.start(publish=1)
        assert (await house.until(ObserverRecovered)).failures == 1_100
    assert pauses[:5] == [0.1, 0.2, 0.4, 0.5, 0.5]
    assert pauses[-1] == 0.5


async def test_the_queue_follows_its_policy_during_an_outage(kit: Any, supervising: Any) -> None:
    """Bounded while nothing is delivered; what fell out is counted, and what is left comes in order."""
    async with supervising() as house:
        sink = kit.Scripted(write=[kit.fail, kit.fail])
        observer = house.add(sink, capacity=8, backoff_s=1e6, max_backoff_s=1e6)
        await house.start(publish=1)
        await house.until(ObserverFailed)
        assert observer.circuit == "open"
        await house.publish(100)
        assert observer.source.statistics.queued == 8
        reports = await house.drain()  # ends the pause
    assert sink.got == [1, *range(95, 102)]
    assert (reports["sink"].delivered, reports["sink"].dropped, reports["sink"].state) == (8, 93, "closed")


@pytest.mark.parametrize(
    ("fails", "options", "recovered", "ran", "counts"),
    [
        ({3: 2}, {"retries": 2}, [2], [1, 2, 3, 3, 3, 4, 5], (5, 0)),
        ({2: 1, 3: 1, 5: 1}, {"retries": 1}, [1, 1, 1], [1, 2, 2, 3, 3, 4, 5, 5], (5, 0)),
        ({3: 1}, {"on_error": "disable"}, [], [1, 2, 3], (2, 3)),
    ],
    ids=["one hook", "different hooks", "disabled"],
)
async def test_a_callback_resumes_at_the_hook_that_failed(
    kit: Any, supervising: Any, fails: dict[int, int], options: Any, recovered: list[int], ran: list[int], counts: Any
) -> None:
    """Hooks that returned are delivered and not repeated, and failures of different hooks do not add up."""
    async with supervising() as house:
        hooks = kit.Hooks({at: [kit.fail] * times for at, times in fails.items()})
        house.add(hooks, **options)
        await house.start(publish=5)
        assert [(await house.until(ObserverRecovered)).failures for _ in recovered] == recovered
        if not recovered:
            await house.until(ObserverFailed)
        report = (await house.drain())["sink"]
    assert (hooks.ran, (report.delivered, report.dropped)) == (ran, counts)
    assert failures(house) == [("on_something", "retrying" if recovered else "disabled", 1)] * len(fails)


@pytest.mark.parametrize("when", ["given up", "left by the drain"])
async def test_one_that_is_left_behind_begins_nothing_new(kit: Any, supervising: Any, when: str) -> None:
    """The hook that hangs ends when it likes; those after it in the batch were reported as never run, and are not."""
    async with supervising() as house:
        gate = house.gate()
        hooks = kit.Hooks({1: [gate]})
        if when == "given up":
            house.add(hooks, on_error="disable", timeout_s=kit.SHORT_S)
        else:
            house.add(hooks)
        await house.start(publish=3)
        await gate.reached.wait()
        if when == "given up":
            await house.until(ObserverFailed)
        reports = await house.drain(kit.SHORT_S)
    assert reports["sink"].delivered == 0
    assert hooks.ran == [1]  # the thread has ended


def test_an_exception_is_described_in_one_line() -> None:
    """Whatever its text is: long, in several lines, missing or itself broken."""

    class Broken(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert describe(ValueError("a\n  b")) == "ValueError: a b"
    assert describe(ValueError()) == "ValueError"
    assert describe(ValueError("x" * 2_000)) == f"ValueError: {'x' * 1_000}..."
    assert describe(Broken()) == "Broken: its text cannot be had, RuntimeError"
