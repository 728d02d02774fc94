"""The example service, in its own process: runs are started, shown, commanded, and end with it."""

from __future__ import annotations

import json
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
import jsonschema
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
from typing import Annotated
import msgspec
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


def net(run_id, run_dir, how: str = "", epochs: Annotated[int, msgspec.Meta(ge=1)] = 1_000_000):
    if how == "refuse":
        raise ValueError("no such data")
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

recipes = {"net": "my_jobs:net", "gone": "no_such_module:net"}
app = create_app(Path(sys.argv[1]), recipes, token=sys.argv[2], at_once=int(sys.argv[3]), stop_s=15)
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
        ("os:system", "x", 422),
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
    service.start(f"{name}-wrong", how="refuse", launched=launched)
    service.start(f"{name}-good", epochs=2)
    for how, said in hows.items():
        _, reason = service.until_state(f"{name}-{how}", "failed")
        assert (reason or "").startswith(said)
    _, reason = service.until_state(f"{name}-wrong", "failed")
    assert "no such data" in (reason or "")
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
    for command, state in (("pause", "paused"), ("resume", "running")):
        assert service.client.post(f"/runs/watched/{command}").status_code == 202
        service.until_state("watched", state)

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
        said = f"run {name} is queued or under way; wait for it, or choose another run_id"
        assert (answer.status_code, answer.json()["detail"]) == (409, said)
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
    answer = service.client.post("/runs", json={"recipe": "net", "run_id": "fourth"})
    said = "run fourth is stopped already; ask to continue it, or choose another run_id"
    assert (answer.status_code, answer.json()["detail"]) == (409, said)
    shown = [(one["run_id"], one["state"]) for one in service.client.get("/runs").json()][-4:]
    assert shown == [("first", "cancelled"), ("second", "cancelled"), ("third", "cancelled"), ("fourth", "stopped")]


def test_the_end_of_the_service_stops_its_runs_with_a_checkpoint_to_resume_from(
    another: Callable[..., Service],
) -> None:
    """SIGTERM while runs train, one starts and one is queued, and a client watches. All are queued for the next one."""
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
    for name in ("own", "launched"):
        ended = [event for event in service.journal(name) if isinstance(event, RunEnded)]
        assert [(event.status, event.reason) for event in ended] == [("stopped", "the service shuts down")]
        newest = max(CheckpointStore(service.runs / name / CHECKPOINTS_DIR).names())
        assert newest.step == ended[0].global_step >= 5
    names = ("own", "launched", "starting", "in-line")
    assert [json.loads((service.runs / name / "job.json").read_text())["state"] for name in names] == 4 * ["queued"]


def test_a_service_that_is_killed_continues_its_jobs(another: Callable[..., Service]) -> None:
    """Queued ones run, running ones are resumed, whether in its process or in their own; others are listed."""
    service = another(at_once=2)
    service.start("bad", how="refuse")
    service.until_state("bad", "failed")
    service.start("short", epochs=1)
    service.until_state("short", "finished")
    service.start("own")
    service.start("launched", launched=True)
    service.start("in-line", epochs=2)
    for name in ("own", "launched"):
        service.until_step(name, 5)
        service.client.post(f"/runs/{name}/checkpoint").raise_for_status()
    service.process.kill()
    service.process.wait()
    again = another(at_once=2)
    listed = [one["run_id"] for one in again.client.get("/runs").json()]
    assert listed == ["bad", "short", "own", "launched", "in-line"]
    assert again.state("bad") == ("failed", "ValueError: no such data")
    assert again.state("short") == ("finished", None)
    for name in ("own", "launched"):
        again.until(lambda name=name: any(isinstance(one, RunResumed) for one in again.journal(name)))  # type: ignore[misc]
    again.client.post("/runs/own/stop")
    assert again.until_state("in-line", "finished") == ("finished", None)


def test_two_services_share_a_folder_and_start_no_job_twice(another: Callable[..., Service]) -> None:
    """As two workers of one server. Each lists and commands the jobs of both; the device is for one run."""
    one = another()
    other = another()
    one.start("first")
    one.until_step("first", 2)
    other.start("second", epochs=2)
    assert other.show("first")["state"] == "running"
    assert one.show("second")["position"] == 1
    again = other.client.post("/runs", json={"recipe": "net", "run_id": "first"})
    assert (again.status_code, "is queued or under way" in again.text) == (409, True)
    for command, state in (("pause", "paused"), ("resume", "running")):
        assert other.client.post(f"/runs/first/{command}").status_code == 202
        one.until_state("first", state)
    assert other.client.post("/runs/first/checkpoint").status_code == 409
    other.client.post("/runs/first/stop", params={"reason": "from the other"})
    assert one.until_state("first", "stopped") == ("stopped", "from the other")
    assert one.until_state("second", "finished") == ("finished", None)
    other.start("third")
    other.until_step("third", 2)
    other.process.kill()  # the one that is left takes its job
    one.until(lambda: any(isinstance(event, RunResumed) for event in one.journal("third")))
    assert one.until_state("third", "running") == ("running", None)


