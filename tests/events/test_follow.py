"""Following a journal: events come as they are written, until nothing more is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import pytest

from events.journal.follow import Follower
from events.journal.segment import JOURNAL_DIR
from events.journal.writer import Journal
from events.messages import JournalGap, TrainStepEnded
from events.sink import RunInfo

pytestmark = [pytest.mark.anyio, pytest.mark.both_event_loops]


class Written:
    """A journal that is written step by step."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / JOURNAL_DIR
        self.over = False
        self._writer = Journal().open(RunInfo("run", run_dir=str(run_dir)))

    def write(self, *seqs: int) -> None:
        self._writer.write([TrainStepEnded("run", 1, seq, 0.0, 0, seq, 0, None) for seq in seqs])

    def follow(self, after: int = 0, **options: Any) -> Follower:
        return Follower(self.folder, after, over=lambda: self.over, **options)


@pytest.fixture
def journal(tmp_path: Path) -> Any:
    journal = Written(tmp_path)
    yield journal
    journal._writer.close()


async def rest(follower: Follower) -> list[int]:
    got: list[int] = []
    with anyio.fail_after(20):
        while True:
            try:
                got += [event.seq for event in await follower.receive()]
            except anyio.EndOfStream:
                return got


async def test_events_come_as_they_are_written(journal: Any) -> None:
    """From the cursor on; the end comes once nothing more is written, and each time again."""
    follower = journal.follow(2)
    got: list[int] = []

    async def receive() -> None:
        got.extend(await rest(follower))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        for seq in range(1, 6):
            journal.write(seq)
            await anyio.wait_all_tasks_blocked()
        journal.over = True
    assert got == [3, 4, 5]
    assert follower.cursor == 5
    assert await rest(follower) == []


async def test_a_follower_that_is_woken_looks_at_once(journal: Any) -> None:
    """However rarely it looks by itself."""
    follower = journal.follow(poll_s=3_600.0)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rest, follower)
        await anyio.wait_all_tasks_blocked()
        journal.over = True
        follower.wake()


async def test_what_a_dead_writer_left_counts_at_the_end(journal: Any) -> None:
    """An event that lacks only its newline is returned; damaged lines behind the last event are a gap."""
    journal.write(1, 2, 3)
    (segment,) = journal.folder.iterdir()
    data = segment.read_bytes()
    segment.write_bytes(data[:-1])
    follower = journal.follow()
    assert [event.seq for event in await follower.receive()] == [1, 2]
    assert await follower.read() == []
    journal.over = True
    assert [event.seq for event in await follower.receive()] == [3]
    segment.write_bytes(data[:-20] + b"?" + data[-19:])
    follower = journal.follow()
    assert [event.seq for event in await follower.receive()] == [1, 2]
    (gap,) = await follower.receive()
    assert isinstance(gap, JournalGap)
    assert (gap.first_seq, gap.last_seq) == (3, 3)
    assert await rest(follower) == []
