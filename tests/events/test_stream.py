"""A run's events from a cursor on: behind and live, cancelled and resumed, with a journal and without."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from events import CursorError
from events.bus.catch_up import WrittenJournal
from events.bus.pump import Pump
from events.bus.ring import Ring
from events.journal.segment import JOURNAL_DIR
from events.journal.writer import Journal
from events.messages import BackwardEnded, Event, MetricsLogged, TrainEpochEnded, TrainStepEnded
from events.origin import Origin
from events.run.stream import LocalEventStream
from events.safe_files import UnsafeFile
from events.sink import RunInfo

pytestmark = [pytest.mark.anyio, pytest.mark.both_event_loops]

FIELDS: dict[type[Event], tuple[Any, ...]] = {MetricsLogged: ({"accuracy": 0.5},)}


class Story:
    """A bus whose journal is written when the test says so."""

    def __init__(self, run_dir: str | os.PathLike[str] | None, **options: Any) -> None:
        self._dir = Path(run_dir) / JOURNAL_DIR if run_dir is not None else None
        journal = WrittenJournal(self._dir, lambda: self.settled()) if self._dir is not None else None
        self.pump = Pump(Ring(Origin("run")), journal=journal, **options)
        self.streams: list[LocalEventStream] = []
        if run_dir is not None:
            self._writer = Journal().open(RunInfo("run", run_dir=str(run_dir)))
            self._to_write = self.pump.subscribe("journal", Journal.delivery)

    async def publish(self, *kinds: type[Event], count: int = 1) -> None:
        """Publish and deliver."""
        for kind in kinds * count:
            self.pump.ring.publish(kind("run", 1, 0, 0.0, 0, 0, 0, None, *FIELDS.get(kind, ())))
        await self.pump.drain()

    async def write(self) -> None:
        """Bring the journal up to date."""
        while self._dir is not None and not self._to_write.is_empty:
            self._writer.write([event for event, _ in await self._to_write.receive()])
            self._to_write.done()

    def settled(self) -> bool:
        return self._dir is None or self._to_write.statistics.queued == 0

    def open(
        self, since: int | None = None, types: Iterable[type[Event]] | None = None, **options: Any
    ) -> LocalEventStream:
        self.streams.append(LocalEventStream(self.pump, since, types, **options))
        return self.streams[-1]

    async def end(self) -> None:
        await self.write()
        self.pump.close()

    @asynccontextmanager
    async def told(self) -> AsyncIterator[Story]:
        """Its bus is pumped; at the end the run is over and everything is closed."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.pump.run)
            yield self
            await self.end()
        for stream in self.streams:
            await stream.aclose()
        if self._dir is not None:
            self._writer.close()


def seqs(events: Iterable[Event]) -> list[int]:
    return [event.seq for event in events]


async def rest(stream: LocalEventStream) -> list[int]:
    """Everything up to the end of the stream."""
    got: list[int] = []
    while True:
        try:
            got += seqs(await stream.receive())
        except anyio.EndOfStream:
            return got


# --------------------------------------------------------------------------------------------- the journal


async def test_a_journal_that_cannot_be_written_does_not_hold_up_its_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fits into memory is delivered; the rest is lost to this stream, as it is to the journal; then it is live."""
    async with Story(tmp_path).told() as story:
        story.settled = lambda: True  # type: ignore[method-assign]
        monkeypatch.setattr("events.bus.catch_up._PATIENCE_S", 0.0)
        stream = story.open(capacity=4)
        await story.publish(TrainStepEnded, count=9)
        assert seqs(await stream.receive()) == [1, 2]
        assert seqs(await stream.receive()) == [3, 4]
        while stream.cursor < 9:
            with anyio.move_on_after(0.05):
                await stream.receive()
        await story.publish(TrainStepEnded)
        assert seqs(await stream.receive()) == [10]


async def test_a_journal_that_cannot_be_read_is_an_error_that_passes(tmp_path: Path) -> None:
    """The consumer hears of it, and may ask again: nothing was lost."""
    async with Story(tmp_path).told() as story:
        await story.publish(TrainStepEnded, count=3)
        await story.write()
        journal = tmp_path / JOURNAL_DIR
        away = journal.rename(tmp_path / "away")
        journal.symlink_to(away)
        stream = story.open(since=0)
        with pytest.raises(UnsafeFile):
            await stream.receive()
        journal.unlink()
        away.rename(journal)
        assert seqs(await stream.receive()) == [1, 2, 3]


async def test_without_a_journal_only_recent_history_is_reached() -> None:
    """The error names what is kept, and what to do."""
    async with Story(None, history=4).told() as story:
        await story.publish(TrainStepEnded, count=10)
        with pytest.raises(CursorError, match=r"after seq 5 .* oldest event in memory is seq 7; pass since=6 or later"):
            story.open(since=5)
        assert seqs(await story.open(since=6).receive()) == [7, 8, 9, 10]
    async with Story(None).told() as story:
        await story.publish(TrainStepEnded)
        with pytest.raises(CursorError, match="pass since=1 or later"):
            story.open(since=0)


async def test_without_a_journal_the_oldest_events_go_when_the_queue_is_full() -> None:
    """The newest are there; the loss is the bus's to announce."""
    async with Story(None).told() as story:
        stream = story.open(types=[TrainStepEnded], capacity=4)
        await story.publish(TrainStepEnded, count=10)
        assert seqs(await stream.receive()) == [7, 8]
        assert seqs(await stream.receive()) == [9, 10]
        assert stream.cursor in (10, 11)  # the last is the report of the loss, which was not asked for


