"""The bus as a whole: any threads, any subscriptions, a ring that overflows, and who waits for whom."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from events.bus.backlog import Payload
from events.bus.pump import Pump
from events.bus.ring import Ring, RingLimits
from events.bus.subscription import Subscription
from events.messages import (
    EVENT_TYPES,
    Event,
    MetricsLogged,
    ObserverDropped,
    RunEnded,
    StallLedger,
    TrainStepEnded,
    ValStepEnded,
)
from events.origin import Origin
from events.sink import Delivery

pytestmark = [pytest.mark.anyio, pytest.mark.both_event_loops]

LIMIT_S = 20.0
"""No test waits that long: it fails instead."""

DROPPABLE = {
    "TrainStepEnded",
    "BackwardEnded",
    "ValStepEnded",
    "TestStepEnded",
    "MetricsLogged",
    "HistogramLogged",
    "ImageLogged",
    "AudioLogged",
    "TableLogged",
    "TextLogged",
    "SystemSampled",
    "RankReported",
    "ObserversReported",
    "NonFiniteLoss",
    "NonFiniteGradient",
    "CheckpointUploading",
    "StepSkipped",
}
FIELDS: dict[str, tuple[Any, ...]] = {
    "RunStarted": ("module", 1),
    "RunEnded": ("finished",),
    "MetricsLogged": ({"loss": 1.0},),
    "HistogramLogged": ("weights",),
    "AudioLogged": ("speech", "media/speech.wav"),
    "TableLogged": ("predictions", "media/predictions.json"),
    "ImageLogged": ("samples", "media/samples.png"),
    "TextLogged": ("sample", "text"),
    "ObserversReported": ([],),
    "NonFiniteLoss": (1.0, "warned"),
    "NonFiniteGradient": ("warned",),
    "MonitorMissing": ("accuracy", "EarlyStopping"),
    "StepSkipped": ("non_finite_loss",),
    "WarningLogged": ("warning", "slow"),
    "ObserverFailed": ("sink", "error"),
    "ObserverRecovered": ("sink",),
    "ObserverDropped": ("sink",),
    "ObserverSlow": ("sink", "write", 1.0),
    "LoopHeld": ("fence", ["sink"], 1.0),
    "JournalGap": (1, 2, 2, "disk full"),
    "CheckpointStaged": ("step-1.a1", ["steps"]),
    "CheckpointSkipped": (["steps"], ["step-1.a1"]),
    "CheckpointSaved": ("step-1.a1", "run/checkpoints/step-1.a1"),
    "CheckpointFailed": ("step-1.a1", "OSError: disk full"),
    "CheckpointUploading": ("step-1.a1", "s3://bucket", 1, 2),
    "CheckpointUploaded": ("step-1.a1", "s3://bucket"),
    "CheckpointDeleted": ("step-1.a1",),
    "CheckpointRejected": ("step-1.a1", "CheckpointDamaged"),
    "TraceSaved": ("traces/host_1.2.pt.trace.json.gz",),
    "WeightsSaved": ("run/weights.safetensors",),
    "LedgerReported": ("run", StallLedger()),
    "CommandTaken": ("stop", "id"),
    "RankEnded": (1, 1, "host", "failed"),
    "RankReported": (0, 2, "host", "train_step", 1, 0.1, 0.1, StallLedger(), 1, None),
}


def build(kind: type[Event], at: int, thread: int = 0) -> Event:
    """An event that knows the thread that published it and its place there."""
    return kind("run", 1, 0, 0.0, thread, at, 0, None, *FIELDS.get(kind.__name__, ()))


def add_up(subscription: Subscription) -> bool:
    counts = subscription.statistics
    parts = (counts.delivered, counts.dropped, counts.conflated, counts.queued)
    return counts.published == sum(parts) and min(parts) >= 0


def places(events: Any) -> list[int]:
    return [event.global_step for event in events]


async def end(pump: Pump, *subscriptions: Subscription) -> None:
    """What a supervisor does at the end of a run."""
    await pump.drain()
    for subscription in subscriptions:
        subscription.finish()


# -------------------------------------------------------------------------- the event loop does not deliver


async def test_publishing_waits_for_no_event_loop(make: Any, pumping: Any) -> None:
    """With the event loop's thread held, another one publishes ten thousand events and posts a thousand functions."""
    pump = make.pump(history=20_000)
    returned = threading.Event()
    posted: list[int] = []

    def loop() -> None:
        for at in range(10_000):
            pump.ring.publish(build(TrainStepEnded, at))
            if at % 10 == 0:
                pump.ring.post(lambda at=at: posted.append(at))
                pump.ring.flush()
        returned.set()

    async with pumping(pump):
        await pump.drain()
        threading.Thread(target=loop).start()
        assert returned.wait(LIMIT_S)  # held until the last call has returned
        assert (pump.last_seq, posted) == (0, [])
        await pump.drain()
        assert places(pump.history) == list(range(10_000))
        assert posted == list(range(0, 10_000, 10))


