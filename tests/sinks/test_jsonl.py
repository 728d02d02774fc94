"""The events as lines of JSON: exact after disks that fill up, processes that die and runs that go on."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

import sinks
from events.errors import SinkMisconfigured
from events.journal.reader import JournalReader
from events.messages import Event, MetricsLogged, RunResumed, TrainEpochEnded, UnknownEvent
from events.sink import Delivery, RunInfo, delivery_of
from events.wire import decode_json, encode_json
from sinks import JSONL, Memory
from trainer import Trainer, TrainerArguments

ROOT = Path(sinks.__file__).parent.parent


def read(path: Path) -> list[Event]:
    return [decode_json(line) for line in path.read_bytes().splitlines()]


def journal(run_dir: Path) -> list[Event]:
    reader = JournalReader(run_dir / "journal")
    events: list[Event] = []
    while batch := reader.read(1_000):
        events += batch
    return events


def lines(events: list[Event]) -> bytes:
    """What the file must be; NaN does not equal itself, so events are compared by their bytes."""
    return b"".join(encode_json(event) + b"\n" for event in events)


def write_all(path: Path, events: list[Event], **run: Any) -> None:
    writer = JSONL(path=str(path)).open(RunInfo("demo", **run))
    writer.write(events)
    writer.close()


# ------------------------------------------------------------------------------------------- what goes wrong


def test_a_full_disk_raises_and_leaves_nothing_of_the_batch(story: Any, tmp_path: Path, full_at: Any) -> None:
    """The batch comes again when there is room, whole and once."""
    path = tmp_path / "events.jsonl"
    writer = JSONL(path=str(path)).open(RunInfo("demo"))
    first, second = story.steps(50), story.steps(50)
    writer.write(first)
    before = path.read_bytes()
    for _ in range(2):
        with full_at(len(before) + 1_234), pytest.raises(OSError, match="File too large") as caught:
            writer.write(second)
        assert caught.value.errno == errno.EFBIG
        assert path.read_bytes() == before
    writer.write(second)
    writer.close()
    assert path.read_bytes() == lines([*first, *second])


def test_closing_after_a_failure_lets_the_file_go(story: Any, tmp_path: Path, full_at: Any) -> None:
    """What was written stays, and the next run can have it."""
    path = tmp_path / "events.jsonl"
    writer = JSONL(path=str(path)).open(RunInfo("demo"))
    steps = story.steps(20)
    writer.write(steps[:10])
    with full_at(path.stat().st_size + 100), pytest.raises(OSError, match="File too large"):
        writer.write(steps[10:])
    writer.close()
    write_all(path, steps)
    assert path.read_bytes() == lines(steps)


def test_a_second_run_of_the_same_name_is_appended(
    story: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its events have the same numbers but later times; there is one warning."""
    path, events = tmp_path / "events.jsonl", story.steps(20)
    anew = [msgspec.structs.replace(event, time=event.time + 60) for event in events]
    write_all(path, events)
    for begin in (0, 5):  # the second time, the end of it comes again
        write_all(path, anew[begin:])
        assert path.read_bytes() == lines([*events, *anew])
    assert caplog.text.count("which contains an earlier run of the same name, 'demo'") == 1


def test_wherever_a_write_was_cut_off_the_file_is_continued_exactly(story: Any, tmp_path: Path) -> None:
    """A process can die after any byte."""
    events = [
        *story.steps(1),
        story(MetricsLogged, metrics={"größe\n": math.nan}),
        story(RunResumed),
    ]
    path = tmp_path / "events.jsonl"
    whole = lines(events)
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        write_all(path, events)
        assert path.read_bytes() == whole, whole[:size]


