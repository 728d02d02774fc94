"""What a subscription gets and when: routing, beginning and ending, waking, numbers from the device, losses."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
from msgspec.structs import force_setattr

from events.bus.backlog import Payload, Published
from events.bus.fence import Fence
from events.errors import BusClosed
from events.messages import (
    EVENT_TYPES,
    Event,
    MetricsLogged,
    ObserverDropped,
    RunEnded,
    TrainEpochStarted,
    TrainStepEnded,
    ValStepEnded,
)
from events.sink import Delivery

pytestmark = [pytest.mark.anyio, pytest.mark.both_event_loops]

LIMIT_S = 20.0
"""No test waits that long: it fails instead."""


def places(events: Any) -> list[int]:
    return [event.global_step for event in events]


def reports_of(events: Any, observer: str) -> list[ObserverDropped]:
    return [event for event in events if isinstance(event, ObserverDropped) and event.observer == observer]


# -------------------------------------------------------------------------------------------- who gets what


async def test_what_is_wanted_follows_the_subscriptions(make: Any, pumping: Any) -> None:
    """The loop builds rare events only while somebody has asked for them by name."""
    pump = make.pump()
    assert pump.ring.audience.wanted == frozenset()
    steps = pump.subscribe("steps", make.delivery(types=frozenset([ValStepEnded])))
    assert pump.ring.audience.wanted == {ValStepEnded}
    everything = pump.subscribe("everything", make.delivery())
    assert pump.ring.audience.wanted == {ValStepEnded} | {kind for kind in EVENT_TYPES if kind.journalled}
    steps.finish()
    assert ValStepEnded not in pump.ring.audience.wanted
    async with pumping(pump):
        everything.finish()
        everything.finish()
        assert pump.ring.audience.wanted == frozenset()


async def test_subscriptions_get_their_types_from_now_on(make: Any, pumping: Any) -> None:
    """What was delivered before is not repeated; the history keeps the most recent events of all types."""
    pump = make.pump(history=3)

    def publish_all(first: int) -> None:
        for at, kind in enumerate([TrainEpochStarted, TrainStepEnded, ValStepEnded], first):
            pump.ring.publish(make.event(kind, at=at))
        pump.ring.publish(make.ended(first + 3))

    async with pumping(pump):
        early = pump.subscribe("early", make.delivery())
        publish_all(0)
        await pump.drain()
        late = pump.subscribe("late", make.delivery(types=frozenset([ValStepEnded, RunEnded])))
        assert late.is_empty
        publish_all(4)
        await pump.drain()
        assert places([event for event, _ in await early.receive()]) == [0, 1, 3, 4, 5, 7]
        assert places([event for event, _ in await late.receive()]) == [6, 7]
        assert places(pump.history) == [5, 6, 7]
        assert pump.last_seq == 8


async def test_payloads_reach_only_those_who_asked(make: Any, pumping: Any) -> None:
    """And only there do they use up the room in the queue."""
    pump = make.pump()
    with_them = pump.subscribe("callback", make.delivery(), payloads=True)
    without = pump.subscribe("sink", make.delivery())
    payload = Payload(outputs=["tensor"], nbytes=1_000)
    async with pumping(pump):
        pump.ring.publish(make.ended(0), payload)
        pump.ring.publish(make.ended(1))
        await pump.drain()
        assert with_them.queued_bytes == without.queued_bytes + 1_000
        assert [given for _, given in await with_them.receive()] == [payload, None]
        assert [given for _, given in await without.receive()] == [None, None]


async def test_fences_do_not_wait_for_who_gets_nothing(make: Any, pumping: Any) -> None:
    """Whoever left, never came, takes other types or no payloads is released when the event passes."""
    pump = make.pump()
    pump.subscribe("stays", make.delivery(), payloads=True)
    left = pump.subscribe("left", make.delivery(), payloads=True)
    pump.subscribe("other types", make.delivery(types=frozenset([TrainStepEnded])), payloads=True)
    pump.subscribe("no payloads", make.delivery())
    names = ["stays", "left", "other types", "no payloads", "never came"]
    fence, nobody = Fence(names), Fence(["never came"])
    pump.ring.publish(make.ended(0), Payload(fence=fence))
    pump.ring.publish(make.event(ValStepEnded, at=1), Payload(fence=nobody))
    left.finish()
    async with pumping(pump):
        await pump.drain()
        assert fence.waiting == ["stays"]
        assert nobody.wait(0)


async def test_a_fence_falls_when_the_ring_drops_its_event(make: Any, pumping: Any) -> None:
    """The loop would wait for ever for a hook that will not run."""
    pump = make.pump(capacity_bytes=1_000)
    pump.subscribe("callback", make.delivery(), payloads=True)
    fence = Fence(["callback"])
    pump.ring.publish(make.step(0), Payload(fence=fence, nbytes=2_000))
    async with pumping(pump):
        assert pump.ring.counters.dropped == 1
        assert fence.wait(0)


# -------------------------------------------------------------------------------------- beginning and ending


async def test_nobody_can_subscribe_once_it_closes(make: Any, pumping: Any) -> None:
    """From the moment it is closed, not only when it has ended; the error names who came too late."""
    pump = make.pump()
    async with pumping(pump):
        pump.close()
        with pytest.raises(BusClosed, match="'late'"):
            pump.subscribe("late", make.delivery())
    assert not pump.ring.alive
    with pytest.raises(BusClosed, match="'later'"):
        pump.subscribe("later", make.delivery())
    await pump.drain()  # there is nothing to wait for


async def test_draining_delivers_all_that_was_published_before(make: Any, pumping: Any) -> None:
    """At once, for several callers, also while events are kept back to make a batch."""
    pump = make.pump()
    subscription = pump.subscribe("sink", Delivery(latency_s=3_600.0))
    with anyio.fail_after(LIMIT_S):
        async with pumping(pump) as tasks:
            await pump.drain()
            for rounds in range(1, 4):
                for at in range(1_000):
                    pump.ring.publish(make.step(at))
                tasks.start_soon(pump.drain)
                await pump.drain()
                assert subscription.statistics.published == pump.last_seq == 1_000 * rounds


async def test_a_ring_of_many_helpings_is_drained_at_once(make: Any, pumping: Any) -> None:
    """However long events may be kept back to make a batch."""
    pump = make.pump()
    pump.subscribe("sink", Delivery(latency_s=3_600.0))
    for at in range(5_000):
        pump.ring.publish(make.step(at))
    with anyio.fail_after(LIMIT_S):
        async with pumping(pump):
            await pump.drain()
            assert pump.last_seq == 5_000


async def test_a_ring_that_fills_up_is_drained_before_anything_has_to_go(make: Any, pumping: Any) -> None:
    """Without waiting for the tick, which is far away while nobody is in a hurry."""
    pump = make.pump(capacity=64)
    subscription = pump.subscribe("sink", Delivery(latency_s=3_600.0))
    with anyio.fail_after(LIMIT_S):
        async with pumping(pump):
            await pump.drain()
            for _ in range(3):
                for at in range(60):
                    pump.ring.publish(make.step(at))
                received = 0
                while received < 49:  # three quarters, and one more
                    received += len(await subscription.receive())
    assert pump.ring.counters.dropped == 0


async def test_who_takes_only_what_is_rare_is_woken_for_it_and_not_before(make: Any, pumping: Any) -> None:
    """His haste is not that of those who take every step: the pump does not tick for him, and he does not wait."""
    pump = make.pump()
    steps = pump.subscribe("steps", Delivery(latency_s=3_600.0))
    rare = pump.subscribe("rare", Delivery(types=frozenset({RunEnded, TrainEpochStarted}), latency_s=1e-6))
    with anyio.fail_after(LIMIT_S):
        async with pumping(pump):
            pump.ring.publish(make.step(1))  # the pump, which slept, begins to wait for its next tick
            assert [event.global_step for event, _ in await steps.receive()] == [1]
            for at in range(2, 49):
                pump.ring.publish(make.step(at))
                await anyio.wait_all_tasks_blocked()
            pump.ring.publish(
                make.event(ObserverDropped, "x", 1, 0, at=49)
            )  # rare, too, but nobody is in a hurry for it
            await anyio.wait_all_tasks_blocked()
            assert pump.last_seq == 1
            pump.ring.publish(make.ended(50))
            assert [event.global_step for event, _ in await rare.receive()] == [50]
            assert [event.global_step for event, _ in await steps.receive()] == [*range(2, 51)]


async def test_what_is_urgent_does_not_wait_for_the_tick_behind_a_read(make: Any, pumping: Any) -> None:
    """It came while numbers were on their way from the device: it goes as soon as they have arrived."""
    arrived = [False]

    class Waits:
        def start(self, batch: list[Published], /) -> Callable[[], bool]:
            return lambda: arrived[0]

    pump = make.pump(readback=Waits())
    steps = pump.subscribe("steps", Delivery(latency_s=3_600.0))
    rare = pump.subscribe("rare", Delivery(types=frozenset({RunEnded}), latency_s=1e-6))
    with anyio.fail_after(LIMIT_S):
        async with pumping(pump):
            pump.ring.publish(make.step(1))
            await anyio.wait_all_tasks_blocked()
            pump.ring.publish(make.ended(2))
            await anyio.wait_all_tasks_blocked()
            assert pump.last_seq == 0
            arrived[0] = True
            assert [event.global_step for event, _ in await rare.receive()] == [2]
            assert [event.global_step for event, _ in await steps.receive()] == [1, 2]


async def test_who_comes_later_and_is_in_haste_does_not_wait_for_the_tick_that_was(make: Any, pumping: Any) -> None:
    """The most impatient of those who take every step sets the tick, from his coming on."""
    pump = make.pump()
    pump.subscribe("patient", Delivery(latency_s=3_600.0))
    with anyio.fail_after(LIMIT_S):
        async with pumping(pump):
            for at in range(1, 3):  # the second waits for the tick
                pump.ring.publish(make.step(at))
                await anyio.wait_all_tasks_blocked()
            assert pump.last_seq == 1
            hasty = pump.subscribe("hasty", Delivery(latency_s=0.001))
            received: list[int] = []
            while received[-1:] != [9]:
                pump.ring.publish(make.step(9))
                received += [event.global_step for event, _ in await hasty.receive()]


async def test_draining_waits_for_what_threads_had_published(make: Any, pumping: Any, in_threads: Any) -> None:
    """While threads go on publishing, each drain covers at least what came before it."""
    pump = make.pump(capacity=100_000)
    count = [0]

    def publish() -> None:
        for at in range(3_000):
            pump.ring.publish(make.step(at))
            count[0] = at + 1

    async def drain() -> None:
        while count[0] < 3_000:
            before = count[0]
            await pump.drain()
            assert pump.last_seq >= before

    with anyio.fail_after(LIMIT_S):
        async with pumping(pump) as tasks:
            tasks.start_soon(drain)
            await in_threads(pump, publish)


async def test_closing_lets_receivers_have_what_is_queued(make: Any, pumping: Any, receive_all: Any) -> None:
    """They get the rest, then the end of the stream."""
    pump = make.pump()
    subscription = pump.subscribe("sink", make.delivery(overflow="drop_oldest", capacity=20))
    async with pumping(pump):
        for at in range(10):
            pump.ring.publish(make.step(at))
    try:
        with anyio.fail_after(LIMIT_S):
            assert places(await receive_all(subscription)) == list(range(10))
    finally:
        subscription.discard()


async def test_cancelling_the_pump_ends_the_streams_and_leaves_the_rest(make: Any, receive_all: Any) -> None:
    """Receivers get what was delivered, then the end; what is in the ring stays there."""
    pump = make.pump()
    subscription = pump.subscribe("sink", make.delivery())
    received: list[Event] = []

    async def receive() -> None:
        received.extend(await receive_all(subscription))

    async with anyio.create_task_group() as receiver:
        receiver.start_soon(receive)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pump.run)
            for at in range(3):
                pump.ring.publish(make.step(at))
            await pump.drain()
            tasks.cancel_scope.cancel()
            pump.ring.publish(make.step(3))
    assert places(received) == [0, 1, 2]
    assert not pump.ring.alive
    assert (pump.last_seq, subscription.statistics.published) == (3, 3)
    await pump.drain()


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_cancelling_the_pump_natively_is_the_same(make: Any) -> None:
    """Asyncio's own cancellation, whether it sleeps or ticks, releases whoever waits for a drain."""
    for sleeping in (True, False):
        pump = make.pump()
        subscription = pump.subscribe("sink", Delivery(latency_s=3_600.0))
        running = asyncio.ensure_future(pump.run())
        await pump.drain()
        if not sleeping:
            pump.ring.publish(make.step(1))
        drain = asyncio.ensure_future(pump.drain())
        running.cancel()
        await drain
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not pump.ring.alive
        assert subscription.ended


