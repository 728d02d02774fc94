"""A run over the network: the same events, commands and result, whatever happens to the connection."""

from __future__ import annotations

import contextlib
import gc
import http.server
import logging
import random
import re
import socket
import threading
import time
from collections.abc import Awaitable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest
from live.kit import Told
from support.threads import wait_until
from support.training import Net, make_trainer, read_journal

from events.errors import CursorError, RunCancelled, StagecastError
from events.messages import (
    BackwardEnded,
    CheckpointSaved,
    CommandTaken,
    Event,
    LedgerReported,
    MetricsLogged,
    RunEnded,
    RunStarted,
    StallLedger,
    TrainEpochEnded,
    TrainEpochStarted,
    TrainStepEnded,
)
from events.protocol import RunResult
from events.run.folder import RunFolder
from events.run.summary import Summary
from events.wire import encode_json
from sinks.live.runs import RunsOfFolder
from sinks.live.server import Server, bind
from sinks.live.sink import Live
from trainer import Checkpoints, Trainer
from trainer.errors import (
    CommandRefused,
    ConnectedRunFailed,
    ConnectedRunLost,
    ConnectError,
    ConnectionLost,
)
from trainer.remote.connect import connect
from trainer.remote.result import ResultBuilder, RunSnapshot

pytestmark = pytest.mark.anyio
TOKEN = "none-of-your-business"
MANY = 1_000_000


class Boom(Exception):
    """An error of a user's code."""


class Slow(Net):
    """A step takes some milliseconds, so that there is time to intervene."""

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        time.sleep(0.002)
        self.log("bias", self.linear.bias.detach().clone())
        return super().train_step(global_step, batch, device)


def fail(global_step: int) -> None:
    if global_step == 3:
        raise Boom("in a step")


class Proxy:
    """A connection to a server that can be cut after any number of bytes, and be dead for a while."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.lengths: Iterator[int] | None = None
        """Bytes to the client after which each connection is cut; None: never."""
        self.dead = False
        self.refused = threading.Event()
        """Set when a client has called while it was dead."""
        self.connections = 0
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:
                return
            self.connections += 1
            if self.dead:
                client.close()
                self.refused.set()
                continue
            server = socket.create_connection(("127.0.0.1", self.port))
            with self._lock:
                self._open |= {client, server}
            limit = next(self.lengths) if self.lengths is not None else None
            for source, sink, most in ((client, server, None), (server, client, limit)):
                threading.Thread(target=self._pump, args=(source, sink, most), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, most: int | None) -> None:
        try:
            while data := source.recv(4096):
                sink.sendall(data if most is None else data[:most])
                most = None if most is None else most - len(data)
                if most is not None and most <= 0:
                    break
        except OSError:
            pass
        for one in (source, sink):
            _close(one)
            with self._lock:
                self._open.discard(one)

    def cut(self, *, stay_dead: bool = False) -> None:
        self.dead = stay_dead
        with self._lock:
            for one in self._open:
                _close(one)

    def close(self) -> None:
        _close(self._listening)
        self.cut()


def _close(one: socket.socket) -> None:
    with contextlib.suppress(OSError):
        one.shutdown(socket.SHUT_RDWR)
    one.close()


@pytest.fixture(autouse=True)
def _no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STAGECAST_TOKEN", raising=False)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server of the runs of a folder, with commands."""
    (tmp_path / "runs").mkdir(exist_ok=True)
    one = _serve(tmp_path / "runs")
    yield one
    one.stop()


def _serve(folder: Path, port: int = 0, **options: Any) -> Server:
    def start() -> Server:
        server = Server(RunsOfFolder(folder), bind("127.0.0.1", port), "127.0.0.1", **({"commands": True} | options))
        server.start()
        return server

    with ThreadPoolExecutor(1) as thread:  # not in the event loop of a test: the server has its own
        return thread.submit(start).result()


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    one = Proxy(port_of(server))
    yield one
    one.close()


def port_of(server: Server) -> int:
    return int(server.url.rstrip("/").rpartition(":")[2])


def trainer(tmp_path: Path, module: Net | None = None, **options: Any) -> Trainer:
    """A trainer whose run is ``demo``, in a folder of the server."""
    own = {"run_id": "demo", "run_dir": tmp_path / "runs" / "demo", "journal": True, "epochs": MANY}
    return make_trainer(module if module is not None else Slow(), **(own | options))


