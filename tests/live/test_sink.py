"""The sink `Live` with a trainer: beside the loop, in the sink host, without a folder, when it cannot serve."""

from __future__ import annotations

import re
import signal
import socket as sockets
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from live.kit import Start, Story, Told, Watcher, code_of, port_of, read_until, watch
from support.threads import wait_until
from support.training import Net, make_trainer
from websockets.exceptions import ConnectionClosed

from events.errors import SinkMisconfigured
from events.messages import ObserverFailed, RunEnded
from events.protocol import RunResult
from events.sink import Delivery, RunInfo
from sinks import Live, Memory
from sinks.host.child import HostedSink
from sinks.live.sink import ADDRESS_NAME, LiveWriter
from trainer import Trainer, TrainerArguments

TOKEN = "correct-horse-battery"
GIVEN = "corr&ct+horse%20#battery="
HERE = Delivery(runs_in="thread")


class Held(Net):
    """Trains eight steps, and waits in one of them for the test."""

    def __init__(self) -> None:
        super().__init__(rows=64)
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.act = self._wait

    def _wait(self, global_step: int) -> None:
        if global_step == 3:
            self.reached.set()
            assert self.go_on.wait(40)


def started(module: Held, sinks: list[Any], **options: Any) -> Future[RunResult]:
    """Train on a thread."""
    return ThreadPoolExecutor(1).submit(make_trainer(module, sinks=sinks, epochs=1, **options).train)


def is_free(port: int) -> bool:
    with sockets.socket() as one:
        one.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def address(folder: Path) -> str:
    """The address in a run's folder."""
    file = folder / ADDRESS_NAME
    wait_until(lambda: file.exists() and file.read_bytes().endswith(b"\n"))
    url: str = msgspec.json.decode(file.read_bytes())["url"]
    return url


