"""The spill file: everything comes back in order, or is counted as lost; whatever the disk does."""

from __future__ import annotations

import gc
import math
import os
import resource
import tempfile
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, Any

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from events.bus.backlog import Item, Payload, item_of
from events.bus.cpu_time import CpuTime
from events.bus.fence import Fence
from events.bus.pump import Pump
from events.bus.ring import Ring
from events.bus.spill import Spill
from events.bus.subscription import Subscription
from events.bus.worker import Worker
from events.messages import Event, MetricsLogged, ObserverFailed, RunEnded, RunStarted, TrainStepEnded
from events.origin import Origin
from events.sink import Delivery

LIMIT_S = 20.0
"""No test waits that long: it fails instead."""
HUGE = 2**40


def item(kind: type[Event], at: int, *fields: Any, payload: Payload | None = None) -> Item:
    return item_of((kind("run", 1, at, 0.0, 0, at, 0, None, *fields), payload))


def steps(first: int, last: int) -> list[Item]:
    return [item(TrainStepEnded, at) for at in range(first, last + 1)]


def text(at: int, length: int) -> Item:
    """An event that may not be dropped, of about ``length`` bytes in the file."""
    return item(RunEnded, at, "failed", "x" * length)


def seqs(items: list[Item]) -> list[int]:
    return [event.seq for event, _, _ in items]


class Spilling:
    """A spill with its worker, and what has become of the events that were written."""

    def __init__(self, pump: Pump, limit_bytes: int, memory_limit_bytes: int, directory: str | None) -> None:
        self.pump = pump
        self.worker = Worker("spill-test", pump.ring.post, pump.ring.cpu_time)
        self.spill = Spill(self.worker, limit_bytes, memory_limit_bytes, directory)
        self.written = 0
        self.lost: list[int] = []

    def write(self, items: list[Item]) -> None:
        self.spill.write(items, self._on_done)

    def _on_done(self, written: int, lost: list[Item]) -> None:
        self.written += written
        self.lost += seqs(lost)

    async def settle(self) -> None:
        """Wait until the disk has answered to everything written so far."""
        await self.worker.submit(int).finished.wait()

    async def read(self, limit: int = 1_000) -> list[Item]:
        items, lost = await self.spill.read(limit, HUGE)
        assert lost == 0
        return items

    async def read_all(self) -> list[Item]:
        items: list[Item] = []
        while self.spill.count:
            items += await self.read()
        return items

    @contextmanager
    def held(self) -> Iterator[None]:
        """A disk that does not answer meanwhile."""
        release = threading.Event()
        self.worker.submit(release.wait, LIMIT_S)
        try:
            yield
        finally:
            release.set()


@asynccontextmanager
async def spilling(
    limit_bytes: int = 2**20, *, memory_limit_bytes: int = HUGE, directory: str | None = None
) -> AsyncIterator[Spilling]:
    pump = Pump(Ring(Origin("run")))
    with anyio.fail_after(LIMIT_S):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(pump.run)
            spilling = Spilling(pump, limit_bytes, memory_limit_bytes, directory)
            yield spilling
            spilling.spill.close()
            pump.close()


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch) -> list[IO[bytes]]:
    """The real temporary files that are opened during the test."""
    opened: list[IO[bytes]] = []
    really_open = tempfile.TemporaryFile

    def record(**options: Any) -> IO[bytes]:
        opened.append(really_open(**options))
        return opened[-1]

    monkeypatch.setattr(tempfile, "TemporaryFile", record)
    return opened


# ------------------------------------------------------------------------------------- a disk that fails


