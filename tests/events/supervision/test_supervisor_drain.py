"""The end: the drain delivers what is queued, closes everyone, has a deadline and reports what it left."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from events.messages import ObserverFailed, ObserverSlow
from events.protocol import ObserverReport

pytestmark = [pytest.mark.anyio, pytest.mark.both_event_loops]

DEADLINE_S = 0.2
"""Enough to deliver and close what does not hang."""


# ----------------------------------------------------------------------------------------------- the drain


async def test_the_drain_delivers_what_is_queued_and_closes_everyone(kit: Any, supervising: Any) -> None:
    """Each once, with its events; those that had nothing to do too."""
    async with supervising() as house:
        sinks = [kit.Scripted(), kit.AsyncScripted(), kit.Mixed()]
        for number, sink in enumerate(sinks):
            house.add(sink, f"sink{number}", batch=3)
        idle = kit.Scripted()
        house.add(idle, "idle", types=frozenset({ObserverSlow}))
        await house.start(publish=10)
        reports = await house.drain()
    for number, sink in enumerate(sinks):
        assert sink.got == list(range(1, 11))
        assert sink.calls.count("close") == 1
        name = f"sink{number}"
        assert reports[name] == ObserverReport(observer=name, state="closed", published=10, delivered=10)
    assert idle.calls == ["open", "close"]
    assert reports["idle"] == ObserverReport(observer="idle", state="closed")


@pytest.mark.parametrize("call", ["open", "write", "close"])
@pytest.mark.parametrize("sink_type", ["plain", "async"])
async def test_the_drain_ends_at_its_deadline_and_says_who_hangs(
    kit: Any, supervising: Any, call: str, sink_type: str
) -> None:
    """With what it was doing and what it left; the others are closed."""
    async with supervising() as house:
        gate, other = house.gate(), kit.Scripted()
        hang = gate if call == "open" or sink_type == "plain" else gate.passed
        house.add(kit.plain_async_mixed[sink_type](**{call: [hang]}), batch=2)
        house.add(other, "other")
        await house.start(publish=5)
        if call != "close":
            await gate.reached.wait()
        reports = await house.drain(DEADLINE_S)
    delivered = 5 if call == "close" else 0
    assert reports["sink"] == ObserverReport(
        observer="sink",
        state="stuck",
        published=5,
        delivered=delivered,
        left=5 - delivered,
        error=f"still in {call} at the end of the drain",
    )
    assert (reports["other"].state, other.got) == ("closed", [1, 2, 3, 4, 5])


async def test_one_that_is_failing_at_the_deadline_is_reported_with_its_error(kit: Any, supervising: Any) -> None:
    """Tried again and again until then, without the pauses of an outage."""
    async with supervising() as house:
        sink = kit.Scripted(write=iter(lambda: kit.fail, None))
        house.add(sink, backoff_s=1e6, max_backoff_s=1e6, retries=10**6)
        await house.start(publish=2)
        await house.until(ObserverFailed)
        assert sink.calls == ["open", "write"]
        reports = await house.drain(DEADLINE_S)
        assert sink.calls.count("write") > 1
    error = "still in write at the end of the drain, after OSError: disk full"
    assert reports["sink"] == ObserverReport(observer="sink", state="stuck", published=2, left=2, error=error)


@pytest.mark.parametrize("when", ["before the drain", "during the drain"])
async def test_a_hang_that_was_given_up_does_not_hold_up_the_drain(kit: Any, supervising: Any, when: str) -> None:
    """Nothing is left to wait for; closed it is if it ever returns."""
    async with supervising() as house:
        gate = house.gate()
        sink = kit.Scripted(write=[gate])
        house.add(sink, on_error="disable", timeout_s=kit.SHORT_S)
        await house.start(publish=3)
        if when == "before the drain":
            await house.until(ObserverFailed)
        else:
            await gate.reached.wait()
        reports = await house.drain(timeout_s=10 * kit.WAIT_S)
        assert sink.calls == ["open", "write"]
        gate.open()
        await house.supervisor.observers[0].finished()
    error = "TimeoutError: no answer within 0.1 s"
    assert reports["sink"] == ObserverReport(observer="sink", state="disabled", published=3, dropped=3, error=error)


async def test_one_that_was_given_up_is_closed_once_it_has_returned(kit: Any, supervising: Any) -> None:
    """Its methods are called one at a time, and `close` once, whatever happened before."""
    async with supervising() as house:
        gate, closing = house.gate(), house.gate()
        sink = kit.Scripted(write=[gate], close=[closing])
        house.add(sink, on_error="disable", timeout_s=kit.SHORT_S)
        await house.start(publish=3)
        await house.until(ObserverFailed)
        assert sink.calls == ["open", "write"]
        gate.open()
        await closing.reached.wait()
        closing.open()
        reports = await house.drain()
    assert sink.calls == ["open", "write", "close"]
    assert reports["sink"].state == "disabled"


@pytest.mark.parametrize("sink_type", ["plain", "async"])
async def test_a_close_that_raises_is_announced_and_reported(kit: Any, supervising: Any, sink_type: str) -> None:
    """What was delivered may not have been flushed: that is worth knowing. It is not tried again."""
    async with supervising() as house:
        sink = kit.plain_async_mixed[sink_type](close=[kit.fail])
        house.add(sink)
        await house.start(publish=3)
        reports = await house.drain()
    assert [(event.during, event.error) for event in house.told] == [("close", "OSError: disk full")]
    assert sink.calls.count("close") == 1
    expected = ObserverReport(observer="sink", state="failed", published=3, delivered=3, error="OSError: disk full")
    assert reports["sink"] == expected


async def test_a_close_may_take_longer_than_a_delivery(kit: Any, supervising: Any) -> None:
    """The timeout is for deliveries; closing has the drain's deadline."""
    async with supervising() as house:
        gate = house.gate()
        house.add(kit.Scripted(close=[gate]), on_error="disable", timeout_s=kit.SHORT_S, slow_s=2 * kit.SHORT_S)
        async with anyio.create_task_group() as tasks:

            async def open_when_slow() -> None:
                await house.until(ObserverSlow, "close")
                gate.open()

            tasks.start_soon(open_when_slow)
            await house.start(publish=1)
            reports = (await house.supervisor.drain(house.supervisor.observers, kit.WAIT_S))[0]
    assert (reports.state, reports.error) == ("closed", None)