def test_a_port_in_use_disables_the_sink_and_not_the_run() -> None:
    module, memory = Held(), Memory()
    with sockets.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = started(module, [(Live(port=port), HERE), memory], journal=False)
        wait_until(lambda: memory.of(ObserverFailed))
        module.go_on.set()
        run.result(40)
    failed = [event for event in memory.of(ObserverFailed) if event.action == "disabled"]
    assert f"127.0.0.1:{port}" in failed[0].error
    assert memory.of(RunEnded)[0].status == "finished"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"host": "0.0.0.0"}, "token"),
        ({"host": "0.0.0.0", "token": "1234567"}, "at least 8"),
        ({"port": 70_000}, "not a port"),
        ({"port": -1}, "not a port"),
        ({"port": "http"}, "not a port"),
    ],
)
def test_wrong_settings_are_refused_when_the_trainer_is_built(
    fields: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("STAGECAST_TOKEN", raising=False)
    with pytest.raises(SinkMisconfigured, match=said):
        Live(**fields).check()
    with pytest.raises(ValueError, match=said):
        Trainer(Held(), TrainerArguments(device="cpu"), sinks=[Live(**fields)], journal=False, checkpoints=False)


def test_an_address_of_another_machine_is_refused() -> None:
    """When the sink opens."""
    with pytest.raises(SinkMisconfigured, match=r"192\.0\.2\.1"):
        Live(host="192.0.2.1", token=TOKEN).open(RunInfo("demo"))


def test_the_token_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty variable opens nothing."""
    monkeypatch.setenv("STAGECAST_TOKEN", TOKEN)
    writer = Live(host="0.0.0.0").open(RunInfo("demo"))
    url = writer.url.replace("0.0.0.0", "127.0.0.1")
    assert httpx.get(url + "api/runs").status_code == 401
    assert httpx.get(url + "api/runs", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    writer.close()
    monkeypatch.setenv("STAGECAST_TOKEN", "")
    with pytest.raises(SinkMisconfigured):
        Live(host="0.0.0.0").check()


@pytest.mark.parametrize("where", ["folder", "no folder"])
def test_without_a_token_one_is_generated(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is in the printed link, and in a file that only its owner may read; where stderr is kept, only there."""
    monkeypatch.delenv("STAGECAST_TOKEN", raising=False)
    run = RunInfo("demo", run_dir=str(tmp_path) if where == "folder" else None)
    tokens = []
    for kept in (False, True):
        monkeypatch.setattr("events.notice.is_kept", kept)
        writer = Live().open(run)
        try:
            token = writer._server.link.partition("#token=")[2]
            tokens.append(token)
            assert len(token) >= 32
            assert httpx.get(writer.url + "api/runs").status_code == 401
            headers = {"authorization": f"Bearer {token}"}
            assert httpx.get(writer.url + "api/runs", headers=headers).status_code == 200
            assert (token in capsys.readouterr().err) is not kept
            if where == "folder":
                file = tmp_path / ADDRESS_NAME
                assert file.stat().st_mode & 0o777 == 0o600
                assert msgspec.json.decode(file.read_bytes()) == {"url": writer.url, "token": token}
        finally:
            writer.close()
    assert tokens[0] != tokens[1]
    with pytest.raises(SinkMisconfigured, match="token=True is not a token"):
        Live(token=True).check()
    with pytest.raises(SinkMisconfigured, match="require a token"):
        Live(host="0.0.0.0", token=False).check()


def test_watch_prints_its_link_with_a_token_unless_it_is_disabled(told: Told, process: Start) -> None:
    """Other users of this machine can reach the page, too."""
    told.start()
    command = ("-m", "trainer.cli.main", "watch", str(told.path.parent), "--port", "0")
    for options, given, status in (([], "", 401), ([], GIVEN, 401), (["--no-token"], "", 200)):
        one = process(*command, *options, STAGECAST_TOKEN=given)
        assert one.stdout is not None
        link = "http" + one.stdout.readline().partition("http")[2].strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*/(#token=\S+)?", link)
        assert link.endswith("#token=corr%26ct%2Bhorse%2520%23battery%3D") == bool(given)
        url, _, token = link.partition("#token=")
        assert httpx.get(url + "api/runs").status_code == status
        headers = {"authorization": f"Bearer {given or token}"} if token else {}
        assert httpx.get(url + "api/runs", headers=headers).status_code == 200
        assert ("Every user of this machine may watch" in one.stdout.readline()) is bool(options)


def test_its_description_returns_unchanged_from_another_process() -> None:
    live = Live(port=1, commands=True, token=TOKEN, origins=("https://a.example",))
    built, _ = HostedSink.of("live", live, Live.delivery, 0).build()
    assert built == live


@pytest.mark.parametrize("options", [[HERE], []], ids=["thread", "host"])
def test_a_run_is_watched_to_its_end(
    options: list[Delivery], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the link on stderr, all steps, a command, the last state, a free port, no secret in the folder."""
    module, folder, watcher = Held(), tmp_path / "runs" / "demo", Watcher()
    live = Live(commands=True, token=TOKEN)
    run = started(module, [(live, *options) if options else live], run_id="demo", run_dir=folder, journal=True)
    try:
        assert module.reached.wait(30)
        url = address(folder)
        with watch(url) as socket:
            socket.send(watcher.hello(token=TOKEN))
            read_until(socket, watcher, lambda: len(watcher.points.get("train_loss", ())) >= 2)
            assert watcher.run["commands"] is True
            command = {"command": "checkpoint", "id": "c"}
            socket.send(msgspec.json.encode({"type": "command", "command": command}).decode())
            read_until(socket, watcher, lambda: "sent" in watcher.kinds)
            texts = [p.read_bytes() for p in folder.rglob("*") if p.is_file()]
            assert not any(TOKEN.encode() in text for text in texts)
            module.go_on.set()
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    watcher.take(socket.recv(timeout=30))
    finally:
        module.go_on.set()
        run.result(40)
    assert f"stagecast: the run can be watched at {url}#token={TOKEN}\n" in capsys.readouterr().err
    assert watcher.run["status"] == "finished"
    assert watcher.steps() == list(range(1, 9))
    assert code_of(closed) == 1001
    assert is_free(port_of(url))
    assert not (folder / ADDRESS_NAME).exists()


def test_a_run_without_a_folder_is_shown() -> None:
    """From its events alone: it takes no commands, and has no journal."""
    writer = Live(commands=True, token=False).open(RunInfo("demo"))
    story, watcher = Story(), Watcher()
    writer.write([story.started(), *story.steps(3)])
    with watch(writer.url) as socket:
        socket.send(watcher.hello())
        read_until(socket, watcher, lambda: watcher.cursor == 4)
        assert watcher.run["commands"] is False
        sent = httpx.post(writer.url + "api/runs/demo/commands", json={"command": "stop", "id": "1"})
        assert (sent.status_code, sent.json()["type"]) == (409, "refused")
        assert httpx.get(writer.url + "api/runs/demo/journal").status_code == 404
        assert httpx.get(writer.url + "api/runs/demo/media/x.png").status_code == 404
        writer.write([*story.steps(2), story.ended()])
        writer.close()
        with pytest.raises(ConnectionClosed):
            while True:
                watcher.take(socket.recv(timeout=10))
    assert (watcher.run["status"], len(watcher.points["train_loss"])) == ("finished", 5)


def test_a_watcher_that_reads_nothing_does_not_delay_the_end_for_long(story: Story) -> None:
    writer: LiveWriter = Live(token=False).open(RunInfo("demo"))
    with sockets.create_connection(("127.0.0.1", port_of(writer.url))) as silent:
        silent.sendall(b"GET /api/runs/demo/events HTTP/1.1\r\nhost: localhost\r\n\r\n")
        wait_until(lambda: writer._hub.is_watched)
        for _ in range(40):
            writer.write([story.metrics(**{f"m{i}-{story.seq}": 1.0 for i in range(2_000)})])
        done = threading.Thread(target=writer.close)
        done.start()
        done.join(15)
        assert not done.is_alive()
    assert is_free(port_of(writer.url))


def test_an_attempt_that_resumes_shows_the_curves_before_it(told: Told) -> None:
    """Without superseded steps."""
    tell, watcher = told.story, Watcher()
    told.start(20)
    writer = Live(token=False).open(RunInfo("demo", attempt=2, run_dir=str(told.path)))
    with watch(writer.url) as socket:
        socket.send(watcher.hello())
        read_until(socket, watcher, lambda: len(watcher.points.get("train_loss", ())) == 20)
        events = [*tell.resumed(10, 11), *tell.steps(5)]
        told.write(*events)
        writer.write(events)
        writer.write(events)  # delivered again
        read_until(socket, watcher, lambda: watcher.cursor == tell.seq)
    writer.close()
    assert watcher.steps() == list(range(1, 16))
    assert watcher.attempt == 2


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_watch_ends_with_a_signal(number: str, tmp_path: Path, process: Start) -> None:
    """Clients by both protocols are informed, and nothing but its own lines is printed. It may start before the run."""
    one = process("-m", "trainer.cli.main", "watch", str(tmp_path / "runs"), "--port", "0", "--no-token")
    assert one.stdout is not None
    link, _, waits = (one.stdout.readline() for _ in range(3))
    assert waits == f"{tmp_path / 'runs'} does not exist yet: the page shows its runs as soon as one starts.\n"
    url = "http" + link.partition("http")[2].strip()
    assert httpx.get(url + "api/runs").json() == {"runs": []}
    told = Told(tmp_path / "runs" / "demo", steps=1)
    with watch(url) as socket, httpx.stream("GET", url + "api/runs/demo/events", timeout=10) as events:
        socket.send(Watcher().hello())
        socket.recv(timeout=10)
        parts = events.iter_bytes()
        assert b"snapshot" in next(parts)
        one.send_signal(getattr(signal, number))
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                socket.recv(timeout=10)
        assert list(parts) is not None  # it ends, as it should, and is not cut off
    assert code_of(closed) == 1012
    told.let_go()
    out, _ = one.communicate(timeout=20)
    assert one.returncode in (0, -getattr(signal, number))
    assert "Traceback" not in out
    assert "rror" not in out
