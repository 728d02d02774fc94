"""A run through NATS is the run that `connect` finds over HTTP: the same events, commands and result."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from live.kit import Story
from support.nats_server import NatsServer, StartNats
from support.training import Net, make_trainer, read_journal

from events.errors import CheckpointError, RunCancelled
from events.messages import CheckpointSaved, CommandTaken, Event, RunEnded, TrainEpochEnded, TrainStepEnded
from events.sink import Delivery
from sinks import NATS
from sinks.nats import liveness
from sinks.testing import opened
from trainer import Checkpoints, Trainer, connect
from trainer.errors import CommandRefused, ConnectedRunFailed, ConnectedRunLost, ConnectError, ConnectionLost

pytest.importorskip("nats")
pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("no_nats_client_is_left")]
MANY = 1_000_000


class Slow(Net):
    """A step waits a little, so that there is time to intervene."""

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        threading.Event().wait(0.002)
        return super().train_step(global_step, batch, device)


def trainer(folder: Path, url: str, run_id: str, module: Net | None = None, **options: Any) -> Trainer:
    """One with the sink on a thread: a sink host takes seconds to start."""
    here: Delivery = msgspec.structs.replace(NATS.delivery, runs_in="thread", latency_s=0.02)
    sinks = [(NATS(url, commands=options.pop("commands", True)), here)]
    own = {"run_id": run_id, "run_dir": folder / run_id, "journal": True, "epochs": MANY}
    return make_trainer(module or Slow(), sinks=sinks, **(own | options))


async def publish(url: str, events: list[Event]) -> None:
    def write() -> None:
        with opened(NATS(url), run_id=events[0].run_id) as deliver:
            deliver(events)

    await anyio.to_thread.run_sync(write)


async def soon(what: Awaitable[Any]) -> Any:
    with anyio.fail_after(20):
        return await what


async def published(nats_server: NatsServer, run_id: str) -> None:
    with anyio.fail_after(20):
        while not await anyio.to_thread.run_sync(nats_server.stored, run_id):  # noqa: ASYNC110  # no one reports it
            await anyio.sleep(0.02)


async def enter(connection: Any) -> None:
    async with connection:
        pytest.fail("the block was entered")


@pytest.mark.both_event_loops
async def test_events_commands_and_result_are_those_of_the_run(
    nats_server: NatsServer, tmp_path: Path, anyio_backend: str
) -> None:
    """Pause, resume, checkpoint and stop, each taken by the loop; the events are the journal's."""
    name = f"steered.{anyio_backend}"
    there = trainer(tmp_path, nats_server.url, name, checkpoints=Checkpoints(every_steps=None))
    async with there.run() as run:
        await published(nats_server, name)
        async with connect(f"{nats_server.url}/{name}") as remote:
            assert remote.run_id == name
            seen: list[Event] = []
            taken = remote.events(types=[CommandTaken])
            remote.pause("a look")
            assert (await soon(anext(taken))).command == "pause"
            remote.resume()
            assert (await soon(anext(taken))).command == "resume"
            path = await soon(remote.checkpoint("now"))
            assert path == str(tmp_path / name / "checkpoints" / path.rpartition("/")[2])
            remote.stop("enough", checkpoint=False)
            stream = remote.events(since=0)
            with anyio.fail_after(20):
                async for event in stream:
                    seen.append(event)
            result = await soon(remote.result())
            assert (result.run_id, result.status, result.reason, result.checkpoint) == (name, "stopped", "enough", path)
            remote.stop()  # harmless: the run is over
        own = await run.result()
    assert (own.global_step, own.metrics["train_loss"]) == (result.global_step, result.metrics["train_loss"])
    kept = await anyio.to_thread.run_sync(read_journal, tmp_path / name)
    assert seen == kept[: len(seen)]
    assert any(isinstance(event, RunEnded) for event in seen)
    assert stream.cursor == seen[-1].seq
    async with connect(f"{nats_server.url}/{name}") as remote:  # long after
        assert await soon(remote.result()) == result
        again = [event async for event in remote.events(since=seen[9].seq)]
        assert again == seen[10:]


