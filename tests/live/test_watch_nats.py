"""The page of runs that a NATS server keeps: as that of a folder, from anywhere."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import msgspec
import pytest
from live.kit import Serve, Start, Story
from support.nats_server import NatsServer, StartNats
from support.threads import trainer_threads, wait_until
from support.training import Net, make_trainer, read_journal

from events.errors import RunFolderError
from events.messages import Event, JournalGap
from events.protocol import Pause
from events.run.folder import is_held
from events.run.inbox import commands_of
from events.sink import Delivery
from sinks import NATS
from sinks.live.runs import RunsOfFolder
from sinks.nats import liveness
from sinks.nats.address import NatsAddress
from sinks.nats.mirror import NatsMirror
from sinks.testing import opened
from trainer import connect

pytest.importorskip("nats")


@pytest.fixture
def server(start_nats: StartNats) -> NatsServer:
    return start_nats()


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Copy the runs of an address to a folder."""
    started: list[NatsMirror] = []

    def start(url: str) -> Path:
        folder = tmp_path / f"mirror{len(started)}"
        folder.mkdir()
        started.append(NatsMirror(NatsAddress.of(url), folder))
        started[-1].start()
        return folder

    yield start
    for one in started:
        one.stop()
    wait_until(lambda: not [name for name in trainer_threads() if "nats" in name], "a thread has not ended")


def publish(url: str, *events: Event) -> None:
    with opened(NATS(url), run_id=events[0].run_id) as write:
        write(events)


def steps_in(folder: Path) -> list[int]:
    return [event.seq for event in read_journal(folder)] if folder.exists() else []


@pytest.mark.anyio
async def test_the_page_shows_and_steers_the_runs_of_a_server(
    server: NatsServer, mirror: Callable[[str], Path], serve: Serve, tmp_path: Path
) -> None:
    """Several, each with its own status; a command goes through the page and NATS to the loop, and back as an event."""
    old = Story("old 1.0")
    await anyio.to_thread.run_sync(publish, server.url, old.started(), *old.steps(3), old.ended())
    here: Delivery = msgspec.structs.replace(NATS.delivery, runs_in="thread", latency_s=0.02)

    def slowly(step: int) -> None:
        threading.Event().wait(0.002)

    options: dict[str, Any] = {"run_id": "new", "run_dir": tmp_path / "new", "journal": True, "epochs": 1_000_000}
    there = make_trainer(Net(act=slowly), sinks=[(NATS(server.url, commands=True), here)], **options)
    async with there.run() as run:
        folder = await anyio.to_thread.run_sync(mirror, server.url)
        page = await anyio.to_thread.run_sync(lambda: serve(RunsOfFolder(folder), commands=True))
        states: dict[str, str] = {}
        with anyio.fail_after(20):
            while states != {"old 1.0": "finished", "new": "running"}:
                await anyio.sleep(0.02)
                states = {one.run_id: one.status for one in await RunsOfFolder(folder).summaries(True)}
        async with connect(page.url, run_id="new") as remote:
            seen: list[Event] = []
            remote.stop("by the page", checkpoint=False)
            with anyio.fail_after(20):
                async for event in remote.events(since=0):
                    seen.append(event)
                result = await remote.result()
        assert (result.status, result.reason) == ("stopped", "by the page")
        assert (await run.result()).global_step == result.global_step
    assert seen == (await anyio.to_thread.run_sync(read_journal, tmp_path / "new"))[: len(seen)]
    async with connect(page.url, run_id="old 1.0") as remote:
        assert (await remote.result()).global_step == 3


def test_a_copy_survives_its_server_and_tells_the_living_from_the_lost(
    server: NatsServer, mirror: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is missing or twice; a run whose sink answers is under way, however silent."""
    monkeypatch.setattr(liveness, "_UNSERVED_S", 0.3)
    monkeypatch.setattr(liveness, "_QUIET_S", 0.1)
    story, other = Story("one"), Story("two")
    story.time = other.time = time.time()
    publish(server.url, other.started())
    folder = mirror(f"{server.url}/one")
    with opened(NATS(server.url), run_id="one") as write:
        write([story.started(), *story.steps(5)])
        wait_until(lambda: len(steps_in(folder / "one")) == 6)
        server.kill()
        wait_until(lambda: "the page shows what was there, and tries again" in caplog.text)
        server.start()
        more = story.steps(5)
        wait_until(lambda: _taken(write, more))
        wait_until(lambda: steps_in(folder / "one") == [*range(1, 12)])
        threading.Event().wait(1.5)  # longer than a run may be silent whose sink does not answer
        assert is_held(folder / "one")
        with pytest.raises(RunFolderError, match=r"it needs NATS\(commands=True\)"):
            commands_of(folder / "one").send(Pause(id="1"))
    wait_until(lambda: not is_held(folder / "one"), "the run is not lost")
    with pytest.raises(RunFolderError, match="no run is under way"):
        commands_of(folder / "one").send(Pause(id="2"))
    assert [path.name for path in folder.iterdir()] == ["one"]  # the address names it
    publish(server.url, *story.resumed(5, 6), *story.steps(1))
    wait_until(lambda: steps_in(folder / "one") == [*range(1, 15)])


def _taken(write: Callable[[Any], None], events: list[Event]) -> bool:
    try:
        write(events)
    except ConnectionError:
        return False
    return True


def test_what_the_stream_no_longer_has_and_names_that_no_folder_can_have(
    server: NatsServer, mirror: Callable[[str], Path]
) -> None:
    """A gap in the journal names the events; a long name is shortened; other messages are skipped."""
    url = f"{server.url}?prefix=small"
    story = Story("../" + "ü" * 200)
    with opened(NATS(url, max_bytes=20_000), run_id=story.run_id) as write:
        write([story.started(), *story.steps(200)])
    publish(url, Story("a\nb").started())
    folder = mirror(url)
    wait_until(lambda: any(folder.iterdir()) and steps_in(next(folder.iterdir()))[-1:] == [201])
    (run,) = folder.iterdir()
    gap, *rest = read_journal(run)
    assert isinstance(gap, JournalGap)
    assert (gap.first_seq, gap.last_seq + 1) == (1, rest[0].seq)
    assert len(run.name) < 200


@pytest.mark.cold_start  # a forked program knows another temporary folder
def test_the_command_serves_until_a_signal_and_leaves_nothing(
    server: NatsServer, process: Start, tmp_path: Path
) -> None:
    """Its copy is in a temporary folder."""
    story = Story()
    publish(server.url, story.started(), story.ended())
    room = tmp_path / "tmp"
    room.mkdir()
    arguments = ["-m", "trainer.cli.main", "watch", server.url.replace("//", "//user:hidden@"), "--port", "0"]
    child = process(*arguments, TMPDIR=str(room))
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line.startswith(f"{server.url} can be watched at http://127.0.0.1:")
    wait_until(lambda: list(room.glob("stagecast-nats-*/demo/journal/*.jsonl")))
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 143
    assert "hidden" not in line + child.stdout.read()
    assert list(room.iterdir()) == []
    server.kill()
    refused = process(*arguments, TMPDIR=str(room))
    assert refused.wait(20) == 1
    assert refused.stdout is not None
    assert "stagecast watch: error: no NATS server at nats://127.0.0.1:" in refused.stdout.read()
