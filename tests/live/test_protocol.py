"""Messages to clients that others wrote, and to clients that misbehave."""

from __future__ import annotations

import contextlib
import random
import socket as sockets
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import anyio.to_thread
import httpx
import msgspec
import pytest
from httpx_sse import connect_sse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from live.kit import Feeder, Serve, Story, Told, Watcher, code_of, connect_websocket, hub_of, port_of, read_until, watch
from support.threads import WAIT_S, wait_until
from websockets.exceptions import ConnectionClosed, InvalidStatus

from events.messages import CheckpointSaved
from sinks.live import client as client_module
from sinks.live import frames as frames_module
from sinks.live import hub as hub_module
from sinks.live import protocols as protocols_module
from sinks.live import responses as responses_module
from sinks.live import server as server_module
from sinks.live.access import Access
from sinks.live.app import LiveApp
from sinks.live.hub import Hub
from sinks.live.runs import OneRun, RunsOfFolder


def test_an_address_without_a_run_is_refused(told: Told, serve: Serve) -> None:
    """By WebSocket: an unknown run is 4404; any other address is not a WebSocket."""
    server = serve(RunsOfFolder(told.path))
    for path in ("", "api/runs/demo", "api/runs/demo/events", "api/runs/a/b/ws"):
        with pytest.raises(InvalidStatus), connect_websocket(server.url.replace("http", "ws") + path):
            pass
    with watch(server.url) as socket, pytest.raises(ConnectionClosed) as closed:
        socket.send(Watcher().hello())
        socket.recv(timeout=10)
    assert code_of(closed) == 4404


