"""Runs that are pushed to a central page: each event once and in order, whichever side is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.command import COMMAND, environment, run_process
from support.threads import wait_until
from support.training import Net, make_trainer, read_journal

from events.errors import RunFolderError, SinkMisconfigured
from events.journal.lines import encode_lines
from events.journal.reader import JournalReader
from events.journal.segment import segment_name
from events.journal.writer import Journal
from events.messages import Event, ImageLogged, MetricsLogged, ObserverFailed, RunEnded
from events.protocol import Pause
from events.run.inbox import commands_of
from events.run.job import ServiceJob, write_job
from events.sink import RunInfo
from sinks import Push
from sinks.alerts.rules import AlertLimits, Rules
from sinks.live import pushed, pushes
from sinks.live.pushed import read_tokens
from sinks.live.pushes import Pushes
from sinks.live.runs import RunsOfFolder
from sinks.push import sender
from sinks.testing import Story, check_sink, opened
from trainer import Image

TOKEN, OTHER = "token-of-vision", "token-of-speech"
TOKENS = {"vision": TOKEN, "speech": OTHER}


class Central:
    """``stagecast watch --push-tokens`` in a process of its own, at one port whenever it runs."""

    def __init__(self, folder: Path) -> None:
        self.runs = folder / "central"
        self._tokens = folder / "tokens.txt"
        self._tokens.write_text("# of two teams\n" + "".join(f"{name}={token}\n" for name, token in TOKENS.items()))
        self.port = 0
        self.process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        options = ["watch", str(self.runs), "--push-tokens", str(self._tokens), "--port", str(self.port), "--no-token"]
        self.process = subprocess.Popen(
            [*COMMAND, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment()
        )
        assert self.process.stdout is not None
        printed = ""
        while (found := re.search(r"http://127\.0\.0\.1:(\d+)/", printed)) is None:
            line = self.process.stdout.readline()
            assert line, f"the server did not start: {printed}"
            printed += line
        self.port = int(found[1])
        wait_until(lambda: self._answers(), "the server does not answer")

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}api/runs").status_code == 200
        except httpx.TransportError:
            return False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def kill(self) -> None:
        """As a crash does."""
        assert self.process is not None
        self.process.kill()
        self.process.communicate()

    def push(self, **options: Any) -> Push:
        return Push(self.url, **({"token": TOKEN, "project": "vision"} | options))

    def events(self, run_id: str = "demo") -> list[Event]:
        return read_journal(self.runs / "vision" / run_id)

    def shown(self, run_id: str = "demo") -> Any:
        runs = httpx.get(f"{self.url}api/runs").json()["runs"]
        return next((run for run in runs if run["run_id"] == run_id), None)


@pytest.fixture
def central(tmp_path: Path) -> Iterator[Central]:
    one = Central(tmp_path)
    yield one
    one.kill()


@pytest.fixture
def here(tmp_path: Path, serve: Any) -> Any:
    """The same server on a thread of this process, and its folder."""

    def start(**options: Any) -> tuple[str, Path]:
        folder = tmp_path / "central"
        server = serve(RunsOfFolder(folder), pushes=Pushes(folder, TOKENS, **options))
        return server.url, folder / "vision"

    return start


def test_the_sink_keeps_the_rules_of_sinks(here: Any, tmp_path: Path) -> None:
    """See `sinks.testing.check_sink`."""
    url, folder = here()
    check_sink(Push(url, TOKEN, "vision"), written=lambda: read_journal(folder / "demo"), run_dir=tmp_path / "run")


def test_a_run_is_there_once_and_whole_though_the_server_is_killed(central: Central, tmp_path: Path) -> None:
    """With its images; the loop takes its steps meanwhile. At the end the page shows it as finished."""
    run_dir = tmp_path / "run"

    def act(step: int) -> None:
        if step == 3:
            wait_until(lambda: (central.runs / "vision" / "demo").exists() and central.events(), "nothing has arrived")
            assert central.shown()["status"] == "running"
            central.kill()
        elif step == 6:
            failed = lambda: any(isinstance(event, ObserverFailed) for event in read_journal(run_dir))  # noqa: E731
            wait_until(failed, "the outage was not reported")
            central.start()

    def train_step(net: Net, step: int, batch: Any) -> Any:
        import torch

        net.log("samples", Image(torch.rand(3, 4, 4)))
        return net.forward_loss(batch)

    options = {"journal": True, "run_id": "demo", "run_dir": run_dir, "epochs": 6}
    result = make_trainer(Net(act=act, train_step=train_step), sinks=[central.push()], **options).train()
    assert (result.status, result.problems) == ("finished", [])
    kept, stored = read_journal(run_dir), central.events()
    assert len(stored) > 20
    assert stored == kept[: len(stored)]
    assert any(isinstance(event, RunEnded) for event in stored)
    images = [event.path for event in stored if isinstance(event, ImageLogged)]
    assert len(images) == 12
    for path in images:
        assert (central.runs / "vision" / "demo" / path).read_bytes() == (run_dir / path).read_bytes()
    assert httpx.get(f"{central.url}api/runs/demo/media/{images[0]}").headers["content-type"] == "image/png"
    shown = central.shown()
    assert (shown["status"], shown["pushed"], shown["commands"]) == ("finished", True, False)
    report = next(one for one in result.observers if one.observer == "push")
    assert (report.state, report.left, report.dropped) == ("closed", 0, 0)


def deliver(write: Callable[[Any], None], events: Any) -> None:
    """Repeat a write until it succeeds, as the supervisor of a sink does."""
    errors: list[str] = []

    def is_done() -> bool:
        try:
            write(events)
        except ConnectionError as error:
            errors.append(str(error))
            return False
        return True

    wait_until(is_done, f"the events are not taken: {errors[-1:]}")


def test_the_server_loses_nothing_that_it_has_acknowledged(central: Central) -> None:
    """It is killed again and again while a sink writes; the sink repeats what was not acknowledged, which is there
    once."""
    story = Story()
    sent: list[Event] = []
    with opened(central.push()) as write:
        for delay_s in (0.02, 0.07, 0.15):
            killer = threading.Timer(delay_s, central.kill)
            killer.start()
            while True:
                batch = story.steps(40)
                try:
                    write(batch)
                except ConnectionError:
                    break
                sent += batch
            killer.join()
            stored = central.events()
            assert stored == (sent + batch)[: len(stored)]
            assert len(stored) >= len(sent)
            central.start()
            deliver(write, batch)
            sent += batch
    assert central.events() == sent


KILLED = """
import os, sys
from pathlib import Path
from support.threads import wait_until
from support.training import Net, make_trainer
from sinks import Push
from sinks.alerts.rules import AlertLimits, Rules
from trainer import Checkpoints

