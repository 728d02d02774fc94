"""Observers that hang or are slow, plain and async: nobody waits for them, and nothing is done twice."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import anyio.to_thread
import pytest

from events.messages import ObserverFailed, ObserverRecovered, ObserverSlow
from events.protocol import ObserverReport

pytestmark = [pytest.mark.anyio, pytest.mark.both_event_loops]


# ------------------------------------------------------------------------------------------------- hanging


@pytest.mark.parametrize(
    ("sink_type", "call", "then", "calls"),
    [
        ("plain", "write", "succeeds", ["open", "write", "close"]),
        ("plain", "write", "fails", ["open", "write", "write", "close"]),
        ("plain", "open", "succeeds", ["open", "write", "close"]),
        ("async", "write", "succeeds", ["open", "write", "close"]),  # it shields itself from the cancellation
        ("async", "write", "is cancelled", ["open", "write", "write", "close"]),
        ("mixed", "write", "is cancelled", ["open", "write", "write", "close"]),
    ],
)
async def test_a_call_that_exceeds_its_timeout_is_repeated_unless_it_succeeds_late(
    kit: Any, supervising: Any, sink_type: str, call: str, then: str, calls: list[str]
) -> None:
    """`ObserverFailed` is published at once, but nothing arrives twice. A task, unlike a thread, can be cancelled."""
    async with supervising() as house:
        gate = house.gate(kit.fail if then == "fails" else lambda: None)
        act = gate if sink_type == "plain" else lambda: gate.passed(shield=then != "is cancelled")
        sink = kit.plain_async_mixed[sink_type](**{call: [act]})
        observer = house.add(sink, timeout_s=kit.SHORT_S, retries=1)
        await house.start(publish=2)
        failed = await house.until(ObserverFailed, call)
        assert (failed.action, failed.failures) == ("retrying", 1)
        assert failed.error == "TimeoutError: no answer within 0.1 s"
        if then != "is cancelled":
            assert observer.circuit == "open"
            assert sink.calls[-1] == call
            gate.open()
        assert (await house.until(ObserverRecovered)).failures == 1
        reports = await house.drain()
    assert (sink.calls, sink.got) == (calls, [1, 2])
    assert (reports["sink"].state, reports["sink"].delivered) == ("closed", 2)


async def test_a_batch_of_many_short_hooks_is_neither_slow_nor_hanging(kit: Any, supervising: Any) -> None:
    """The time is one for each of them, as long as some get done."""
    async with supervising() as house:
        hooks = kit.Hooks({at: [lambda: threading.Event().wait(0.05)] for at in range(1, 21)})
        house.add(hooks, timeout_s=0.5, slow_s=0.4, on_error="disable")
        await house.start(publish=20)
        reports = await house.drain()
    assert hooks.ran == list(range(1, 21))
    assert (reports["sink"].state, reports["sink"].delivered) == ("closed", 20)
    assert house.told == []


async def test_a_hook_that_hangs_among_others_is_given_up(kit: Any, supervising: Any) -> None:
    """What was done before it counts as delivered, what is behind it as dropped."""
    async with supervising() as house:
        gate = house.gate()
        hooks = kit.Hooks({3: [gate]})
        house.add(hooks, timeout_s=kit.SHORT_S, on_error="disable")
        await house.start(publish=5)
        assert (await house.until(ObserverFailed)).action == "disabled"
        gate.open()
        reports = await house.drain()
    assert hooks.ran == [1, 2, 3]
    assert (reports["sink"].delivered, reports["sink"].dropped) == (2, 3)


async def test_a_slow_call_is_announced_while_it_runs(kit: Any, supervising: Any) -> None:
    """Once, and it is no failure; where the timeout is shorter, that alone speaks."""
    async with supervising() as house:
        gate = house.gate()
        house.add(kit.Scripted(write=[gate]), slow_s=kit.SHORT_S)
        await house.start(publish=1)
        slow = await house.until(ObserverSlow)
        gate.open()
        reports = await house.drain()
    assert (slow.observer, slow.during, slow.running_s) == ("sink", "write", kit.SHORT_S)
    assert [event for event in house.told if event.during == "write"] == [slow]
    assert reports["sink"].state == "closed"


async def test_a_timeout_before_it_is_slow_is_told_once(kit: Any, supervising: Any) -> None:
    """No `ObserverSlow` beside the failure."""
    async with supervising() as house:
        house.add(kit.Scripted(write=[house.gate()]), on_error="disable", timeout_s=kit.SHORT_S, slow_s=kit.SHORT_S)
        await house.start(publish=1)
        failed = await house.until(ObserverFailed)
        await house.drain()
    assert house.told == [failed]


async def test_a_hang_of_one_does_not_delay_another(kit: Any, supervising: Any) -> None:
    """Each has a thread of its own."""
    async with supervising() as house:
        gate, other = house.gate(), kit.Scripted()
        house.add(kit.Scripted(write=[gate]))
        house.add(other, "other")
        await house.start(publish=2)
        await gate.reached.wait()
        await house.publish(2)
        reports = await house.supervisor.drain(house.supervisor.observers[1:], kit.WAIT_S)
    assert reports == [ObserverReport(observer="other", state="closed", published=4, delivered=4)]
    assert other.got == [1, 2, 3, 4]


@pytest.mark.parametrize("sink_type", ["plain", "async", "mixed"])
async def test_observers_work_while_the_hosts_thread_limiter_is_exhausted(
    kit: Any, supervising: Any, sink_type: str
) -> None:
    """A host that keeps all of anyio's kit.threads busy holds up no observer."""
    limiter = anyio.to_thread.current_default_thread_limiter()
    taken = [object() for _ in range(int(limiter.available_tokens))]
    for borrower in taken:
        limiter.acquire_on_behalf_of_nowait(borrower)
    try:
        async with supervising() as house:
            sink = kit.plain_async_mixed[sink_type](write=[kit.fail if sink_type == "plain" else None])
            house.add(sink)
            await house.start(publish=3)
            reports = await house.drain()
    finally:
        for borrower in taken:
            limiter.release_on_behalf_of(borrower)
    assert sink.got == [1, 2, 3]
    assert reports["sink"].state == "closed"


async def test_async_methods_run_in_the_event_loop_and_plain_ones_on_a_thread(kit: Any, supervising: Any) -> None:
    """The thread is the observer's own, named after it, and daemonic, so that a hang does not keep a process alive."""
    here = threading.current_thread()
    async with supervising() as house:
        plain, fully_async, mixed = kit.Scripted(), kit.AsyncScripted(), kit.Mixed()
        for name, sink in (("plain", plain), ("async", fully_async), ("mixed", mixed)):
            house.add(sink, name)
        await house.start(publish=1)
        await house.drain()
        assert {(thread.name, thread.daemon) for thread in plain.threads} == {("stagecast-plain", True)}
        assert {thread.name for thread in fully_async.threads - {here}} == {"stagecast-async"}  # its `open`
        assert here in fully_async.threads
        assert {thread.name for thread in mixed.threads} == {"stagecast-mixed", here.name}
    assert plain.got == fully_async.got == mixed.got == [1]
