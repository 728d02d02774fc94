"""One observer's queue: what is in it, what falls out of it, and what a receiver that comes and goes gets."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Coroutine
from typing import Any, TypeVar, get_args

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.bus.backlog import Item, Payload, Published, item_of
from events.bus.fence import Fence
from events.bus.subscription import Subscription
from events.messages import MetricsLogged, RunEnded, TrainStepEnded
from events.sink import Delivery, Overflow

T = TypeVar("T")
HUGE = 2**40

pytestmark = pytest.mark.both_event_loops


def item(kind: type[Any], at: int, *fields: Any, payload: Payload | None = None) -> Item:
    return item_of((kind("run", 1, at, 0.0, 0, at, 0, None, *fields), payload))


def step(at: int, payload: Payload | None = None) -> Item:
    return item(TrainStepEnded, at, payload=payload)


def ended(at: int, payload: Payload | None = None) -> Item:
    return item(RunEnded, at, "finished", payload=payload)


def steps(first: int, last: int) -> list[Item]:
    return [step(at) for at in range(first, last + 1)]


def now(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that need not wait; no event loop is there to wait in."""
    try:
        coroutine.send(None)
    except StopIteration as returned:
        value: T = returned.value
        return value
    coroutine.close()
    raise AssertionError("it waits")


def seqs(batch: list[Published]) -> list[int]:
    return [event.seq for event, _ in batch]


def add_up(subscription: Subscription) -> bool:
    counts = subscription.statistics
    parts = (counts.delivered, counts.dropped, counts.conflated, counts.queued)
    return counts.published == sum(parts) and min(parts) >= 0


# ------------------------------------------------------------------------------------- a receiver that waits


@pytest.mark.anyio
@pytest.mark.parametrize("cancelled", ["before the offer", "after the offer"])
async def test_a_cancelled_receive_loses_nothing(cancelled: str) -> None:
    """A batch that was handed to a receiver in the moment it was cancelled is what its next receive returns."""
    subscription = Subscription("s", Delivery())
    scope = anyio.CancelScope()
    got: list[int] = []

    async def receive() -> None:
        with scope:
            got.extend(seqs(await subscription.receive()))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        if cancelled == "before the offer":
            scope.cancel()
        subscription.offer(steps(1, 3))
        scope.cancel()
    subscription.finish()
    with pytest.raises(anyio.EndOfStream):
        while True:
            got += seqs(await subscription.receive())
    assert got == [1, 2, 3]
    assert subscription.statistics.delivered == 3


@pytest.mark.anyio
async def test_the_pump_survives_a_receiver_that_is_being_cancelled() -> None:
    """A receiver that has a cancellation pending cannot be handed anything; that is not the pump's trouble."""
    subscription = Subscription("s", Delivery())
    scope = anyio.CancelScope()

    async def receive() -> None:
        with scope:
            await subscription.receive()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        scope.cancel()
        subscription.offer(steps(1, 1))
        subscription.offer(steps(2, 2))
    received = []
    while not subscription.is_empty:
        received += seqs(await subscription.receive())
    assert received == [1, 2]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_a_natively_cancelled_receive_loses_nothing() -> None:
    """The same for asyncio's own cancellation, as of `asyncio.timeout`, which anyio does not see coming."""
    subscription = Subscription("s", Delivery())
    task = asyncio.ensure_future(subscription.receive())
    await anyio.wait_all_tasks_blocked()
    subscription.offer(steps(1, 3))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert seqs(await subscription.receive()) == [1, 2, 3]
    assert subscription.statistics.delivered == 0