def test_disconnects_lose_and_repeat_nothing(story: Story, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of both protocols come and go, cut off at random places; one stays connected."""
    monkeypatch.setattr(hub_module, "FRAME_S", 0.005)
    hub = hub_of(story)
    server = serve(hub)
    watchers = [Watcher() for _ in range(8)]
    errors: list[BaseException] = []

    def by_socket(watcher: Any, messages: int, *, takes_gzip: bool) -> None:
        with watch(server.url) as socket:
            socket.send(watcher.resume(gzip=takes_gzip) if watcher.cursor else watcher.hello(gzip=takes_gzip))
            for _ in range(messages):
                data = socket.recv(timeout=10)
                watcher.take(data)
                assert isinstance(data, bytes) == (takes_gzip and watcher.kinds[-1] == "snapshot")
            socket.socket.shutdown(sockets.SHUT_RDWR)  # without a close

    def by_events(watcher: Any, messages: int) -> None:
        headers = {"last-event-id": f"{watcher.attempt}-{watcher.cursor}"} if watcher.cursor else {}
        with connect_sse(client, "GET", events, headers=headers) as source:
            for event, _ in zip(source.iter_sse(), range(messages), strict=False):
                watcher.take(event.data)

    def come_and_go(watcher: Any, seed: int) -> None:
        generator = random.Random(seed)
        try:
            for _ in range(25):
                messages = generator.randint(1, 3)
                if seed % 4 == 0:
                    by_events(watcher, messages)
                else:
                    by_socket(watcher, messages, takes_gzip=seed % 2 == 0)
        except BaseException as error:
            errors.append(error)

    events = server.url + "api/runs/demo/events"
    with watch(server.url) as stays, httpx.Client(timeout=10) as client:
        stays.send(Watcher().hello())
        drain = threading.Thread(target=lambda: _read_all(stays))
        drain.start()
        # A snapshot has each step in a point of its own, up to two thousand.
        feeder = Feeder(hub, story, lambda: [story.step(float(story.seq))] if story.seq < 1_900 else [], 0.003)
        threads = [threading.Thread(target=come_and_go, args=(one, seed)) for seed, one in enumerate(watchers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        feeder.stop()
        for watcher in watchers:
            with watch(server.url) as socket:
                socket.send(watcher.resume())
                if watcher.cursor != story.seq:
                    read_until(socket, watcher, lambda watcher=watcher: watcher.cursor == story.seq)
    drain.join()
    assert not errors
    expected = [(event.global_step, event.loss) for event in feeder.events]
    assert all(watcher.points["train_loss"] == expected for watcher in watchers)
    assert sum(watcher.kinds.count("snapshot") for watcher in watchers) < 40  # of 200; the others resumed


def _read_all(socket: Any) -> None:
    try:
        while True:
            socket.recv()
    except ConnectionClosed:
        pass


MESSAGES = st.one_of(
    st.binary(max_size=200),
    st.text(max_size=200),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
        max_leaves=10,
    ).map(lambda value: msgspec.json.encode({"type": "command", "command": value})),
    st.fixed_dictionaries(
        {"type": st.sampled_from(["hello", "snapshot", "command", "", "frame"])},
        optional={
            "since": st.integers() | st.text(max_size=5),
            "attempt": st.integers(),
            "token": st.none() | st.text(max_size=5) | st.integers(),
            "command": st.none() | st.just({"command": "pause", "id": "\0"}) | st.just({"command": "stop", "id": 7}),
        },
    ).map(msgspec.json.encode),
    st.sampled_from([b"[" * 60_000, b'{"type":"command","command":' + b"[" * 50_000, b"9" * 60_000, b"x" * 70_000]),
    st.sampled_from(['{"type":"hello","since":' + "9" * 5_000 + "}", '{"type":"hello","since":1e999}']),
)


@pytest.fixture(scope="module")
def sturdy() -> Iterator[tuple[Hub, Any]]:
    """A hub, and its server, which takes commands."""
    hub = Hub()
    hub.view.run.run_id = "demo"
    server = server_module.Server(OneRun(hub), server_module.bind("127.0.0.1", 0), "127.0.0.1", commands=True)
    server.start()
    yield hub, server
    server.stop()


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(MESSAGES, min_size=1, max_size=4), st.booleans())
def test_no_message_ends_the_server(
    sturdy: Any, caplog: pytest.LogCaptureFixture, messages: list[bytes | str], greets: bool
) -> None:
    """Bytes, texts, numbers, nests, invalid commands: a close or an answer, never an error of the server."""
    _, server = sturdy
    with watch(server.url) as socket:
        try:
            if greets:
                socket.send(Watcher().hello())
            for one in messages:
                socket.send(one)
            for _ in range(2):
                socket.recv(timeout=0.02)
        except (ConnectionClosed, TimeoutError, UnicodeError):
            pass
    assert not [record for record in caplog.records if "Exception" in record.getMessage()]
    with watch(server.url) as socket:
        socket.send(Watcher().hello())
        assert '"snapshot"' in socket.recv(timeout=10)


def test_invalid_frames_do_not_end_the_server(sturdy: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Instead of a WebSocket handshake, and after it."""
    _, server = sturdy
    generator = random.Random(1)
    for round_ in range(60):
        with watch(server.url) as socket:
            raw = socket.socket
            if round_ % 2:
                socket.send(Watcher().hello())
            try:
                raw.sendall(generator.randbytes(generator.randint(1, 300)))
                if round_ % 3 == 0:
                    raw.shutdown(sockets.SHUT_RDWR)
                socket.recv(timeout=0.01)
            except (ConnectionClosed, TimeoutError, OSError):
                pass
    assert not [record for record in caplog.records if "Exception" in record.getMessage()]
    assert httpx.get(server.url + "api/runs").status_code == 200


def test_a_clients_requests_for_snapshots_are_limited_in_rate(sturdy: Any) -> None:
    """Each costs more than all frames of a second."""
    hub, server = sturdy
    watcher, story = Watcher(), Story()
    with watch(server.url) as socket:
        socket.send(watcher.hello())
        feeder = Feeder(hub, story, lambda: story.steps(1))
        began = time.monotonic()
        while watcher.kinds.count("snapshot") < 3:
            socket.send('{"type":"snapshot"}')
            watcher.take(socket.recv(timeout=10))
        took_s = time.monotonic() - began
        feeder.stop()
    assert took_s >= client_module.SNAPSHOT_S


@contextlib.contextmanager
def stuck(server: Any) -> Iterator[Any]:
    """A client that has sent its hello, and reads nothing."""
    raw = sockets.socket()
    raw.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 2**16)
    raw.connect(("127.0.0.1", port_of(server.url)))
    with watch(server.url, sock=raw, max_queue=1) as socket:
        socket.send(Watcher().hello())
        yield socket


