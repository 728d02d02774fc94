from __future__ import annotations

import io
import json
import math
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas
import pytest
from support.curves import Curves, Logs, curves
from support.faulty_proxy import Fault, FaultyProxy
from support.mlflow_server import MLflowServer
from support.threads import WAIT_S

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
)
from events.sink import Delivery, RunInfo
from sinks import Memory, MLflow
from sinks.testing import check_sink
from sinks.trackers.mlflow import RUN_ID_TAG, mlflow_name
from trainer import Checkpoints, Trainer, TrainerArguments

# What MLflow's own code, and what it imports, does.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    one = MLflowServer(tmp_path_factory.mktemp("mlflow"))
    try:
        one.start()
        yield one
    finally:
        one.kill()


@pytest.fixture
def proxy(server: Any) -> Iterator[Any]:
    """Between the sink and the server, to do something wrong."""
    one = FaultyProxy(server.port)
    yield one
    one.close()


@pytest.fixture(autouse=True)
def _an_environment_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Settings that a sink leaves behind go when the test is over."""
    before = {name: value for name, value in os.environ.items() if name.startswith("MLFLOW_")}
    for name in before:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    yield
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """The test's name: of its experiment, and its run."""
    return str(request.node.name)


@pytest.fixture
def connect(server: Any, name: str, tmp_path: Path) -> Callable[..., Any]:
    """Opens sinks."""

    def open_one(run_id: str = name, *, attempt: int = 1, uri: str | None = None, **options: Any) -> Any:
        sink = MLflow(uri or server.url, experiment=name, **options)
        return sink.open(RunInfo(run_id, attempt=attempt, run_dir=str(tmp_path)))

    return open_one


class Look:
    """What a client that is not the sink's finds of an experiment."""

    def __init__(self, server: Any, experiment: str, folder: Path) -> None:
        from mlflow import MlflowClient

        self._client = MlflowClient(server.url)
        self._folder = folder
        found = self._client.get_experiment_by_name(experiment)
        self.runs = self._client.search_runs([found.experiment_id]) if found is not None else []

    @property
    def run(self) -> Any:
        [run] = self.runs
        return run

    def points(self, name: str) -> list[tuple[int, float]]:
        """In order of step and time."""
        history = self._client.get_metric_history(self.run.info.run_id, name)
        return [(one.step, one.value) for one in sorted(history, key=lambda one: (one.step, one.timestamp))]

    def times(self, name: str) -> list[int]:
        return [one.timestamp for one in self._client.get_metric_history(self.run.info.run_id, name)]

    def files(self, folder: str) -> list[str]:
        return [one.path for one in self._client.list_artifacts(self.run.info.run_id, folder)]

    def read(self, path: str) -> bytes:
        return Path(self._client.download_artifacts(self.run.info.run_id, path, str(self._folder))).read_bytes()


@pytest.fixture
def look(server: Any, name: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Look]:
    return lambda: Look(server, name, tmp_path_factory.mktemp("downloads"))


def expected(memory: Memory) -> Curves:
    """All numbers that were published, by MLflow's name, in order of steps."""
    return {
        mlflow_name(name): sorted(points, key=lambda point: point[0]) for name, points in curves(memory.events).items()
    }


ARGUMENTS: dict[str, Any] = {"train_batch_size": 4, "device": "cpu"}


# --------------------------------------------------------------------------------- servers, and what goes wrong