@pytest.mark.anyio
async def test_events_that_come_while_a_receiver_begins_to_wait_wake_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between finding the queue empty and waiting, an event may come. Every batch travels through the same stream."""
    create: Any = anyio.create_memory_object_stream
    streams: list[Any] = []

    class Streams:
        def __getitem__(self, kind: Any) -> Any:
            streams.append(kind)
            return create

    monkeypatch.setattr(anyio, "create_memory_object_stream", Streams())
    subscription = Subscription("s", Delivery())
    count = 300
    got: list[int] = []

    async def receive() -> None:
        while len(got) < count:
            got.extend(seqs(await subscription.receive()))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        for at in range(1, count + 1):
            for _ in range(at % 4):  # meets the receiver at each of its steps
                await anyio.lowlevel.checkpoint()
            subscription.offer([step(at)])
            if at % 30 == 0:  # seldom: asyncio takes a tenth of a second for it
                await anyio.wait_all_tasks_blocked()
                assert subscription.is_empty
    assert got == list(range(1, count + 1))
    assert len(streams) == 1
    subscription.finish()


@pytest.mark.anyio
async def test_the_end_comes_after_everything_that_was_queued() -> None:
    """Whoever waits, or comes later, gets the rest before the end of the stream; and the end again if asked again."""
    for offered_first in (True, False):
        subscription = Subscription("s", Delivery(batch=2))
        got: list[int] = []

        async def receive(subscription: Subscription = subscription, got: list[int] = got) -> None:
            while True:
                try:
                    got.extend(seqs(await subscription.receive()))
                except anyio.EndOfStream:
                    return

        if offered_first:
            subscription.offer(steps(1, 5))
            subscription.finish()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            if not offered_first:
                await anyio.wait_all_tasks_blocked()
                subscription.offer(steps(1, 5))
                subscription.finish()
        assert got == [1, 2, 3, 4, 5]
        with pytest.raises(anyio.EndOfStream):
            await subscription.receive()
        assert subscription.statistics.delivered == 5


@pytest.mark.anyio
async def test_discarding_ends_a_receiver_that_waits() -> None:
    """A stream closed from another task does not leave its consumer hanging."""
    subscription = Subscription("s", Delivery())

    async def receive() -> None:
        with pytest.raises(anyio.EndOfStream):
            await subscription.receive()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        subscription.discard()
    with pytest.raises(anyio.EndOfStream):
        await subscription.receive()


@pytest.mark.anyio
async def test_a_delivered_batch_is_not_kept_alive() -> None:
    """What a receiver has let go is gone while it waits for more: payloads hold tensors."""

    class Outputs:
        pass

    subscription = Subscription("s", Delivery(), payloads=True)
    gone: list[weakref.ref[Outputs]] = []

    async def receive() -> None:
        for _ in range(2):
            batch = await subscription.receive()
            gone.append(weakref.ref(batch[0][1].outputs))  # type: ignore[union-attr]
            del batch
        with pytest.raises(anyio.EndOfStream):
            await subscription.receive()

    async with anyio.create_task_group() as tasks:
        subscription.offer([step(1, Payload(outputs=Outputs()))])
        tasks.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        subscription.offer([step(2, Payload(outputs=Outputs()))])
        await anyio.wait_all_tasks_blocked()
        gc.collect()
        assert [ref() for ref in gone] == [None, None]
        subscription.finish()


# -------------------------------------------------------------------------------------- limits and policies


def test_an_ended_subscription_counts_what_it_is_offered_as_dropped() -> None:
    """Nothing disappears uncounted, not even what comes too late."""
    subscription = Subscription("s", Delivery())
    subscription.finish()
    subscription.offer(steps(1, 3))
    assert (subscription.statistics.published, subscription.statistics.dropped) == (3, 3)


@pytest.mark.parametrize("overflow", ["drop_oldest", "latest"])
def test_the_newest_event_finds_room_while_a_batch_is_delivered(overflow: Overflow) -> None:
    """A slow delivery of a full queue must not turn dropping the oldest into dropping the newest."""
    for capacity in (1, 2, 5):
        subscription = Subscription("s", Delivery(capacity=capacity, overflow=overflow))
        subscription.offer(steps(1, 10))
        first = seqs(now(subscription.receive()))
        subscription.offer(steps(11, 20))
        last = seqs(now(subscription.receive()))
        while not subscription.is_empty:
            last = seqs(now(subscription.receive()))
        assert first[-1] <= 10
        assert last[-1] == 20


def test_what_must_not_be_dropped_has_room_while_a_batch_fills_the_queue() -> None:
    """A batch in delivery counts, but does not use up the reserve."""
    subscription = Subscription("s", Delivery(capacity=4))
    subscription.offer(steps(1, 4))
    now(subscription.receive())
    subscription.offer([*steps(5, 20), *(ended(at) for at in range(21, 27))])
    assert subscription.statistics.dropped == 18  # the steps: two of the first batch are in delivery
    received = seqs(now(subscription.receive()))
    while not subscription.is_empty:
        received += seqs(now(subscription.receive()))
    assert received == [21, 22, 23, 24, 25, 26]


@pytest.mark.parametrize("overflow", ["drop_oldest", "latest"])
@pytest.mark.parametrize("build", [step, ended])
def test_an_event_larger_than_the_queue_waits_alone(overflow: Overflow, build: Any) -> None:
    """Such as an epoch's outputs: it is delivered unless another one comes; then nobody waits for its hook."""
    subscription = Subscription("s", Delivery(overflow=overflow, capacity_bytes=1_000), payloads=True)
    fences = [Fence(["s"]) for _ in range(3)]
    for at, fence in enumerate(fences, 1):
        subscription.offer([build(at, Payload(fence=fence, nbytes=10_000))])
        assert subscription.queued_bytes < 15_000
    assert subscription.statistics.dropped + subscription.statistics.conflated == 2
    assert [fence.waiting for fence in fences] == [[], [], ["s"]]
    assert seqs(now(subscription.receive())) == [3]


