"""The format of the lines, and files that others have written. `test_files` tests what all sinks of files share."""

from __future__ import annotations

import fcntl
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.files import JSONL_FILES, lines_for

from events.errors import SinkMisconfigured
from events.messages import MetricsLogged, RunResumed, TrainEpochEnded, UnknownEvent
from events.sink import RunInfo, delivery_of
from events.wire import decode_json
from sinks import JSONL
from sinks.testing import Story


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.mark.parametrize("rest", [b"\0" * 500, b'{"ty' + b"\0" * 100], ids=["zeros", "partial"])
def test_zeros_that_a_crashed_machine_has_left_are_cut_away(rest: bytes, story: Story, path: Path) -> None:
    """Some file systems grow a file before they have its content."""
    steps = story.steps(3)
    path.write_bytes(lines_for(steps[:2]) + rest)
    JSONL_FILES.write(path, steps)
    assert path.read_bytes() == lines_for(steps)


def test_a_foreign_file_is_refused_and_unchanged(path: Path) -> None:
    """Its last line is incomplete, and must not be removed like a torn event."""
    path.write_text("first\nand last")
    with pytest.raises(SinkMisconfigured, match=r"cannot continue .*events\.jsonl"):
        JSONL(path=str(path)).open(RunInfo("demo"))
    assert path.read_text() == "first\nand last"


@pytest.mark.skipif(not hasattr(fcntl, "F_OFD_SETLK"), reason="there are no locks that a reader cannot take")
def test_a_process_with_read_access_cannot_lock_the_file(story: Story, path: Path, caplog: Any) -> None:
    """By neither kind of lock; a read lock is reported."""
    path.touch()
    whole = struct.pack("hhqqi0q", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
    with open(path, "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        JSONL_FILES.write(path, story.steps(1))
        assert "read lock" not in caplog.text
        fcntl.fcntl(other, fcntl.F_OFD_SETLK, whole)
        JSONL_FILES.write(path, story.steps(2))
    assert caplog.text.count("has a read lock of another process") == 1
    assert len(path.read_bytes().splitlines()) == 3


def test_an_event_that_cannot_be_encoded_is_skipped(story: Story, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With a warning: otherwise it would fail forever, together with the others of its batch."""
    steps = story.steps(2)
    JSONL_FILES.write(path, [steps[0], story(MetricsLogged, metrics={"a": object()}), steps[1]])
    assert path.read_bytes() == lines_for(steps)
    assert "JSONL skips an event" in caplog.text


@pytest.mark.parametrize(
    ("types", "says"),
    [
        (["TrainEpochEnd"], "did you mean 'TrainEpochEnded'"),
        (["###"], "no such event"),
        ("TrainEpochEnded", "a list of names"),
    ],
)
def test_wrong_types_are_refused_by_the_constructor(types: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        JSONL(types=types)


def test_only_the_chosen_types_are_kept(story: Story, path: Path) -> None:
    """Others are not subscribed to, and skipped events do not count as missing later."""
    sink = JSONL(path=str(path), types=["TrainEpochEnded"])
    assert delivery_of(sink).types == {TrainEpochEnded}
    assert msgspec.json.decode(msgspec.json.encode(sink), type=JSONL) == sink
    ended = story(TrainEpochEnded, steps=3)
    writer = sink.open(RunInfo("demo"))
    writer.write([*story.steps(1), ended, *story.steps(1)])
    writer.write(story.steps(1))
    writer.close()
    assert [decode_json(line) for line in path.read_bytes().splitlines()] == [ended]


def test_every_kind_of_event_comes_back_as_it_was(story: Story, path: Path) -> None:
    """Those of a later version, too: their bytes are kept."""
    raw = b'{"type":"Later","run_id":"demo","attempt":1,"seq":3,"what":[1,2]}'
    events = [
        story.started(),
        story(MetricsLogged, metrics={"a/b ü\n": math.inf, "c\udc80": -0.0}),
        story(UnknownEvent, unknown_type="Later", raw=raw),
        story(RunResumed, checkpoint="step-3.a1", after_seq=2),
    ]
    JSONL_FILES.write(path, events)
    assert path.read_bytes() == lines_for(events)
    assert json.loads(path.read_bytes().splitlines()[2])["what"] == [1, 2]
