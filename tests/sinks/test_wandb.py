from __future__ import annotations

import gc
import json
import math
import os
import signal
import socket
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.curves import Logs, curves
from support.threads import wait_until

from events.errors import SinkMisconfigured
from events.messages import (
    AudioLogged,
    HistogramLogged,
    ImageLogged,
    MetricsLogged,
    ObserverFailed,
    RunEnded,
    TableLogged,
    TextLogged,
    TrainStepEnded,
    ValEpochEnded,
)
from events.sink import Delivery, RunInfo
from sinks import Memory, WandB
from sinks.testing import check_sink
from sinks.trackers.wandb import wandb_run_id
from trainer import Checkpoints, Trainer, TrainerArguments

KEY = "0123456789abcdef" * 2 + "01234567"
# What the client's own code does when its process is killed or its sockets are let go.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _an_environment_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in os.environ:
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules["wandb"].teardown() if "wandb" in sys.modules else None


@pytest.fixture(autouse=True, scope="module")
def _its_processes_are_reaped() -> Iterator[None]:
    """The client lets go of its service without waiting for it: or a later test would be told of that."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens sinks that write offline, and closes them when the test is over."""
    opened: list[Any] = []

    def open_one(run_id: str = "demo", *, attempt: int = 1, run_dir: Path | None = None, **options: Any) -> Any:
        run = RunInfo(run_id, attempt=attempt, run_dir=str(run_dir or tmp_path))
        opened.append(WandB(**({"mode": "offline"} | options)).open(run))
        return opened[-1]

    yield open_one
    for writer in opened:
        writer.close()


class Log:
    """The content of the transaction logs below a folder, in order, as ``wandb sync`` uploads it."""

    def __init__(self, folder: Path) -> None:
        from wandb.proto.wandb_internal_pb2 import Record

        self.files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime)
        self.records: list[Any] = []
        for file in self.files:
            for data in _blocks(file.read_bytes()):
                self.records.append(Record.FromString(data))
        self.runs = self.of("run")
        self.exit_codes = [one.exit_code for one in self.of("exit")]

    def of(self, kind: str) -> list[Any]:
        return [getattr(one, kind) for one in self.records if one.WhichOneof("record_type") == kind]

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [{_key(item): json.loads(item.value_json) for item in one.item} for one in self.of("history")]

    def points(self, name: str) -> list[tuple[int, float]]:
        return [(row["global_step"], float(row[name])) for row in self.rows if name in row]

    @property
    def config(self) -> dict[str, Any]:
        return {_key(item): json.loads(item.value_json) for one in self.of("config") for item in one.update}

    @property
    def summary(self) -> dict[str, Any]:
        return {_key(item): json.loads(item.value_json) for one in self.of("summary") for item in one.update}


def _key(item: Any) -> str:
    return ".".join(item.nested_key) or item.key