def test_block_keeps_everything_and_asks_for_credit() -> None:
    """The loop is told once there is too much, and again when there is room."""
    told: list[bool] = []
    delivery = Delivery(overflow="block", capacity=4, batch=2)
    subscription = Subscription("s", delivery, on_credit=lambda subscription, full: told.append(full))
    subscription.offer(steps(1, 6))
    assert told == [True]
    received = []
    while not subscription.is_empty:
        received += seqs(now(subscription.receive()))
    subscription.done()
    assert received == [1, 2, 3, 4, 5, 6]
    assert told == [True, False, False, False]  # after the first two are done, four wait: that is allowed
    assert subscription.statistics.dropped == 0


def test_a_discarded_subscription_gives_its_credit_back_for_good() -> None:
    """An observer that was given up does not hold the loop when its last call returns after all."""
    told: list[bool] = []
    delivery = Delivery(overflow="block", capacity=1)
    subscription = Subscription("s", delivery, on_credit=lambda subscription, full: told.append(full))
    subscription.offer(steps(1, 5))
    now(subscription.receive())
    subscription.discard()
    subscription.done()
    assert told == [True, False]
    assert add_up(subscription)


@pytest.mark.parametrize("how", ["dropped", "conflated", "late", "discarded", "in delivery", "partly done"])
def test_a_fence_falls_when_its_event_is_lost(how: str) -> None:
    """The loop never waits for a hook that will not run, whichever way its event went."""
    overflow: Overflow = "latest" if how == "conflated" else "drop_oldest"
    subscription = Subscription("s", Delivery(overflow=overflow, capacity=2), payloads=True)
    fence = Fence(["s", "other"])
    if how == "late":
        subscription.finish()
    subscription.offer([step(1, Payload(fence=fence))])
    if how in ("dropped", "conflated"):
        subscription.offer(steps(2, 3))
    elif how != "late":
        if how != "discarded":
            now(subscription.receive())
        if how == "partly done":
            subscription.done(0)
        else:
            subscription.discard()
    assert fence.waiting == ["other"]
    assert add_up(subscription)


def test_a_fence_stands_while_its_event_waits_or_is_delivered() -> None:
    """Being taken from the queue is not having run."""
    subscription = Subscription("s", Delivery(), payloads=True)
    fence = Fence(["s"])
    subscription.offer([ended(1, Payload(fence=fence))])
    now(subscription.receive())
    subscription.done()  # the hook has returned; releasing is the target's business
    assert fence.waiting == ["s"]


