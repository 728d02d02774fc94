"""The sinks of files: exact after disks that fill up, processes that die, and runs that resume."""

from __future__ import annotations

import errno
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from support.curves import Logs, curves
from support.files import CSV_FILES, JSONL_FILES, TENSORBOARD_FILES, Files, lines_for

from events.journal.reader import JournalReader
from events.messages import Event, MetricsLogged
from events.sink import Delivery, RunInfo
from events.wire import decode_json
from sinks import CSV, JSONL, Memory, TensorBoard
from sinks.files.appended import AppendedFile
from sinks.replay import replay
from sinks.testing import Story
from trainer import Trainer, TrainerArguments

ROOT = Path(__file__).parent.parent.parent


KINDS = {"CSV": CSV_FILES, "JSONL": JSONL_FILES, "TensorBoard": TENSORBOARD_FILES}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
one_file = pytest.mark.parametrize("kind", [KINDS["CSV"], KINDS["JSONL"]], ids=["CSV", "JSONL"])


def file_at(path: Path) -> Path:
    """The one file of a sink."""
    return next(path.iterdir()) if path.is_dir() else path


# ------------------------------------------------------------------------------------------- what goes wrong


@every_kind
def test_a_full_disk_raises_and_keeps_nothing_of_the_batch(
    kind: Files, story: Story, tmp_path: Path, full_at: Any
) -> None:
    """The retry writes it whole and once; so does the next run after a writer that failed and was closed."""
    path = tmp_path / kind.name
    first, second, third = story.steps(50), story.steps(50), story.steps(50)
    writer = kind.sink(str(path)).open(RunInfo("demo"))
    writer.write(first)
    file = file_at(path)
    before = file.read_bytes()
    for _ in range(2):
        with full_at(len(before) + 1_234), pytest.raises(OSError, match="File too large") as caught:
            writer.write(second)
        assert caught.value.errno == errno.EFBIG
        assert file.read_bytes() == before
    for batch in (second, second, second[20:]):
        writer.write(batch)
    with full_at(file.stat().st_size + 100), pytest.raises(OSError, match="File too large"):
        writer.write(third)
    writer.close()
    kind.write(path, [*second, *third])
    assert kind.found(path) == kind.wanted([*first, *second, *third])