@pytest.fixture
def big(story: Story, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> tuple[Hub, Any, Callable[[], list[Any]]]:
    """A hub whose large frames soon fill the buffers of a connection."""
    monkeypatch.setattr(hub_module, "FRAME_S", 0.02)
    monkeypatch.setattr(frames_module, "KEPT_BYTES", 2**20)
    monkeypatch.setattr(hub_module, "MOST_IN_A_FRAME", 10**9)
    hub = hub_of(story)
    values = {f"metric-{index:04d}": 1.0 for index in range(500)}

    def make() -> list[Any]:
        return [*(story.metrics(**values) for _ in range(5)), story.step()]

    server = serve(hub)
    server._socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, 2**15)  # its connections have it too
    return hub, server, make


def test_a_slow_client_gets_a_gap_and_a_snapshot_and_delays_no_other(big: Any, story: Story) -> None:
    """It stops reading until its next frame was dropped; another client misses nothing."""
    hub, server, make = big
    slow, fast = Watcher(), Watcher()
    with watch(server.url) as quick, stuck(server) as late:
        quick.send(fast.hello())
        read_until(quick, fast, lambda: "snapshot" in fast.kinds)
        slow.take(late.recv(timeout=10))
        missed = hub.frames.newest
        feeder = Feeder(hub, story, make, 0.02)
        deadline = time.monotonic() + WAIT_S
        kept: list[float] = []
        while hub.frames.oldest < missed + 20 and time.monotonic() < deadline:
            fast.take(quick.recv(timeout=10))
            kept.append(hub.frames.nbytes)
        hub.feed([story(CheckpointSaved, checkpoint="step-1.a1", path="p")])
        feeder.stop()
        read_until(quick, fast, lambda: fast.cursor == story.seq)
        read_until(late, slow, lambda: slow.cursor == story.seq)
    assert fast.kinds.count("snapshot") == 1
    assert "gap" not in fast.kinds
    assert [step for step, _ in fast.points["train_loss"]] == list(range(1, story.global_step + 1))
    gap = slow.kinds.index("gap")
    assert slow.kinds[gap + 1] == "snapshot"
    assert slow.checkpoints == fast.checkpoints != {}
    assert max(kept) <= 2 * 2**20