@pytest.mark.anyio
async def test_what_a_full_disk_refuses_is_lost_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device without space every write fails: nothing raises, nothing waits, the events are named as lost."""
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: open("/dev/full", "r+b", buffering=0))  # noqa: SIM115
    async with spilling() as disk:
        disk.write(steps(1, 5))
        disk.write(steps(6, 7))
        assert (disk.spill.count, disk.lost) == (7, [])
        assert await disk.spill.read(10, HUGE) == ([], 0)
        assert (disk.spill.count, disk.spill.memory_bytes, disk.written) == (0, 0, 0)
        assert disk.lost == [1, 2, 3, 4, 5, 6, 7]


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.anyio
async def test_a_chunk_written_in_part_leaves_no_trace() -> None:
    """The disk takes half of a chunk: the chunk is lost as a whole, what was before it and what follows is not."""
    async with spilling() as disk:
        disk.write([text(1, 500), text(2, 500)])
        await disk.settle()
        with largest_file(2_048):
            disk.write([text(3, 500), text(4, 500), text(5, 500)])
            await disk.settle()
        assert disk.lost == [3, 4, 5]
        disk.write([text(6, 700)])
        assert seqs(await disk.read_all()) == [1, 2, 6]


@pytest.mark.anyio
@pytest.mark.parametrize("folder", ["missing", "a file"])
async def test_a_folder_that_takes_no_file_loses_events_until_it_does(folder: str, tmp_path: Path) -> None:
    """A wrong folder is a disk that refuses; once it has been put right, the spill works."""
    place = tmp_path / "spill"
    if folder == "a file":
        place.touch()
    async with spilling(directory=str(place)) as disk:
        disk.write(steps(1, 2))
        await disk.settle()
        assert disk.lost == [1, 2]
        place.unlink(missing_ok=True)
        place.mkdir()
        disk.write(steps(3, 4))
        assert seqs(await disk.read_all()) == [3, 4]
        assert list(place.iterdir()) == []  # the file has no name


def cut(file: IO[bytes]) -> None:
    file.truncate(os.fstat(file.fileno()).st_size - 100)


def cut_to_nothing(file: IO[bytes]) -> None:
    file.truncate(0)


def overwrite_event(file: IO[bytes]) -> None:
    os.pwrite(file.fileno(), b"\xc1" * 8, os.fstat(file.fileno()).st_size - 40)


def overwrite_length(file: IO[bytes]) -> None:
    os.pwrite(file.fileno(), b"\xff\xff\xff\xff", 0)


@pytest.mark.anyio
@pytest.mark.parametrize("damage", [cut, cut_to_nothing, overwrite_event, overwrite_length])
async def test_what_a_damaged_file_does_not_give_back_is_counted(
    damage: Callable[[IO[bytes]], None], files: list[IO[bytes]]
) -> None:
    """Whatever happens to the file, what can be read is, the rest is counted as lost, and the file is used again."""
    async with spilling() as disk:
        disk.write([text(at, 200) for at in range(1, 6)])
        await disk.settle()
        damage(files[0])
        received: list[int] = []
        lost = 0
        while disk.spill.count:
            items, gone = await disk.spill.read(1_000, HUGE)
            received += seqs(items)
            lost += gone
        assert received == list(range(1, len(received) + 1))
        assert len(received) + lost == 5
        assert lost > 0
        assert len(received) == 4 or damage is not overwrite_event
        disk.write([text(at, 300) for at in range(6, 9)])
        assert seqs(await disk.read_all()) == [6, 7, 8]
        assert len(files) == 1


@pytest.mark.anyio
async def test_nobody_waits_for_an_event_that_cannot_be_read_back(files: list[IO[bytes]]) -> None:
    """The subscription releases the fences of what the file has lost, counts it, and goes on."""
    async with spilling() as disk:
        delivery = Delivery(overflow="spill", capacity=1)
        subscription = Subscription("s", delivery, payloads=True, spill=disk.spill)
        fences = [Fence(["s"]) for _ in range(4)]
        subscription.offer([item(RunEnded, at, "finished", payload=Payload(fence=fences[at])) for at in range(4)])
        await disk.settle()
        cut_to_nothing(files[0])
        assert [event.seq for event, _ in await subscription.receive()] == [0]
        subscription.finish()
        with pytest.raises(anyio.EndOfStream):
            await subscription.receive()
        assert [fence.waiting for fence in fences] == [["s"], [], [], []]
        statistics = subscription.statistics
        assert (statistics.delivered, statistics.dropped, statistics.queued) == (1, 3, 0)


# ---------------------------------------------------------------------------------------------- its limits


@pytest.mark.anyio
async def test_beyond_its_limit_events_are_lost_until_some_are_read(files: list[IO[bytes]]) -> None:
    """The file never grows beyond the limit; what it has taken is intact, and reading makes room again."""
    async with spilling(limit_bytes=1_000) as disk:
        disk.write([text(at, 200) for at in range(1, 9)])
        await disk.settle()
        assert disk.lost == [4, 5, 6, 7, 8]
        assert disk.spill.count == 3
        assert seqs(await disk.read(1)) == [1]
        disk.write([text(9, 200), text(10, 200)])
        await disk.settle()
        assert disk.lost[5:] == [10]
        assert os.fstat(files[0].fileno()).st_size <= 1_000
        assert seqs(await disk.read_all()) == [2, 3, 9]


@pytest.mark.anyio
async def test_events_come_back_whole_from_both_sides_of_the_wrap(files: list[IO[bytes]]) -> None:
    """A ring that is never emptied wraps at every place of an event, its length included."""
    limit = 1_003
    async with spilling(limit_bytes=limit) as disk:
        received: list[Item] = []
        disk.write([text(1, 100)])
        for at in range(2, 400):
            disk.write([text(at, 100 + at % 7)])
            received += await disk.read(1)
        received += await disk.read_all()
        assert seqs(received) == list(range(1, 400))
        assert [len(event.reason) for event, _, _ in received] == [100, *(100 + at % 7 for at in range(2, 400))]  # type: ignore[attr-defined]
        assert os.fstat(files[0].fileno()).st_size <= limit
        assert disk.lost == []


@pytest.mark.anyio
async def test_an_emptied_file_gives_its_space_back(files: list[IO[bytes]]) -> None:
    """What has been read does not stay on the disk."""
    async with spilling() as disk:
        for first in (1, 11):
            disk.write([text(at, 1_000) for at in range(first, first + 10)])
            await disk.settle()
            assert os.fstat(files[0].fileno()).st_size > 10_000
            assert seqs(await disk.read_all()) == list(range(first, first + 10))
            assert os.fstat(files[0].fileno()).st_size == 0


@pytest.mark.anyio
async def test_a_disk_that_does_not_answer_is_bounded_in_memory() -> None:
    """On their way to the file events fill the memory limit, those that are not droppable twice that; no more."""
    async with spilling(memory_limit_bytes=4 * 512) as disk:
        with disk.held():
            disk.write(steps(1, 3))
            disk.write(steps(4, 6))
            assert (disk.lost, disk.spill.memory_bytes) == ([5, 6], 4 * 512)
            disk.write([item(RunEnded, 7, "finished")])  # 4 KiB: twice the limit has no room for it either
            assert disk.lost == [5, 6, 7]
        assert seqs(await disk.read_all()) == [1, 2, 3, 4]
        assert disk.spill.memory_bytes == 0
    async with spilling(memory_limit_bytes=4_096) as disk:
        with disk.held():
            disk.write([*steps(1, 8), *(item(RunEnded, at, "finished") for at in (9, 10)), *steps(11, 11)])
            assert disk.lost == [10, 11]
        assert seqs(await disk.read_all()) == [*range(1, 9), 9]


@pytest.mark.anyio
async def test_a_read_keeps_to_its_limits() -> None:
    """In number exactly, in bytes by one event at most; and one event there always is."""
    async with spilling() as disk:
        disk.write(steps(1, 20))
        assert seqs((await disk.spill.read(3, HUGE))[0]) == [1, 2, 3]
        assert seqs((await disk.spill.read(100, 1_100))[0]) == [4, 5, 6]
        assert seqs((await disk.spill.read(100, 1))[0]) == [7]
        assert disk.spill.count == 13


@pytest.mark.anyio
async def test_an_event_larger_than_one_read_comes_back_in_its_place() -> None:
    """Half a megabyte of text between small events."""
    async with spilling() as disk:
        disk.write([*steps(1, 2), text(3, 2**19), *steps(4, 5)])
        received: list[Item] = []
        while disk.spill.count:
            received += await disk.read(2)
        assert seqs(received) == [1, 2, 3, 4, 5]
        assert received[2][0].reason == "x" * 2**19  # type: ignore[attr-defined]


# ---------------------------------------------------------------------------------------- what is in it


@pytest.mark.anyio
async def test_odd_values_survive_and_what_cannot_be_written_is_lost_alone() -> None:
    """NaN stays NaN, lone surrogates become their escapes, and an integer of more than 64 bits takes none along."""
    async with spilling() as disk:
        disk.write(
            [
                item(MetricsLogged, 1, {"loss": math.nan, "best": -math.inf}),
                item(ObserverFailed, 2, "sink", "no such file: \udc80.txt"),
                item(RunStarted, 3, "Module", 1, None, None, {"seed": 2**80}),
                *steps(4, 4),
            ]
        )
        metrics, failed, step = [event for event, _, _ in await disk.read_all()]
        assert isinstance(metrics, MetricsLogged)
        assert math.isnan(metrics.metrics["loss"])
        assert metrics.metrics["best"] == -math.inf
        assert failed.error == "no such file: \\udc80.txt"  # type: ignore[attr-defined]
        assert step.seq == 4
        assert disk.lost == [3]


@pytest.mark.anyio
async def test_fenced_payloads_stay_in_memory_and_others_are_let_go() -> None:
    """The loop waits for a fenced hook, so it gets its outputs; nobody else's tensors are kept."""

    class Outputs:
        pass

    async with spilling() as disk:
        fenced = Payload(fence=Fence(["a"]), outputs=Outputs(), nbytes=10)
        other = Outputs()
        gone = weakref.ref(other)
        disk.write([item(RunEnded, 1, "finished", payload=fenced)])
        disk.write([item(TrainStepEnded, 2, payload=Payload(outputs=other, nbytes=10**6))])
        del other
        gc.collect()
        assert gone() is None
        assert [payload for _, payload, _ in disk.spill.fenced()] == [fenced]
        received = await disk.read_all()
        assert [payload for _, payload, _ in received] == [fenced, None]
        assert received[0][1] is fenced
        assert received[1][2] == 512
        assert disk.spill.fenced() == []


