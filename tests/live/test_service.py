"""The example service, in its own process: runs are started, shown, commanded, and end with it."""

from __future__ import annotations

import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import anyio
import httpx
import msgspec
import pytest
from httpx_sse import connect_sse
from websockets.sync.client import connect as connect_websocket

import trainer
from events.checkpoint.store import CHECKPOINTS_DIR, CheckpointStore
from events.journal.reader import JournalReader
from events.journal.segment import JOURNAL_DIR
from events.messages import Event, RunEnded, RunResumed, TrainStepEnded
from trainer.remote.connect import connect

ROOT = Path(trainer.__file__).parent.parent
WAIT_S = 25.0
JOBS = """
import os, sys, time
from support.training import Net, make_trainer


class Job(Net):
    how = ""

    def train_step(self, global_step, batch, device):
        time.sleep(0.005)
        if global_step == 3 and self.how == "raise":
            raise ValueError("in a step")
        if global_step == 3 and self.how == "exit":
            sys.exit("from a step")
        if global_step == 3 and self.how == "die":
            os._exit(7)
        return super().train_step(global_step, batch, device)


def net(run_id, run_dir, how="", epochs=1_000_000):
    job = Job(rows=32, lr=0.01)
    job.how = how
    options = {"run_id": run_id, "run_dir": run_dir, "resume": "auto", "journal": True, "checkpoints": True}
    return make_trainer(job, epochs=epochs, **options)
"""
SERVE = """
import socket, sys
from itertools import chain
from pathlib import Path
import uvicorn
from trainer.examples.service import create_app

app = create_app(Path(sys.argv[1]), {"net": "my_jobs:net"}, token=sys.argv[2], at_once=int(sys.argv[3]), stop_s=15)
listening = socket.create_server(("127.0.0.1", 0))
print(listening.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])
"""