def test_a_server_that_is_not_there_is_an_error_at_once(story: Any, tmp_path: Path) -> None:
    """The client would try for minutes; when to try again is the supervisor's to say."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(Exception, match=rf"{port}.*(refused|Max retries)"):
        MLflow(f"http://127.0.0.1:{port}").open(RunInfo("demo"))


def test_a_server_that_hangs_is_left_in_time(proxy: Any, connect: Any, story: Any, look: Any) -> None:
    """And what it has not taken comes again, once."""
    writer = connect(uri=f"http://127.0.0.1:{proxy.port}", timeout_s=1)
    batch = story.steps(5)
    proxy.arm(Fault(0, False, 1.0, "stall"))
    with pytest.raises(Exception, match=r"(?i)timed out"):
        writer.write(batch)
    writer.write(batch)
    assert look().points("train_loss") == [(step, 2.0) for step in range(1, 6)]


@pytest.mark.parametrize("act", ["500", "reset"])
@pytest.mark.parametrize("answered", [False, True], ids=["before", "after"])
def test_a_request_that_fails_is_made_again_and_doubles_nothing(
    proxy: Any, connect: Any, story: Any, look: Any, act: Any, answered: bool
) -> None:
    """Whether the server has taken the points before it failed, or not."""
    writer = connect(uri=f"http://127.0.0.1:{proxy.port}")
    batch = story.steps(1_200)
    proxy.arm(Fault(1, answered, 0.5, act))
    with pytest.raises(Exception, match=r"500|reset|aborted|Max retries"):
        writer.write(batch)
    assert len(proxy.fired) == 1
    writer.write(batch)
    assert look().points("step_s") == [(step, 0.1) for step in range(1, 1_201)]


def test_a_run_whose_creation_was_not_heard_of_is_found_again(
    server: Any, proxy: Any, connect: Any, story: Any, look: Any
) -> None:
    """The answer was lost; there is one run, not two."""
    connect("other")  # so that the experiment is there
    proxy.arm(Fault(2, True, 0.0, "reset"))
    with pytest.raises(Exception, match=r"reset|aborted|Max retries"):
        connect(uri=f"http://127.0.0.1:{proxy.port}")
    assert "runs/create" in proxy.requests[2]
    connect(uri=f"http://127.0.0.1:{proxy.port}").write(story.steps(1))
    assert len(look().runs) == 2


def test_what_a_server_missed_that_was_killed_during_a_run_arrives_when_it_is_back(
    server: Any, name: str, look: Any
) -> None:
    """Every number that was published is there once: those before, those in the middle, and those after."""
    memory, failed = Memory(), threading.Event()

    class Watch:
        """A sink that hears of the failure."""

        delivery = Delivery(types=frozenset({ObserverFailed}), latency_s=0.001)

        def open(self, run: RunInfo) -> Watch:
            return self

        def write(self, events: Any) -> None:
            failed.set()

        def close(self) -> None: ...

    def act(global_step: int) -> None:
        if global_step == 20:
            server.kill()
        elif global_step == 40:
            assert failed.wait(WAIT_S)
            server.start()

    delivery = Delivery(types=MLflow.delivery.types, latency_s=0.01, backoff_s=0.05, max_backoff_s=0.5, retries=500)
    sink = MLflow(server.url, experiment=name)
    result = Trainer(
        Logs(240, act=act),
        TrainerArguments(**ARGUMENTS),
        sinks=[memory, (sink, delivery), Watch()],
        run_id=name[:40],
        journal=False,
        checkpoints=False,
    ).train()
    report = next(one for one in result.observers if one.observer == "mlflow")
    assert (report.state, report.dropped, report.left) == ("closed", 0, 0)
    found = look()
    assert {metric: found.points(metric) for metric in expected(memory)} == expected(memory)
    assert len(found.points("train_loss")) == 60
    assert found.run.info.status == "FINISHED"


def test_a_deleted_experiment_is_reported_and_not_retried(server: Any, connect: Any, name: str) -> None:
    """MLflow keeps its name, so no other can be created under it."""
    from mlflow import MlflowClient

    connect()
    client = MlflowClient(server.url)
    client.delete_experiment(client.get_experiment_by_name(name).experiment_id)
    with pytest.raises(SinkMisconfigured, match="was deleted; restore it, or set experiment to another name"):
        connect()


@pytest.mark.parametrize(
    "address", ["http://", "http://host:port", "https://a b", "http://host:0", "", "http://me:hid/den@host"]
)
def test_an_address_that_is_none_is_refused_before_the_run(address: str) -> None:
    """With what was given, but its password."""
    with pytest.raises(SinkMisconfigured, match="is not an address") as caught:
        MLflow(address).check()
    assert "hid" not in str(caught.value)


# ------------------------------------------------------------------------------------------- what is logged


def test_nan_stays_and_infinities_become_the_largest_numbers(connect: Any, story: Any, look: Any) -> None:
    """So a database keeps them."""
    writer = connect()
    values = [math.nan, math.inf, -math.inf, 1e308]
    writer.write([event for value in values for event in story.steps(1, loss=value)])
    largest = sys.float_info.max
    assert [repr(value) for _, value in look().points("train_loss")] == [
        repr(value) for value in (math.nan, largest, -largest, 1e308)
    ]


def test_it_keeps_the_rules_of_sinks(server: Any, name: str, look: Any, tmp_path: Path) -> None:
    """Repeated events are there once, at their own time."""

    def written() -> object:
        return [repr(look().points(metric)) for metric in ("train_loss", "a")]

    check_sink(MLflow(server.url, experiment=name), written=written, run_dir=tmp_path)
    assert look().times("train_loss")[-3:] == [1_700_000_000_000 + 100 * step for step in range(6, 9)]


def test_more_than_a_request_holds_is_sent_in_several(proxy: Any, connect: Any, story: Any, look: Any) -> None:
    """By number, and by bytes: a request has at most 1,000 metrics and a megabyte."""
    writer = connect(uri=f"http://127.0.0.1:{proxy.port}")
    proxy.arm()
    story.global_step = 1
    writer.write(
        [
            story(MetricsLogged, metrics={f"many/{i}": float(i) for i in range(2_300)}),
            story(MetricsLogged, metrics={f"{i:04d}" + "é" * 240: float(i) for i in range(900)}),
        ]
    )
    metrics = look().run.data.metrics
    assert len(metrics) == 3_200
    assert len([one for one in proxy.requests if "log-batch" in one]) == 3 + 2
    assert metrics["many/2299"] == 2_299.0


def test_a_name_that_mlflow_does_not_take_is_changed_the_same_way_every_time(
    connect: Any, story: Any, look: Any
) -> None:
    """No two become one, and what it takes stays."""
    kept = ["größe", "a/b c", "日本", "val_loss/key-1.x", "x" * 250]
    changed = [
        "a$b",
        "a?b",
        "/abs",
        "a/../b",
        "a//b",
        "trail/",
        ".",
        "..",
        "../..",
        "",
        "a\nb",
        "a:b",
        "x" * 251,
        "./a",
    ]
    assert [mlflow_name(one) for one in kept] == kept
    names = [mlflow_name(one) for one in changed]
    assert len({*names, *kept}) == len(kept) + len(changed)
    assert mlflow_name("a$b") == "a_b-" + mlflow_name("a$b")[-8:]
    writer = connect()
    writer.write([story(MetricsLogged, metrics={one: 1.0 + i for i, one in enumerate(kept + changed)})])
    metrics = look().run.data.metrics
    assert [metrics[one] for one in kept + names] == [1.0 + i for i in range(len(kept + changed))]


def test_arguments_are_parameters_and_a_file(connect: Any, story: Any, look: Any) -> None:
    """Nested ones by their path; of what is too long, the file has all."""
    arguments = {
        "lr": 0.1,
        "nested": {"a": None, "b": [1, "ü"]},
        "long": "y" * 7_000,
        "strange $": True,
        "empty": {},
        "none": "",
    } | {f"many{i}": i for i in range(150)}
    own = {"lr": 3, "width": {"hidden": 8}}
    origin = {"command_line": "python job.py", "git_commit": "a" * 40, "git_dirty": False}
    connect().write([story.started(arguments=arguments, config=own, **origin)])
    found = look()
    tags = found.run.data.tags
    assert tags["mlflow.source.git.commit"] == "a" * 40
    assert (tags["stagecast.command_line"], tags["stagecast.git_dirty"]) == ("python job.py", "false")
    assert json.loads(found.read("config.json")) == own
    parameters = found.run.data.params
    assert (parameters["lr"], parameters["nested/a"], parameters["nested/b"]) == ("0.1", "None", '[1, "ü"]')
    assert (parameters["config/lr"], parameters["width/hidden"]) == ("3", "8")
    assert (parameters["empty"], parameters["none"], parameters[mlflow_name("strange $")]) == ("{}", "", "True")
    assert parameters["long"] == "y" * 6_000
    assert parameters["many149"] == "149"
    assert json.loads(found.read("arguments.json")) == arguments


def test_media_are_files_by_name_and_step(connect: Any, story: Any, look: Any, tmp_path: Path) -> None:
    """Deleted files are skipped, with the rest intact; histograms are skipped."""
    (tmp_path / "media").mkdir()
    (tmp_path / "media" / "a.png").write_bytes(b"a picture")
    (tmp_path / "media" / "a.wav").write_bytes(b"a sound")
    (tmp_path / "media" / "a.json").write_bytes(b'{"columns":["a","b"],"rows":[[1,"x"],[null,0.5]],"cut":null}')
    (tmp_path / "media" / "bad.json").write_bytes(b'{"columns":["a"],"rows":[[1,2]]}')
    (tmp_path / "media" / "long.txt").write_bytes("lang über".encode())
    story.global_step = 7
    connect().write(
        [
            story(HistogramLogged, name="weights", low=0.0, high=1.0, counts=[1.0]),
            story(ImageLogged, name="samples", path="media/a.png", key="other"),
            story(ImageLogged, name="gone", path="media/gone.png"),
            story(AudioLogged, name="speech", path="media/a.wav", rate=8_000),
            story(TableLogged, name="rows", path="media/a.json", columns=["a", "b"], rows=2),
            story(TableLogged, name="bad", path="media/bad.json"),
            story(TextLogged, name="said", text="hallo ü"),
            story(TextLogged, name="long", text="la", path="media/long.txt"),
        ]
    )
    found = look()
    assert found.files("images/samples/other") == ["images/samples/other/00000007.png"]
    assert found.read("images/samples/other/00000007.png") == b"a picture"
    assert found.read("audio/speech/00000007.wav") == b"a sound"
    table = pandas.read_json(io.BytesIO(found.read("tables/rows/00000007.json")), orient="split")
    assert [*table.columns] == ["a", "b"]
    assert (table["a"][0], table["b"].tolist()) == (1, ["x", 0.5])
    assert found.files("tables") == ["tables/rows"]
    assert found.read("texts/said/00000007.txt").decode() == "hallo ü"
    assert found.read("texts/long/00000007.txt").decode() == "lang über"


def test_the_status_tells_how_the_run_ended(connect: Any, story: Any, look: Any, capfd: Any) -> None:
    """A tag has the exact status, and another the reason; numbers that come later are still accepted."""
    ends = {"finished": "FINISHED", "stopped": "FINISHED", "cancelled": "KILLED", "failed": "FAILED"}
    for status in ends:
        writer = connect(status, tags={"team": "x"}, run_name=f"named {status}")
        late = story(MetricsLogged, metrics={"late": 1.0})
        writer.write([story(RunEnded, status=status, reason="because"), late])
        writer.close()
    runs = look().runs
    assert {run.info.run_name: run.info.status for run in runs} == {
        f"named {one}": shown for one, shown in ends.items()
    }
    assert {run.info.end_time for run in runs} == {1_700_000_000_000}
    assert {run.data.tags["stagecast.status"] for run in runs} == ends.keys()
    assert {(run.data.tags["stagecast.reason"], run.data.tags["team"]) for run in runs} == {("because", "x")}
    assert [run.data.metrics["late"] for run in runs] == [1.0] * 4
    assert capfd.readouterr().out == ""


def test_a_later_attempt_finds_its_own_mlflow_run(connect: Any) -> None:
    """A name with both kinds of quotes is looked for by a pattern, which fits others."""
    names = [
        *[f"it's {char}x{char}" for char in "-_%"],
        """it's "x\"""",
        "plain",
        'say "x"',
        """it's "x" 50%_""",
        "ü ` %",
    ]
    found = [connect(name).mlflow_run_id for name in names]
    assert len({*found}) == len(names)
    assert [connect(name, attempt=2).mlflow_run_id for name in names] == found