@pytest.mark.anyio
async def test_a_fenced_event_that_is_lost_is_not_kept() -> None:
    """Refused by the file, it is handed to whoever releases the fence, and its payload is let go."""
    async with spilling(limit_bytes=300) as disk:
        payloads = [Payload(fence=Fence(["a"])) for _ in range(2)]
        disk.write([item(RunEnded, at, "failed", "x" * 150, payload=payloads[at]) for at in range(2)])
        await disk.settle()
        assert disk.lost == [1]
        assert [payload for _, payload, _ in disk.spill.fenced()] == [payloads[0]]


# -------------------------------------------------------------------------------- cancelling and closing


@pytest.mark.anyio
async def test_what_a_cancelled_read_has_taken_is_returned_by_the_next() -> None:
    """The disk cannot be called back; its answer is not lost."""
    async with spilling() as disk:
        disk.write(steps(1, 6))
        with disk.held():
            for _ in range(2):
                with anyio.CancelScope() as scope:
                    scope.cancel()
                    await disk.read(2)
                assert scope.cancelled_caught
        assert disk.spill.count == 6
        assert seqs(await disk.read(1)) == [1, 2]
        assert seqs(await disk.read(1)) == [3]
        assert seqs(await disk.read_all()) == [4, 5, 6]


@pytest.mark.anyio
async def test_closing_ends_a_read_that_is_under_way() -> None:
    """Whoever closes has counted the events as dropped: the read brings nothing."""
    async with spilling() as disk:
        disk.write(steps(1, 6))
        results: list[Any] = []
        reading = anyio.Event()

        async def read() -> None:
            reading.set()
            results.append(await disk.spill.read(3, HUGE))

        async with anyio.create_task_group() as tasks:
            with disk.held():
                tasks.start_soon(read)
                await reading.wait()
                disk.spill.close()
                assert disk.spill.count == 0
        assert results == [([], 0)]