def journal(tmp_path: Path) -> list[Event]:
    return read_journal(tmp_path / "runs" / "demo")


async def journalled(tmp_path: Path) -> None:
    """Wait for an event in the journal: before it, no server knows the run."""
    with anyio.fail_after(20):
        while not journal(tmp_path):  # noqa: ASYNC110  # a file reports nothing
            await anyio.sleep(0.01)


async def enter(connection: Any) -> None:
    async with connection:
        pytest.fail("the block was entered")


async def soon(what: Awaitable[Any]) -> Any:
    with anyio.fail_after(20):
        return await what


async def test_an_address_without_an_answer_is_an_error_at_once() -> None:
    """Without a retry: a wrong address is more likely than a late server."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConnectError, match=f"no run is served at http://127.0.0.1:{port}/: ConnectError"):
        await enter(connect(f"http://127.0.0.1:{port}"))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:8765",
        "ws://there/",
        "http:///x",
        "file:///etc",
        "http://[::1",
        "http://127.0.0.1:80 80/",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:80/\ud800",
        "https://me:hid/den@there/",
        "https://me:80/hidden@there/",
        "https://me:hidden@there@:x/",
        "//me:hidden@there",
        "me:hidden@there/#run=a",
        "https://there:x/#%74oken=hid#den",
        "there/token=hidden",
        "https:/me:hidden@there",
        "https:\\\\me:hidden@there:0",
        "https://me:hidden@there:0/",
        5,
    ],
)
async def test_an_invalid_address_is_refused_before_anything_is_sent(url: Any) -> None:
    """The error does not repeat a password."""
    with pytest.raises(ConnectError, match="is not the address of a page") as caught:
        connect(url)
    assert not re.search("hid|den", str(caught.value))


@pytest.mark.parametrize(
    "option",
    [{"run_id": 5}, {"run_id": "\ud800"}, {"token": 5}, {"give_up_s": "long"}, {"give_up_s": -1}, {"token": "ü"}],
)
async def test_an_invalid_option_is_refused_by_its_name(option: dict[str, Any]) -> None:
    with pytest.raises(ConnectError, match=next(iter(option))):
        connect("http://127.0.0.1:1", **option)


async def test_a_password_in_the_address_is_not_shown() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ConnectError, match=f"http://127.0.0.1:{port}/") as caught:
        await enter(connect(f"http://me:hidden@127.0.0.1:{port}"))
    assert "hidden" not in str(caught.value)


async def test_another_web_server_is_refused() -> None:
    """Whether it answers with a page or with a refusal."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<html>"
            self.send_response(200 if self.path == "/api/runs" else 404)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as other:
        threading.Thread(target=other.serve_forever).start()
        url = f"http://127.0.0.1:{other.server_port}/"
        with pytest.raises(ConnectError, match="is not a server of runs"):
            await enter(connect(url))
        with pytest.raises(ConnectError, match=r"run x at .*: the server answers 404 Not Found; see that the address"):
            await enter(connect(url, run_id="x"))
        other.shutdown()