# ------------------------------------------------------------------------------------------------- types


async def test_types_that_are_not_kept_come_only_to_those_who_name_them(tmp_path: Path) -> None:
    """They are too many for everybody."""
    async with Story(tmp_path).told() as story:
        everything, named = story.open(), story.open(types={BackwardEnded, TrainEpochEnded})
        await story.publish(BackwardEnded, TrainStepEnded, TrainEpochEnded)
        assert seqs(await everything.receive()) == [2, 3]
        assert seqs(await named.receive()) == [1, 3]


async def test_types_that_are_not_kept_come_from_the_opening_on(tmp_path: Path) -> None:
    """What was published while the stream was reading the past is not lost, though the journal was further already."""
    async with Story(tmp_path).told() as story:
        await story.publish(TrainStepEnded)
        stream = story.open(since=0, types={BackwardEnded, TrainStepEnded})
        await story.publish(BackwardEnded, TrainStepEnded, count=2)
        await story.write()
        await story.end()
        assert await rest(stream) == [1, 2, 3, 4, 5]


# ----------------------------------------------------------------------------------- cursors and cancelling


async def test_a_stream_that_nobody_holds_any_more_is_let_go(tmp_path: Path) -> None:
    """As after a `break` out of `async for`: nothing is kept for it, on whatever thread that is noticed."""
    async with Story(tmp_path).told() as story:
        kept = story.open()
        for _ in range(3):
            left: Any = story.open()
            left.itself = story.streams.pop()  # in a cycle, which the collector finds
        del left
        await anyio.to_thread.run_sync(gc.collect)
        await story.publish(TrainStepEnded, count=5)
        assert [one.name for one in story.pump._subscriptions].count("run.events") == 1
        assert seqs(await kept.receive()) == [1, 2, 3, 4, 5]


async def test_closing_ends_a_receive_that_waits(tmp_path: Path) -> None:
    """And lets go of the queue: the bus does not fill it any more."""
    async with Story(tmp_path).told() as story:
        stream = story.open(types={BackwardEnded})

        async def receive() -> None:
            with pytest.raises(anyio.EndOfStream):
                await stream.receive()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await anyio.wait_all_tasks_blocked()
            await stream.aclose()
        await stream.aclose()
        assert BackwardEnded not in story.pump.ring.audience.wanted


KINDS = st.sampled_from([TrainStepEnded, TrainStepEnded, MetricsLogged, TrainEpochEnded, BackwardEnded])
ACTION = st.one_of(
    st.tuples(st.just("publish"), st.lists(KINDS, min_size=1, max_size=12)),
    st.tuples(st.sampled_from(["let", "let", "write", "cancel", "resume"]), st.integers(0, 8)),
)


@settings(deadline=None, max_examples=150)
@given(
    capacity=st.integers(1, 6),
    types=st.sampled_from([None, {TrainStepEnded, BackwardEnded}, {TrainEpochEnded}]),
    since=st.sampled_from([None, 0]),
    early=st.lists(KINDS, max_size=4),
    schedule=st.lists(ACTION, max_size=20),
)
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_every_event_comes_once_and_in_order_whatever_happens(
    backend: str, capacity: int, types: Any, since: int | None, early: list[Any], schedule: list[Any]
) -> None:
    """Slow and fast, cancelled, and resumed from its cursor at any moment, while the journal lags or not."""

    async def main(folder: str) -> None:
        kinds = [*early]
        got: list[Event] = []
        async with Story(folder).told() as story:
            await story.publish(*early)
            streams = [story.open(since, types, capacity=capacity)]
            for action, argument in schedule:
                scope = anyio.CancelScope()

                async def receive(scope: anyio.CancelScope = scope) -> None:
                    with scope:
                        for _ in range(2):
                            got.extend(await streams[-1].receive())
                            got.append(await anext(streams[-1]))

                async with anyio.create_task_group() as tasks:
                    if action in ("let", "cancel"):
                        tasks.start_soon(receive)
                    if action == "publish":
                        kinds += argument
                        await story.publish(*argument)
                    elif action == "write":
                        await story.write()
                    elif action == "resume":
                        cursor = streams[-1].cursor
                        if argument % 2:
                            await streams[-1].aclose()
                            assert streams[-1].cursor == cursor
                        streams.append(story.open(cursor, types, capacity=capacity))
                    for _ in range(argument if action in ("let", "cancel") else 0):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()
            await story.end()
            got.extend([event async for event in streams[-1]])
        begin = len(early) if since is None else 0
        wanted = {kind for kind in kinds if kind.journalled} if types is None else types
        order = seqs(got)
        assert order == sorted(set(order))
        certain = [at for at, kind in enumerate(kinds, 1) if at > begin and kind in wanted and kind.journalled]
        assert [event.seq for event in got if event.journalled] == certain
        assert all(type(event) in wanted for event in got)

    with tempfile.TemporaryDirectory() as folder:
        anyio.run(main, folder, backend=backend)
