"""Runs told by hand, written to a journal as a run would; clients of a page; and a feed of a hub."""

from __future__ import annotations

import gzip
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.threads import WAIT_S
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as connect_websocket

from events.messages import Event, MetricsLogged, RunEnded, RunResumed, RunStarted, TrainStepEnded
from events.run.folder import RunFolder
from events.wire import encode_json_lines
from sinks.live.hub import Hub
from sinks.live.server import Server

Serve = Callable[..., Server]
"""The fixture ``serve``."""
Start = Callable[..., subprocess.Popen[str]]
"""The fixture ``process``."""
IMAGE = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x01\0\0\0\x01\x08\x06\0\0\0"
"""The beginning of a PNG file."""


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
        """The first events of another attempt, from a checkpoint at this step."""
        name = f"step-{step}.a{self.attempt}"
        self.attempt += 1
        self.global_step = step
        return [self.started(), self(RunResumed, checkpoint=name, after_seq=after_seq)]

    def ended(self, status: str = "finished") -> Any:
        return self(RunEnded, status=status)


class Told:
    """A run's folder, held as by a run that trains; its journal grows when the test writes."""

    def __init__(self, path: Path, run_id: str = "demo", steps: int | None = None) -> None:
        """Args: ``steps``: the first events are the run's start and this number of steps."""
        self.path = path
        self.story = Story(run_id)
        self.events: list[Event] = []
        self._folder: RunFolder | None = RunFolder.open(path, run_id)
        if steps is not None:
            self.start(steps)

    def start(self, steps: int = 0, **fields: Any) -> None:
        self.write(self.story.started(**fields), *self.story.steps(steps))

    def write(self, *events: Any) -> None:
        if not events:
            return
        numbers = sorted((self.path / "journal").glob("*.jsonl"))
        file = numbers[-1] if numbers else self.path / "journal" / f"{events[0].seq:020d}.jsonl"
        with open(file, "ab") as out:
            out.write(encode_json_lines(events))
        self.events += events

    def let_go(self) -> None:
        """Release the folder, as the end of the run's process does."""
        if self._folder is not None:
            self._folder.close()
        self._folder = None


class Watcher:
    """The state of a run by the messages that its page received: the newest snapshot and all points since."""

    def __init__(self) -> None:
        self.points: dict[str, list[tuple[int, float]]] = {}
        self.run: dict[str, Any] = {}
        self.checkpoints: dict[str, Any] = {}
        self.cursor: int | None = None
        self.attempt: int | None = None
        self.kinds: list[str] = []

    def take(self, data: str | bytes) -> dict[str, Any]:
        if isinstance(data, bytes) and data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
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

    def steps(self) -> list[int]:
        """The steps of the training loss."""
        return [step for step, _ in self.points.get("train_loss", ())]

    def hello(self, **fields: Any) -> str:
        return msgspec.json.encode({"type": "hello", **fields}).decode()

    def resume(self, **fields: Any) -> str:
        return self.hello(since=self.cursor, attempt=self.attempt, **fields)


def watch(url: str, **options: Any) -> ClientConnection:
    """Connect to the run ``demo``."""
    address = url.replace("http", "ws", 1) + "api/runs/demo/ws"
    return connect_websocket(address, proxy=None, close_timeout=1, max_size=None, **options)


def read_until(socket: ClientConnection, watcher: Watcher, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        watcher.take(socket.recv(timeout=max(0.0, deadline - time.monotonic())))


def code_of(caught: pytest.ExceptionInfo[ConnectionClosed]) -> int:
    """The code with which the server closed a WebSocket."""
    assert caught.value.rcvd is not None
    return caught.value.rcvd.code


def port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1].strip("/"))


def hub_of(story: Story, steps: int = 0) -> Hub:
    """A hub with a run ``demo``."""
    hub = Hub()
    hub.view.run.run_id = "demo"
    hub.feed([story.started(), *story.steps(steps)])
    return hub


class Feeder:
    """Feeds a hub on a thread, as a sink's thread does, until it is stopped."""

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