url, run_dir, central = sys.argv[1:]


def act(step):
    if step == 9 and not (Path(run_dir) / "killed").exists():
        journal = Path(central) / "journal"
        wait_until(lambda: any(path.stat().st_size for path in journal.glob("*.jsonl")), "nothing has arrived")
        (Path(run_dir) / "killed").touch()
        os.kill(os.getpid(), 9)


options = {"journal": True, "checkpoints": Checkpoints(every_steps=4), "resume": "auto", "epochs": 6}
push = Push(url, "token-of-vision", "vision")
make_trainer(Net(act=act), sinks=[push], run_id="demo", run_dir=run_dir, **options).train()
"""


def test_a_run_that_is_killed_is_silent_and_whole_once_it_is_resumed(
    central: Central, process: Any, tmp_path: Path
) -> None:
    """Silent, not lost: the server cannot know. What the killed process had journalled arrives, too."""
    (tmp_path / "killed.py").write_text(KILLED)
    run_dir, copy = tmp_path / "run", central.runs / "vision" / "demo"
    first = process("killed.py", central.url, str(run_dir), str(copy))
    output, _ = first.communicate(timeout=50)
    assert first.returncode == -signal.SIGKILL, output
    wait_until(lambda: central.shown()["status"] == "silent", "the run is not silent")
    assert central.events() == read_journal(run_dir)
    again = process("killed.py", central.url, str(run_dir), str(copy))
    output, _ = again.communicate(timeout=50)
    assert again.returncode == 0, output
    stored, kept = central.events(), read_journal(run_dir)
    assert stored == kept[: len(stored)]
    assert {event.attempt for event in stored} == {1, 2}
    assert central.shown()["status"] == "finished"


def test_what_is_not_delivered_at_the_end_is_said_and_sent_later(central: Central, tmp_path: Path) -> None:
    """The end waits a moment for a server that is away. The command that sends the rest stands in the problem."""
    central.kill()
    options = {"journal": True, "run_id": "demo", "run_dir": tmp_path / "run", "epochs": 2}
    result = make_trainer(Net(), sinks=[central.push()], **options).train()
    (problem,) = (one for one in result.problems if "push" in one)
    command = re.search(r"stagecast (replay \S+ --to push url=\S+ project=\S+)", problem)
    assert re.search(r"\(\d+ events not delivered\)", problem)
    assert command is not None, problem
    central.start()
    words = [str(tmp_path / "run") if word == "RUN" else word for word in command[1].split()]
    sent = run_process(*words, STAGECAST_PUSH_TOKEN=TOKEN)
    assert sent.code == 0, sent
    assert central.events() == read_journal(tmp_path / "run")


def test_a_wrong_token_disables_the_sink_once_and_writes_nothing(here: Any, tmp_path: Path) -> None:
    """So does that of another project; a server without projects, and an address with a redirect, are named."""
    url, folder = here()
    run = RunInfo("demo")
    for push in (Push(url, "wrong-token", "vision"), Push(url, OTHER, "vision"), Push(url, TOKEN, "unknown")):
        with pytest.raises(SinkMisconfigured, match=rf"refuses the token for project {push.project} \(401"):
            push.open(run)
    assert not folder.parent.exists()
    result = make_trainer(
        Net(), sinks=[Push(url, OTHER, "vision")], journal=True, run_id="demo", run_dir=tmp_path / "run"
    ).train()
    (problem,) = result.problems
    assert "refuses the token for project vision" in problem
    assert [event.action for event in read_journal(tmp_path / "run") if isinstance(event, ObserverFailed)] == [
        "disabled"
    ]


def test_a_server_that_takes_no_runs_is_named(serve: Any, tmp_path: Path) -> None:
    """At the first attempt: after a success, the same answer may come from a proxy during an outage."""
    url = serve(RunsOfFolder(tmp_path)).url
    with pytest.raises(SinkMisconfigured, match=r"takes no runs \(404 .*; serve it with stagecast watch --push-tokens"):
        Push(url, TOKEN, "vision").open(RunInfo("demo"))


def test_a_page_at_a_loopback_address_is_asked_without_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of both versions of the protocol."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:2")
    for host in ("127.0.0.1", "[::1]"):
        with pytest.raises(ConnectionError, match="does not take events: ConnectError"):
            Push(f"http://{host}:1/", TOKEN, "vision").open(RunInfo("demo"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"url": "example.org"}, "is not the address of a page"),
        ({"url": "https://user:secret@example.org"}, "is not the address of a page"),
        ({"url": "https://exam\nple.org"}, "is not the address of a page"),
        ({"project": "../x"}, "is not a name"),
        ({"token": None}, "Push has no token; give token=, or set the environment variable STAGECAST_PUSH_TOKEN"),
        ({"token": "short"}, "too short"),
    ],
)
def test_a_wrong_option_is_named_before_the_run(options: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no message has the token or a password."""
    monkeypatch.delenv("STAGECAST_PUSH_TOKEN", raising=False)
    push = Push(**({"url": "https://example.org", "token": TOKEN, "project": "vision"} | options))
    with pytest.raises(SinkMisconfigured, match=said) as caught:
        push.check()
    assert "secret" not in f"{caught.value} {push!r}"
    assert TOKEN not in f"{caught.value} {push!r}"