async def test_each_observer_has_a_name_of_its_own(kit: Any, supervising: Any) -> None:
    """Reports, fences and events go by name; ``bus`` is the bus itself."""
    async with supervising() as house:
        names = [house.add(kit.Scripted(), name).name for name in ("memory", "memory", "bus", "memory-2", "memory")]
        await house.start()
        reports = await house.drain()
    assert names == ["memory", "memory-2", "bus-2", "memory-2-2", "memory-3"]
    assert list(reports) == names


async def test_a_cancelled_supervisor_leaves_no_thread_and_no_task_behind(kit: Any, supervising: Any) -> None:
    """Idle kit.threads end at once, a hanging one when its call returns, an async call is cancelled."""
    async with supervising() as house:
        gate, async_gate = house.gate(), house.gate()
        ended = anyio.Event()

        async def hang() -> None:
            try:
                await async_gate.passed()
            finally:
                ended.set()

        house.add(kit.Scripted(), "idle")
        house.add(kit.Scripted(write=[gate]), "hanging")
        house.add(kit.AsyncScripted(write=[hang]), "async")
        await house.start(publish=1)
        await gate.reached.wait()
        await async_gate.reached.wait()
        house.tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await ended.wait()
            for thread in kit.threads():
                if thread.name != "stagecast-hanging":
                    thread.join(kit.WAIT_S)
            assert [thread.name for thread in kit.threads()] == ["stagecast-hanging"]