def test_a_killed_process_leaves_whole_lines_and_the_next_continues(story: Any, tmp_path: Path) -> None:
    """What it had written is there: it was handed to the operating system with each batch."""
    path = tmp_path / "events.jsonl"
    script = f"""
import sys
from events.messages import TrainStepEnded
from events.sink import RunInfo
from sinks import JSONL
writer = JSONL(path={str(path)!r}).open(RunInfo("demo"))
for seq in range(1, 10**9):
    writer.write([TrainStepEnded("demo", 1, seq, 0.0, 0, seq, 0, "train")])
    print(seq, flush=True)
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            seen = [int(process.stdout.readline()) for _ in range(100)]
        finally:
            process.send_signal(signal.SIGKILL)
    story.attempt, story.seq = 2, 10**9
    more = story.steps(5)
    write_all(path, more, attempt=2)
    found = read(path)
    assert [event.seq for event in found[:-5]] == [*range(1, len(found) - 4)]
    assert len(found) - 5 >= seen[-1]
    assert found[-5:] == more


def test_zeros_that_a_crashed_machine_has_left_are_cut_away(story: Any, tmp_path: Path) -> None:
    """Some file systems grow a file before they have what goes into it."""
    path = tmp_path / "events.jsonl"
    steps = story.steps(3)
    for rest in (b"\0" * 500, b'{"ty' + b"\0" * 100):
        path.write_bytes(lines(steps[:2]) + rest)
        write_all(path, steps)
        assert path.read_bytes() == lines(steps)


def test_a_foreign_file_is_refused_and_unchanged(tmp_path: Path) -> None:
    """Its last line is incomplete, and must not be removed like a torn event."""
    path = tmp_path / "notes.txt"
    path.write_text("first\nand last")
    with pytest.raises(SinkMisconfigured, match=r"cannot continue .*notes\.txt"):
        JSONL(path=str(path)).open(RunInfo("demo"))
    assert path.read_text() == "first\nand last"


def test_two_runs_at_a_time_cannot_have_one_file(tmp_path: Path) -> None:
    """The second may only have to wait for the first, so the error is retried."""
    sink = JSONL(path=str(tmp_path / "events.jsonl"))
    writer = sink.open(RunInfo("demo"))
    with pytest.raises(OSError, match="another run is writing to this file"):
        sink.open(RunInfo("other"))
    writer.close()
    sink.open(RunInfo("other")).close()


@pytest.mark.skipif(not hasattr(fcntl, "F_OFD_SETLK"), reason="there are no locks that a reader cannot take")
def test_who_may_only_read_the_file_cannot_hold_it(story: Any, tmp_path: Path, caplog: Any) -> None:
    """By neither kind of lock; a read lock is reported."""
    path = tmp_path / "events.jsonl"
    path.touch()
    whole = struct.pack("hhqqi0q", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    with open(path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        write_all(path, story.steps(1))
        assert "read lock" not in caplog.text
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, whole)
        write_all(path, story.steps(2))
    assert caplog.text.count("has a read lock of another process") == 1
    assert len(read(path)) == 3


def test_an_event_that_cannot_be_encoded_is_skipped(
    story: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With a warning: otherwise it would fail forever, together with the others of its batch."""
    path = tmp_path / "events.jsonl"
    steps = story.steps(2)
    bad = story(MetricsLogged, metrics={"a": object()})
    write_all(path, [steps[0], bad, steps[1]])
    assert path.read_bytes() == lines(steps)
    assert "JSONL skips an event" in caplog.text


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"path": ""}, r"JSONL\(path=''"),
        ({"path": Path("x")}, "give a path as a string"),
        ({"types": ["TrainEpochEnd"]}, "did you mean 'TrainEpochEnded'"),
        ({"types": ["###"]}, "no such event"),
        ({"types": "TrainEpochEnded"}, "a list of names"),
    ],
)
def test_a_wrong_description_is_refused_where_it_is_given(fields: dict[str, Any], says: str) -> None:
    """With what is wrong and what there is instead."""
    with pytest.raises(ValueError, match=says):
        JSONL(**fields)


# ------------------------------------------------------------------------------------------- what is in the file


def test_only_the_chosen_types_are_kept(story: Any, tmp_path: Path) -> None:
    """Others are not subscribed to, and skipped events do not count as missing later."""
    sink = JSONL(path=str(tmp_path / "events.jsonl"), types=["TrainEpochEnded"])
    assert delivery_of(sink).types == {TrainEpochEnded}
    assert msgspec.json.decode(msgspec.json.encode(sink), type=JSONL) == sink
    ended = story(TrainEpochEnded, steps=3)
    writer = sink.open(RunInfo("demo"))
    writer.write([*story.steps(1), ended, *story.steps(1)])
    writer.write(story.steps(1))
    writer.close()
    assert read(tmp_path / "events.jsonl") == [ended]