async def test_the_token_is_sent_and_never_shown(told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an argument, or from the environment; one that fits no header is refused at once."""
    told.start()
    server = _serve(tmp_path / "runs", token=TOKEN)
    try:
        for wrong in (None, "wrong-" + TOKEN):
            with pytest.raises(ConnectError, match=r"401 Unauthorized .*give connect its token") as caught:
                await enter(connect(server.url, token=wrong))
            assert caught.value.status == 401
            assert TOKEN not in str(caught.value)
        with pytest.raises(ConnectError, match="the token has characters"):
            connect(server.url, token="tóken\n")
        async with connect(server.url, token=TOKEN) as run:
            assert run.run_id == "demo"
        monkeypatch.setenv("STAGECAST_TOKEN", TOKEN)
        async with connect(server.url) as run:
            assert [type(event) for event in await soon(run.events(since=0).receive())] == [RunStarted]
    finally:
        server.stop()


async def test_of_several_runs_one_must_be_named(tmp_path: Path, server: Server) -> None:
    """In the address, as the page has it, or as an argument; the error shows how."""
    with pytest.raises(ConnectError, match="serves no run yet"):
        await enter(connect(server.url))
    names = ["demo", "größer & schöner"]
    runs = [Told(tmp_path / "runs" / str(number), name) for number, name in enumerate(names)]
    for one in runs:
        one.write(one.story.started())
    with pytest.raises(ConnectError, match=r"serves 2 runs, .*demo \(running\).*connect\('http://.*#run="):
        await enter(connect(server.url))
    for given in (
        {"url": f"{server.url}#run=gr%C3%B6%C3%9Fer+%26+sch%C3%B6ner"},
        {"url": server.url, "run_id": names[1]},
    ):
        async with connect(**given) as run:
            assert run.run_id == names[1]
    with pytest.raises(ConnectError, match=r"404 Not Found \(there is no such run\)"):
        await enter(connect(server.url, run_id="other"))
    for one in runs:
        one.let_go()


async def test_a_connection_that_is_cut_anywhere_misses_nothing_and_repeats_nothing(
    told: Told, proxy: Proxy, anyio_backend: str
) -> None:
    """Hundreds of events, over dozens of connections, each cut after a random number of bytes."""
    draw = random.Random(len(anyio_backend))
    tell = told.story
    told.write(tell.started(), *tell.steps(600), tell.metrics(strange=float("nan")), tell.ended())
    told.let_go()
    async with connect(proxy.url) as run:
        proxy.lengths = iter(lambda: draw.randrange(700, 9_000), None)
        proxy.cut()  # the one that is open
        got = [event async for event in run.events(since=0)]
        some = [event async for event in run.events(since=300, types=[MetricsLogged, RunEnded])]
    assert proxy.connections > 15
    assert [encode_json(event) for event in got] == [encode_json(event) for event in told.events]
    assert [type(event) for event in some] == [MetricsLogged, RunEnded]


async def test_a_server_that_restarts_is_found_again(told: Told, tmp_path: Path) -> None:
    """It ends its answer cleanly in the middle of the run: that is not the end of the run."""
    tell = told.story
    server = _serve(tmp_path / "runs")
    told.start()
    async with connect(server.url) as run:
        stream = run.events(since=0)
        assert type(await soon(anext(stream))) is RunStarted
        for _ in range(2):
            await anyio.to_thread.run_sync(server.stop)
            told.write(*tell.steps(2))
            server = _serve(tmp_path / "runs", port_of(server))
            assert [(await soon(anext(stream))).global_step for _ in range(2)] == [
                tell.global_step - 1,
                tell.global_step,
            ]
        told.write(tell.ended())
        told.let_go()
        assert [type(event) async for event in stream] == [RunEnded]
        with pytest.raises(anyio.EndOfStream):
            await stream.receive()
    server.stop()


async def test_a_server_that_stays_away_times_out_and_may_be_used_again(told: Told, proxy: Proxy) -> None:
    """Waiting calls raise `ConnectionLost` after the given time; later calls continue."""
    tell = told.story
    told.start()
    async with connect(proxy.url, give_up_s=0.3) as run:
        stream = run.events(since=0)
        assert type(await soon(anext(stream))) is RunStarted
        proxy.cut(stay_dead=True)
        with pytest.raises(ConnectionLost, match=r"run demo at http://.* has been out of reach for 0\.3 s: .*"):
            await soon(anext(stream))
        with pytest.raises(ConnectionLost, match=r"out of reach for 0\.3 s"):
            await soon(run.result())
        proxy.dead = False
        told.write(tell.step())
        assert (await soon(anext(stream))).global_step == 1
        assert stream.cursor == 2


async def test_a_stream_starts_where_it_was_opened(told: Told, server: Server) -> None:
    """Earlier events are not in it; those between its opening and its first read are."""
    tell = told.story
    told.start(5)
    async with connect(server.url) as run:
        told.write(*tell.steps(5))
        stream = run.events()
        with anyio.fail_after(20):
            while stream.cursor != 11:
                with anyio.move_on_after(0.1):
                    await stream.receive()
        told.write(tell.step())
        assert (await soon(anext(stream))).global_step == 11


async def test_open_streams_are_released(told: Told, server: Server) -> None:
    """In the middle, when nothing refers to them; and at the end of the block, with an error for waiting tasks."""
    told.start(3)
    async with anyio.create_task_group() as tasks:

        async def wait(stream: Any) -> None:
            with pytest.raises(ConnectionLost, match=r"the block of connect.* was left"):
                while True:
                    await stream.receive()
            failed.append(stream)

        failed: list[Any] = []
        async with connect(server.url) as run:
            async for _ in run.events(since=0):
                break
            gc.collect()
            kept = run.events(since=0)
            await kept.receive()
            tasks.start_soon(wait, run.events(since=0))
            await anyio.wait_all_tasks_blocked()
    assert len(failed) == 1
    with pytest.raises(ConnectionLost, match="was left"):
        await kept.receive()
    with pytest.raises(ConnectionLost, match="wait for the run inside of it"):
        await run.result()
    with pytest.raises(ConnectionLost, match="was left"):
        run.stop()


async def test_events_that_are_not_in_the_journal_are_refused(told: Told, server: Server) -> None:
    """A stream of them would wait for ever."""
    told.start()
    async with connect(server.url) as run:
        with pytest.raises(CursorError, match="BackwardEnded cannot be watched from another process"):
            run.events(types=[BackwardEnded, TrainStepEnded])
        with pytest.raises(CursorError, match="since=-1"):
            run.events(since=-1)


async def test_the_last_checkpoint_arrives_after_the_end_of_the_loop(told: Told, server: Server) -> None:
    """It is durable only after `RunEnded`: the stream continues until the run releases its folder."""
    tell = told.story
    told.write(tell.started(), tell.step(), tell.ended("stopped"))
    got: list[type[Event]] = []
    async with connect(server.url) as run, anyio.create_task_group() as tasks:

        async def watch() -> None:
            got.extend([type(event) async for event in run.events(since=0)])

        tasks.start_soon(watch)
        with anyio.move_on_after(1.5) as waiting:  # longer than the server takes to look
            await run.result()
        assert waiting.cancelled_caught
        told.write(tell(CheckpointSaved, checkpoint="step-1.a1", path="/there/step-1.a1"))
        told.let_go()
        result = await soon(run.result())
    assert got == [RunStarted, TrainStepEnded, RunEnded, CheckpointSaved]
    assert result.checkpoint == "/there/step-1.a1"


async def test_a_run_is_commanded_over_the_network(tmp_path: Path, server: Server) -> None:
    """Commands are executed in order, a checkpoint is awaited, and the result is that of the run itself."""
    async with trainer(tmp_path, checkpoints=Checkpoints()).run() as here:
        await anext(here.events(since=0, types=[TrainEpochEnded]))
        await journalled(tmp_path)
        async with connect(f"{server.url}#run=demo") as run:
            taken = run.events(types=[CommandTaken])
            run.pause("look")
            run.resume()
            path = await soon(run.checkpoint("now"))
            assert path in {event.path for event in journal(tmp_path) if isinstance(event, CheckpointSaved)}
            run.stop("enough")
            result = await soon(run.result())
            commands = [(event.command, event.reason) async for event in taken]
        assert await run.result() == result  # also afterwards, now that it is known
        run.pause()
    own = await here.result()
    assert commands == [("pause", "look"), ("resume", None), ("checkpoint", "now"), ("stop", "enough")]
    _assert_like(result, own)
    assert result.checkpoint == own.checkpoint != path


def _assert_like(result: RunResult, own: RunResult) -> None:
    for name in ("run_id", "attempt", "status", "reason", "global_step", "epochs", "metrics", "ledger"):
        assert getattr(result, name) == getattr(own, name), name


@pytest.mark.parametrize("waits", ["result", "checkpoint", "stream", "nobody"])
async def test_a_refused_command_raises_in_the_waiting_call(
    told: Told, tmp_path: Path, waits: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with a log entry; the run can still be watched. Without a waiting call, the end of the block raises."""
    tell = told.story
    told.start()
    server = _serve(tmp_path / "runs", commands=False)
    caplog.set_level(logging.WARNING)
    with pytest.raises(CommandRefused, match=r"'(stop|checkpoint)' was not taken: .*403 .*takes no commands") as caught:
        async with connect(server.url) as run:
            if waits == "nobody":
                run.stop()
            else:
                stream = run.events(since=1)
                with pytest.raises(CommandRefused) as told_once:
                    if waits == "result":
                        run.stop()
                        await soon(run.result())
                    elif waits == "checkpoint":
                        await soon(run.checkpoint())
                    else:
                        run.stop()
                        await soon(stream.receive())
                told.write(tell.step())
                assert (await soon(anext(stream))).global_step == 1
                raise told_once.value
    assert caught.value.status == 403
    assert "did not get through" in caplog.text
    server.stop()


async def test_commands_wait_for_a_server_that_is_away_and_keep_their_order(tmp_path: Path, proxy: Proxy) -> None:
    """The end of the block waits for their arrival."""
    async with trainer(tmp_path).run() as here:
        await anext(here.events(since=0, types=[TrainStepEnded]))
        await journalled(tmp_path)
        async with connect(proxy.url) as run, anyio.create_task_group() as tasks:
            proxy.cut(stay_dead=True)
            run.pause("1")
            await anyio.to_thread.run_sync(run.resume, "2")  # any thread may
            run.pause("3")
            run.stop("4")

            async def repair() -> None:
                assert await anyio.to_thread.run_sync(proxy.refused.wait, 20.0)
                proxy.dead = False

            tasks.start_soon(repair)
    assert (await here.result()).reason == "4"
    reasons = [event.reason for event in journal(tmp_path) if isinstance(event, CommandTaken)]
    assert reasons == ["1", "2", "3", "4"]


async def test_a_command_that_cannot_be_delivered_raises_at_the_end_of_the_block(told: Told, proxy: Proxy) -> None:
    """After the given time: a lost stop must not look like a sent one."""
    told.start()
    with pytest.raises(ConnectionLost, match=r"out of reach for 0\.2 s"):
        async with connect(proxy.url, give_up_s=0.2) as run:
            proxy.cut(stay_dead=True)
            run.stop()


async def test_a_command_for_a_run_that_is_over_is_harmless(told: Told, server: Server) -> None:
    told.start()
    async with connect(server.url) as run:
        told.write(told.story.ended())
        told.let_go()
        run.stop()
        assert (await soon(run.result())).status == "finished"
        run.stop()
    run.stop()
    async with connect(server.url) as run:
        run.pause()


async def test_leaving_the_block_in_any_way_does_not_disturb_the_run(tmp_path: Path, server: Server) -> None:
    """Cleanly, by an exception, which propagates unchanged, or cancelled; earlier commands are sent."""
    error = Boom("mine")
    async with trainer(tmp_path).run() as here:
        steps = here.events(since=0, types=[TrainStepEnded])
        await anext(steps)
        await journalled(tmp_path)
        async with connect(server.url):
            pass
        with pytest.raises(Boom) as caught:
            async with connect(server.url) as run:
                await anext(run.events(since=0))
                raise error
        assert caught.value is error
        with anyio.CancelScope() as scope:
            async with connect(server.url) as run:
                run.pause("cancelled")
                scope.cancel()
                await run.result()
        assert scope.cancelled_caught
        taken = await soon(anext(here.events(since=0, types=[CommandTaken])))
        assert (taken.command, taken.reason) == ("pause", "cancelled")
        here.resume()
        await soon(anext(steps))
        with pytest.raises(Boom):
            async with connect(server.url) as run:
                run.stop("on the way out")
                raise error
    assert (await here.result()).reason == "on the way out"


async def test_a_run_that_fails_or_is_cancelled_raises_a_typed_error(tmp_path: Path, server: Server) -> None:
    """With the type, the text and the run's last step of the exception."""
    with pytest.raises(Boom):
        async with trainer(tmp_path, Slow(act=fail)).run():
            pass
    async with connect(server.url) as run:
        with pytest.raises(ConnectedRunFailed, match="run demo failed after global_step 2: Boom: in a step") as caught:
            await soon(run.result())
    assert caught.value.result is not None
    assert (caught.value.result.status, caught.value.result.global_step) == ("failed", 2)
    cancelled = anyio.CancelScope()
    with cancelled:
        async with trainer(tmp_path, resume=None).run() as here:
            await anext(here.events(types=[TrainStepEnded]))
            cancelled.cancel()
    async with connect(server.url) as run:
        with pytest.raises(RunCancelled, match="run demo was cancelled: its task was cancelled"):
            await soon(run.result())


async def test_a_run_whose_process_dies_is_lost(told: Told, server: Server) -> None:
    """The journal has no end, and no process holds the folder."""
    told.write(told.story.started(), told.story.step())
    async with connect(server.url) as run:
        stream = run.events(since=0)
        await stream.receive()
        told.let_go()  # as the system does for one that is killed
        assert [event async for event in stream] == []
        with pytest.raises(ConnectedRunLost, match="run demo is lost"):
            await soon(run.result())
        assert issubclass(ConnectedRunLost, StagecastError)


async def test_a_page_that_ends_with_its_run_has_sent_everything(tmp_path: Path) -> None:
    """The sink `Live` ends with the run; the run's folder has the link, with the generated token."""
    live = Live(commands=True)
    async with trainer(tmp_path, sinks=[live], checkpoints=Checkpoints()).run() as here:
        await anext(here.events(since=0, types=[TrainStepEnded]))
        folder = tmp_path / "runs" / "demo"
        await anyio.to_thread.run_sync(wait_until, (folder / "live.json").exists)
        async with connect(folder) as run:
            stream = run.events(since=0)
            run.stop("seen enough")
            began = time.monotonic()
            result = await soon(run.result())
            got = [event async for event in stream]
            took_s = time.monotonic() - began
    own = await here.result()
    _assert_like(result, own)
    assert result.checkpoint == own.checkpoint
    assert [event.seq for event in got] == [event.seq for event in journal(tmp_path)][: len(got)]
    assert RunEnded in {type(event) for event in got}
    assert took_s < 15


def test_a_folder_whose_page_cannot_be_found_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an address, with one that is not a file, is damaged, or belongs to another user."""
    with pytest.raises(ConnectError, match=r"has no live\.json, .*; add the sink Live"):
        connect(tmp_path)
    address = tmp_path / "live.json"
    (tmp_path / "other").write_text('{"url": "http://127.0.0.1:1/", "token": "of-somebody"}')
    address.symlink_to(tmp_path / "other")
    with pytest.raises(ConnectError, match="is a symbolic link"):
        connect(tmp_path)
    for data in (b"", b'{"url": 5}', b"\xff", b'{"url": "' + b"x" * 100_000, b'{"x":' + b"[" * 16_000):
        address.unlink()
        address.write_bytes(data)
        with pytest.raises(ConnectError, match="cannot be read"):
            connect(str(tmp_path))
    address.unlink()
    address.write_text('{"url": "http://127.0.0.1:1/", "token": "of-somebody"}')
    with RunFolder.open(tmp_path, "run"):
        connect(tmp_path)
    monkeypatch.setattr("os.geteuid", lambda: 4_242)
    with pytest.raises(ConnectError, match="belongs to another user"):
        connect(tmp_path)


def test_a_result_comes_from_a_summary_and_the_last_events() -> None:
    """Older values come from the summary, newer ones from the events; a new attempt starts again."""
    latest: dict[str, Any] = {"train_loss": 2.0, "rare": "nan", "lr": 0.1, "system/cpu_percent": 3.0}
    known = RunSnapshot(cursor=90, run=Summary("demo", attempt=2, status="running", epoch=7, latest=latest))
    builder = ResultBuilder(known)

    def event(kind: type[Event], attempt: int, epoch: int, **fields: Any) -> Any:
        return kind("demo", attempt, 91, 0.0, 0, 40, epoch, None, **fields)

    builder.add([event(TrainStepEnded, 1, 3, loss=9.0)])  # of an attempt that was superseded
    assert builder.result is None
    builder.add([event(MetricsLogged, 2, 7, metrics={"often": 1.0}, key="easy")])
    builder.add([event(RunEnded, 2, 7, status="stopped", reason="x")])
    result = builder.result
    assert result is not None
    assert (result.status, result.reason, result.attempt, result.epochs, result.global_step) == (
        "stopped",
        "x",
        2,
        7,
        40,
    )
    assert {name: str(value) for name, value in result.metrics.items()} == {
        "train_loss": "2.0",
        "rare": "nan",
        "often/easy": "1.0",
    }
    builder.add([event(RunStarted, 3, 7, module="m", epochs=9), event(TrainEpochStarted, 3, 8)])
    assert builder.result is None
    builder.add(
        [event(TrainEpochEnded, 3, 8), event(LedgerReported, 3, 8, scope="run", ledger=StallLedger(wall_s=1.0))]
    )
    builder.add([event(RunEnded, 3, 8, status="finished")])
    result = builder.result
    assert result is not None
    assert (result.attempt, result.epochs, result.ledger.wall_s) == (3, 9, 1.0)