def test_a_client_that_reads_nothing_is_disconnected(big: Any, story: Story, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1013 when it reads again; otherwise its connection is dropped."""
    monkeypatch.setattr(client_module, "SEND_S", 0.3)
    monkeypatch.setattr(responses_module, "_CLOSE_S", 2.0)
    monkeypatch.setattr(protocols_module, "_CLOSING_S", 0.1)
    hub, server, make = big
    with stuck(server) as late, stuck(server):
        wait_until(lambda: hub._watchers == 2)
        feeder = Feeder(hub, story, make, 0.01)
        wait_until(lambda: not hub.is_watched)
        feeder.stop()
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                late.recv(timeout=10)
        assert code_of(closed) == 1013
        wait_until(lambda: not server._server.server_state.connections)


def test_connections_beyond_the_maximum_are_refused(sturdy: Any) -> None:
    """By both protocols, until another one ends."""
    _, server = sturdy
    app = server._app
    before, app._clients.most = app._clients.most, 2
    try:
        with watch(server.url) as first, watch(server.url) as second:
            first.send(Watcher().hello())
            second.send(Watcher().hello())
            wait_until(lambda: len(app._clients) == 2)
            with watch(server.url) as third, pytest.raises(ConnectionClosed) as closed:
                third.send(Watcher().hello())
                third.recv(timeout=10)
            assert code_of(closed) == 1013
            assert httpx.get(server.url + "api/runs/demo/events").status_code == 503
        wait_until(lambda: not app._clients)
        with watch(server.url) as socket:
            socket.send(Watcher().hello())
            assert '"snapshot"' in socket.recv(timeout=10)
    finally:
        app._clients.most = before


def test_clients_resume_after_a_restart_of_the_server(told: Told, serve: Serve) -> None:
    """A client that has missed nothing gets no snapshot; another one does."""
    tell = told.story
    told.start(10)
    runs, watcher, behind = RunsOfFolder(told.path), Watcher(), Watcher()
    first = serve(runs)
    for one in (watcher, behind):
        with watch(first.url) as socket:
            socket.send(one.hello())
            read_until(socket, one, lambda one=one: one.cursor == tell.seq)
            if one is behind:
                first.stop()
                with pytest.raises(ConnectionClosed) as closed:
                    socket.recv(timeout=10)
                assert code_of(closed) == 1012
    second = serve(RunsOfFolder(told.path))
    with watch(second.url) as socket:
        socket.send(watcher.resume())
        watcher.take(socket.recv(timeout=10))  # the sign of life
        told.write(*tell.steps(5))
        read_until(socket, watcher, lambda: watcher.cursor == tell.seq)
    third = serve(RunsOfFolder(told.path))
    with watch(third.url) as socket:
        socket.send(behind.resume())
        read_until(socket, behind, lambda: behind.cursor == tell.seq)
    assert (watcher.kinds.count("snapshot"), behind.kinds.count("snapshot")) == (1, 2)
    assert watcher.points == behind.points


def test_a_journal_is_followed_to_its_end(told: Told, serve: Serve) -> None:
    """Each event once, from a cursor on, until the run is over."""
    tell = told.story
    told.start(10)
    server = serve(RunsOfFolder(told.path))
    seqs: list[int] = []
    url = server.url + "api/runs/demo/journal?since=5&follow=1"
    with httpx.stream("GET", url, timeout=15) as answer:
        for line in answer.iter_lines():
            if line:
                seqs.append(msgspec.json.decode(line)["seq"])
            if len(seqs) == 6:
                told.write(*tell.steps(10), tell.ended())
                told.let_go()
    assert seqs == list(range(6, tell.seq + 1))


def test_journals_are_sent_in_small_parts_to_a_limited_number_of_clients(
    told: Told, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that read nothing hold little memory and two threads in all; the runs are looked for once or twice."""
    looks: list[int] = []
    look = RunsOfFolder._look
    monkeypatch.setattr(RunsOfFolder, "_look", lambda self: looks.append(1) or look(self))
    monkeypatch.setattr(client_module, "SEND_S", 2.0)
    monkeypatch.setattr(protocols_module, "_CLOSING_S", 0.1)
    tell = told.story
    told.write(tell.started(), *(tell.metrics(**{f"m{i}": 1.0 for i in range(200)}) for _ in range(1_000)))
    server = serve(RunsOfFolder(told.path))
    server._app._followers.most = 20
    server._socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, 2**15)
    address = ("127.0.0.1", port_of(server.url))
    parts: list[int] = []
    send = client_module.Client.send

    most = 0

    async def noted(self: Any, data: bytes) -> None:
        nonlocal most
        most = max(most, server._app._followers.count)
        parts.append(len(data))
        await send(self, data)

    monkeypatch.setattr(client_module.Client, "send", noted)
    with contextlib.ExitStack() as open_:
        for _ in range(30):
            one = open_.enter_context(sockets.socket())
            one.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 2**16)
            one.connect(address)
            one.sendall(b"GET /api/runs/demo/journal HTTP/1.1\r\nhost: localhost\r\n\r\n")
        wait_until(lambda: server._app._followers.count == 20)
        assert len(looks) <= 3
        answer = httpx.get(server.url + "api/runs/demo/journal")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
        assert "20 clients read journals" in answer.json()["error"]
        assert server._app._folders.total_tokens == 2
        wait_until(lambda: server._app._followers.count == 0)  # none of them read
    assert max(parts) <= 2**16
    assert most == 20
    lines = httpx.get(server.url + "api/runs/demo/journal").content.splitlines()
    assert [msgspec.json.decode(line)["seq"] for line in lines] == list(range(1, tell.seq + 1))