def test_every_kind_of_event_comes_back_as_it_was(story: Any, tmp_path: Path) -> None:
    """Those of a later version, too: their bytes are kept."""
    path = tmp_path / "events.jsonl"
    raw = b'{"type":"Later","run_id":"demo","attempt":1,"seq":3,"what":[1,2]}'
    events = [
        story.started(),
        story(MetricsLogged, metrics={"a/b ü\n": math.inf, "c\udc80": -0.0}),
        story(UnknownEvent, unknown_type="Later", raw=raw),
        story(RunResumed, checkpoint="step-3.a1", after_seq=2),
    ]
    write_all(path, events)
    assert path.read_bytes() == lines(events)
    assert json.loads(path.read_bytes().splitlines()[2])["what"] == [1, 2]


def test_a_resumed_run_continues_the_file(story: Any, tmp_path: Path) -> None:
    """Also where its events are numbered from before the last one written, because the journal had lost some."""
    path = tmp_path / "events.jsonl"
    first = story.steps(10)
    write_all(path, first)
    story.attempt, story.seq = 2, 5
    second = story.steps(10)
    write_all(path, second, attempt=2)
    write_all(path, second, attempt=2)
    assert path.read_bytes() == lines([*first, *second])


def test_a_large_file_is_continued_behind_other_runs(story: Any, tmp_path: Path) -> None:
    """Its end tells where to go on, or, if others have written since, all of it."""
    path = tmp_path / "events.jsonl"
    steps = story.steps(12_000)
    write_all(path, steps[:-1])
    assert path.stat().st_size > 1.5 * 2**20
    write_all(path, steps[-2:])
    others = [msgspec.structs.replace(step, run_id="other") for step in steps]
    writer = JSONL(path=str(path)).open(RunInfo("other"))
    writer.write(others)
    writer.close()
    last = story.steps(1)
    write_all(path, [*steps, *last])
    assert path.read_bytes() == lines([*steps, *others, *last])


# --------------------------------------------------------------------------------------------------- with a run


@pytest.mark.parametrize("place", ["thread", "process"])
def test_the_file_has_what_the_journal_has(place: Any, tmp_path: Path, one_weight: Any) -> None:
    """Over two attempts, byte for byte, on a thread and in a sink host."""

    class Net(one_weight):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss = super().train_step(global_step, batch, device)
            return loss if global_step != 3 else loss * math.nan

    for epochs in (2, 3):
        arguments = TrainerArguments(epochs=epochs, train_batch_size=2, device="cpu")
        own: Any = {"run_dir": tmp_path / "run", "run_id": "run", "resume": "auto", "sinks_in": place}
        result = Trainer(Net(), arguments, sinks=[JSONL()], **own).train()
        assert [(one.observer, one.state) for one in result.observers if one.observer == "jsonl"] == [
            ("jsonl", "closed")
        ]
    found = (tmp_path / "run/events.jsonl").read_bytes()
    assert found == lines(journal(tmp_path / "run"))
    assert {event.attempt for event in read(tmp_path / "run/events.jsonl")} == {1, 2}
    assert found.count(b'"nonfinite"') > 1


def test_what_a_run_kept_in_memory_is_in_the_file(tmp_path: Path, one_weight: Any) -> None:
    """A run that keeps no journal, with a path."""
    memory = Memory()
    sink = JSONL(path=str(tmp_path / "deep/er/events.jsonl"))
    arguments = TrainerArguments(train_batch_size=2, device="cpu")
    Trainer(
        one_weight(),
        arguments,
        sinks=[(sink, Delivery(overflow="drop_oldest")), memory],
        journal=False,
        checkpoints=False,
    ).train()
    assert (tmp_path / "deep/er/events.jsonl").read_bytes() == lines(memory.events)