# --------------------------------------------------------------------------------------- waking and sharing


@pytest.fixture
def restless() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("restless")
async def test_every_event_wakes_a_pump_that_sleeps_or_is_about_to(make: Any, pumping: Any, in_threads: Any) -> None:
    """No wake-up is lost, at whatever moment of the pump's round an event or a posted function comes."""
    pump = make.pump()
    subscription = pump.subscribe("sink", make.delivery())
    seen = threading.Event()
    rounds = 600

    def loop() -> None:
        for at in range(rounds):
            seen.clear()
            for _ in range(at % 50):
                pass  # another moment each time
            if at % 3:
                pump.ring.publish(make.step(at))
            else:
                pump.ring.post(seen.set)
            assert seen.wait(LIMIT_S), f"round {at}"

    async def receive() -> None:
        while True:
            try:
                await subscription.receive()
            except anyio.EndOfStream:
                return
            seen.set()

    async with pumping(pump) as tasks:
        tasks.start_soon(receive)
        await in_threads(pump, loop)


async def test_a_long_backlog_does_not_hold_up_the_host(make: Any, pumping: Any) -> None:
    """Other tasks of the event loop run between the helpings."""
    pump = make.pump()
    pump.subscribe("sink", make.delivery())
    for at in range(12_000):
        pump.ring.publish(make.step(at))
    seen: set[int] = set()

    async def watch() -> None:
        while pump.last_seq < 12_000:
            seen.add(pump.last_seq)
            await anyio.lowlevel.checkpoint()

    async with pumping(pump) as tasks:
        tasks.start_soon(watch)
        await pump.drain()
    assert len(seen - {0, 12_000}) >= 3