class Service:
    """A process of the service, and a client with the token."""

    def __init__(self, folder: Path, at_once: int = 1) -> None:
        self.runs = folder / "runs"
        self.token = secrets.token_hex(16)
        (folder / "my_jobs.py").write_text(JOBS)
        (folder / "serve.py").write_text(SERVE)
        command = [sys.executable, "serve.py", str(self.runs), self.token, str(at_once)]
        environment = {"PYTHONPATH": f"{ROOT}:{folder}:{ROOT}/tests", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"
        headers = {"authorization": f"Bearer {self.token}"}
        self.client = httpx.Client(base_url=self.url, headers=headers, timeout=WAIT_S)
        self.until(self._answers)

    def _answers(self) -> bool:
        try:
            return self.client.get("/runs").status_code == 200  # only ours knows the token
        except httpx.ConnectError:
            return False

    def start(self, run_id: str, *, launched: bool = False, **arguments: Any) -> dict[str, Any]:
        order = {"recipe": "net", "run_id": run_id, "arguments": arguments, "launched": launched}
        answer = self.client.post("/runs", json=order)
        assert answer.status_code == 201, answer.text
        shown: dict[str, Any] = answer.json()
        return shown

    def show(self, run_id: str) -> dict[str, Any]:
        shown: dict[str, Any] = self.client.get(f"/runs/{run_id}").json()
        return shown

    def state(self, run_id: str) -> tuple[str, str | None]:
        shown = self.show(run_id)
        return shown["state"], shown["reason"]

    def until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, "the condition did not become true"
            time.sleep(0.02)

    def until_state(self, run_id: str, *states: str) -> tuple[str, str | None]:
        over = ("finished", "stopped", "failed", "cancelled")
        self.until(lambda: self.show(run_id)["state"] in (*states, *over))
        state = self.state(run_id)
        assert state[0] in states, state
        return state

    def until_step(self, run_id: str, step: int) -> None:
        self.until(lambda: any(e.global_step >= step for e in self.journal(run_id) if isinstance(e, TrainStepEnded)))

    def journal(self, run_id: str) -> list[Event]:
        reader = JournalReader(self.runs / run_id / JOURNAL_DIR)
        return list(chain.from_iterable(iter(reader.read, [])))  # a read is bounded

    def end(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.communicate()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with room for a single run."""
    one = Service(tmp_path_factory.mktemp("service"))
    yield one
    one.end()


@pytest.fixture
def another(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Start a service in the test's folder."""
    started: list[Service] = []

    def start(at_once: int = 1) -> Service:
        started.append(Service(tmp_path, at_once))
        return started[-1]

    yield start
    for one in started:
        one.end()


def test_requests_without_the_token_are_refused(service: Service) -> None:
    """For runs and their streams; so is a page of another site whose user has the token."""
    for address in ("/runs", "/runs/x", "/live/api/runs"):
        assert httpx.get(service.url + address).status_code == 401
    assert httpx.post(service.url + "/runs/x/stop").status_code == 401
    assert service.client.post("/runs/x/stop", headers={"origin": "https://elsewhere.org"}).status_code == 403


def test_requests_are_refused_before_their_body_is_read(service: Service) -> None:
    """Without the token; beyond the maximum length; without a length."""
    place = httpx.URL(service.url)
    token = str(service.client.headers["authorization"]).encode()
    for status, header in (
        (401, b"content-length: 300000000"),
        (413, b"content-length: 300000000\r\nauthorization: " + token),
        (411, b"transfer-encoding: chunked\r\nauthorization: " + token),
    ):
        with socket.create_connection((place.host, place.port or 80), 20) as connection:
            kind = b"content-type: application/json\r\n"
            connection.sendall(b"POST /runs HTTP/1.1\r\nhost: 127.0.0.1\r\n" + kind + header + b"\r\n\r\n")
            assert connection.recv(12) == b"HTTP/1.1 %d" % status  # of a body that never comes


def test_a_run_that_cannot_be_started_is_refused(service: Service) -> None:
    """An unknown recipe, a name that leads out of the folder; a command for a run that was never started."""
    for recipe, run_id, status in (
        ("os:system", "x", 404),
        ("net", "../x", 422),
        ("net", "", 422),
        ("net", "x/y", 422),
    ):
        answer = service.client.post("/runs", json={"recipe": recipe, "run_id": run_id})
        assert answer.status_code == status, answer.text
    for command in ("stop", "pause", "resume", "checkpoint"):
        assert service.client.post(f"/runs/never/{command}").status_code == 404
    assert service.client.get("/runs").json() == []


@pytest.mark.parametrize("launched", [False, True], ids=["in_process", "launched"])
def test_a_run_that_fails_does_not_disturb_other_runs_or_the_service(service: Service, launched: bool) -> None:
    """Whether its step raises, exits, or ends its process; the next run in the queue is trained."""
    name = "launched" if launched else "own"
    hows = {"raise": "ValueError: in a step", "exit": "SystemExit: from a step"}
    if launched:
        hows = {"raise": "LaunchedRunFailed: ValueError: in a step", "die": "LaunchedRunCrashed: "}
    for how in hows:
        service.start(f"{name}-{how}", how=how, launched=launched)
    service.start(f"{name}-wrong", nonsense=1, launched=launched)
    service.start(f"{name}-good", epochs=2)
    for how, said in hows.items():
        _, reason = service.until_state(f"{name}-{how}", "failed")
        assert (reason or "").startswith(said)
    _, reason = service.until_state(f"{name}-wrong", "failed")
    assert "nonsense" in (reason or "")
    assert service.until_state(f"{name}-good", "finished", "failed") == ("finished", None)


def test_a_run_is_watched_and_commanded_by_all_doors(service: Service) -> None:
    """Server-Sent Events, WebSocket and `connect`; clients may leave at any time."""
    service.start("watched")
    service.until_step("watched", 3)
    events = "/live/api/runs/watched/events"
    with connect_sse(service.client, "GET", events) as source:
        kinds = [event.event for event, _ in zip(source.iter_sse(), range(3), strict=False)]
    assert kinds == ["snapshot", "frame", "frame"]
    address = f"{service.url.replace('http', 'ws')}/live/api/runs/watched/ws"
    with connect_websocket(address, proxy=None) as socket:
        socket.send(msgspec.json.encode({"type": "hello", "token": service.token}).decode())
        snapshot = msgspec.json.decode(socket.recv(timeout=WAIT_S))
    assert (snapshot["type"], snapshot["run"]["run_id"]) == ("snapshot", "watched")
    path = service.client.post("/runs/watched/checkpoint").json()
    assert Path(path).is_dir()
    assert service.client.post("/runs/watched/pause").status_code == 202
    assert service.client.post("/runs/watched/resume").status_code == 202

    async def watch() -> tuple[str, str | None]:
        async with connect(f"{service.url}/live/#run=watched", token=service.token) as run:
            await anext(run.events(types=[TrainStepEnded]))
            run.stop("from far away")
            result = await run.result()
            return result.status, result.reason

    assert anyio.run(watch) == ("stopped", "from far away")
    assert service.until_state("watched", "stopped") == ("stopped", "from far away")
    assert service.client.post("/runs/watched/pause").status_code == 409


def test_runs_wait_in_a_queue_and_may_leave_it(service: Service) -> None:
    """The device has room for one; each has its position; a name is used once."""
    places = [service.start(name)["position"] for name in ("first", "second", "third", "fourth")]
    service.until_state("first", "running")
    assert places[1:] == [2, 3, 4] or places[1:] == [1, 2, 3]
    assert [service.show(name)["position"] for name in ("first", "second", "third", "fourth")] == [None, 1, 2, 3]
    for name in ("first", "second"):
        answer = service.client.post("/runs", json={"recipe": "net", "run_id": name})
        assert (answer.status_code, answer.json()["detail"]) == (409, f"run {name} is queued or under way")
    assert service.client.post("/runs/second/pause").status_code == 409
    service.client.delete("/runs/second")
    service.client.post("/runs/third/stop", params={"reason": "not needed"})
    assert service.until_state("second", "cancelled") == ("cancelled", None)
    assert service.until_state("third", "cancelled") == ("cancelled", "not needed")
    assert service.show("fourth")["position"] == 1
    service.until_step("first", 2)
    service.client.post("/runs/first/pause")
    service.client.delete("/runs/first")  # cancelled while it is paused
    assert service.until_state("first", "cancelled")[0] == "cancelled"
    service.until_state("fourth", "running")
    service.client.post("/runs/fourth/stop")
    assert service.until_state("fourth", "stopped") == ("stopped", "requested by a client")
    shown = [(one["run_id"], one["state"]) for one in service.client.get("/runs").json()][-4:]
    assert shown == [("first", "cancelled"), ("second", "cancelled"), ("third", "cancelled"), ("fourth", "stopped")]


def test_the_end_of_the_service_stops_its_runs_with_a_checkpoint_to_resume_from(
    another: Callable[..., Service],
) -> None:
    """SIGTERM while runs train, one starts and one is queued, and a client watches."""
    service = another(at_once=3)
    service.start("own")
    service.start("launched", launched=True)
    service.until_step("own", 5)
    service.until_step("launched", 5)
    service.start("starting", launched=True)
    service.start("in-line")
    watching = threading.Event()

    def watch() -> None:
        with httpx.stream("GET", f"{service.url}/live/api/runs/own/events", headers=service.client.headers) as answer:
            try:
                for _ in answer.iter_bytes():
                    watching.set()
            except httpx.RemoteProtocolError:
                pass

    watcher = threading.Thread(target=watch)
    watcher.start()
    assert watching.wait(WAIT_S)
    service.process.send_signal(signal.SIGTERM)
    printed, _ = service.process.communicate(timeout=WAIT_S)
    watcher.join(WAIT_S)
    assert service.process.returncode in (0, -signal.SIGTERM), printed
    assert "Traceback" not in printed
    reached: dict[str, int] = {}
    for name in ("own", "launched"):
        ended = [event for event in service.journal(name) if isinstance(event, RunEnded)]
        assert [(event.status, event.reason) for event in ended] == [("stopped", "the service shuts down")]
        newest = max(CheckpointStore(service.runs / name / CHECKPOINTS_DIR).names())
        assert newest.step == ended[0].global_step >= 5
        reached[name] = newest.step
    assert not (service.runs / "in-line").exists()
    again = another()
    again.start("own", epochs=reached["own"] // 4 + 2)
    assert again.until_state("own", "finished", "failed") == ("finished", None)
    resumed = [event for event in again.journal("own") if isinstance(event, RunResumed)]
    assert [event.global_step for event in resumed] == [reached["own"]]