async def test_the_pumps_processor_time_is_counted(make: Any, pumping: Any) -> None:
    """While it runs where the system tells it, and when it has ended everywhere."""
    pump = make.pump()
    async with pumping(pump):
        pump.ring.publish(build(TrainStepEnded, 0))
        await pump.drain()
    assert pump.ring.cpu_time.read_ns() > 0


def test_only_what_comes_with_every_step_may_be_dropped() -> None:
    """Events of the run, of epochs, commands, observers and the ledger are not among them."""
    assert {kind.__name__ for kind in EVENT_TYPES if kind.droppable} == DROPPABLE


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(deadline=None, max_examples=40)
@given(
    capacity=st.integers(1, 12),
    first_seq=st.integers(1, 2**40),
    kinds=st.lists(st.one_of(st.sampled_from(EVENT_TYPES), st.just(TrainStepEnded)), max_size=60),
)
def test_the_oldest_steps_go_and_nothing_else(
    backend: str, capacity: int, first_seq: int, kinds: list[type[Event]]
) -> None:
    """Without a pump the ring keeps its last events and, beyond them, all that must not be dropped; the rest counts."""
    pump = Pump(Ring(Origin("run"), RingLimits(capacity=capacity)), first_seq=first_seq, history=1_000)
    for at, kind in enumerate(kinds):
        pump.ring.publish(build(kind, at))
    expected = [at for at, kind in enumerate(kinds) if not kind.droppable or at >= len(kinds) - capacity]
    assert pump.ring.counters.dropped == len(kinds) - len(expected)

    async def deliver() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pump.run)
            await pump.drain()
            pump.close()

    anyio.run(deliver, backend=backend)
    history = list(pump.history)
    if pump.ring.counters.dropped:
        report = history.pop()
        assert isinstance(report, ObserverDropped)
        assert (report.observer, report.dropped, report.conflated) == ("bus", pump.ring.counters.dropped, 0)
    assert places(history) == expected
    assert [event.seq for event in pump.history] == list(range(first_seq, first_seq + len(pump.history)))
    assert pump.last_seq == first_seq + len(pump.history) - 1


async def test_telemetry_never_holds_the_loop(make: Any, pumping: Any) -> None:
    """However full the ring is of what may be dropped, the loop is not told to wait."""
    pump = make.pump(capacity=8)
    pump.subscribe("sink", make.delivery(capacity=2))
    for at in range(100):
        pump.ring.publish(build(TrainStepEnded, at))
        assert not pump.ring.gated
        assert pump.ring.wait_for_room(0)
    async with pumping(pump):
        assert pump.ring.counters.dropped == 92


async def test_the_loop_waits_once_the_reserve_is_used_up(make: Any, pumping: Any) -> None:
    """What must not be dropped has room beyond the ring; then the loop is held, by the bus, until it is delivered."""
    pump = make.pump(capacity=8, reserve=4, history=100)
    for at in range(12):
        pump.ring.publish(build(RunEnded, at))
    assert not pump.ring.gated
    pump.ring.publish(build(RunEnded, 12))
    assert pump.ring.gated
    assert not pump.ring.wait_for_room(0)
    assert pump.ring.blocked_by == ["bus"]
    async with pumping(pump):
        await pump.drain()
        assert not pump.ring.gated
        assert pump.ring.wait_for_room(0)
        assert places(pump.history) == list(range(13))


