"""Lossless delivery: a subscription that is full reads from the journal what does not fit into memory."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events.bus import catch_up
from events.bus.backlog import item_of
from events.bus.catch_up import WrittenJournal
from events.bus.subscription import Subscription
from events.journal import reader as journal_reader
from events.journal.follow import Follower
from events.journal.segment import JOURNAL_DIR
from events.journal.writer import Journal
from events.messages import BackwardEnded, Event, JournalGap, MetricsLogged, TrainEpochEnded, TrainStepEnded
from events.sink import Delivery, RunInfo

pytestmark = [pytest.mark.anyio, pytest.mark.both_event_loops]

FIELDS: dict[type[Event], tuple[Any, ...]] = {MetricsLogged: ({"accuracy": 0.5},)}


class Run:
    """A subscription, and a journal that is written when the test says so."""

    def __init__(self, run_dir: str | os.PathLike[str], **delivery: Any) -> None:
        self.failing = False
        self.folder = Path(run_dir) / JOURNAL_DIR
        self.subscription = Subscription(
            "sink",
            Delivery(**{"overflow": "catch_up", "capacity": 4, **delivery}),
            journal=WrittenJournal(self.folder, lambda: self.failing or not self.unwritten),
        )
        self.seq = 0
        self.unwritten: list[Event] = []
        self._writer = Journal().open(RunInfo("run", run_dir=os.fspath(run_dir)))

    def publish(self, *kinds: type[Event], count: int = 1) -> None:
        events: list[Event] = []
        for kind in kinds * count:
            self.seq += 1
            events.append(kind("run", 1, self.seq, 0.0, 0, 0, 0, None, *FIELDS.get(kind, ())))
        self.unwritten += events
        self.subscription.offer([item_of((event, None)) for event in events if self.subscription.wants(type(event))])

    def write(self) -> None:
        self._writer.write(self.unwritten)
        self.unwritten.clear()

    async def receive(self) -> list[int]:
        with anyio.fail_after(20):
            batch = await self.subscription.receive()
        assert self.adds_up
        return [event.seq for event, _ in batch]

    async def rest(self) -> list[int]:
        """Everything up to the end of the stream."""
        self.subscription.finish()
        got: list[int] = []
        while True:
            try:
                got += await self.receive()
            except anyio.EndOfStream:
                return got

    @property
    def adds_up(self) -> bool:
        counts = self.subscription.statistics
        parts = (counts.delivered, counts.dropped, counts.conflated, counts.queued)
        return counts.published == sum(parts) and min(parts) >= 0

    def close(self) -> None:
        self.subscription.discard()
        self._writer.close()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path)
    yield run
    run.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catch_up, "_PATIENCE_S", 0.0)


async def test_events_that_do_not_fit_come_from_the_journal(run: Run) -> None:
    """All, in order, each once; then the queue serves again from memory, and may fill up again."""
    for first in (1, 101):
        run.publish(TrainStepEnded, TrainEpochEnded, count=50)
        assert run.subscription.statistics.queued == 100
        run.write()
        got: list[int] = []
        while len(got) < 100:
            got += await run.receive()
        run.subscription.done()
        assert got == list(range(first, first + 100))
        assert run.subscription.is_empty
    assert await run.rest() == []
    assert run.subscription.statistics.dropped == 0


async def test_memory_holds_no_more_than_the_capacity(tmp_path: Path) -> None:
    """However many events wait, in count and in bytes, but for one read of the journal."""
    run = Run(tmp_path, capacity=1_000, capacity_bytes=10_000)
    run.publish(TrainStepEnded, TrainEpochEnded, count=500)
    run.write()
    got: list[int] = []
    while len(got) < 1_000:
        assert run.subscription.queued_bytes <= 10_000 + 64 * 4_096
        got += await run.receive()
    run.close()


async def test_a_write_that_is_repeated_loses_nothing(run: Run) -> None:
    """While the journal pauses before it writes again, it counts as settled, and has less than it will."""
    run.publish(TrainStepEnded, count=9)
    run.failing = True
    async with anyio.create_task_group() as tasks:

        async def repeat() -> None:
            await anyio.wait_all_tasks_blocked()
            run.write()
            run.failing = False

        tasks.start_soon(repeat)
        assert await run.rest() == list(range(1, 10))


async def test_a_queue_that_is_full_late_does_not_read_the_whole_journal(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It begins with the segment that has the next event."""
    monkeypatch.setattr(catch_up, "_FAR", 10)
    opened: list[int] = []
    lines = journal_reader.SegmentLines
    monkeypatch.setattr(
        journal_reader,
        "SegmentLines",
        lambda folder, number, *rest: opened.append(number) or lines(folder, number, *rest),
    )
    for at in range(1, 21):
        run.publish(TrainStepEnded)
        run.write()
        run._writer._leave_segment()  # the next event begins a new one
        assert await run.receive() == [at]
    run.publish(TrainStepEnded, count=9)
    run.write()
    assert await run.rest() == list(range(21, 30))
    assert opened == [21]


@pytest.mark.usefixtures("impatient")
async def test_an_event_that_the_journal_could_not_keep_is_dropped_and_counted(run: Run) -> None:
    """In the middle, and at the end; what comes later is delivered."""
    run.publish(TrainStepEnded, count=7)
    lost = run.unwritten.pop(5)
    run.write()
    assert [*await run.receive(), *await run.receive(), *await run.receive()] == [1, 2, 3, 4, 5, 7]
    run.publish(TrainStepEnded, count=9)
    run.failing = True
    assert await run.rest() == [8, 9]
    assert lost.seq == 6
    assert run.subscription.statistics.dropped == 1 + 7
    assert run.subscription.take_losses() == (8, 0)


