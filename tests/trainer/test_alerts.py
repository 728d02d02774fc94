from __future__ import annotations

import json
import math
import os
import queue
import signal
import stat
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.command import Stagecast, stagecast, started  # noqa: F401  # a fixture
from support.scripts import Start
from support.training import Boom, Net, Scored, failing

from events.errors import ArgumentsError
from events.messages import CommandTaken, ObserverFailed, RunEnded, SystemSampled, ValEpochEnded
from events.sink import Delivery, RunInfo
from sinks import Alert, Memory
from sinks.alerts.rules import AlertLimits, Rules
from sinks.testing import Story
from trainer import Trainer, TrainerArguments


class Receiver:
    """A webhook on a port of its own. ``refuse`` is the number of requests that it answers with an error."""

    def __init__(self) -> None:
        self.received: queue.Queue[dict[str, Any]] = queue.Queue()
        self.refuse = 0

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.refuse -= 1
                if owner.refuse < 0:
                    owner.received.put(body)
                self.send_response(503 if owner.refuse >= 0 else 200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """Nothing."""

        owner = self
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/hook"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def all(self) -> list[tuple[str, str]]:
        return [(one["kind"], one["text"]) for one in self.received.queue]

    def next(self) -> dict[str, Any]:
        return self.received.get(timeout=50)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.server.shutdown()
    receiver.server.server_close()


def run(net: Net, folder: Path, *alerts: Any, **arguments: Any) -> Any:
    """Train; the default console stays as it is beside the alerts."""
    options = {"train_batch_size": 8, "device": "cpu", "epochs": 1, "drain_timeout_s": 50} | arguments
    return Trainer(net, TrainerArguments(**options), alerts=alerts, run_dir=folder / "demo", run_id="demo").train()


def test_the_end_of_a_run_is_told_with_what_a_webhook_needs(receiver: Receiver, tmp_path: Path) -> None:
    run(Net(), tmp_path, Alert(receiver.url))
    message = receiver.next()
    assert (
        message.items() >= {"kind": "finished", "run_id": "demo", "step": 2, "run_dir": str(tmp_path / "demo")}.items()
    )
    assert message["text"] == message["content"] == "demo: finished at step 2"
    with pytest.raises(Boom):
        run(failing(Boom("of the user"), at=2), tmp_path / "failing", Alert(receiver.url))
    assert receiver.next()["text"] == "demo: failed in train_step at step 1: Boom: of the user"
    assert receiver.received.empty()


def test_numbers_that_are_not_finite_and_a_metric_that_stays_are_told_once(receiver: Receiver, tmp_path: Path) -> None:
    run(Net(rows=40, scales={2: math.nan}), tmp_path / "nan", Alert(receiver.url, when=["nan"]), non_finite="skip")
    assert receiver.all() == [("nan", "demo: the loss is NaN or infinite at step 1")]
    scored = Scored(0.3, 0.5, 0.4, 0.5, 0.5, 0.6, 0.5, math.nan)
    alert = Alert(receiver.url, when=["no_improvement"], monitor="score", mode="max", patience=2)
    run(scored, tmp_path / "scored", alert, epochs=8)
    assert receiver.all()[1:] == [
        ("no_improvement", "demo: score has not improved for 2 values (0.5); the best is 0.5 of step 2"),
        ("no_improvement", "demo: score has not improved for 2 values (nan); the best is 0.6 of step 6"),
    ]


def test_a_run_without_progress_is_told_while_it_stands(receiver: Receiver, tmp_path: Path) -> None:
    def wait(step: int) -> None:
        # Arrives while this step stands; on a slow machine the step before it arrives late, and is told first.
        while step == 2 and "since step 1" not in receiver.next()["text"]:
            pass

    run(Net(act=wait), tmp_path, Alert(receiver.url, stalled_s=1.0, when=["stalled"]))


def test_a_full_disk_is_told_until_it_is_over_and_a_repeated_batch_is_judged_once(receiver: Receiver) -> None:
    story = Story("demo")
    writer = Alert(receiver.url, patience=3).open(RunInfo("demo"))
    writer.write([story.started()])
    worse = [story(ValEpochEnded, loss=loss) for loss in (1.0, 2.0, 3.0)]
    writer.write(worse)
    writer.write(worse)
    for used in (90.0, 96.0, 97.0, 80.0, 95.0):
        writer.write([story(SystemSampled, disk_used_percent=used)])
    writer.write([story(RunEnded, status="stopped", reason="of a person")])
    writer.close()
    assert [text for _, text in receiver.all()] == [
        "demo: the disk of the run's folder is 96.0 % full",
        "demo: the disk of the run's folder is 95.0 % full",
        "demo: stopped at step 0: of a person",
    ]


def test_a_run_that_is_paused_or_over_is_not_stalled() -> None:
    story = Story("demo")
    rules = Rules(AlertLimits(10.0, "val_loss", "min", 5, 95.0), "demo", None)
    assert rules.look(100.0) is None  # before the first event
    told = []
    for now, event in [
        (100.0, story.started()),
        (200.0, story(CommandTaken, command="pause", command_id="1")),
        (300.0, story(CommandTaken, command="resume", command_id="2")),
        (305.0, story(SystemSampled, cpu_percent=1.0)),
        (400.0, story(RunEnded, status="finished")),
    ]:
        rules.take(event, now)
        told.append([rules.look(now + after) is not None for after in (9.0, 10.0, 99.0)])
    never = [False] * 3
    assert told == [[False, True, False], never, [False, True, False], never, never]


def test_a_message_that_cannot_be_sent_is_sent_again_and_once(receiver: Receiver, tmp_path: Path) -> None:
    receiver.refuse, memory = 2, Memory()
    quick = Delivery(backoff_s=0.01, types=Alert.delivery.types)
    arguments = TrainerArguments(train_batch_size=8, device="cpu", epochs=1, drain_timeout_s=50)
    Trainer(Net(), arguments, sinks=[memory], alerts=[(Alert(receiver.url), quick)], run_dir=tmp_path / "demo").train()
    assert [kind for kind, _ in receiver.all()] == ["finished"]
    failures = memory.of(ObserverFailed)
    assert "503" in failures[0].error
    assert "/hook" not in repr(Alert(receiver.url)) + failures[0].error  # it is a secret


def test_a_command_and_the_desktop_get_the_text_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tell me", "notify-send"):
        program = tmp_path / name
        program.write_text('#!/bin/sh\nprintf "%s|" "$@" "$STAGECAST_ALERT_KIND" >> "$0.out"\n')
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    with pytest.raises(Boom):
        run(
            failing(Boom("$(touch gone) -x"), at=1), tmp_path, Alert(f"'{tmp_path}/tell me' --to you"), Alert("desktop")
        )
    text = "demo: failed in train_step at step 0: Boom: $(touch gone) -x"
    assert (tmp_path / "tell me.out").read_text() == f"--to|you|{text}|failed|"
    options = "--app-name=stagecast|--urgency=critical|--"
    assert (tmp_path / "notify-send.out").read_text() == f"{options}|stagecast: failed|{text}||"


def test_a_wrong_alert_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch, stagecast: Stagecast) -> None:  # noqa: F811
    monkeypatch.setenv("PATH", "/nowhere")
    for to, words in [
        ("desktop", "needs the program notify-send; install it"),
        ("no-such-program --now", "'no-such-program --now' is not 'desktop', not an address"),
        ("https:///path", "the webhook has no host"),
        ("'", "is not a command: No closing quotation"),
    ]:
        with pytest.raises(ArgumentsError, match=rf"alerts\[0\]: Alert: .*{words}"):
            Trainer(Net(), alerts=[Alert(to)])
    with pytest.raises(ArgumentsError, match=r"alerts must be a list, not 'desktop'"):
        Trainer(Net(), alerts="desktop")
    with pytest.raises(ArgumentsError, match=r"alerts\[0\] must be a sink"):
        Trainer(Net(), alerts=["desktop"])
    for wrong in ({"when": "nan"}, {"when": ["nan", "slow"]}, {"patience": 0}, {"stalled_s": "5"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Alert("true", **wrong)
    for text, words in [("desktop", "notify-send"), ('{"to": "x", "wen": 1}', "wen"), ("{", "not JSON")]:
        ended = stagecast("watch", ".", "--alert", text)
        assert ended.code == 2
        assert words in ended.err


def test_watch_tells_that_a_run_was_killed_and_nothing_that_was_before(
    receiver: Receiver, tmp_path: Path, script: Start
) -> None:
    program = script(
        "import pathlib, time\n"
        "from support.training import Net\n"
        "from trainer import Trainer, TrainerArguments\n"
        "def act(step):\n"
        "    if step == 3:\n"
        "        files = pathlib.Path('runs/demo/journal')\n"
        "        while not any(b'NonFiniteLoss' in one.read_bytes() for one in files.iterdir()):\n"
        "            time.sleep(0.01)  # another thread writes it\n"
        "        print('stands', flush=True)\n"
        "        input()\n"
        "net = Net(act=act, scales={1: float('nan')}, rows=40)\n"
        "arguments = TrainerArguments(train_batch_size=8, device='cpu', epochs=1, non_finite='skip')\n"
        "Trainer(net, arguments, sinks=[], run_dir='runs/demo', run_id='demo').train()\n"
    )
    program.wait_for("stands")
    alert = json.dumps({"to": receiver.url, "stalled_s": 0.5})
    with started("watch", str(tmp_path / "runs"), "--port", "0", "--alert", alert) as (server, out, _):
        assert "can be watched" in out.readline()
        assert receiver.next()["kind"] == "stalled"
        program.signal(signal.SIGKILL)
        message = receiver.next()
        assert message["kind"] == "failed"
        assert "its process ended without a word" in message["text"]
        server.send_signal(signal.SIGINT)
        server.wait()
    assert receiver.received.empty()


def test_a_server_that_is_stopped_tells_nothing_about_runs_that_go_on(
    receiver: Receiver, tmp_path: Path, script: Start
) -> None:
    program = script(
        "from support.training import Net\n"
        "from trainer import Trainer, TrainerArguments\n"
        "net = Net(act=lambda step: step == 2 and (print('stands', flush=True), input()))\n"
        "arguments = TrainerArguments(train_batch_size=8, device='cpu', epochs=1)\n"
        "Trainer(net, arguments, sinks=[], run_dir='runs/demo', run_id='demo').train()\n"
    )
    program.wait_for("stands")
    alert = json.dumps({"to": receiver.url, "stalled_s": 0.5})
    with started("watch", str(tmp_path / "runs"), "--port", "0", "--alert", alert) as (server, _, _):
        assert receiver.next()["kind"] == "stalled"
        server.send_signal(signal.SIGTERM)
        server.wait()
    assert receiver.received.empty()
    assert program.process.stdin is not None
    program.process.stdin.write("\n")
    assert program.end()[0] == 0
