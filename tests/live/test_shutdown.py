"""The application closes its connections itself when the server that runs it shuts down: real servers, real signals."""

from __future__ import annotations

import contextlib
import signal
import socket as sockets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
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

live = LiveApp(RunsOfFolder(Path("runs").absolute()), Access(hosts=["127.0.0.1", "localhost"]))
fastapi = FastAPI(lifespan=lifespan)
fastapi.add_middleware(GZipMiddleware)
fastapi.add_middleware(BaseHTTPMiddleware, dispatch=passed_on)
fastapi.mount("/live", live)
starlette = Starlette(routes=[Mount("/live", live)])
litestar = Litestar([asgi("/live", is_mount=True, copy_scope=True)(live)])
"""
EMBEDDED = """
import asyncio, socket, sys, threading
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
    import signal
    signal.signal(signal.SIGTERM, lambda number, frame: setattr(server, "should_exit", True))
    thread.join()

of_a_thread() if sys.argv[1:] else asyncio.run(main())
"""
UVICORN = ("-m", "uvicorn", "--port", "0")
HYPERCORN = ("-m", "hypercorn", "-b", "127.0.0.1:0")
GUNICORN = ("-m", "gunicorn", "-b", "127.0.0.1:0", "--worker-class")
SERVERS = {
    "uvicorn": (*UVICORN, "served:fastapi"),
    "uvicorn-alone": (*UVICORN, "served:live"),
    "uvicorn-h11-wsproto": (*UVICORN, "--http", "h11", "--ws", "wsproto", "served:starlette"),
    "uvicorn-two-workers": (*UVICORN, "--workers", "2", "served:fastapi"),
    "uvicorn-litestar": (*UVICORN, "served:litestar"),
    "uvicorn-embedded": ("embedded.py",),
    "uvicorn-on-a-thread": ("embedded.py", "thread"),
    "hypercorn": (*HYPERCORN, "-w", "0", "served:fastapi"),
    "hypercorn-two-workers": (*HYPERCORN, "-w", "2", "served:starlette"),
    "hypercorn-trio": (*HYPERCORN, "-w", "1", "-k", "trio", "served:fastapi"),
    "gunicorn-uvicorn": (*GUNICORN, "uvicorn.workers.UvicornWorker", "--workers", "2", "served:fastapi"),
    "gunicorn-asgi": (*GUNICORN, "asgi", "served:starlette"),
}


class Streams:
    """Clients of each kind whose connections stay open, each on a thread that reads until the end."""

    def __init__(self, kit: Any, url: str) -> None:
        self.ends: dict[str, Any] = {}
        self.first: dict[str, bytes] = {}
        self._open = threading.Barrier(5)
        self._threads = [
            threading.Thread(target=self._read, args=(kit, name, url))
            for name in ("events", "journal", "socket", "silent")
        ]
        for thread in self._threads:
            thread.start()
        self._open.wait(40)

    def _read(self, kit: Any, name: str, url: str) -> None:
        try:
            if name in ("socket", "silent"):  # the second one never says its hello
                with kit.watch(url) as socket:
                    if name == "socket":
                        socket.send(kit.Watcher().hello())
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


def address(process: Any) -> str:
    """Where a server says that it is."""
    for line in process.stdout:
        for begin in ("unning on http://", "Listening at: http://", "listening on http://"):
            if begin in line:
                return "http://" + line.partition("http://")[2].split()[0].strip("'\"") + "/"
    raise AssertionError("the server has not started")


@pytest.fixture
def written(told: Any, tmp_path: Path) -> Iterator[Any]:
    """A run that is under way, and the modules that serve it."""
    (tmp_path / "served.py").write_text(APP)
    (tmp_path / "embedded.py").write_text(EMBEDDED)
    told.write(told.story.started(), *told.story.steps(3))
    return told


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_shuts_down_at_once_while_clients_are_connected(
    name: str, written: Any, kit: Any, process: Any
) -> None:
    """SIGTERM: streams end cleanly, WebSockets are closed with 1012, the host's lifespan ends, the process exits."""
    one = process(*SERVERS[name])
    url = address(one) + ("" if "served:live" in SERVERS[name] else "live/")
    kit.wait_until(lambda: _answers(url))
    streams = Streams(kit, url)
    one.send_signal(signal.SIGTERM)
    printed, _ = one.communicate(timeout=10)
    ends = streams.join()
    if name != "hypercorn-two-workers":  # hypercorn kills its other workers once the first has ended
        assert ends == {"events": "clean", "journal": "clean", "socket": 1012, "silent": 1012}
    assert one.returncode in (0, -signal.SIGTERM), printed
    assert "Traceback" not in printed
    if "served:fastapi" in SERVERS[name] or "embedded" in name:
        assert "the host's lifespan has ended" in printed
    assert streams.first["events"].startswith(b"retry: ")


def test_a_client_that_reads_nothing_does_not_hold_the_shutdown(written: Any, kit: Any, process: Any) -> None:
    """What it was sent fills the buffers; its connection is closed all the same."""
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
            for _ in range(24):  # by then the other one has been sent more than the buffers hold
                next(parts)
        one.send_signal(signal.SIGTERM)
        printed, _ = one.communicate(timeout=10)
    assert "Traceback" not in printed


def test_a_server_that_ends_after_so_many_requests_closes_what_is_open(written: Any, kit: Any, process: Any) -> None:
    """``--limit-max-requests``: nobody has asked it to end, and no signal comes."""
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


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(url + "api/runs").status_code == 200
    return False


def test_a_server_reloads_while_clients_are_connected(written: Any, kit: Any, process: Any, tmp_path: Path) -> None:
    """``--reload`` replaces the process when a file changes; `connect` reconnects and misses nothing."""
    one = process(*UVICORN, "--reload", "served:fastapi")
    url = address(one) + "live/"
    kit.wait_until(lambda: _answers(url))
    seen: list[int] = []

    async def watch() -> None:
        async with connect(url + "#run=demo") as run:
            async for event in run.events(since=0, types=[TrainStepEnded]):
                seen.append(event.global_step)
                if len(seen) == 3:
                    (tmp_path / "served.py").write_text(APP + "\n# changed\n")
                    await anyio.to_thread.run_sync(_read_until, one, "Started server process")
                    written.write(*written.story.steps(2))
                if len(seen) == 5:
                    return

    with anyio.from_thread.start_blocking_portal() as portal:
        streams = Streams(kit, url)
        portal.call(watch)
    assert seen == [1, 2, 3, 4, 5]
    assert streams.join() == {"events": "clean", "journal": "clean", "socket": 1012, "silent": 1012}


def _read_until(process: Any, text: str) -> None:
    assert any(text in line for line in process.stdout)