class Later:
    """A device that answers when it is told to."""

    def __init__(self) -> None:
        self.ready = False
        self.polls = 0
        self.batches: list[list[int]] = []
        self.started = anyio.Event()

    def start(self, batch: list[Published], /) -> Callable[[], bool]:
        self.batches.append([event.global_step for event, _ in batch])
        self.started.set()

        def poll() -> bool:
            self.polls += 1
            if self.ready:
                for event, _ in batch:
                    force_setattr(event, "loss", float(event.global_step))
            return self.ready

        return poll


async def test_events_wait_in_order_for_numbers_from_the_device(make: Any, pumping: Any) -> None:
    """Nothing is delivered incomplete or overtakes; the event loop goes on meanwhile, and so does what is posted."""
    device = Later()
    pump = make.pump(readback=device, history=100)
    subscription = pump.subscribe("sink", make.delivery())
    drained = anyio.Event()

    async def drain() -> None:
        await pump.drain()
        drained.set()

    with anyio.fail_after(LIMIT_S):
        async with pumping(pump) as tasks:
            for at in range(3):
                pump.ring.publish(make.step(at))
            await device.started.wait()
            for at in range(3, 6):
                pump.ring.publish(make.step(at))
            tasks.start_soon(drain)
            while device.polls < 3:
                await anyio.lowlevel.checkpoint()
            posted = anyio.Event()
            pump.ring.post(posted.set)
            await posted.wait()
            assert (pump.last_seq, len(pump.history), subscription.statistics.published) == (0, 0, 0)
            assert not drained.is_set()
            device.ready = True
            await drained.wait()
            received = [event for event, _ in await subscription.receive()]
            assert [event.loss for event in received] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]  # type: ignore[attr-defined]
            assert [event.seq for event in received] == [1, 2, 3, 4, 5, 6]
            assert [at for batch in device.batches for at in batch] == [0, 1, 2, 3, 4, 5]