@every_kind
def test_wherever_a_write_was_cut_off_the_rest_is_added(
    kind: Files, story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process can die after any byte: within a header, a quoted name, a number, or between an event's rows."""
    monkeypatch.setattr("sinks.files.event_files._CHUNK", 50)
    monkeypatch.setattr(AppendedFile, "close", lambda self: self._file.close())  # no flush, which takes the time
    batches: list[list[Event]] = [[*story.steps(1)], [story(MetricsLogged, metrics={'a "b",\nü': 0.25, "x": -0.5})]]
    batches[1].append(story(MetricsLogged, metrics={"y": 1.0}))
    path = tmp_path / kind.name
    for batch in batches:
        kind.write(path, batch)
    if path.is_dir():  # each run has started a file
        for file in sorted(path.iterdir())[1:]:
            file.unlink()
    file = file_at(path)
    whole = file.read_bytes()
    for size in range(0, len(whole), 3 if path.is_dir() else 1):
        for other in path.iterdir() if path.is_dir() else ():
            other.unlink()
        file.write_bytes(whole[:size])
        kind.write(path, [*batches[0], *batches[1]])
        assert kind.found(path) == kind.wanted([*batches[0], *batches[1]]), whole[:size]


@one_file
def test_an_event_that_was_cut_off_and_never_comes_again_leaves_nothing(
    kind: Files, story: Story, tmp_path: Path
) -> None:
    """Not a part of a row or a line."""
    first, second = story.steps(1), story.steps(1)
    path = tmp_path / kind.name
    kind.write(path, first)
    whole = path.read_bytes()
    for size in range(whole.index(b"\n") + 1, len(whole), 7):
        path.write_bytes(whole[:size])
        kind.write(path, second)
        lines = path.read_bytes().splitlines(keepends=True)
        assert {*lines} <= {*whole.splitlines(keepends=True), *lines[-2:]}
        assert path.read_bytes().endswith(b"\n")


@every_kind
def test_a_second_run_of_the_same_name_is_appended(
    kind: Files, story: Story, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its events have the same numbers but later times; there is one warning."""
    path, events = tmp_path / kind.name, story.steps(20)
    again = [msgspec.structs.replace(event, time=event.time + 60) for event in events]
    kind.write(path, events)
    for start in (0, 5):  # the second time, its end is delivered again
        kind.write(path, again[start:])
        assert kind.found(path) == kind.wanted([*events, *again])
    assert caplog.text.count("which contains an earlier run of the same name, 'demo'") == 1


@every_kind
def test_only_one_writer_at_a_time_has_a_file(kind: Files, story: Story, tmp_path: Path) -> None:
    """The second may only have to wait for the first, so the error is retried."""
    sink = kind.sink(str(tmp_path / kind.name))
    writer = sink.open(RunInfo("demo"))
    writer.write(story.steps(1))
    with pytest.raises(OSError, match="another run is writing to this file"):
        sink.open(RunInfo("demo"))
    writer.close()
    sink.open(RunInfo("demo")).close()


@every_kind
def test_a_file_that_was_deleted_is_an_error(kind: Files, story: Story, tmp_path: Path) -> None:
    """Otherwise its rows would be lost silently."""
    writer = kind.sink(str(tmp_path / kind.name)).open(RunInfo("demo"))
    file_at(tmp_path / kind.name).unlink()
    with pytest.raises(FileNotFoundError, match="deleted"):
        writer.write(story.steps(1))
    writer.close()


def test_a_killed_process_leaves_whole_lines_and_the_next_continues(story: Story, tmp_path: Path) -> None:
    """Each batch was handed to the operating system."""
    path = tmp_path / "events.jsonl"
    script = f"""
from events.messages import TrainStepEnded
from events.sink import RunInfo
from sinks import JSONL
writer = JSONL(path={str(path)!r}).open(RunInfo("demo"))
for seq in range(1, 10**9):
    writer.write([TrainStepEnded("demo", 1, seq, 0.0, 0, seq, 0, "train")])
    print(seq, flush=True)
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            seen = [int(process.stdout.readline()) for _ in range(100)]
        finally:
            process.send_signal(signal.SIGKILL)
    story.attempt, story.seq = 2, 10**9
    more = story.steps(5)
    JSONL_FILES.write(path, more, attempt=2)
    found = [decode_json(line) for line in path.read_bytes().splitlines()]
    assert [event.seq for event in found[:-5]] == [*range(1, len(found) - 4)]
    assert len(found) - 5 >= seen[-1]
    assert found[-5:] == more


@pytest.mark.parametrize("path", ["", 3, Path("x.csv"), "a\0b"], ids=repr)
@every_kind
def test_an_invalid_path_is_refused_by_the_constructor(kind: Files, path: Any) -> None:
    """With its value."""
    with pytest.raises(ValueError, match=r"\((path|dir)=.*give a path as a string"):
        kind.sink(path)


# ------------------------------------------------------------------------------------ attempts and other runs


@every_kind
def test_a_resumed_run_is_continued(kind: Files, story: Story, tmp_path: Path) -> None:
    """Even if its events are numbered from before the last one written, because the journal had lost some."""
    path = tmp_path / kind.name
    first = story.steps(10)
    kind.write(path, first)
    story.attempt, story.seq = 2, 5
    second = story.steps(10)
    for _ in range(2):
        kind.write(path, second, attempt=2)
    assert kind.found(path) == kind.wanted([*first, *second])


@one_file
def test_runs_one_after_the_other_may_share_a_file(
    kind: Files, story: Story, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each continues its own events, even if those of another run follow them, more than are read first."""
    monkeypatch.setattr("sinks.files.appended._TAIL_BYTES", 2_000)
    path = tmp_path / kind.name
    steps = story.steps(30)
    other = [msgspec.structs.replace(step, run_id="other") for step in steps]
    kind.write(path, steps[:-1])
    kind.write(path, steps[-2:])
    kind.write(path, other, "other")
    last = story.steps(1)
    kind.write(path, [*steps, *last])
    assert kind.found(path) == kind.wanted([*steps, *other, *last])


@pytest.mark.parametrize("place", ["thread", "process"])
def test_a_run_of_two_attempts_has_whole_files_to_which_a_replay_adds_nothing(place: Any, tmp_path: Path) -> None:
    """In a thread and in a sink host; a replay into deleted files writes them again."""

    def logs_nan(net: Any, global_step: int, batch: Any) -> Any:
        net.log("bad", math.nan)
        return net.forward_loss(batch)[0]

    memory, run_dir = Memory(), tmp_path / "run"
    for epochs in (2, 3):
        arguments = TrainerArguments(epochs=epochs, train_batch_size=4, device="cpu")
        own: Any = {"run_dir": run_dir, "run_id": "run", "resume": "auto", "sinks_in": place}
        sinks = [CSV(), JSONL(), TensorBoard(), memory]
        result = Trainer(Logs(train_step=logs_nan), arguments, sinks=sinks, **own).train()
        assert {one.state for one in result.observers} == {"closed"}
    reader, journal = JournalReader(run_dir / "journal"), []
    while batch := reader.read(1_000):
        journal += batch
    assert {"train_loss", "val_loss", "größe/π", "train_epoch_loss"} <= curves(memory.events).keys()

    def check(*names: str) -> None:
        found = {name: KINDS[name].found(run_dir / KINDS[name].name) for name in names}
        assert found == {name: KINDS[name].wanted(journal) for name in names}

    check(*KINDS)
    assert CSV_FILES.wanted(journal) == CSV_FILES.wanted(memory.events)
    assert (run_dir / "events.jsonl").read_bytes().count(b'"nonfinite"') > 1
    anyio.run(replay, run_dir, [CSV(), JSONL(), TensorBoard()])
    check(*KINDS)
    for file in (run_dir / "metrics.csv", run_dir / "events.jsonl", *(run_dir / "tensorboard").iterdir()):
        file.unlink()
    reports = anyio.run(replay, run_dir, [CSV(), JSONL(), TensorBoard()])
    assert [(report.state, report.left) for report in reports] == [("closed", 0)] * 3
    check("CSV", "TensorBoard")  # a replay skips superseded events, which have no numbers here


def test_a_run_without_a_journal_writes_to_a_path(tmp_path: Path) -> None:
    """Its missing folders are created."""
    memory, path = Memory(), tmp_path / "deep/er/events.jsonl"
    arguments = TrainerArguments(train_batch_size=4, device="cpu")
    sinks = [(JSONL(path=str(path)), Delivery(overflow="drop_oldest")), memory]
    Trainer(Logs(), arguments, sinks=sinks, journal=False, checkpoints=False).train()
    assert path.read_bytes() == lines_for(memory.events)