def test_a_file_of_tokens_has_a_line_per_project(tmp_path: Path) -> None:
    """Each mistake names its line."""
    file = tmp_path / "tokens"
    file.write_text("# teams\n\nvision = one-token\nspeech=another-token\n")
    assert read_tokens(str(file)) == {"vision": "one-token", "speech": "another-token"}
    for text, said in (
        ("vision", "line 1 is not PROJECT=TOKEN"),
        ("a=token-one\na=token-two", "line 2 is not PROJECT=TOKEN, or its project is there twice"),
        ("../a=token-one", "line 1 is not"),
        ("# none", "has no tokens"),
    ):
        file.write_text(text)
        with pytest.raises(SinkMisconfigured, match=said):
            read_tokens(str(file))
    with pytest.raises(SinkMisconfigured, match="cannot be read"):
        read_tokens(str(tmp_path / "nowhere"))


class Raw:
    """A sender that may send anything."""

    def __init__(self, url: str) -> None:
        headers = {"authorization": f"Bearer {TOKEN}"}
        self.client = httpx.Client(base_url=f"{url}api/push/vision/", headers=headers, timeout=20)

    def get(self, run: str = "demo", sender: str = "0" * 16) -> httpx.Response:
        return self.client.get("events", params={"run": run, "sender": sender})

    def post(self, body: Any, run: str = "demo", sender: str = "0" * 16, **options: Any) -> httpx.Response:
        return self.client.post("events", params={"run": run, "sender": sender}, content=body, **options)

    def put(self, path: str, body: bytes = b"data", run: str = "demo") -> httpx.Response:
        return self.client.put("media", params={"run": run, "sender": "0" * 16, "path": path}, content=body)