async def test_how_a_run_ended_is_raised(nats_server: NatsServer, tmp_path: Path) -> None:
    """As over HTTP: a failure with its text, a cancellation, and a process that died."""

    def fail(step: int) -> None:
        if step == 3:
            raise ValueError("in a step")

    async with connect_when(
        nats_server, "failing", trainer(tmp_path, nats_server.url, "failing", Net(act=fail), epochs=3)
    ) as run:
        with pytest.raises(
            ConnectedRunFailed, match=r"run failing failed after global_step 2: ValueError: in a step"
        ) as caught:
            await soon(run.result())
    assert caught.value.result is not None
    story = Story("cancelled")
    await publish(
        nats_server.url,
        [story.started(), *story.steps(2), story(RunEnded, status="cancelled", reason="by its service")],
    )
    async with connect(nats_server.url, run_id="cancelled") as run:
        with pytest.raises(RunCancelled, match="by its service"):
            await soon(run.result())
        with pytest.raises(CheckpointError, match="ended before"):
            await soon(run.checkpoint())
    story = Story("dead")
    await publish(nats_server.url, [story.started(), *story.steps(2)])
    async with connect(nats_server.url, run_id="dead") as run:
        assert len([event async for event in run.events(since=0)]) == 3
        with pytest.raises(ConnectedRunLost, match="run dead is lost"):
            await soon(run.result())


def connect_when(nats_server: NatsServer, run_id: str, ready: Trainer) -> Any:
    """Connect to a run that trains on a thread, from its first event on."""

    class Both:
        async def __aenter__(self) -> Any:
            def train() -> None:
                with contextlib.suppress(ValueError):
                    ready.train()

            self.thread = threading.Thread(target=train)
            self.thread.start()
            await published(nats_server, run_id)
            self.connection = connect(f"{nats_server.url}/{run_id}")
            return await self.connection.__aenter__()

        async def __aexit__(self, *exc_info: Any) -> None:
            await self.connection.__aexit__(*exc_info)
            await anyio.to_thread.run_sync(self.thread.join)

    return Both()


@pytest.mark.both_event_loops
async def test_a_run_that_dies_meanwhile_is_lost(
    nats_server: NatsServer, monkeypatch: pytest.MonkeyPatch, anyio_backend: str
) -> None:
    """Its sink answers no more. As long as it does, a run may be silent."""
    monkeypatch.setattr(liveness, "_UNSERVED_S", 0.3)
    monkeypatch.setattr(liveness, "_QUIET_S", 0.1)
    story = Story(f"dying.{anyio_backend}")
    sink = opened(NATS(nats_server.url), run_id=story.run_id)
    write = await anyio.to_thread.run_sync(sink.__enter__)
    try:
        await anyio.to_thread.run_sync(write, [story.started(), *story.steps(2)])
        async with connect(nats_server.url, run_id=story.run_id) as run:
            stream = run.events(since=0)
            assert len(await soon(stream.receive())) == 3
            with anyio.move_on_after(1.5):
                await stream.receive()
                pytest.fail("there is no event")
            await anyio.to_thread.run_sync(write, story.steps(1))
            assert len(await soon(stream.receive())) == 1
            await anyio.to_thread.run_sync(sink.__exit__, None, None, None)
            with pytest.raises(ConnectedRunLost):
                await soon(run.result())
            with pytest.raises(anyio.EndOfStream):
                await soon(stream.receive())
    finally:
        await anyio.to_thread.run_sync(sink.__exit__, None, None, None)


async def test_a_server_that_is_killed_loses_and_repeats_nothing(start_nats: StartNats, tmp_path: Path) -> None:
    """Both sides connect again; what the run published meanwhile comes from its journal."""
    own = start_nats()
    async with trainer(tmp_path, own.url, "demo").run() as run:
        await published(own, "demo")
        async with connect(f"{own.url}/demo") as remote:
            stream = remote.events(since=0)
            seen = await soon(stream.receive())
            for _ in range(2):
                own.kill()
                await anyio.sleep(0.3)
                await anyio.to_thread.run_sync(own.start)
                begun = len(seen)
                with anyio.fail_after(20):
                    while len(seen) < begun + 200:
                        seen += await stream.receive()
            remote.stop()
            with anyio.fail_after(20):
                async for event in stream:
                    seen.append(event)
            assert (await soon(remote.result())).status == "stopped"
        await run.result()
    assert seen == (await anyio.to_thread.run_sync(read_journal, tmp_path / "demo"))[: len(seen)]
    assert sum(isinstance(event, TrainStepEnded) for event in seen) > 100