async def test_payloads_are_bounded_in_bytes(make: Any, pumping: Any) -> None:
    """Steps go with their tensors until the rest fits; what must not go holds the loop until it is delivered."""
    pump = make.pump(capacity_bytes=1_000, history=100)
    for at in range(5):
        pump.ring.publish(build(TrainStepEnded, at), Payload(nbytes=400))
        assert not pump.ring.gated
    assert pump.ring.counters.dropped == 3
    pump.ring.publish(build(RunEnded, 5), Payload(nbytes=700))
    assert not pump.ring.gated
    pump.ring.publish(build(RunEnded, 6), Payload(nbytes=700))
    assert pump.ring.counters.dropped == 3, "that steps go would make no room for these"
    assert pump.ring.gated
    assert pump.ring.blocked_by == ["bus"]
    async with pumping(pump):
        await pump.drain()
        assert not pump.ring.gated
        assert places(pump.history)[:4] == [3, 4, 5, 6]  # and then how many were dropped
        for at in range(7, 9):
            pump.ring.publish(build(TrainStepEnded, at), Payload(nbytes=500))
        pump.ring.publish(build(RunEnded, 9), Payload(nbytes=1_000))
        assert pump.ring.counters.dropped == 3
        assert not pump.ring.gated


async def test_memory_is_bounded_after_the_pump_has_ended(make: Any, pumping: Any) -> None:
    """A loop that goes on for a while publishes into a ring that drops and counts; it is never held."""
    pump = make.pump(capacity=8)
    pump.subscribe("callback", make.delivery(overflow="block", capacity=1))
    async with pumping(pump):
        pass
    for at in range(100):
        pump.ring.publish(build(TrainStepEnded, at))
        pump.ring.post(lambda: None)
        assert pump.ring.wait_for_room(LIMIT_S)
    pump.ring.flush()
    assert pump.ring.counters.dropped >= 100 - 2 * 8


# ------------------------------------------------------------------------------------------ any run at all


class Receiver(NamedTuple):
    overflow: Any
    capacity: int
    batch: int
    pause: int
    types: frozenset[type[Event]] | None


RECEIVERS = st.builds(
    Receiver,
    st.sampled_from(["latest", "drop_oldest", "block"]),
    st.integers(1, 8),
    st.integers(1, 5),
    st.integers(0, 3),
    st.one_of(st.none(), st.frozensets(st.sampled_from([TrainStepEnded, RunEnded, ValStepEnded]))),
)
PLANS = st.lists(
    st.lists(st.sampled_from([TrainStepEnded, TrainStepEnded, MetricsLogged, ValStepEnded, RunEnded]), max_size=60),
    min_size=1,
    max_size=3,
)


def wants(types: frozenset[type[Event]] | None, event: Event) -> bool:
    return event.journalled if types is None else type(event) in types


def check_history(pump: Pump, first_seq: int, plans: list[list[type[Event]]]) -> None:
    history = list(pump.history)
    assert [event.seq for event in history] == list(range(first_seq, first_seq + len(history)))
    ours = [event for event in history if not isinstance(event, ObserverDropped)]
    assert len(ours) + pump.ring.counters.dropped == sum(len(kinds) for kinds in plans)
    assert pump.ring.counters.dropped == sum(getattr(event, "dropped", 0) for event in history if _is_of(event, "bus"))
    for thread, kinds in enumerate(plans):
        mine = [event for event in ours if event.rank == thread]
        assert places(mine) == sorted(set(places(mine)))
        assert all(type(event) is kinds[event.global_step] for event in mine)
        kept = {at for at, kind in enumerate(kinds) if not kind.droppable}
        assert kept <= set(places(mine))


def _is_of(event: Event, observer: str) -> bool:
    return isinstance(event, ObserverDropped) and event.observer == observer