def _blocks(data: bytes) -> Iterator[bytes]:
    """Records of a file as LevelDB writes its logs: split into parts, none across a border of 32 KiB."""
    at, record = 7, b""
    while at + 7 <= len(data):
        if (left := 32_768 - at % 32_768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


class BadServer:
    """Takes connections, and answers each request with an error, or never."""

    def __init__(self, answer: bytes | None) -> None:
        self._answer = answer
        self._kept: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._kept.append(client)
            if self._answer is not None:
                client.recv(65_536)
                client.sendall(self._answer)
                client.close()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for one in self._kept:
            one.close()


@pytest.fixture(params=["refuses", "hangs", "500"])
def bad_url(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "refuses":
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        yield f"http://127.0.0.1:{port}"
        return
    error = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    server = BadServer(error if request.param == "500" else None)
    yield server.url
    server.close()


# --------------------------------------------------------------------------------- servers, and what goes wrong


def test_a_server_that_does_not_answer_is_an_error_in_time_and_so_is_it_the_next_time(
    bad_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The second attempt fails for the same reason, not because the first left something behind."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    sink = WandB(project="p", mode="online", base_url=bad_url, init_timeout_s=1)
    for _ in range(2):
        with pytest.raises(Exception, match=r"deadline exceeded|timed out|connection refused|HTTP 500"):
            sink.open(RunInfo("demo", run_dir=str(tmp_path)))


@pytest.mark.parametrize("bad_url", ["hangs"], indirect=True)
def test_a_run_trains_to_its_end_and_ends_when_there_is_no_server(
    bad_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sink is disabled with the reason; the run continues."""
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    memory = Memory()
    sink = WandB(project="p", mode="online", base_url=bad_url, init_timeout_s=0.5)
    arguments = TrainerArguments(train_batch_size=4, device="cpu")
    delivery = Delivery(retries=1, types=WandB.delivery.types)
    result = Trainer(Logs(), arguments, sinks=[memory, (sink, delivery)], journal=False, checkpoints=False).train()
    assert result.status == "finished"
    assert len(memory.of(TrainStepEnded)) == 4
    report = next(one for one in result.observers if one.observer == "wandb")
    assert report.state == "disabled"
    assert {one.during for one in memory.of(ObserverFailed)} <= {"open"}


def test_without_a_key_the_sink_raises_instead_of_prompting(tmp_path: Path) -> None:
    """No prompt at a terminal, no upload that fails later."""
    with pytest.raises(SinkMisconfigured, match="API key"):
        WandB(mode="online").open(RunInfo("demo", run_dir=str(tmp_path)))


def test_when_its_process_dies_a_write_fails_at_once(connect: Any, story: Any, tmp_path: Path) -> None:
    """It is reported, and neither a write nor the end waits for what cannot come."""
    writer = WandB(mode="offline").open(RunInfo("demo", run_dir=str(tmp_path)))
    writer.write(story.steps(1))
    for child in psutil.Process().children(recursive=True):
        if "wandb" in child.name():
            child.kill()
            child.wait()
    with pytest.raises(OSError, match="Connection"):
        for _ in range(50):
            writer.write(story.steps(1))
    with pytest.raises(OSError, match="Connection"):
        writer.close()
    with pytest.raises(OSError, match="Connection"):
        sys.modules["wandb"].teardown()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "onlin"}, r"WandB\(mode='onlin'\): give 'online'"),
        ({"init_timeout_s": 0}, r"WandB\(init_timeout_s=0\)"),
        ({"finish_timeout_s": math.nan}, r"WandB\(finish_timeout_s=nan\)"),
        ({"base_url": "wandb.example"}, r"base_url='wandb.example'\) is not the address"),
        ({"base_url": "http://host:port"}, r"base_url='http://host:port'\) is not the address"),
        ({"base_url": "http://me:hid/den@host"}, r"base_url='http://\.\.\.@host'\) is not the address"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_before_the_run(options: Any, message: str) -> None:
    """With what was given, and what to give."""
    with pytest.raises(SinkMisconfigured, match=message):
        WandB(**options).check()


# ------------------------------------------------------------------------------------------- what is written


def test_it_keeps_the_rules_of_sinks(tmp_path: Path) -> None:
    """With events of every type."""
    check_sink(WandB(mode="offline"), run_dir=tmp_path)


def test_numbers_keep_their_step_and_time_and_are_written_once(connect: Any, story: Any, tmp_path: Path) -> None:
    """A late number too, which W&B refuses for its own steps; NaN and infinities survive; repeated events do not."""
    writer = connect()
    values = [math.nan, math.inf, -math.inf, 1e308, 5e-324]
    batch = [event for value in [2.0, *values] for event in story.steps(1, loss=value, step_s=10.0)]
    story.global_step = 1
    batch.append(story(MetricsLogged, metrics={"late": 7.0}))
    writer.write(batch[:3])
    for _ in range(2):
        writer.write(batch)
    writer.close()
    log = Log(tmp_path)
    assert log.points("late") == [(1, 7.0)]
    assert [(step, repr(value)) for step, value in log.points("train_loss")] == [
        (step, repr(value)) for step, value in enumerate([2.0, *values], 1)
    ]
    assert [row["_timestamp"] for row in log.rows if "train_loss" in row] == [event.time for event in batch[:-1]]
    axes = {one.name or one.glob_name: one.step_metric for one in log.of("metric")}
    assert axes == {"global_step": "", "*": "global_step"}


def test_two_values_of_one_name_at_one_step_are_both_there(connect: Any, story: Any, tmp_path: Path) -> None:
    """Numbers of a step share a row, but none replaces another."""
    writer = connect()
    [step] = story.steps(1)
    writer.write([step, *[story(MetricsLogged, metrics={"a": float(i), "b": 0.0}) for i in range(3)]])
    writer.close()
    log = Log(tmp_path)
    assert log.points("a") == [(1, 0.0), (1, 1.0), (1, 2.0)]
    assert len(log.rows) == 3


def test_strange_names_are_kept_and_those_of_wandb_are_moved(connect: Any, story: Any, tmp_path: Path) -> None:
    """A user's ``global_step`` must not become the axis of everything."""
    names = ["größe", "a/b c", "x" * 600, "日本", "dots.in.it", "a\nb", "global_step", "_step", "_timestamp", ""]
    writer = connect()
    story.global_step = 3
    writer.write([story(MetricsLogged, metrics={name: 1.0 + i}) for i, name in enumerate(names)])
    writer.close()
    log = Log(tmp_path)
    for index, name in enumerate(names):
        shown = name if index < 6 else f"logged/{name}"
        assert log.points(shown) == [(3, 1.0 + index)], name


def test_histograms_and_media_are_shown_as_wandb_shows_them(connect: Any, story: Any, tmp_path: Path) -> None:
    """More bins than W&B's maximum are merged; deleted files are skipped, with the rest intact."""
    from PIL import Image

    (tmp_path / "media").mkdir()
    Image.new("RGB", (4, 3), "red").save(tmp_path / "media" / "a.png")
    (tmp_path / "media" / "a.wav").write_bytes(b"a sound")
    (tmp_path / "media" / "a.json").write_bytes(b'{"columns":["a","b"],"rows":[[1,"x"],["NaN",0.5]],"cut":null}')
    (tmp_path / "media" / "long.txt").write_text("long <text>")
    writer = connect()
    story.global_step = 5
    writer.write(
        [
            story(HistogramLogged, name="weights", low=-1.0, high=1.0, counts=[1.0, 0.0, 3.0, 2.0]),
            story(HistogramLogged, name="many", low=0.0, high=1.0, counts=[1.0] * 1_100),
            story(HistogramLogged, name="one", low=2.0, high=2.0, counts=[9.0]),
            story(HistogramLogged, name="nothing", counts=[0.0, 0.0], non_finite=2.0),
            story(ImageLogged, name="samples", path="media/a.png", width=4, height=3, key="other"),
            story(ImageLogged, name="gone", path="media/gone.png"),
            story(AudioLogged, name="speech", path="media/a.wav", rate=8_000),
            story(TableLogged, name="rows", path="media/a.json", columns=["a", "b"], rows=2),
            story(TextLogged, name="said", text="<b>&"),
            story(TextLogged, name="long", text="lo", path="media/long.txt"),
        ]
    )
    writer.close()
    log = Log(tmp_path)
    [row] = log.rows
    assert row["weights._type"] == "histogram"
    assert row["weights.values"] == [1, 0, 3, 2]
    assert row["weights.bins"] == [-1, -0.5, 0, 0.5, 1]
    assert len(row["many.values"]) <= 512
    assert sum(row["many.values"]) == 1_100
    assert row["one.bins"] == [1.5, 2.5]
    assert not [name for name in row if name.startswith(("nothing", "gone"))]
    assert (row["samples/other._type"], row["samples/other.width"]) == ("image-file", 4)
    files = log.files[0].parent / "files"
    assert (files / row["samples/other.path"]).exists()
    assert row["speech._type"] == "audio-file"
    assert (files / row["speech.path"]).read_bytes() == (tmp_path / "media" / "a.wav").read_bytes() == b"a sound"
    assert row["rows._type"] == "table-file"
    table = json.loads((files / row["rows.path"]).read_text())
    assert (table["columns"], table["data"]) == (["a", "b"], [[1, "x"], ["NaN", 0.5]])
    assert "&lt;b&gt;&amp;" in (files / row["said.path"]).read_text()
    assert "long &lt;text&gt;" in (files / row["long.path"]).read_text()


@pytest.mark.parametrize(
    ("status", "code"), [("finished", 0), ("stopped", 0), ("cancelled", 255), ("failed", 1), (None, 1)]
)
def test_the_exit_code_tells_how_the_run_ended(
    connect: Any, story: Any, tmp_path: Path, status: str | None, code: int
) -> None:
    """W&B shows finished, killed or failed by it; the summary has our own word, and the reason."""
    writer = connect()
    arguments, origin = {"lr": 0.1, "nested": {"a": None}}, {"git_commit": "abc", "git_dirty": True}
    writer.write([story.started(arguments=arguments, config={"width": 8}, **origin), *story.steps(1)])
    if status is not None:
        writer.write([story(RunEnded, status=status, reason="because")])
    writer.close()
    log = Log(tmp_path)
    assert log.exit_codes == [code]
    if status is not None:
        assert (log.summary["stagecast/status"], log.summary["stagecast/reason"]) == (status, "because")
    assert (log.config["lr"], log.config["width"]) == (0.1, 8)
    assert log.config["module"] == "my_package.Net"
    assert (log.config["git_commit"], log.config["git_dirty"]) == ("abc", True)


def test_a_run_that_the_environment_names_is_joined(
    connect: Any, story: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the agent of a sweep names it; a name given to the sink goes before."""
    monkeypatch.setenv("WANDB_RUN_ID", "from-env")
    for options in ({}, {"id": "from-caller"}):
        writer = connect(**options)
        writer.write(story.steps(1))
        writer.close()
    assert {run.run_id for run in Log(tmp_path).runs} == {"from-env", "from-caller"}


def test_an_active_run_of_the_caller_is_joined_and_left_open(story: Any, tmp_path: Path) -> None:
    """The caller's own metrics keep their axis, and the caller ends the run."""
    import wandb

    with wandb.init(mode="offline", id="mine", dir=tmp_path, settings=wandb.Settings(silent=True)) as mine:
        result = Trainer(
            Logs(),
            TrainerArguments(train_batch_size=4, device="cpu"),
            sinks=[(WandB(mode="offline"), Delivery(types=WandB.delivery.types))],
            journal=False,
            checkpoints=False,
        ).train()
        mine.log({"after": 1.0})
    assert [one.state for one in result.observers if one.observer == "wandb"] == ["closed"]
    # The client's own process writes the log, and reports to no one when it is complete.
    wait_until(lambda: Log(tmp_path).exit_codes, "the log is not complete")
    log = Log(tmp_path)
    assert {run.run_id for run in log.runs} == {"mine"}
    assert log.exit_codes == [0]
    assert [step for step, _ in log.points("train_loss")] == [1, 2, 3, 4]
    assert any(row.get("after") == 1.0 for row in log.rows)
    assert log.summary["stagecast/status"] == "finished"
    axes = {one.name: one.step_metric for one in log.of("metric")}
    assert axes["train_loss"] == "global_step"
    assert "*" not in {one.glob_name for one in log.of("metric")}


def test_a_second_attempt_continues_the_same_wandb_run(connect: Any, story: Any, tmp_path: Path) -> None:
    """Its id comes from the run's name, and W&B resumes it."""
    for attempt in (1, 2):
        story.attempt = attempt
        writer = connect("a run/é", attempt=attempt, project="p", tags=["x"], group="g")
        writer.write(story.steps(2))
        writer.close()
    log = Log(tmp_path)
    assert [(one.run_id, one.project, one.run_group, list(one.tags)) for one in log.runs] == [
        (wandb_run_id("a run/é"), "p", "g", ["x"])
    ] * 2
    assert all(one.resume for one in log.runs)
    assert [one.display_name for one in log.runs] == ["a run/é"] * 2
    assert [step for step, _ in log.points("train_loss")] == [1, 2, 3, 4]


def test_ids_are_what_wandb_takes_and_no_two_runs_have_one() -> None:
    """A name that W&B takes is its own id."""
    assert wandb_run_id("fine-run_1.2") == "fine-run_1.2"
    strange = [wandb_run_id(name) for name in ("a/b", "a b", "a_b", "ä", "x" * 65, "x" * 66)]
    assert len(set(strange)) == 6
    assert all(len(one) <= 64 for one in strange)


# ----------------------------------------------------------------------------------------------- the host


def test_the_process_of_the_run_keeps_its_hooks_and_its_output(connect: Any, story: Any, capfd: Any) -> None:
    """W&B would replace `sys.exit` and `sys.excepthook`, and say things on the console."""

    def hooks() -> list[Any]:
        return [sys.exit, sys.excepthook, sys.stdout, sys.stderr, *map(signal.getsignal, (2, 15))]

    before = hooks()
    writer = connect()
    writer.write(story.steps(1))
    import wandb

    assert wandb.run is None
    assert hooks() == before
    writer.close()
    assert hooks() == before
    assert capfd.readouterr() == ("", "")


def test_disabled_writes_nothing(connect: Any, story: Any, tmp_path: Path) -> None:
    """Not even a folder of W&B's in which something would be looked for."""
    writer = connect(mode="disabled")
    writer.write([story.started(), *story.steps(3)])
    writer.close()
    assert Log(tmp_path).files == []


def test_the_environment_says_what_the_sink_does_not(
    monkeypatch: pytest.MonkeyPatch, story: Any, tmp_path: Path
) -> None:
    """As for everything else that uses W&B."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "from-outside")
    writer = WandB().open(RunInfo("demo"))
    writer.write(story.steps(1))
    writer.close()
    assert [one.project for one in Log(tmp_path).runs] == ["from-outside"]


@pytest.mark.parametrize("place", ["thread", "process"])
def test_a_run_and_its_continuation_arrive_whole(tmp_path: Path, place: Any) -> None:
    """Every number that was published is there, under its step, in a thread and in a sink host."""
    memory = Memory()
    for epochs in (1, 2):
        Trainer(
            Logs(),
            TrainerArguments(train_batch_size=4, device="cpu", epochs=epochs),
            sinks=[memory, WandB(project="p", mode="offline")],
            run_id="whole",
            run_dir=tmp_path / "whole",
            checkpoints=Checkpoints(),
            resume="auto",
            sinks_in=place,
        ).train()
    log = Log(tmp_path / "whole")
    expected = curves(memory.events)
    assert {"train_loss", "val_loss", "größe/π"} <= expected.keys()
    assert {name: log.points(name) for name in expected} == expected
    assert log.exit_codes == [0, 0]
    assert len({one.run_id for one in log.runs}) == 1
    assert len(memory.of(ValEpochEnded)) == 2