@pytest.mark.usefixtures("impatient")
async def test_a_damaged_line_is_a_gap_in_its_place(run: Run) -> None:
    """The gap counts as published; the event that it stands for as dropped."""
    run.publish(TrainStepEnded, count=9)
    run.write()
    (segment,) = run.folder.iterdir()
    lines = segment.read_bytes().split(b"\n")
    lines[6] = lines[6][:-9] + b"?" + lines[6][-8:]
    segment.write_bytes(b"\n".join(lines))
    kinds: list[type[Event]] = []
    while len(kinds) < 9:
        kinds += [type(event) for event, _ in await run.subscription.receive()]
    assert kinds == [*[TrainStepEnded] * 6, JournalGap, TrainStepEnded, TrainStepEnded]
    assert await run.rest() == []
    counts = run.subscription.statistics
    assert (counts.published, counts.delivered, counts.dropped) == (10, 9, 1)


async def test_a_journal_that_cannot_be_read_for_a_while_is_read_later(run: Run) -> None:
    """The observer behind the subscription does not notice."""
    run.publish(TrainStepEnded, count=9)
    run.write()
    away = run.folder.rename(run.folder.with_name("away"))
    run.folder.symlink_to(away)
    got = [*await run.receive(), *await run.receive()]
    async with anyio.create_task_group() as tasks:

        async def repair() -> None:
            await anyio.wait_all_tasks_blocked()
            run.folder.unlink()
            away.rename(run.folder)

        tasks.start_soon(repair)
        got += await run.rest()
    assert got == list(range(1, 10))


def test_an_event_that_the_journal_does_not_keep_is_dropped_at_once(tmp_path: Path) -> None:
    """Only streams may ask for such types and catch up; there is no place to read them from."""
    run = Run(tmp_path, types=frozenset({BackwardEnded, TrainStepEnded}))
    run.publish(TrainStepEnded, BackwardEnded, count=4)
    counts = run.subscription.statistics
    assert (counts.published, counts.queued, counts.dropped) == (8, 6, 2)
    run.close()


def test_without_a_journal_there_is_nothing_to_catch_up_from() -> None:
    """The error names who asked, and what to do."""
    with pytest.raises(
        ValueError, match=r"'sink' reads the journal, and the run has none; keep the journal, or choose"
    ):
        Subscription("sink", Delivery(overflow="catch_up"))


@pytest.mark.parametrize("reads", [False, True])
async def test_discarding_ends_a_read_that_is_under_way(run: Run, monkeypatch: pytest.MonkeyPatch, reads: bool) -> None:
    """While it waits for the journal or reads it. Everything is counted, and the receiver gets the end."""
    run.publish(TrainStepEnded, count=9)
    await run.receive()
    await run.receive()
    read = Follower.read

    async def read_and_discard(follower: Follower, limit: int) -> list[Event]:
        events = await read(follower, limit)
        if events[-1].seq > 4:
            run.subscription.discard()
        return events

    async def receive() -> None:
        with pytest.raises(anyio.EndOfStream):
            await run.subscription.receive()

    if reads:
        run.write()
        monkeypatch.setattr(Follower, "read", read_and_discard)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        run.subscription.discard()
    assert run.adds_up
    assert run.subscription.statistics.dropped == 5


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_natively_cancelled_receive_loses_nothing(run: Run) -> None:
    """Asyncio leaves a thread behind that reads: the next call returns what it finds."""
    run.publish(TrainStepEnded, count=3_000)
    run.write()
    got: list[int] = []

    async def receive() -> None:
        while True:
            got.extend(event.seq for event, _ in await run.subscription.receive())

    for turns in range(12):
        task = asyncio.ensure_future(receive())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert got + await run.rest() == list(range(1, 3_001))


KINDS = st.sampled_from([TrainStepEnded, TrainStepEnded, MetricsLogged, TrainEpochEnded])
ACTION = st.one_of(
    st.tuples(st.just("publish"), st.lists(KINDS, min_size=1, max_size=12)),
    st.tuples(st.sampled_from(["receive", "receive", "write", "cancel"]), st.integers(0, 8)),
)


@settings(deadline=None, max_examples=100)
@given(
    capacity=st.integers(1, 6),
    batch=st.integers(1, 5),
    types=st.sampled_from([None, frozenset({TrainStepEnded}), frozenset({TrainEpochEnded})]),
    schedule=st.lists(ACTION, max_size=20),
)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_every_event_is_delivered_once_and_in_order(
    backend: str, capacity: int, batch: int, types: Any, schedule: list[Any]
) -> None:
    """Slow and fast, cancelled at any moment, while the journal lags or not; the counts add up after each step."""

    async def main(folder: str) -> None:
        run = Run(folder, capacity=capacity, batch=batch, types=types)
        kinds: list[type[Event]] = []
        got: list[int] = []
        for action, argument in schedule:
            if action == "publish":
                kinds += argument
                run.publish(*argument)
            elif action == "write":
                run.write()
            else:
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as tasks:

                        async def receive() -> None:
                            while True:
                                got.extend(await run.receive())

                        tasks.start_soon(receive)
                        for _ in range(argument):
                            await anyio.lowlevel.checkpoint()
                        if action == "receive" and not run.unwritten:
                            while not run.subscription.is_empty:
                                await anyio.lowlevel.checkpoint()
                        scope.cancel()
            assert run.adds_up
        run.write()
        got += await run.rest()
        assert got == [at for at, kind in enumerate(kinds, 1) if types is None or kind in types]
        assert run.subscription.statistics.dropped == 0
        run.close()

    with tempfile.TemporaryDirectory() as folder:
        anyio.run(main, folder, backend=backend)
