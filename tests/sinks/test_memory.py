from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import msgspec
import pytest

from events.messages import (
    MetricsLogged,
    TestEpochEnded,
    TrainEpochEnded,
    TrainStepEnded,
    ValEpochEnded,
)
from events.sink import RunInfo
from sinks.memory import Memory


def test_beyond_its_capacity_the_oldest_are_dropped_and_counted(story: Any) -> None:
    """Memory is bounded however long the run, also if one batch is larger than everything that is kept."""
    sink = Memory(capacity=10)
    writer = sink.open(RunInfo("demo"))
    steps = story.steps(25)
    writer.write(steps[:7])
    assert (len(sink.events), sink.dropped) == (7, 0)
    writer.write(steps[7:])
    assert (sink.events, sink.dropped) == (steps[15:], 15)
    sink.clear()
    assert (sink.events, sink.dropped) == ([], 0)
    with pytest.raises(ValueError, match="capacity=0"):
        Memory(capacity=0)


def test_reading_while_the_run_writes_gives_whole_snapshots(story: Any) -> None:
    """A reader in another thread sees a beginning of the history, never an error and never a gap."""
    sink = Memory()
    writer = sink.open(RunInfo("demo"))
    steps = story.steps(20_000)
    started = threading.Event()

    def write() -> None:
        for start in range(0, len(steps), 20):
            writer.write(steps[start : start + 20])
            started.set()

    thread = threading.Thread(target=write)
    thread.start()
    started.wait()
    seen = 0
    while thread.is_alive():
        events = sink.events
        assert len(events) >= seen
        assert len(events) % 20 == 0
        assert events[-1] is steps[len(events) - 1]
        seen = len(events)
    thread.join()
    assert sink.events == steps


def test_events_are_found_by_type(story: Any) -> None:
    """In order, and typed for the reader."""
    sink = Memory()
    writer = sink.open(RunInfo("demo"))
    events = [*story.steps(3), story(TrainEpochEnded, loss=1.5)]
    writer.write(events)
    writer.close()
    assert sink.of(TrainStepEnded) == events[:3]
    assert sink.of(TrainEpochEnded)[-1].loss == 1.5
    assert sink.of(MetricsLogged) == []


def test_metrics_have_the_names_of_the_result(story: Any) -> None:
    """Logged ones by their name, losses by their stage; only the default dataloader adds no key."""
    sink = Memory()
    sink.open(RunInfo("demo")).write(
        [
            *story.steps(2, loss=3.0),
            *story.steps(1, loss=None),
            story(MetricsLogged, metrics={"lr": 0.1}),
            story(MetricsLogged, metrics={"accuracy": 0.5, "f1": 0.25}, key="default"),
            story(MetricsLogged, metrics={"accuracy": 0.75}, key="shifted"),
            story(ValEpochEnded, loss=2.0),
            story(ValEpochEnded, key="shifted", loss=4.0),
            story(ValEpochEnded, key="unlabelled"),
            story(TestEpochEnded, loss=1.0),
        ]
    )
    assert sink.metrics("train_loss") == [(1, 3.0), (2, 3.0)]
    assert sink.metrics("lr") == [(3, 0.1)]
    assert sink.metrics("accuracy") == [(3, 0.5)]
    assert sink.metrics("accuracy/shifted") == [(3, 0.75)]
    assert sink.metrics("val_loss") == [(3, 2.0)]
    assert sink.metrics("val_loss/shifted") == [(3, 4.0)]
    assert sink.metrics("test_loss") == [(3, 1.0)]
    assert sink.metrics("nobody logged this") == []


def test_its_events_are_not_part_of_the_description(story: Any) -> None:
    """A copy elsewhere starts empty; settings are compared. The loop never waits for it, and it receives every type."""
    sink = Memory(capacity=50)
    sink.open(RunInfo("demo")).write(story.steps(3))
    assert (sink, hash(sink)) == (Memory(capacity=50), hash(Memory(capacity=50)))
    assert msgspec.to_builtins(sink) == {"capacity": 50}
    assert (sink.delivery.overflow, sink.delivery.types) == ("drop_oldest", None)
    sent = msgspec.json.decode(msgspec.json.encode(sink), type=Memory)
    for other in (sent, pickle.loads(pickle.dumps(sink)), copy.copy(sink)):
        assert other == sink
        assert other.events == []
    assert len(sink.events) == 3