def check_subscription(pump: Pump, receiver: Receiver, subscription: Subscription, received: list[Event]) -> None:
    meant = [event for event in pump.history if wants(receiver.types, event)]
    counts = subscription.statistics
    assert add_up(subscription)
    assert (counts.published, counts.delivered, counts.queued) == (len(meant), len(received), 0)
    by_seq = {event.seq: event for event in meant}
    order = [event.seq for event in received]
    assert order == sorted(set(order))
    for event in received:
        same = by_seq[event.seq]
        assert (type(event), event.rank, event.global_step) == (type(same), same.rank, same.global_step)
    if receiver.overflow == "block":
        assert order == list(by_seq)
        assert received == meant


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ring=st.integers(8, 64),
    first_seq=st.integers(1, 2**40),
    receivers=st.lists(RECEIVERS, max_size=4),
    plans=PLANS,
    pumped=st.booleans(),
)
def test_every_event_is_delivered_or_accounted_for(
    backend: str,
    in_threads: Any,
    ring: int,
    first_seq: int,
    receivers: list[Receiver],
    plans: list[list[type[Event]]],
    pumped: bool,
) -> None:
    """Several threads, any subscriptions, a pump that runs or is late: order, identity and counts hold everywhere."""

    async def main() -> None:
        pump = Pump(Ring(Origin("run"), RingLimits(capacity=ring)), first_seq=first_seq, history=10_000)
        received: list[list[Event]] = [[] for _ in receivers]
        subscriptions = [
            pump.subscribe(
                f"observer {at}",
                Delivery(
                    overflow=receiver.overflow,
                    capacity=receiver.capacity,
                    batch=receiver.batch,
                    types=receiver.types,
                    latency_s=1e-6,
                ),
            )
            for at, receiver in enumerate(receivers)
        ]

        async def receive(at: int) -> None:
            while True:
                try:
                    received[at] += [event for event, _ in await subscriptions[at].receive()]
                except anyio.EndOfStream:
                    return
                for _ in range(receivers[at].pause):
                    await anyio.lowlevel.checkpoint()

        def publish(thread: int, kinds: list[type[Event]]) -> None:
            for at, kind in enumerate(kinds):
                while pumped and pump.ring.gated:
                    pump.ring.wait_for_room(0.02)
                pump.ring.publish(build(kind, at, thread))

        threads = [lambda thread=thread, kinds=kinds: publish(thread, kinds) for thread, kinds in enumerate(plans)]
        with anyio.fail_after(LIMIT_S):
            async with anyio.create_task_group() as running, anyio.create_task_group() as tasks:
                if not pumped:
                    run_all(threads)
                running.start_soon(pump.run)
                for at in range(len(receivers)):
                    tasks.start_soon(receive, at)
                if pumped:
                    await in_threads(pump, *threads)
                await pump.drain()
                pump.report_losses()
                await end(pump, *subscriptions)
                tasks.start_soon(close_after, pump, subscriptions)
        check_history(pump, first_seq, plans)
        for at, receiver in enumerate(receivers):
            check_subscription(pump, receiver, subscriptions[at], received[at])
        if pumped and any(receiver.overflow == "block" for receiver in receivers):
            assert pump.ring.counters.dropped == 0

    anyio.run(main, backend=backend)


def run_all(functions: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT_S)


async def close_after(pump: Pump, subscriptions: list[Subscription]) -> None:
    while not all(subscription.statistics.queued == 0 for subscription in subscriptions):
        await anyio.lowlevel.checkpoint()
    pump.close()
    for subscription in subscriptions:
        subscription.discard()


# --------------------------------------------------------------------------------------------- backpressure


