"""What all sinks have in common. A new sink needs one line in `CASES`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

import sinks
from events.errors import SinkMisconfigured
from events.messages import Event, TrainStepEnded
from events.sink import RunInfo
from sinks import (
    CSV,
    JSONL,
    NATS,
    Alert,
    Console,
    Live,
    Memory,
    MLflow,
    OpenTelemetry,
    Prometheus,
    Push,
    TensorBoard,
    WandB,
)
from sinks.testing import Story, check_sink, opened


class Case(NamedTuple):
    sink: Any
    written: Callable[[Path], object] | None = None
    """Reads what is in the run's folder."""


def _scalars(folder: Path) -> object:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    return {tag: [(one.step, repr(one.value)) for one in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


CASES = {
    "Alert": Case(Alert("true")),
    "Console": Case(Console()),
    "Memory": Case(Memory(capacity=50)),
    "CSV": Case(CSV(), lambda folder: (folder / "metrics.csv").read_bytes()),
    "JSONL": Case(JSONL(), lambda folder: (folder / "events.jsonl").read_bytes()),
    "JSONL of one type": Case(JSONL(types=["TrainStepEnded"]), lambda folder: (folder / "events.jsonl").read_bytes()),
    "TensorBoard": Case(TensorBoard(), _scalars),
    "Prometheus": Case(Prometheus(port=0, linger_s=0)),
    "Live": Case(Live(port=0)),
}
ELSEWHERE = {"MLflow", "NATS", "OpenTelemetry", "Push", "WandB"}
"""Those that need a server or the client's files: their own tests call `check_sink`."""


@pytest.mark.parametrize("name", CASES)
def test_a_sink_keeps_the_rules_of_sinks(name: str, tmp_path: Path) -> None:
    """See `sinks.testing.check_sink`."""
    case = CASES[name]
    written = None if case.written is None else lambda: case.written(tmp_path)  # type: ignore[misc]
    check_sink(case.sink, written=written, run_dir=tmp_path)


def test_every_sink_is_checked() -> None:
    """A new sink is, too."""
    assert set(sinks.__all__) <= CASES.keys() | ELSEWHERE


@pytest.mark.parametrize(
    ("sink", "module", "extra"),
    [
        (Live(), "starlette", "live"),
        (TensorBoard(), "tensorboardX", "tensorboard"),
        (TensorBoard(), "google_crc32c", "tensorboard"),
        (WandB(), "wandb", "wandb"),
        (MLflow(), "mlflow", "mlflow"),
        (NATS("nats://host"), "nats", "nats"),
        (NATS(f"nats://host?creds={__file__}"), "nkeys", "nats"),
        (Prometheus(), "prometheus_client", "prometheus"),
        (Push("https://host", "long-token"), "httpx", "live"),
        (OpenTelemetry(), "opentelemetry.exporter.otlp.proto.http", "opentelemetry"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, msgspec.Struct) else None,
)
def test_without_its_client_a_sink_names_what_to_install(
    sink: Any, module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the run, and without importing the client."""
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == module else real(name))
    with pytest.raises(SinkMisconfigured, match=rf"needs the package {module}: pip install 'stagecast\[{extra}\]'"):
        sink.check()


@pytest.mark.parametrize("kind", [CSV, JSONL, TensorBoard])
def test_a_sink_of_files_needs_a_path_if_the_run_has_no_folder(kind: Any) -> None:
    """There is nowhere to put the default file."""
    with pytest.raises(SinkMisconfigured, match=f"{kind.__name__} has no path"):
        kind().open(RunInfo("demo"))


# ------------------------------------------------------------------------------------------- sinks.testing itself


class Good(msgspec.Struct, frozen=True):
    """Appends the steps that it has not written yet."""

    path: str

    def open(self, run: RunInfo) -> Any:
        return GoodWriter(Path(self.path))


class GoodWriter:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.touch()

    def write(self, events: Any) -> None:
        known = set(self.path.read_text().splitlines())
        with self.path.open("a") as file:
            for event in events:
                if str(event.seq) not in known:
                    known.add(str(event.seq))
                    file.write(f"{event.seq}\n")

    def close(self) -> None: ...


class Repeats(GoodWriter):
    def write(self, events: Any) -> None:
        with self.path.open("a") as file:
            file.writelines(f"{event.seq}\n" for event in events)


class Forgets(GoodWriter):
    def __init__(self, path: Path) -> None:
        super().__init__(path)
        path.write_text("")


class Once(GoodWriter):
    def write(self, events: Any) -> None:
        super().write([event for event in events if event.attempt == 1])


class Changes(GoodWriter):
    def write(self, events: Any) -> None:
        for event in events:
            getattr(event, "metrics", {}).clear()


class Async(GoodWriter):
    async def write(self, events: Any) -> None:  # type: ignore[override]
        super().write(events)

    async def close(self) -> None: ...  # type: ignore[override]


class Private(Good, frozen=True):
    def __eq__(self, other: object) -> bool:
        return self is other


@pytest.mark.parametrize(
    ("writer", "broken"),
    [
        (GoodWriter, None),
        (Async, None),
        (Repeats, "writes repeated events again"),
        (Forgets, "adds nothing|writes repeated events"),
        (Once, "adds nothing when the run resumes"),
        (Changes, "changes the events that it is given"),
    ],
)
def test_the_check_finds_each_broken_rule(writer: Any, broken: str | None, tmp_path: Path) -> None:
    """And nothing in a sink that keeps them, whether its methods are async or not."""
    file = tmp_path / "seqs.txt"

    class Described(Good, frozen=True):
        def open(self, run: RunInfo) -> Any:
            return writer(Path(self.path))

    if broken is None:
        check_sink(Described(str(file)), written=file.read_text)
        assert [int(line) for line in file.read_text().splitlines()] == [
            *range(1, len(file.read_text().splitlines()) + 1)
        ]
    else:
        with pytest.raises(AssertionError, match=broken):
            check_sink(Described(str(file)), written=file.read_text)


def test_the_check_wants_a_description_that_can_be_sent(tmp_path: Path) -> None:
    """To the sink host."""
    with pytest.raises(AssertionError, match="not equal after a trip through JSON"):
        check_sink(Private(str(tmp_path / "a")))
    with pytest.raises(AssertionError, match="has no method open"):
        check_sink(object())  # type: ignore[arg-type]


def test_a_story_is_a_run_with_consistent_headers() -> None:
    """Each event has the next ``seq``; steps count on, also in the next attempt."""
    story = Story("mine")
    events: list[Event] = [story.started(), *story.steps(2, loss=0.5), *story.resumed(), *story.steps(1)]
    assert [event.seq for event in events] == [*range(1, 7)]
    assert {event.run_id for event in events} == {"mine"}
    assert [(event.attempt, event.global_step) for event in events if isinstance(event, TrainStepEnded)] == [
        (1, 1),
        (1, 2),
        (2, 3),
    ]
    seen: list[Event] = []
    with opened(memory := Memory()) as write:
        write(events)
        seen += memory.events
    assert seen == events