@pytest.fixture
def raw_to() -> Iterator[Callable[[str], Raw]]:
    """Connect senders."""
    connected: list[Raw] = []

    def connect(url: str) -> Raw:
        connected.append(Raw(url))
        return connected[-1]

    yield connect
    for one in connected:
        one.client.close()


def test_hostile_names_and_paths_stay_in_the_folder_of_the_project(here: Any, raw_to: Any, tmp_path: Path) -> None:
    """Whatever a run is called, its folder is one level below the project's; files are in its media."""
    url, folder = here()
    raw = raw_to(url)
    names = ["..", ".", "../../x", "a/b", "/etc", "a.b", "Größe *", "x" * 250, "%2e%2e", "C:\\x"]
    for name in names:
        line = encode_lines([Story(name).started()], 0)
        assert raw.get(name).status_code == 200
        assert raw.post(line, name).json() == {"cursor": 1}, name
    assert len(list(folder.iterdir())) == len(names)
    assert {path.parent for path in tmp_path.rglob("journal")} == {*folder.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == {"central"}
    for name in ("", "a\nb", "x" * 251):
        assert raw.get(name).status_code == 400
    raw.get()
    for path in ("media/../../x.png", "/media/x.png", "run.lock", "media", "media/.x", "media//x", "media/a/b/c/d", ""):
        assert raw.put(path).status_code == 400, path
    assert raw.put("media/loss/step-1.a1.1.png").status_code == 200
    assert (folder / "demo" / "media" / "loss" / "step-1.a1.1.png").read_bytes() == b"data"
    os.symlink(tmp_path, folder / "demo" / "media" / "link")
    assert raw.put("media/link/x.png").status_code == 400
    assert not (tmp_path / "x.png").exists()


def test_lines_that_are_not_the_next_events_of_the_run_are_refused(here: Any, raw_to: Any) -> None:
    """None of a refused request is kept; a sender that was replaced gets an error."""
    url, folder = here()
    raw, story = raw_to(url), Story()
    first, *rest = encode_lines([story.started(), *story.steps(5)], 0).splitlines(keepends=True)
    assert raw.post(first).status_code == 409  # it has not asked for the newest event
    assert raw.get().json() == {"cursor": 0, "newest": None}
    assert raw.post(first + rest[0]).json() == {"cursor": 2}
    changed = rest[1].replace(b'"seq":3', b'"seq":4')
    for body, status in (
        (rest[2], 409),  # one is missing before it
        (rest[1] + changed, 400),
        (b"{}\n", 400),
        (encode_lines([Story("another").started()], 0), 400),
        (encode_lines([story(RunEnded, status="finished")], 2) + b"[" * 10_000, 400),
    ):
        assert raw.post(body).status_code == status, body[:80]
    assert raw.post(first + rest[0] + rest[1]).json() == {"cursor": 3}  # repeated ones are skipped
    assert raw.get(sender="1" * 16).json()["newest"].encode() == rest[1][:-1]
    assert raw.post(rest[2]).status_code == 409
    assert raw.post(rest[2], sender="1" * 16).json() == {"cursor": 4}
    late = encode_lines([Story()(MetricsLogged, metrics={})], 0)
    assert raw.post(late, sender="1" * 16).json() == {"cursor": 4}
    assert len(read_journal(folder / "demo")) == 4


def test_sizes_rates_and_the_disk_are_bounded(here: Any, raw_to: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each refusal has its status and its reason."""
    url, folder = here(most_bytes=200_000)
    raw, story = raw_to(url), Story()
    raw.get()
    assert raw.post(b"x" * (4 * 2**20 + 1)).status_code == 413
    assert raw.post(iter([b"x"])).status_code == 411
    assert raw.put("media/a.png", b"x" * 150_000).status_code == 200
    full = raw.put("media/b.png", b"x" * 150_000)
    assert (full.status_code, "of 200,000; remove runs" in full.text) == (507, True)
    monkeypatch.setattr(pushed, "_LEAST_FREE_BYTES", 2**60)
    assert "nearly full" in raw.post(encode_lines(story.steps(1), 0)).text
    monkeypatch.setattr(pushed, "_LEAST_FREE_BYTES", 0)
    monkeypatch.setattr(pushed, "MOST_RUNS", 1)
    raw.get("second")
    assert "maximum" in raw.post(encode_lines([Story("second").started()], 0), "second").text
    monkeypatch.setattr(pushes, "MOST_OPEN", 2)
    assert raw.get("third").status_code == 503
    monkeypatch.setattr(pushed, "REQUESTS_PER_S", 0.001)
    monkeypatch.setattr(pushed, "BURST", 3.0)
    assert [raw.get().status_code for _ in range(5)] == [200, 200, 200, 429, 429]
    assert [path.name for path in folder.iterdir()] == ["demo"]


def test_a_sender_that_says_nothing_is_silent_and_one_without_events_is_not(
    here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A silent run takes no commands, and is running again once it is heard."""
    monkeypatch.setattr(pushed, "SILENT_S", 1.5)
    monkeypatch.setattr(sender, "ALIVE_S", 0.2)
    url, folder = here()
    story = Story()

    def shown() -> Any:
        return httpx.get(f"{url}api/runs").json()["runs"][0]

    with opened(Push(url, TOKEN, "vision")) as write:
        write([story.started()])
        began = time.monotonic()
        while time.monotonic() < began + 3.0:  # time is what is tested
            assert (shown()["status"], shown()["commands"]) == ("running", False)
        with pytest.raises(RunFolderError, match="trains elsewhere and is only pushed here"):
            commands_of(folder / "demo").send(Pause(id="one"))
        monkeypatch.setattr(sender, "ALIVE_S", 1e6)
        wait_until(lambda: shown()["status"] == "silent", "the run is not silent")
        write(story.steps(1))
        assert shown()["status"] == "running"
    assert len(read_journal(folder / "demo")) == 2


def test_a_second_run_of_one_name_is_refused_and_the_first_is_unharmed(here: Any, tmp_path: Path) -> None:
    """Whether it comes later, or both start at once; in another project it is welcome."""
    url, folder = here()
    push = Push(url, TOKEN, "vision")
    first, second = Story("twice"), Story("twice")
    second.time += 0.5
    for name, story in (("first", first), ("second", second)):
        journal = Journal().open(RunInfo("twice", run_dir=str(tmp_path / name)))
        journal.write([story.started(), *story.steps(9)])
        journal.close()
    events, others = read_journal(tmp_path / "first"), read_journal(tmp_path / "second")
    with (
        opened(push, run_id="twice", run_dir=tmp_path / "first") as one,
        opened(push, run_id="twice", run_dir=tmp_path / "second") as other,
    ):
        one(events[:4])
        with pytest.raises(ConnectionError, match="another newest event"):
            other(others[:4])
        with pytest.raises(SinkMisconfigured, match="has another run with the run_id 'twice'"):
            other(others[:4])
        deliver(one, events)
    with (
        opened(push, run_id="twice", run_dir=tmp_path / "second") as other,
        pytest.raises(SinkMisconfigured, match="give this run another run_id, or Push another project"),
    ):
        other(others)
    assert read_journal(folder / "twice") == events
    with opened(Push(url, OTHER, "speech"), run_id="twice", run_dir=tmp_path / "second") as other:
        other(others)
    assert read_journal(folder.parent / "speech" / "twice") == others


def test_events_that_a_killed_server_has_not_written_are_sent_again(here: Any) -> None:
    """It may leave half a line, or a new segment without any."""
    url, folder = here()
    story = Story()
    events: list[Event] = [*story.steps(5)]
    with opened(Push(url, TOKEN, "vision")) as write:
        write(events)
    journal = folder / "demo" / "journal"
    with open(journal / segment_name(1), "ab") as file:
        file.write(b'{"type":"TrainStepEnded","run_id":"demo","attempt":1,"se')
    (journal / segment_name(6)).touch()
    events += story.steps(3)
    with opened(Push(url, TOKEN, "vision")) as write:
        write(events[5:])
    assert JournalReader(journal).read() == events


def test_what_is_too_large_or_missing_is_skipped_with_a_warning(
    here: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A gap stands for an event; the event of a file that is not sent stays."""
    monkeypatch.setattr(sender, "MOST_FILE_BYTES", 1_000)
    monkeypatch.setattr(pushes, "MOST_MEDIA_BYTES", 500)
    url, folder = here()
    run_dir, story = tmp_path / "run", Story()
    (run_dir / "media").mkdir(parents=True)
    sizes = {"small": 10, "large": 2_000, "refused": 700}
    for name, size in sizes.items():
        (run_dir / "media" / f"{name}.png").write_bytes(bytes(size))
    images = [
        story(ImageLogged, name=name, path=f"media/{name}.png", width=1, height=1, nbytes=1)
        for name in (*sizes, "gone")
    ]
    huge = story(MetricsLogged, metrics={f"a metric with a long name, {index}": 0.1 for index in range(60_000)})
    with opened(Push(url, TOKEN, "vision"), run_dir=run_dir) as write:
        write([*images, huge, *story.steps(1)])
    stored = read_journal(folder / "demo")
    assert [type(event).__name__ for event in stored] == [*4 * ["ImageLogged"], "JournalGap", "TrainStepEnded"]
    assert [path.name for path in (folder / "demo" / "media").iterdir()] == ["small.png"]
    warned = [record.getMessage() for record in caplog.records]
    for part in (
        "does not send media/large.png: .*larger than 1,000 bytes",
        "does not send media/refused.png: .* 413 .*700 bytes",
        "does not send media/gone.png",
        "does not publish event 5, MetricsLogged: its line has .* bytes, and the server takes 2,097,152",
    ):
        assert [one for one in warned if re.search(part, one)], warned


def test_the_page_and_alerts_say_silent_and_queued(here: Any, visit: Any) -> None:
    """Of a pushed run whose sender has left before its end, and of a job that waits; neither offers commands."""
    expect = pytest.importorskip("playwright.sync_api").expect
    url, folder = here()
    story = Story()
    events: list[Event] = [story.started(host="box"), *story.steps(3)]
    writer = Push(url, TOKEN, "vision").open(RunInfo("demo"))  # not `opened`: the browser has an event loop here
    writer.write(events)
    writer.close()
    (folder / "waits").mkdir()
    write_job(folder / "waits", ServiceJob("waits", {}, asked=time.time()))
    for run_id, state in (("demo", "silent"), ("waits", "queued")):
        page = visit(url, f"#run={run_id}")
        expect(page.locator("#status")).to_contain_text(state)
        expect(page.locator("#commands")).to_be_hidden()
    rules = Rules(AlertLimits(10.0, "val_loss", "min", 5, 95.0), "demo", str(folder / "demo"))
    for event in events:
        rules.take(event, event.time)
    message = rules.closed(time.time())
    assert message is not None
    assert (message.kind, "nothing arrives after step 3" in message.text) == ("stalled", True)