def test_a_second_attempt_continues_the_same_mlflow_run(connect: Any, story: Any, look: Any) -> None:
    """An argument that has changed since keeps its first value, as MLflow demands."""
    writer = connect()
    writer.write([story.started(arguments={"epochs": 1}), *story.steps(2), story(RunEnded, status="failed")])
    story.attempt = 2
    writer = connect(attempt=2)
    assert look().run.info.status == "RUNNING"
    writer.write(
        [story.started(arguments={"epochs": 2, "new": 3}), *story.steps(2), story(RunEnded, status="finished")]
    )
    found = look()
    assert [step for step, _ in found.points("train_loss")] == [1, 2, 3, 4]
    assert (found.run.data.params["epochs"], found.run.data.params["new"]) == ("1", "3")
    assert json.loads(found.read("arguments.json")) == {"epochs": 2, "new": 3}
    assert (found.run.info.status, found.run.data.tags[RUN_ID_TAG]) == ("FINISHED", found.run.info.run_name)


@pytest.mark.parametrize("how", ["environment", "active", "given"])
def test_a_run_of_the_caller_is_joined_and_not_ended(
    server: Any, story: Any, name: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second run is made; parameters and numbers are added, and its status is not ours to set."""
    import mlflow

    mlflow.set_tracking_uri(server.url)
    mlflow.set_experiment(name)
    with mlflow.start_run() as active:
        mlflow.log_param("theirs", 1)
        mlflow.set_tag("mlflow.source.git.commit", "theirs")
        run_id = active.info.run_id
        sink = MLflow(server.url, experiment=name)
        if how == "environment":
            monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
        elif how == "given":
            sink = MLflow(server.url, mlflow_run_id=run_id)
        bound = sink.bound() if how == "active" else sink
        writers: list[Any] = []
        opening = threading.Thread(target=lambda: writers.append(bound.open(RunInfo("demo"))))  # as a sink's thread
        opening.start()
        opening.join()
        started = story.started(arguments={"lr": 0.1}, git_commit="ours", git_dirty=True)
        writers[0].write([started, *story.steps(2), story(RunEnded, status="failed")])
        client = mlflow.MlflowClient(server.url)
        experiment = client.get_experiment_by_name(name)
        (found,) = client.search_runs([experiment.experiment_id])
        assert (found.info.run_id, found.info.status) == (run_id, "RUNNING")
        assert (found.data.params["theirs"], found.data.params["lr"]) == ("1", "0.1")
        assert found.data.tags["stagecast.status"] == "failed"
        assert found.data.tags["mlflow.source.git.commit"] == "theirs"
        assert len(client.get_metric_history(run_id, "train_loss")) == 2


def test_a_run_to_join_that_does_not_exist_is_named(server: Any) -> None:
    """Trying again does not help."""
    with pytest.raises(SinkMisconfigured, match="MLflow has no run 'abc'; correct or remove mlflow_run_id"):
        MLflow(server.url, mlflow_run_id="abc").open(RunInfo("demo"))


def test_what_the_user_has_set_for_the_client_stays(connect: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is not set is given the sink's limits."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    connect(timeout_s=2)
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "3"
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "2"


@pytest.mark.parametrize("place", ["thread", "process"])
def test_a_run_and_its_continuation_arrive_whole(server: Any, name: str, look: Any, tmp_path: Path, place: Any) -> None:
    """Every number that was published is there, under its step, in a thread and in a sink host."""
    memory = Memory()
    for epochs in (1, 2):
        Trainer(
            Logs(),
            TrainerArguments(**ARGUMENTS, epochs=epochs),
            sinks=[memory, MLflow(server.url, experiment=name)],
            run_id="whole",
            run_dir=tmp_path / "whole",
            checkpoints=Checkpoints(),
            resume="auto",
            sinks_in=place,
        ).train()
    found = look()
    assert {"train_loss", "val_loss", mlflow_name("größe/π")} <= expected(memory).keys()
    assert {metric: found.points(metric) for metric in expected(memory)} == expected(memory)
    assert found.run.info.status == "FINISHED"
