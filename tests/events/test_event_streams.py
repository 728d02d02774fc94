"""What the event streams of a run have in common: in its process, from its journal, and over the network."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import pytest

from events.bus.catch_up import WrittenJournal
from events.bus.pump import Pump
from events.bus.ring import Ring
from events.journal.segment import JOURNAL_DIR, segment_name
from events.journal.writer import Journal
from events.messages import Event, MetricsLogged, RunEnded, RunStarted, TrainEpochEnded, TrainStepEnded
from events.origin import Origin
from events.protocol import EventStream
from events.run.folder import RunFolder
from events.run.stream import JournalEventStream, LocalEventStream
from events.sink import RunInfo
from events.wire import encode_json_lines
from sinks.live.runs import RunsOfFolder
from sinks.live.server import Server, bind
from trainer.remote.connect import connect

pytestmark = pytest.mark.anyio
LIMIT_S = 30.0
FIELDS: dict[type[Event], tuple[Any, ...]] = {
    MetricsLogged: ({"accuracy": 0.5},),
    RunStarted: ("a.Net", 1),
    RunEnded: ("finished",),
}
Types = Iterable[type[Event]] | None


class InProcess:
    """A run whose stream is subscribed to its bus."""

    def __init__(self, folder: Path) -> None:
        self._pump = Pump(Ring(Origin("demo")), history=100_000)

    @asynccontextmanager
    async def under_way(self) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._pump.run)
            yield
            self._pump.close()

    async def publish(self, *kinds: type[Event], count: int = 1) -> None:
        for kind in kinds * count:
            self._pump.ring.publish(kind("demo", 1, 0, 0.0, 0, 0, 0, None, *FIELDS.get(kind, ())))
        await self._pump.drain()

    async def end(self) -> None:
        await self.publish(RunEnded)
        self._pump.close()

    def open(self, since: int | None = None, types: Types = None) -> EventStream:
        return LocalEventStream(self._pump, since, types)


class InProcessWithJournal(InProcess):
    """One that reads from the journal what is not in its queue."""

    def __init__(self, folder: Path) -> None:
        journal = WrittenJournal(folder / JOURNAL_DIR, lambda: self._to_write.statistics.queued == 0)
        self._pump = Pump(Ring(Origin("demo")), journal=journal)
        self._to_write = self._pump.subscribe("journal", Journal.delivery)
        self._writer = Journal().open(RunInfo("demo", run_dir=str(folder)))

    @asynccontextmanager
    async def under_way(self) -> AsyncIterator[None]:
        async with super().under_way():
            yield
        self._writer.close()

    async def publish(self, *kinds: type[Event], count: int = 1) -> None:
        await super().publish(*kinds, count=count)
        while not self._to_write.is_empty:
            self._writer.write([event for event, _ in await self._to_write.receive()])
            self._to_write.done()


class FromJournal:
    """A run whose journal another process writes."""

    def __init__(self, folder: Path) -> None:
        self._folder: RunFolder | None = RunFolder.open(folder / "runs" / "demo", "demo")
        self._journal = folder / "runs" / "demo" / JOURNAL_DIR
        self._seq = 0

    @asynccontextmanager
    async def under_way(self) -> AsyncIterator[None]:
        yield
        self._let_go()

    async def publish(self, *kinds: type[Event], count: int = 1) -> None:
        events = []
        for kind in kinds * count:
            self._seq += 1
            events.append(kind("demo", 1, self._seq, 1.0, 0, 0, 0, None, *FIELDS.get(kind, ())))
        with open(self._journal / segment_name(1), "ab") as file:  # noqa: ASYNC230  # a few bytes
            file.write(encode_json_lines(events))

    async def end(self) -> None:
        await self.publish(RunEnded)
        self._let_go()

    def _let_go(self) -> None:
        if self._folder is not None:
            self._folder.close()
        self._folder = None

    def open(self, since: int | None = None, types: Types = None) -> EventStream:
        return JournalEventStream(self._journal, 1, lambda: self._folder is None, since, types)


class OverNetwork(FromJournal):
    """A run whose folder a server watches."""

    @asynccontextmanager
    async def under_way(self) -> AsyncIterator[None]:
        runs = RunsOfFolder(self._journal.parent.parent)
        server = Server(runs, bind("127.0.0.1", 0), "127.0.0.1")
        server.start()
        try:
            async with connect(server.url) as self._run:
                yield
        finally:
            self._let_go()
            await anyio.to_thread.run_sync(server.stop)

    def open(self, since: int | None = None, types: Types = None) -> EventStream:
        return self._run.events(since=since, types=types)


Source = InProcess | FromJournal


@pytest.fixture(params=[InProcess, InProcessWithJournal, FromJournal, OverNetwork])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    """A run that has not started."""
    return request.param(tmp_path)  # type: ignore[no-any-return]


@asynccontextmanager
async def started(source: Source, *kinds: type[Event]) -> AsyncIterator[None]:
    """Start the run, and publish; nothing in the block may take long."""
    if isinstance(source, FromJournal):  # a server knows a run by its journal
        await source.publish(RunStarted, *kinds)
    with anyio.fail_after(LIMIT_S):
        async with source.under_way():
            if not isinstance(source, FromJournal):
                await source.publish(RunStarted, *kinds)
            yield


async def rest(stream: EventStream) -> list[int]:
    """The ``seq`` of everything up to the end of the stream."""
    return [event.seq async for event in stream]


async def receive(stream: EventStream, count: int) -> list[int]:
    """The ``seq`` of at least ``count`` events."""
    got: list[int] = []
    while len(got) < count:
        got += [event.seq for event in await stream.receive()]
    return got


@pytest.mark.parametrize(("since", "expected"), [(None, [5, 6]), (0, [1, 2, 3, 4, 5, 6]), (3, [4, 5, 6])])
async def test_a_stream_starts_after_its_cursor(source: Source, since: int | None, expected: list[int]) -> None:
    """None: with the next event; 0: with the first."""
    async with started(source, *[TrainStepEnded] * 3):
        stream = source.open(since)
        while stream.cursor != (4 if since is None else since):  # noqa: ASYNC110  # a server says where "now" is
            await anyio.sleep(0.001)
        await source.publish(TrainStepEnded)
        await source.end()
        assert await rest(stream) == expected


@pytest.mark.parametrize("source", [InProcess, InProcessWithJournal, FromJournal], indirect=True)
async def test_a_cursor_of_the_future_skips_the_events_before_it(source: Source) -> None:
    async with started(source, *[TrainStepEnded] * 3):
        stream = source.open(9)
        await source.end()
        assert await rest(stream) == []


async def test_a_stream_opened_after_the_end_has_the_whole_history_and_ends_each_time(source: Source) -> None:
    async with started(source, TrainStepEnded):
        await source.end()
        for since, expected in ((0, [1, 2, 3]), (2, [3]), (3, [])):
            stream = source.open(since)
            assert await rest(stream) == expected
            for _ in range(2):
                with pytest.raises(anyio.EndOfStream):
                    await stream.receive()
            assert stream.cursor == 3


async def test_only_the_chosen_types_come_from_the_past_and_the_present(source: Source) -> None:
    async with started(source, TrainStepEnded, MetricsLogged, TrainEpochEnded, TrainStepEnded):
        stream = source.open(0, [TrainEpochEnded, MetricsLogged])
        assert await receive(stream, 2) == [3, 4]
        await source.publish(TrainStepEnded, TrainEpochEnded)
        assert await receive(stream, 1) == [7]
        await source.end()
        assert await rest(stream) == []


async def test_a_cursor_is_that_of_the_last_event_returned(source: Source) -> None:
    """In the middle of a batch too, and after closing: a stream that resumes there repeats and skips nothing."""
    async with started(source, *[TrainStepEnded] * 5):
        first = source.open(0)
        async for event in first:
            assert first.cursor == event.seq
            if event.seq == 3:
                break
        await first.aclose()
        assert first.cursor == 3
        with pytest.raises(anyio.EndOfStream):
            await first.receive()
        assert await receive(source.open(first.cursor), 3) == [4, 5, 6]


async def test_the_rest_of_a_batch_comes_by_either_way(source: Source) -> None:
    """Whoever has iterated may receive, and the other way round."""
    async with started(source, *[TrainStepEnded] * 2):
        stream = source.open(0)
        assert (await anext(stream)).seq == 1
        assert await receive(stream, 2) == [2, 3]
        assert stream.cursor == 3
        await source.publish(TrainStepEnded)
        await source.end()
        assert await rest(stream) == [4, 5]
        assert await rest(stream) == []


async def test_a_cancelled_receive_loses_and_repeats_nothing(source: Source) -> None:
    """At any moment, while events come."""
    got: list[int] = []
    async with started(source):
        stream = source.open(0)

        async def publish() -> None:
            for _ in range(30):
                await source.publish(TrainStepEnded, count=30)
                await anyio.sleep(0.002)  # each time, receivers are cancelled at another place
            await source.end()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(publish)
            cancelled = 0
            try:
                while True:
                    with anyio.move_on_after(0.002 * cancelled if cancelled < 20 else LIMIT_S) as scope:
                        got += [event.seq for event in await stream.receive()]
                    cancelled += scope.cancelled_caught
            except anyio.EndOfStream:
                pass
    assert got == [*range(1, 30 * 30 + 3)]
    assert cancelled


async def test_closing_ends_a_receive_that_waits(source: Source) -> None:
    async with started(source):
        stream = source.open(1)

        async def wait() -> None:
            with pytest.raises(anyio.EndOfStream):
                await stream.receive()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.wait_all_tasks_blocked()
            await stream.aclose()
        await stream.aclose()