# --------------------------------------------------------------------------------------------------- losses


async def test_losses_are_reported_at_most_once_a_second_and_at_the_end(make: Any, pumping: Any) -> None:
    """Hundreds of losses make few reports; with the last one they add up to what was lost."""
    pump = make.pump(capacity=4, history=10_000)
    delivery = make.delivery(capacity=2, types=frozenset([TrainStepEnded, MetricsLogged]))
    plain = pump.subscribe("plain", delivery)
    latest = pump.subscribe("latest", make.delivery(overflow="latest", capacity=2, types=delivery.types))
    pump.subscribe("quiet", make.delivery()).recoverable = True
    began = time.monotonic()
    async with pumping(pump):
        for at in range(200):
            for _ in range(6):
                pump.ring.publish(make.metrics(at, loss=1.0))
            await pump.drain()
        seconds = time.monotonic() - began
        assert 0 < len(reports_of(pump.history, "bus")) <= 2 + seconds
        pump.report_losses()
        pump.report_losses()
        await pump.drain()
        for subscription in (plain, latest):
            reports, counts = reports_of(pump.history, subscription.name), subscription.statistics
            assert len(reports) <= 3 + seconds
            assert sum(report.dropped for report in reports) == counts.dropped
            assert sum(report.conflated for report in reports) == counts.conflated
        assert plain.statistics.dropped > 0
        assert latest.statistics.conflated > 0
        assert sum(report.dropped for report in reports_of(pump.history, "bus")) == pump.ring.counters.dropped == 400
        assert reports_of(pump.history, "quiet") == []