def test_wrong_arguments_are_refused_before_they_are_queued(service: Service) -> None:
    """Each with its field and the reason; a misspelt name with the right one."""
    for order, place, said in (
        ({"recipe": "nett"}, ["recipe"], "did you mean net?"),
        ({"recipe": "gone"}, ["recipe"], "no_such_module:net cannot be imported: ModuleNotFoundError"),
        ({"arguments": {"epochs": "many"}}, ["arguments", "epochs"], "Expected `int`, got `str`"),
        ({"arguments": {"epochs": 0}}, ["arguments", "epochs"], "Expected `int` >= 1"),
        ({"arguments": {"epoch": 3}}, ["arguments", "epoch"], "did you mean epochs?"),
        ({"arguments": {"run_dir": "/etc"}}, ["arguments", "run_dir"], "is not known"),
        ({"lanched": True}, [], "did you mean launched?"),
        ({"launched": "perhaps"}, ["launched"], "valid boolean"),
    ):
        answer = service.client.post("/runs", json={"recipe": "net", "run_id": "wrong", **order})
        assert answer.status_code == 422, answer.text
        (problem,) = answer.json()["detail"]
        assert problem["loc"] == ["body", *place]
        assert said in problem["msg"]
    odd = '{"recipe": "net", "run_id": "wrong", "arguments": {"how": "%s"}}'
    for text in (
        odd % "\\ud800",
        odd.replace("how", "\\ud800"),
        odd.replace("net", "\\ud800"),
        odd.replace("run_id", "\\ud800"),
    ):
        answer = service.client.post("/runs", content=text, headers={"content-type": "application/json"})
        assert (answer.status_code, answer.json()["detail"][0]["loc"][0]) == (422, "body"), text
    assert service.client.get("/runs/wrong").status_code == 404
    assert not (service.runs / "wrong").exists()


def test_the_page_shows_jobs_without_a_journal(service: Service) -> None:
    """Those that are queued, and those that have failed before their first event; `/` leads to the page."""
    service.start("busy")
    service.until_step("busy", 1)
    service.start("waits")
    service.start("refused", how="refuse")
    runs = {run["run_id"]: run for run in service.client.get("/live/api/runs").json()["runs"]}
    assert (runs["busy"]["status"], runs["waits"]["status"]) == ("running", "queued")
    shown = service.client.get("/live/api/runs/waits").json()["run"]
    assert (shown["run_id"], shown["status"]) == ("waits", "queued")
    service.client.post("/runs/busy/stop")
    service.until_state("waits", "running")
    service.client.delete("/runs/waits")
    service.until_state("refused", "failed")
    runs = {run["run_id"]: run for run in service.client.get("/live/api/runs").json()["runs"]}
    assert (runs["refused"]["status"], runs["refused"]["reason"]) == ("failed", "ValueError: no such data")
    shown = service.client.get("/live/api/runs/refused").json()["run"]
    assert (shown["status"], shown["problems"]) == (
        "failed",
        ["the run failed before its first event: ValueError: no such data"],
    )
    assert runs["waits"]["status"] == "cancelled"
    home = service.client.get("/", follow_redirects=True)
    assert (home.url.path, home.headers["content-type"]) == ("/live/", "text/html; charset=utf-8")


class SchemaClient:
    """A client that knows nothing but an OpenAPI schema: it finds operations by name, and checks each answer."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        schema = client.get("/openapi.json").json()
        self._schema = schema
        self.operations: dict[str, tuple[str, str, dict[str, Any]]] = {}
        for path, methods in schema["paths"].items():
            for method, operation in methods.items():
                self.operations[operation["operationId"]] = method, path, operation
        self.answered: set[str] = set()

    def call(self, name: str, body: Any = None, **parameters: str) -> tuple[int, Any]:
        method, path, operation = self.operations[name]
        known = {one["name"]: one["in"] for one in operation.get("parameters", ())}
        query = {key: value for key, value in parameters.items() if known[key] == "query"}
        url = path.format(**{key: value for key, value in parameters.items() if known[key] == "path"})
        if body is not None:
            self._check(body, operation["requestBody"]["content"]["application/json"]["schema"])
        answer = self._client.request(method, url, params=query, json=body)
        declared = operation["responses"][str(answer.status_code)]
        value = answer.json()
        self._check(value, declared["content"]["application/json"]["schema"])
        self.answered.add(name)
        return answer.status_code, value

    def _check(self, value: Any, schema: Any) -> None:
        whole = {"$ref": "#/schema", "schema": schema, "components": self._schema["components"]}
        jsonschema.Draft202012Validator(whole).validate(value)


def test_a_client_that_is_made_from_the_schema_uses_every_operation(service: Service) -> None:
    """Each answer is as the schema says, refusals among them."""
    client = SchemaClient(service.client)
    assert client.call("start_run", {"recipe": "net", "run_id": "schema"})[0] == 201
    assert client.call("start_run", {"recipe": "net", "run_id": "schema"})[0] == 409
    assert client.call("start_run", {"recipe": "nett", "run_id": "other"})[0] == 422
    service.until_step("schema", 2)
    assert client.call("pause_run", run_id="schema") == (202, None)
    service.until_state("schema", "paused")
    assert client.call("show_run", run_id="schema")[1]["state"] == "paused"
    assert "paused" in str(client._schema["components"]["schemas"]["Shown"])
    assert client.call("resume_run", run_id="schema") == (202, None)
    assert client.call("checkpoint_run", run_id="schema")[0] == 200
    assert client.call("stop_run", run_id="schema", reason="enough") == (202, None)
    assert service.until_state("schema", "stopped") == ("stopped", "enough")
    assert client.call("pause_run", run_id="schema")[0] == 409
    assert client.call("cancel_run", run_id="schema")[0] == 409
    assert client.call("show_run", run_id="never")[0] == 404
    assert len(client.call("list_runs")[1]) > 0
    assert client.answered == set(client.operations)
    with httpx.Client(base_url=service.url) as stranger:
        client._client = stranger
        assert client.call("list_runs")[0] == 401
