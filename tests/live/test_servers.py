"""The application under each server, mounted anywhere: both protocols, and the end of the server."""

from __future__ import annotations

import contextlib
import signal
import socket as sockets
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from httpx_sse import connect_sse
from live.kit import Start, Told, Watcher, read_until, watch
from support.threads import wait_until
from websockets.exceptions import ConnectionClosed

from events.messages import TrainStepEnded
from trainer.remote.connect import connect

APP = """
import contextlib, sys
from pathlib import Path
import anyio
from fastapi import FastAPI
from litestar import Litestar
from litestar.handlers import asgi
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Mount
from sinks.live.access import Access
from sinks.live.app import LiveApp
from sinks.live.runs import RunsOfFolder

@contextlib.asynccontextmanager
async def lifespan(app):
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.sleep_forever)
        yield
        print("the host's lifespan has ended", file=sys.stderr)
        tasks.cancel_scope.cancel()

async def passed_on(request, call_next):
    return await call_next(request)

live = LiveApp(RunsOfFolder(Path("runs").absolute()), Access(commands=True, hosts=["127.0.0.1", "localhost"]))
fastapi = FastAPI(lifespan=lifespan)
fastapi.add_middleware(GZipMiddleware)
fastapi.add_middleware(BaseHTTPMiddleware, dispatch=passed_on)
fastapi.mount("/live", live)
starlette = Starlette(routes=[Mount("/a/b", live)])
nested = FastAPI()
nested.mount("/in", Starlette(routes=[Mount("/deep", live)]))
litestar = Litestar([asgi("/watch", is_mount=True, copy_scope=True)(live)])
"""
EMBEDDED = """
import asyncio, signal, socket, sys, threading
import uvicorn
from served import fastapi

async def main():
    listening = socket.create_server(("127.0.0.1", 0))
    print(f"running on http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    server = uvicorn.Server(uvicorn.Config(fastapi, log_level="warning"))
    await asyncio.gather(server.serve(sockets=[listening]), asyncio.sleep(0))

def of_a_thread():
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(fastapi, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    print(f"running on http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    signal.signal(signal.SIGTERM, lambda number, frame: setattr(server, "should_exit", True))
    thread.join()

of_a_thread() if sys.argv[1:] else asyncio.run(main())
"""
UVICORN = ("-m", "uvicorn", "--port", "0")
HYPERCORN = ("-m", "hypercorn", "-b", "127.0.0.1:0")
GUNICORN = ("-m", "gunicorn", "-b", "127.0.0.1:0", "--worker-class")
MOUNTS = {"live": "", "fastapi": "live/", "starlette": "a/b/", "nested": "in/deep/", "litestar": "watch/"}
SERVERS = {
    "uvicorn": (*UVICORN, "served:fastapi"),
    "uvicorn-alone-behind-a-proxy": (*UVICORN, "--root-path", "/proxy", "served:live"),
    "uvicorn-h11-wsproto": (*UVICORN, "--http", "h11", "--ws", "wsproto", "served:starlette"),
    "uvicorn-two-workers": (*UVICORN, "--workers", "2", "served:fastapi"),
    "uvicorn-nested": (*UVICORN, "served:nested"),
    "uvicorn-litestar": (*UVICORN, "served:litestar"),
    "uvicorn-embedded": ("embedded.py",),
    "uvicorn-on-a-thread": ("embedded.py", "thread"),
    "hypercorn": (*HYPERCORN, "-w", "0", "served:live"),
    "hypercorn-two-workers": (*HYPERCORN, "-w", "2", "served:starlette"),
    "hypercorn-trio": (*HYPERCORN, "-w", "1", "-k", "trio", "served:fastapi"),
    "gunicorn-uvicorn": (*GUNICORN, "uvicorn.workers.UvicornWorker", "--workers", "2", "served:fastapi"),
    "gunicorn-asgi": (*GUNICORN, "asgi", "served:nested"),
}