async def test_block_holds_the_loop_and_loses_nothing(make: Any, pumping: Any, in_threads: Any) -> None:
    """A loop that keeps to the gate gets every event through the smallest queue, and does not run far ahead."""
    pump = make.pump(capacity=16)
    subscription = pump.subscribe("callback", make.delivery(overflow="block", capacity=2))
    published = itertools.count(1)
    received: list[int] = []
    ahead: list[int] = []

    def loop() -> None:
        for _ in range(600):
            while pump.ring.gated:
                assert pump.ring.wait_for_room(LIMIT_S)
            at = next(published)
            pump.ring.publish(build(TrainStepEnded, at))
            ahead.append(at - len(received))

    async def receive() -> None:
        while len(received) < 600:
            received.extend(places([event for event, _ in await subscription.receive()]))

    with anyio.fail_after(LIMIT_S):
        async with pumping(pump) as tasks:
            tasks.start_soon(receive)
            await in_threads(pump, loop)
    assert received == list(range(1, 601))
    assert (pump.ring.counters.dropped, subscription.statistics.dropped) == (0, 0)
    assert max(ahead) <= 2 + 2 * 16


async def test_whoever_holds_the_loop_is_named_until_it_has_room(make: Any, pumping: Any) -> None:
    """Receiving, leaving and being given up all let the loop go on."""
    pump = make.pump()
    delivery = make.delivery(overflow="block", capacity=2)
    names = ["c", "a", "b"]
    subscriptions = {name: pump.subscribe(name, delivery) for name in names}
    async with pumping(pump):
        for at in range(4):
            pump.ring.publish(build(TrainStepEnded, at))
        await pump.drain()
        assert pump.ring.blocked_by == ["a", "b", "c"]
        assert pump.ring.gated
        subscriptions["a"].finish()
        assert pump.ring.blocked_by == ["b", "c"]
        subscriptions["b"].discard()
        assert pump.ring.blocked_by == ["c"]
        assert not pump.ring.wait_for_room(0)
        while not subscriptions["c"].is_empty:
            await subscriptions["c"].receive()
        subscriptions["c"].done()
        assert not pump.ring.gated
        assert pump.ring.wait_for_room(0)
        assert all(add_up(subscription) for subscription in subscriptions.values())


async def test_the_loop_is_held_before_the_ring_must_drop_what_somebody_must_get(make: Any, pumping: Any) -> None:
    """While the event loop is blocked, a ring that fills up tells the loop in time."""
    pump = make.pump(capacity=16)
    subscription = pump.subscribe("callback", make.delivery(overflow="block"))
    for count in itertools.count(1):
        pump.ring.publish(build(TrainStepEnded, count))
        if pump.ring.gated:
            break
    assert count <= 16
    for at in range(8):  # what is left of this step
        pump.ring.publish(build(TrainStepEnded, count + 1 + at))
    assert pump.ring.counters.dropped == 0
    async with pumping(pump):
        await pump.drain()
        assert not pump.ring.gated
        assert subscription.statistics.published == count + 8


async def test_releasing_ends_a_wait_but_not_the_gate(make: Any, pumping: Any) -> None:
    """The loop has something else to look at: a stop, or a cancellation."""
    pump = make.pump(capacity=1, reserve=0)
    pump.ring.publish(build(RunEnded, 1))
    pump.ring.publish(build(RunEnded, 2))
    results: list[bool] = []
    loop = threading.Thread(target=lambda: results.append(pump.ring.wait_for_room(LIMIT_S)))
    loop.start()
    while loop.is_alive():
        pump.ring.release()
        loop.join(0.01)
    assert results == [False]
    assert pump.ring.gated
    async with pumping(pump):
        await pump.drain()
        assert not pump.ring.gated


async def test_the_end_of_the_pump_lets_the_loop_go(make: Any, in_threads: Any) -> None:
    """Nobody will make room any more, so nobody waits for it; the wait that is under way ends too."""
    pump = make.pump()
    pump.subscribe("callback", make.delivery(overflow="block", capacity=1))
    results: list[bool] = []
    waiting = threading.Event()

    def loop() -> None:
        waiting.set()
        results.append(pump.ring.wait_for_room(LIMIT_S))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(pump.run)
        for at in range(3):
            pump.ring.publish(build(TrainStepEnded, at))
        await pump.drain()
        thread = threading.Thread(target=loop)
        thread.start()
        assert waiting.wait(LIMIT_S)
        tasks.cancel_scope.cancel()
    thread.join(LIMIT_S)
    assert results == [True]
