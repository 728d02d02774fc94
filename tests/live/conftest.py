"""Runs told by hand, written to a journal as a run would; and servers that show them."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from websockets.sync.client import ClientConnection, connect

import sinks
from events.messages import Event, MetricsLogged, RunEnded, RunResumed, RunStarted, TrainStepEnded
from events.run.folder import RunFolder
from events.wire import encode_json_lines
from sinks.live.hub import Hub
from sinks.live.runs import OneRun
from sinks.live.server import Server, bind

ROOT = Path(sinks.__file__).parent.parent
WAIT_S = 20.0


class Story:
    """Builds the events of a run; its attributes are those of the next one."""

    def __init__(self, run_id: str = "demo") -> None:
        self.run_id = run_id
        self.time = 1_700_000_000.0
        self.attempt = 1
        self.seq = 0
        self.global_step = 0
        self.epoch = 0

    def __call__(self, kind: type[Event], **fields: Any) -> Any:
        self.seq += 1
        self.time += 0.01
        step = fields.pop("global_step", self.global_step)
        stage = fields.pop("stage", "train")
        return kind(self.run_id, self.attempt, self.seq, self.time, 0, step, self.epoch, stage, **fields)

    def started(self, **fields: Any) -> Any:
        return self(RunStarted, **({"module": "a.Net", "epochs": 3, "steps_per_epoch": 100} | fields))

    def step(self, loss: float = 1.0) -> Any:
        self.global_step += 1
        return self(TrainStepEnded, loss=loss, step_in_epoch=self.global_step, step_s=0.01, rows=32)

    def steps(self, count: int) -> list[Any]:
        return [self.step(float(self.global_step + 1)) for _ in range(count)]

    def metrics(self, **values: float) -> Any:
        return self(MetricsLogged, metrics=values)

    def resumed(self, step: int, after_seq: int) -> list[Any]:
        """The beginning of another attempt, from a checkpoint at this step."""
        name = f"step-{step}.a{self.attempt}"
        self.attempt += 1
        self.global_step = step
        return [self.started(), self(RunResumed, checkpoint=name, after_seq=after_seq)]

    def ended(self, status: str = "finished") -> Any:
        return self(RunEnded, status=status)


class Told:
    """A run's folder, with a journal that grows when the test says so; held, as by a run that is under way."""

    def __init__(self, path: Path, run_id: str = "demo") -> None:
        self.path = path
        self.story = Story(run_id)
        self.events: list[Event] = []
        self._folder: RunFolder | None = RunFolder.open(path, run_id)

    def write(self, *events: Any) -> None:
        if not events:
            return
        numbers = sorted((self.path / "journal").glob("*.jsonl"))
        file = numbers[-1] if numbers else self.path / "journal" / f"{events[0].seq:020d}.jsonl"
        with open(file, "ab") as out:
            out.write(encode_json_lines(events))
        self.events += events

    def let_go(self) -> None:
        if self._folder is not None:
            self._folder.close()
        self._folder = None


class Watcher:
    """What a page would know of a run, from what it is sent: the newest snapshot and all points since."""

    def __init__(self) -> None:
        self.points: dict[str, list[tuple[int, float]]] = {}
        self.run: dict[str, Any] = {}
        self.checkpoints: dict[str, Any] = {}
        self.cursor: int | None = None
        self.attempt: int | None = None
        self.kinds: list[str] = []

    def take(self, data: str | bytes) -> dict[str, Any]:
        message: dict[str, Any] = msgspec.json.decode(data)
        self.kinds.append(message["type"])
        if message["type"] == "snapshot":
            self.attempt = message["attempt"]
            self.points = {n: list(zip(s["step"], s["mean"], strict=True)) for n, s in message["series"].items()}
            self.checkpoints = {one["name"]: one for one in message["checkpoints"]}
        elif message["type"] == "frame":
            for name, (steps, values) in message.get("points", {}).items():
                self.points.setdefault(name, []).extend(zip(steps, values, strict=True))
            self.checkpoints |= {one["name"]: one for one in message.get("checkpoints", [])}
        else:
            return message
        self.run |= message.get("run", {})
        self.cursor = message["cursor"]
        return message

    def hello(self, **fields: Any) -> str:
        return msgspec.json.encode({"type": "hello", **fields}).decode()

    def resume(self) -> str:
        return self.hello(since=self.cursor, attempt=self.attempt)


def watch(url: str, **options: Any) -> ClientConnection:
    """Connect to the run ``demo``."""
    address = url.replace("http", "ws", 1) + "api/runs/demo/ws"
    return connect(address, proxy=None, close_timeout=1, max_size=None, **options)


def read_until(socket: ClientConnection, watcher: Watcher, condition: Callable[[], bool]) -> None:
    """Read until what the watcher knows is what is waited for."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        watcher.take(socket.recv(timeout=max(0.0, deadline - time.monotonic())))


def wait_until(condition: Callable[[], Any]) -> None:
    """For what no event tells."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it has not come about"
        time.sleep(0.005)


class Feeder:
    """Feeds a hub with steps on a thread, as a sink's thread does, until it is told to stop."""

    def __init__(self, hub: Hub, story: Story, make: Callable[[], list[Any]], pause_s: float = 0.002) -> None:
        self.events: list[Event] = []
        self._hub, self._make, self._pause_s = hub, make, pause_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(self._pause_s):
            made = self._make()
            self.events += made
            self._hub.feed(made)

    def stop(self) -> None:
        self._over.set()
        self._thread.join()


class Kit:
    """What the tests of this folder share."""

    Story, Told, Watcher, Feeder = Story, Told, Watcher, Feeder
    connect = staticmethod(connect)
    watch = staticmethod(watch)
    read_until = staticmethod(read_until)
    wait_until = staticmethod(wait_until)
    ROOT = ROOT
    WAIT_S = WAIT_S


@pytest.fixture
def kit() -> type[Kit]:
    return Kit


@pytest.fixture
def story() -> Story:
    return Story()


@pytest.fixture
def told(tmp_path: Path) -> Iterator[Told]:
    one = Told(tmp_path / "runs" / "demo")
    yield one
    one.let_go()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Serve runs, or a single hub, on a thread, at a free port."""
    started: list[Server] = []

    def start(what: Any, host: str = "127.0.0.1", **options: Any) -> Server:
        runs = OneRun(what) if isinstance(what, Hub) else what
        server = Server(runs, bind(host, 0), host, **options)
        server.start()
        started.append(server)
        return server

    yield start
    for one in started:
        one.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real one, that of the system."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        if os.environ.get("CI"):
            pytest.fail("no chromium on the PATH: apt-get install -y chromium")
        pytest.skip("no chromium on the PATH")
    playwright: Any = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=path)
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def nginx() -> str:
    """Where nginx is."""
    path = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}{os.pathsep}/usr/sbin")
    if path is None and os.environ.get("CI"):
        pytest.fail("no nginx on the PATH: apt-get install -y nginx-light")
    return path or pytest.skip("no nginx on the PATH")


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens the page: see `page_visits.Visits`. The test fails for what went wrong there."""
    sys.path.insert(0, str(Path(__file__).parent))
    visits: Any = importlib.import_module("page_visits").Visits(browser)
    yield visits
    visits.close()


@pytest.fixture(autouse=True)
def _warm_starts(warm_starts: None) -> None:
    """Programs of these tests are forked."""


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start Python in a process of its own, which is ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **env: str) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}", "PYTHONUNBUFFERED": "1"} | env
        command = [sys.executable, *arguments]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()
