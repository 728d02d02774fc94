"""One observer's queue: what is in it, what falls out of it, and what a receiver that comes and goes gets."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar, get_args

import anyio
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from events.bus.backlog import Item, Payload, Published, item_of
from events.bus.fence import Fence
from events.bus.subscription import Subscription
from events.messages import Event, MetricsLogged, RunEnded, TrainStepEnded
from events.sink import Delivery, Overflow

T = TypeVar("T")
HUGE = 2**40

pytestmark = pytest.mark.both_event_loops


def item(kind: type[Any], at: int, *fields: Any, payload: Payload | None = None) -> Item:
    return item_of((kind("run", 1, at, 0.0, 0, at, 0, None, *fields), payload))


def step(at: int, payload: Payload | None = None) -> Item:
    return item(TrainStepEnded, at, payload=payload)


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


# ------------------------------------------------------------------------------------------- any schedule


class SubscriptionMachine(RuleBasedStateMachine):
    """A queue with any policy and limits: each event is delivered once and in order, or lost for a stated reason."""

    @initialize(
        overflow=st.sampled_from([policy for policy in get_args(Overflow) if policy != "catch_up"]),
        capacity=st.integers(1, 8),
        capacity_bytes=st.sampled_from([1_500, 20_000, HUGE]),
        batch=st.integers(1, 5),
        kinds=st.sampled_from([["step"], ["step", "large"], ["x", "y"], ["step", "step", "large", "ended", "x", "y"]]),
    )
    def subscribe(self, overflow: Overflow, capacity: int, capacity_bytes: int, batch: int, kinds: list[str]) -> None:
        self.kinds = kinds
        self.delivery = Delivery(overflow=overflow, capacity=capacity, capacity_bytes=capacity_bytes, batch=batch)
        self.is_full = False
        self.subscription = Subscription("s", self.delivery, payloads=True, on_credit=self.take_credit)
        self.offered: list[Item] = []
        self.received: list[Published] = []
        self.hand: list[int] = []
        self.refused: set[int] = set()  # handed over, and then dropped
        self.ended = False

    def take_credit(self, subscription: Subscription, full: bool) -> None:
        self.is_full = full

    @rule(data=st.data(), count=st.integers(1, 12))
    def offer(self, data: st.DataObject, count: int) -> None:
        items = []
        for at in range(len(self.offered) + 1, len(self.offered) + 1 + count):
            kind = data.draw(st.sampled_from(self.kinds))
            payload = Payload(fence=Fence(["s", "other"]), nbytes=10_000 if kind == "large" else 100)
            if kind in ("x", "y"):
                items.append(item(MetricsLogged, at, {kind: float(at)}, payload=payload))
            elif kind == "ended":
                items.append(item(RunEnded, at, "finished", payload=payload))
            else:
                items.append(step(at, payload))
        self.offered += items
        got = set(seqs(self.received))
        kept = [one for one in self.offered if not one[0].droppable and one[0].seq not in got and self.is_waiting(one)]
        has_room = len(kept) <= self.delivery.capacity and self.delivery.capacity_bytes == HUGE and not self.ended
        self.refused |= {event.seq for event, _, _ in items} if self.ended else set()
        self.subscription.offer(items)
        assert not has_room or all(map(self.is_waiting, kept))
        # The newest has room, whatever is being delivered, except among events that must not be dropped.
        assert self.ended or "ended" in self.kinds or self.is_waiting(items[-1])

    @staticmethod
    def is_waiting(one: Item) -> bool:
        """Whether the hook of an event may still run."""
        assert one[1] is not None
        assert one[1].fence is not None
        return "s" in one[1].fence.waiting

    @rule()
    def receive(self) -> None:
        if not self.subscription.is_empty:
            self.done(None)
            got = now(self.subscription.receive())
            # The other half is for events that come while it is delivered.
            assert 0 < len(got) <= min(self.delivery.batch, (self.delivery.capacity + 1) // 2)
            nbytes = sum(item_of(published)[2] for published in got)
            assert len(got) == 1 or nbytes <= self.delivery.capacity_bytes // 2
            self.received += got
            self.hand = seqs(got)
        elif self.ended:
            self.hand = []
            with pytest.raises(anyio.EndOfStream):
                now(self.subscription.receive())

    @rule(count=st.none() | st.integers(0, 5))
    def done(self, count: int | None) -> None:
        self.subscription.done(count)
        self.refused |= set(self.hand if count == 0 else self.hand[count:] if count else [])
        self.hand = []

    @precondition(lambda self: len(self.offered) > 60)
    @rule()
    def finish(self) -> None:
        self.subscription.finish()
        self.ended = True

    @precondition(lambda self: len(self.offered) > 60)
    @rule()
    def discard(self) -> None:
        self.subscription.discard()
        self.refused |= set(self.hand)
        self.hand = []
        self.ended = True

    @invariant()
    def counts_and_limits_hold(self) -> None:
        counts, delivery = self.subscription.statistics, self.delivery
        parts = (counts.delivered, counts.dropped, counts.conflated, counts.queued)
        assert counts.published == sum(parts) == len(self.offered)
        assert min(parts) >= 0
        assert counts.conflated == 0 or delivery.overflow == "latest"
        full = counts.queued > delivery.capacity or self.subscription.queued_bytes > delivery.capacity_bytes
        if delivery.overflow == "block":
            assert self.ended or self.is_full == full
            return
        largest = max((size for _, _, size in self.offered), default=0)
        assert counts.queued <= max(2 * delivery.capacity, 2)
        # One event may exceed the bytes by itself: that in delivery, and the newest.
        limit = delivery.capacity_bytes
        assert self.subscription.queued_bytes <= max(2 * limit, limit + largest, 2 * largest)

    def teardown(self) -> None:
        if not hasattr(self, "subscription"):
            return
        undisturbed = not self.ended
        while not self.subscription.is_empty:
            self.receive()
        self.done(None)
        self.discard()
        self.subscription.done()
        self.counts_and_limits_hold()
        assert not self.is_full
        assert self.subscription.statistics.queued == self.subscription.queued_bytes == 0
        order = seqs(self.received)
        assert order == sorted(set(order))
        delivered = set(order) - self.refused
        assert self.subscription.statistics.delivered == len(delivered)
        for event, payload, _ in self.offered:  # the loop never waits for a hook that will not run
            assert payload is not None
            assert payload.fence is not None
            assert payload.fence.waiting == (["other", "s"] if event.seq in delivered else ["other"])
        if undisturbed and self.offered:
            self.check_policy(set(order))

    def check_policy(self, got: set[int]) -> None:
        delivery, kept = self.delivery, [event.seq for event, _, _ in self.offered if not event.droppable]
        if delivery.overflow == "block":
            assert len(got) == len(self.offered)
        if (
            delivery.overflow == "latest"
            and delivery.capacity >= 8
            and delivery.capacity_bytes == HUGE
            and len(kept) < 4
        ):
            assert last_values(event for event, _ in self.received) == last_values(one[0] for one in self.offered)


def last_values(events: Iterable[Event]) -> dict[str, float]:
    values: dict[str, float] = {}
    for event in events:
        if isinstance(event, MetricsLogged):
            values |= event.metrics
    return values


TestSubscription = SubscriptionMachine.TestCase
TestSubscription.settings = settings(deadline=None, max_examples=100, stateful_step_count=25)