async def test_a_stream_begins_anywhere_in_a_long_history(nats_server: NatsServer) -> None:
    """Without reading what stands before, among the events of other runs; now, and of chosen types."""
    one, other = Story("long.one"), Story("long.other")
    events: list[Event] = [one.started()]
    await publish(nats_server.url, events)
    for _ in range(4):
        more = one.steps(4_000)
        await publish(nats_server.url, more)
        await publish(nats_server.url, [other.started() if not other.seq else other.step(), *other.steps(3_000)])
        events += more
    async with connect(nats_server.url, run_id="long.one") as run:
        for since in (1, 6_000, 15_000, len(events) - 1):
            stream = run.events(since=since)
            assert (await soon(anext(stream))).seq == since + 1
            await stream.aclose()
        now = run.events(types=[TrainEpochEnded])
        with anyio.fail_after(20):
            while now.cursor != len(events):  # noqa: ASYNC110  # the server says where the stream begins
                await anyio.sleep(0.01)
        last = [one(TrainEpochEnded), *one.steps(1), one.ended()]
        await publish(nats_server.url, last)
        assert [event.seq for event in [event async for event in now]] == [last[0].seq]
        assert [event async for event in run.events(since=len(events) - 2)] == [*events[-2:], *last]


async def test_a_refused_command_is_raised(nats_server: NatsServer, tmp_path: Path) -> None:
    """By the sink, which takes none unless it is told to; and one that no sink takes."""
    async with trainer(tmp_path, nats_server.url, "closed", commands=False).run() as run:
        await published(nats_server, "closed")
        async with connect(nats_server.url, run_id="closed") as remote:
            remote.stop()
            with pytest.raises(CommandRefused, match=r"'stop' was not taken: .*it needs NATS\(commands=True\)"):
                await soon(remote.result())
        run.stop()
        await run.result()


@pytest.mark.both_event_loops
async def test_a_cancelled_wait_loses_nothing(nats_server: NatsServer, anyio_backend: str) -> None:
    """In every wait of a connection: entering, receiving, waiting for the result; and natively under asyncio."""
    story = Story(f"cut.{anyio_backend}")
    events: list[Event] = [story.started(), *story.steps(2_000), story.ended()]
    await publish(nats_server.url, events)
    for milliseconds in (0, 1, 3, 10, 30):
        with anyio.move_on_after(milliseconds / 1000):
            async with connect(nats_server.url, run_id=story.run_id) as run:
                await run.result()
    async with connect(nats_server.url, run_id=story.run_id) as run:
        stream = run.events(since=0)
        seen: list[Event] = []
        for attempt in range(200):
            if anyio_backend == "asyncio" and attempt % 2:
                task = asyncio.ensure_future(stream.receive())
                await asyncio.sleep(attempt / 20_000)
                task.cancel()
                try:
                    seen += await task
                except asyncio.CancelledError:
                    continue
                except anyio.EndOfStream:
                    break
            else:
                with anyio.move_on_after(attempt / 10_000):
                    try:
                        seen += await stream.receive()
                    except anyio.EndOfStream:
                        break
        with anyio.fail_after(20):
            seen += [event async for event in stream]
        assert seen == events


async def test_what_is_wrong_is_named(start_nats: StartNats, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server, the stream, the run, the token; each before the block is entered."""
    own = start_nats()
    with pytest.raises(ConnectError, match=r"has no stream of stagecast\.\*\.\*; see that a run with the sink NATS"):
        await enter(connect(own.url))
    story = Story("größer 1.0")
    await publish(own.url, [story.started(), story.ended()])
    async with connect(own.url) as run:  # the only one
        assert run.run_id == story.run_id
        assert (await soon(run.result())).status == "finished"
    story = Story("other")
    story.time = time.time()
    await publish(own.url, [story.started()])
    with pytest.raises(
        ConnectError, match=r"has 2 runs, größer 1\.0, other; choose one, as in connect\('.*/gr%C3%B6%C3%9Fer%201\.0'\)"
    ):
        await enter(connect(own.url))
    with pytest.raises(ConnectError, match="has no events of run third"):
        await enter(connect(f"{own.url}/third"))
    for wrong in ("nats://me:hid/den@there", "nats://there?speed=1", "tls://"):
        with pytest.raises(ConnectError, match="NATS") as caught:
            connect(wrong)
        assert "hid" not in str(caught.value)
    async with connect(f"{own.url}/other", give_up_s=0.5) as run:
        own.kill()
        with pytest.raises(ConnectionLost, match=r"run other at nats://.* has been out of reach for 0\.5 s: .*refused"):
            await soon(run.result())
    with pytest.raises(ConnectError, match=r"no run is served at nats://127\.0\.0\.1:.*: Connection refused"):
        await enter(connect(f"{own.url}/other"))
    assert CheckpointSaved.journalled