def test_commands_are_offered_once_the_run_has_started(told: Told, serve: Serve) -> None:
    """To clients that came earlier, too; and not after its end."""
    tell, watcher = told.story, Watcher()
    hub = Hub(told.path)
    hub.view.run.run_id = "demo"
    server = serve(hub, commands=True)
    with watch(server.url) as socket:
        socket.send(watcher.hello())
        read_until(socket, watcher, lambda: "snapshot" in watcher.kinds)
        assert watcher.run["commands"] is False
        hub.feed([tell.started()])
        read_until(socket, watcher, lambda: watcher.run["commands"] is True)
        hub.feed([tell.ended()])
        read_until(socket, watcher, lambda: watcher.run["commands"] is False)


def test_the_test_client_of_a_framework_may_send_several_requests(told: Told) -> None:
    """Each of them has its own event loop."""
    from starlette.applications import Starlette
    from starlette.routing import Mount

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it would rather have another client
        from starlette.testclient import TestClient

    told.start()
    client = TestClient(Starlette(routes=[Mount("/{name}/live", LiveApp(RunsOfFolder(told.path), Access()))]))
    assert client.get("/any/live/").status_code == 200  # the parameters of the host's path are not the application's
    assert client.put("/any/live/api/runs").json()["error"].startswith("PUT is not allowed at this address; use ")
    for _ in range(2):
        assert client.get("/any/live/api/runs/demo").json()["run"]["run_id"] == "demo"
        with client.websocket_connect("/any/live/api/runs/demo/ws") as socket:
            socket.send_json({"type": "hello"})
            assert socket.receive_json()["type"] == "snapshot"
            assert socket.receive_json()["type"] == "frame"


@pytest.mark.anyio
async def test_no_thread_of_the_host_is_needed(told: Told) -> None:
    """Pages, runs, journal, images and commands are served while anyio's default threads are all in use."""
    told.start(3)
    (told.path / "media").mkdir()
    (told.path / "media" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0\0\0\1" * 2)
    limiter = anyio.to_thread.current_default_thread_limiter()
    access = Access(commands=True, check=lambda request: True)
    transport = httpx.ASGITransport(LiveApp(RunsOfFolder(told.path), access))  # type: ignore[arg-type]
    run = "/api/runs/demo"
    limiter.total_tokens = 1
    async with limiter, httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        with anyio.fail_after(20):
            for path in ("/", "/page/live.js", "/api/runs", run, run + "/journal", run + "/media/a.png"):
                assert (await client.get(path)).status_code == 200, path
            assert (await client.post(run + "/commands", json={"command": "stop", "id": "1"})).status_code == 202


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("raw", "location"),
    [
        (None, b"./watch/"),
        (b"/watch", b"./watch/"),
        (b"/watch?token=x", b"./watch/"),
        (b"/sub/w%20h", b"./w%20h/"),
        (b"/\\evil.example", b"./%5Cevil.example/"),
        (b"/watch\r\nset-cookie: a=b", b"./watch%0D%0Aset-cookie%3A%20a%3Db/"),
    ],
)
async def test_a_mount_without_its_slash_leads_only_to_itself(raw: bytes | None, location: bytes) -> None:
    """Whatever a server passes on."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": "/watch", "root_path": "/watch", "headers": []}
    await LiveApp(OneRun(Hub()), Access())(scope | ({"raw_path": raw} if raw else {}), None, send)  # type: ignore[arg-type]
    assert sent[0]["status"] == 307
    assert dict(sent[0]["headers"])[b"location"] == location