class Streams:
    """Open connections of each kind, each read by a thread until its end."""

    def __init__(self, url: str) -> None:
        self.ends: dict[str, Any] = {}
        self.first: dict[str, bytes] = {}
        self._open = threading.Barrier(5)
        self._threads = [
            threading.Thread(target=self._read, args=(name, url)) for name in ("events", "journal", "socket", "silent")
        ]
        for thread in self._threads:
            thread.start()
        self._open.wait(40)

    def _read(self, name: str, url: str) -> None:
        try:
            if name in ("socket", "silent"):  # the second one never sends its hello
                with watch(url) as socket:
                    if name == "socket":
                        socket.send(Watcher().hello())
                        socket.recv(timeout=20)
                    self._open.wait(40)
                    while True:
                        socket.recv(timeout=40)
            address = url + "api/runs/demo/" + {"events": "events", "journal": "journal?follow=1"}[name]
            with httpx.stream("GET", address, timeout=40) as answer:
                parts = answer.iter_bytes()
                self.first[name] = next(parts)
                self._open.wait(40)
                for _ in parts:
                    pass
            self.ends[name] = "clean"
        except ConnectionClosed as closed:
            self.ends[name] = closed.rcvd.code if closed.rcvd is not None else "cut off"
        except Exception as error:
            self.ends[name] = error

    def join(self) -> dict[str, Any]:
        for thread in self._threads:
            thread.join(20)
        return self.ends


CLEAN = {"events": "clean", "journal": "clean", "socket": 1012, "silent": 1012}


def address(process: subprocess.Popen[str]) -> str:
    """The address that a server prints."""
    assert process.stdout is not None
    for line in process.stdout:
        for begin in ("unning on http://", "Listening at: http://", "listening on http://"):
            if begin in line:
                return "http://" + line.partition("http://")[2].split()[0].strip("'\"") + "/"
    raise AssertionError("the server has not started")


def answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url + "api/runs").status_code == 200
    return False


@pytest.fixture
def written(told: Told, tmp_path: Path) -> Iterator[Told]:
    """A run that trains, and the modules that serve it."""
    (tmp_path / "served.py").write_text(APP)
    (tmp_path / "embedded.py").write_text(EMBEDDED)
    told.start(3)
    return told


def read_events(client: httpx.Client, url: str, watcher: Watcher, until: int) -> None:
    """Read Server-Sent Events up to an event, from the watcher's place."""
    headers = {"last-event-id": f"1-{watcher.cursor}"} if watcher.cursor is not None else {}
    with connect_sse(client, "GET", url + "api/runs/demo/events", headers=headers) as source:
        for event in source.iter_sse():
            assert watcher.take(event.data)["type"] == event.event
            assert event.id == f"1-{watcher.cursor}"
            if watcher.cursor == until:
                return