# ------------------------------------------------------------------------------------------- any schedule

KINDS = st.sampled_from(["step", "step", "ended", "metrics x", "metrics y"])
OPERATION = st.one_of(
    st.tuples(st.just("offer"), st.lists(KINDS, min_size=1, max_size=12)),
    st.tuples(st.sampled_from(["receive", "receive", "done", "finish", "discard"]), st.integers(0, 6)),
)


def build(kind: str, at: int, fence: Fence) -> Item:
    payload = Payload(fence=fence, nbytes=100)
    if kind == "step":
        return step(at, payload)
    if kind == "ended":
        return ended(at, payload)
    return item(MetricsLogged, at, {kind[-1]: float(at)}, payload=payload)


@settings(deadline=None, max_examples=300)
@given(
    overflow=st.sampled_from([policy for policy in get_args(Overflow) if policy != "catch_up"]),
    capacity=st.integers(1, 8),
    capacity_bytes=st.sampled_from([2_000, 20_000, HUGE]),
    batch=st.integers(1, 5),
    schedule=st.lists(OPERATION, max_size=25),
)
def test_events_are_conserved_whatever_happens(
    overflow: Overflow, capacity: int, capacity_bytes: int, batch: int, schedule: list[tuple[str, Any]]
) -> None:
    """Counts add up, order holds, bounds hold and bytes and fences come back, after every step of any schedule."""
    delivery = Delivery(overflow=overflow, capacity=capacity, capacity_bytes=capacity_bytes, batch=batch)
    subscription = Subscription("s", delivery, payloads=True)
    offered: list[Item] = []
    values: dict[str, float] = {}
    received: list[Published] = []
    for action, argument in schedule:
        if action == "offer":
            items = [build(kind, len(offered) + n + 1, Fence(["s"])) for n, kind in enumerate(argument)]
            before = [event.metrics.copy() for event, _, _ in items if isinstance(event, MetricsLogged)]
            offered += items
            subscription.offer(items)
            assert before == [event.metrics for event, _, _ in items if isinstance(event, MetricsLogged)]
        elif action == "receive" and not subscription.is_empty:
            received += (handed := now(subscription.receive()))
            assert 0 < len(handed) <= batch
        elif action == "done":
            subscription.done(argument or None)
        elif action == "finish":
            subscription.finish()
        elif action == "discard":
            subscription.discard()
        assert add_up(subscription)
        statistics = subscription.statistics
        if overflow == "block":
            assert statistics.conflated == 0
        else:
            assert statistics.queued <= max(2 * capacity, 2)
            largest = max((size for _, _, size in offered), default=0)
            # One event may exceed the limit by itself: that in delivery, and the newest.
            assert subscription.queued_bytes <= max(2 * capacity_bytes, capacity_bytes + largest, 2 * largest)
    while not subscription.is_empty:
        received += now(subscription.receive())
    subscription.done()
    subscription.discard()
    subscription.discard()  # twice is as good as once
    assert add_up(subscription)
    assert subscription.statistics.queued == subscription.queued_bytes == 0
    order = seqs(received)
    assert order == sorted(set(order))
    got = set(order)
    for event, payload, _ in offered:
        assert payload is not None
        assert payload.fence is not None
        if event.seq not in got:
            assert payload.fence.waiting == []
    disturbed = any(action in ("finish", "discard") for action, _ in schedule)
    if overflow == "block" and not disturbed:
        assert len(got) == len(offered)
    if overflow == "latest" and not disturbed and capacity >= 8 and capacity_bytes == HUGE:
        for event, _, _ in offered:
            if isinstance(event, MetricsLogged):
                values |= event.metrics
        seen: dict[str, float] = {}
        for event, _ in received:
            if isinstance(event, MetricsLogged):
                seen |= event.metrics
        if sum(event.droppable is False for event, _, _ in offered) < 4:
            assert seen == values