@pytest.mark.anyio
async def test_closing_lets_go_of_the_file_and_the_thread(files: list[IO[bytes]]) -> None:
    """After the writes under way, which nobody counts any more; twice is as good as once."""
    async with spilling() as disk:
        payload = Payload(fence=Fence(["a"]))
        with disk.held():
            disk.write([item(RunEnded, 1, "finished", payload=payload), *steps(2, 3)])
            (thread,) = [thread for thread in threading.enumerate() if thread.name == "spill-test"]
            assert [kept for _, kept, _ in disk.spill.close()] == [payload]
            assert disk.spill.close() == []
            disk.write(steps(4, 5))
        thread.join(LIMIT_S)
        assert not thread.is_alive()
        await disk.pump.drain()
        assert [file.closed for file in files] == [True]
        assert (disk.spill.count, disk.written, disk.lost) == (0, 0, [4, 5])
        assert disk.spill.fenced() == []


def test_a_spill_that_was_never_needed_has_neither_thread_nor_file(files: list[IO[bytes]]) -> None:
    """Most queues never overflow."""
    posted: list[Callable[[], object]] = []
    spill = Spill(Worker("spill-test", posted.append, CpuTime()), 1_000, 1_000, None)
    assert spill.close() == []
    assert [thread for thread in threading.enumerate() if thread.name == "spill-test"] == []
    assert files == posted == []


# ----------------------------------------------------------------------------------------- any schedule

OPERATION = st.one_of(
    st.tuples(st.just("write"), st.lists(st.integers(0, 400), min_size=1, max_size=8)),
    st.tuples(st.just("read"), st.integers(1, 6)),
)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(limit_bytes=st.sampled_from([300, 1_000, 5_003, 2**20]), schedule=st.lists(OPERATION, max_size=20))
def test_events_come_back_in_order_or_are_counted(
    backend: str, limit_bytes: int, schedule: list[tuple[str, Any]]
) -> None:
    """Whatever is written and read, each event is read once, in order, or named as lost; all of them if they fit."""

    async def main() -> None:
        async with spilling(limit_bytes) as disk:
            sizes: list[int] = []
            received: list[Item] = []
            for action, argument in schedule:
                if action == "write":
                    disk.write([text(len(sizes) + at, size) for at, size in enumerate(argument, 1)])
                    sizes += argument
                elif disk.spill.count:
                    received += (items := await disk.read(argument))
                    assert len(items) <= argument
            received += await disk.read_all()
            order = seqs(received)
            assert order == sorted(set(order))
            assert sorted(order + disk.lost) == list(range(1, len(sizes) + 1))
            assert disk.written == len(order)
            assert [len(event.reason) for event, _, _ in received] == [sizes[at - 1] for at in order]  # type: ignore[attr-defined]
            if limit_bytes == 2**20:
                assert disk.lost == []
            assert (disk.spill.count, disk.spill.memory_bytes) == (0, 0)

    anyio.run(main, backend=backend)