def check_protocols(told: Told, url: str, mount: str) -> None:
    """The page and its relative addresses, both protocols, resumed by cursor and by Last-Event-ID, a command, HEAD."""
    tell, by_socket, by_events = told.story, Watcher(), Watcher()
    with httpx.Client(timeout=10, follow_redirects=True) as client:
        assert client.get(url).headers["content-security-policy"].startswith("default-src 'none'")
        if mount:  # otherwise there is no address without a slash
            assert str(client.get(url.rstrip("/")).url) == url
        assert client.get(url + "page/live.css").headers["content-type"].startswith("text/css")
        assert [run["run_id"] for run in client.get(url + "api/runs").json()["runs"]] == ["demo"]
        head = client.head(url + "api/runs/demo")
        assert (head.status_code, head.content) == (200, b"")
        assert client.get(url + "api/runs/nothing").status_code == 404
        assert len(client.get(url + "api/runs/demo/journal").text.splitlines()) == 4
        with watch(url) as socket:
            socket.send(by_socket.hello())
            read_until(socket, by_socket, lambda: "snapshot" in by_socket.kinds)
            told.write(*tell.steps(5))
            read_events(client, url, by_events, tell.seq)
            told.write(*tell.steps(5))
            read_until(socket, by_socket, lambda: by_socket.cursor == tell.seq)
            read_events(client, url, by_events, tell.seq)
            with watch(url) as again:
                again.send(by_socket.resume())
                told.write(*tell.steps(5))
                read_until(again, by_socket, lambda: by_socket.cursor == tell.seq)
            socket.send('{"type":"command","command":{"command":"pause","id":"p"}}')
            while (answer := Watcher().take(socket.recv(timeout=10)))["type"] != "sent":
                pass
            assert answer["id"] == "p"
        with pytest.raises(ConnectionClosed) as closed, watch(url) as socket:
            socket.send('{"type":')
            socket.recv(timeout=10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1008
    steps = [(step, float(step)) for step in range(1, 19)]
    assert by_socket.points["train_loss"] == steps
    assert by_events.points["train_loss"] == steps[:13]
    assert by_socket.kinds.count("snapshot") == by_events.kinds.count("snapshot") == 1


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_serves_both_protocols_and_shuts_down_at_once(name: str, written: Told, process: Start) -> None:
    """SIGTERM: streams end cleanly, WebSockets are closed with 1012, the host's lifespan ends, the process exits."""
    app = SERVERS[name][-1].partition(":")[2] or "fastapi"
    one = process(*SERVERS[name])
    url = address(one) + MOUNTS[app]
    wait_until(lambda: answers(url))
    if not name.endswith("-workers") and name != "gunicorn-uvicorn":  # another worker has no frames to resume from
        check_protocols(written, url, MOUNTS[app])
    streams = Streams(url)
    one.send_signal(signal.SIGTERM)
    printed, _ = one.communicate(timeout=10)
    ends = streams.join()
    if name != "hypercorn-two-workers":  # hypercorn kills its other workers once the first has ended
        assert ends == CLEAN
    assert one.returncode in (0, -signal.SIGTERM), printed
    assert "Traceback" not in printed
    if app == "fastapi":
        assert "the host's lifespan has ended" in printed
    assert streams.first["events"].startswith(b"retry: ")


def test_a_client_that_reads_nothing_does_not_delay_the_shutdown(written: Told, process: Start) -> None:
    """Its buffers are full; its connection is closed all the same."""
    one = process(*UVICORN, "served:fastapi")
    url = address(one) + "live/"
    metrics = {f"metric-{index:05d}-{'x' * 100}": 1.0 for index in range(3_000)}
    written.write(*(written.story.metrics(**metrics) for _ in range(20)))
    with sockets.socket() as silent:
        silent.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, 2**13)
        silent.connect(("127.0.0.1", httpx.URL(url).port))
        silent.sendall(b"GET /live/api/runs/demo/journal?follow=1 HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert silent.recv(12) == b"HTTP/1.1 200"
        with httpx.stream("GET", url + "api/runs/demo/journal?follow=1", timeout=20) as reads:
            parts = reads.iter_lines()
            for _ in range(24):  # by then the silent client was sent more than the buffers hold
                next(parts)
        one.send_signal(signal.SIGTERM)
        printed, _ = one.communicate(timeout=10)
    assert "Traceback" not in printed


def test_a_server_that_ends_after_a_number_of_requests_closes_open_connections(written: Told, process: Start) -> None:
    """``--limit-max-requests``: without a signal."""
    one = process(*UVICORN, "--limit-max-requests", "2", "served:fastapi")
    url = address(one) + "live/"
    with httpx.stream("GET", url + "api/runs/demo/events", timeout=20) as events:
        parts = events.iter_bytes()
        next(parts)
        for _ in range(2):
            assert httpx.get(url + "api/runs").status_code == 200
        for _ in parts:
            pass
    one.communicate(timeout=10)


def test_a_server_reloads_while_clients_are_connected(written: Told, process: Start, tmp_path: Path) -> None:
    """``--reload`` replaces the process when a file changes; `connect` reconnects and misses nothing."""
    one = process(*UVICORN, "--reload", "served:fastapi")
    assert one.stdout is not None
    output = one.stdout
    url = address(one) + "live/"
    wait_until(lambda: answers(url))
    seen: list[int] = []

    def wait_for_start() -> None:
        assert any("Started server process" in line for line in output)

    async def follow() -> None:
        async with connect(url + "#run=demo") as run:
            async for event in run.events(since=0, types=[TrainStepEnded]):
                seen.append(event.global_step)
                if len(seen) == 3:
                    (tmp_path / "served.py").write_text(APP + "\n# changed\n")
                    await anyio.to_thread.run_sync(wait_for_start)
                    written.write(*written.story.steps(2))
                if len(seen) == 5:
                    return

    with anyio.from_thread.start_blocking_portal() as portal:
        streams = Streams(url)
        portal.call(follow)
    assert seen == [1, 2, 3, 4, 5]
    assert streams.join() == CLEAN
