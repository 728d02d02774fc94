"""The journal: nothing that was written is lost, whatever happens to the process, the disk or the file."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from events import wire
from events.bounds import LAST_ATTEMPT
from events.errors import RunFolderError, WireError
from events.journal import reader as journal_reader
from events.journal.history import SUPERSEDED_TYPES, EventFinder, read_history
from events.journal.lines import CHECKSUM, MAX_DECODED_BYTES, PREVIOUS_SEQ, decoded_bytes, encode_lines
from events.journal.reader import JournalReader, SkippedLine
from events.journal.segment import segment_numbers
from events.journal.tail import journal_tail
from events.journal.writer import JOURNAL_DELIVERY, Journal, JournalWriter
from events.messages import (
    EVENT_TYPES,
    BackwardEnded,
    CheckpointDeleted,
    CheckpointFailed,
    CheckpointRejected,
    CheckpointSaved,
    CheckpointSkipped,
    CheckpointStaged,
    CheckpointUploaded,
    CheckpointUploading,
    CommandTaken,
    Event,
    JournalGap,
    LoopHeld,
    MetricsLogged,
    ObserverDropped,
    ObserverFailed,
    ObserverRecovered,
    ObserverSlow,
    ObserversReported,
    RankEnded,
    RankReported,
    RunEnded,
    RunResumed,
    RunStarted,
    SystemSampled,
    TraceSaved,
    TrainStepEnded,
    UnknownEvent,
    WarningLogged,
    WeightsSaved,
)
from events.safe_files import UnsafeFile
from events.schema import json_schema
from events.sink import RunInfo, Sink, delivery_of

ROOT = Path(__file__).parents[2]


def step(seq: int, attempt: int = 1, global_step: int | None = None, loss: float = 0.5) -> TrainStepEnded:
    at = seq if global_step is None else global_step
    return TrainStepEnded("run", attempt, seq, time.time(), 0, at, 0, "train", loss=loss)


def steps(first: int, last: int) -> list[Event]:
    return [step(seq) for seq in range(first, last + 1)]


def ended(seq: int) -> RunEnded:
    return RunEnded("run", 1, seq, time.time(), 0, seq, 0, None, status="finished")


def open_journal(folder: Path, **options: Any) -> JournalWriter:
    return Journal(**options).open(RunInfo("run", run_dir=str(folder)))


def write(folder: Path, events: list[Event]) -> None:
    writer = open_journal(folder)
    writer.write(events)
    writer.close()


def seqs(folder: Path, since: int = 0) -> list[int]:
    return [event.seq for event in read_all(JournalReader(folder / "journal", since))]


def read_all(reader: JournalReader, limit: int = 1_024) -> list[Event]:
    events = []
    while batch := reader.read(limit):
        assert len(batch) <= limit
        events += batch
    return events


def segments(folder: Path) -> list[Path]:
    return sorted((folder / "journal").iterdir())


def gaps(folder: Path) -> list[tuple[int, int, int, int]]:
    events = read_all(JournalReader(folder / "journal"))
    return [
        (event.seq, event.first_seq, event.last_seq, event.lost) for event in events if isinstance(event, JournalGap)
    ]


class BadDisk:
    """The system calls of the journal, refusing on demand. What it does not refuse reaches the real disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.room: int | None = None
        """Bytes that writes still take; None for any number."""
        self.refuse_truncate = False
        self.short = False
        """Whether each write takes only a few bytes."""
        self.synced = 0
        self._write, self._truncate, self._fsync = os.write, os.ftruncate, os.fsync
        for name, function in (("write", self.write), ("ftruncate", self.truncate), ("fsync", self.fsync)):
            monkeypatch.setattr(f"events.journal.writer.os.{name}", function)

    def write(self, fd: int, data: Any) -> int:
        take = min(len(data), 7) if self.short else len(data)
        if self.room is not None:
            take = min(take, self.room)
            self.room -= take
            if take == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._write(fd, data[:take])

    def truncate(self, fd: int, size: int) -> None:
        if self.refuse_truncate:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._truncate(fd, size)

    def fsync(self, fd: int) -> None:
        self.synced += 1
        self._fsync(fd)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[BadDisk]:
    with monkeypatch.context() as patch:
        yield BadDisk(patch)


# ------------------------------------------------------------------------------------------------- any schedule


class JournalMachine(RuleBasedStateMachine):
    """A journal beside its model, a list: what was written is read back once and in order, whatever happened."""

    @initialize(segment_bytes=st.integers(1, 1_500))
    def open(self, segment_bytes: int) -> None:
        self.stack = contextlib.ExitStack()
        self.folder = Path(self.stack.enter_context(tempfile.TemporaryDirectory()))
        self.disk = BadDisk(self.stack.enter_context(pytest.MonkeyPatch.context()))
        self.segment_bytes, self.attempt, self.repeated = segment_bytes, 1, 0
        self.writer = open_journal(self.folder, segment_bytes=segment_bytes)
        self.model: list[tuple[str, int]] = []  # type and ``seq`` of each line
        self.seq = 0
        self.follower = JournalReader(self.folder / "journal")
        self.followed: list[Event] = []
        self.torn: list[tuple[str, int]] = []
        self.unfinished = False  # the last line lacks its newline
        self.suspicious = False  # the disk has failed, and no later event was written since
        self.disk_was_full = False
        self.left: dict[Path, bytes] = {}  # the segments of earlier writers

    def events(self, kinds: Iterable[str], time: float = 2.0**32) -> list[Event]:
        """Build the next events: ``kept``, ``unkept`` by the journal, or ``lost``, which does not reach it."""
        found: list[Event] = []
        for kind in kinds:
            self.seq += 1
            header: Any = ("run", self.attempt, self.seq, time, 0, self.seq, 0, "train")
            if kind != "lost":
                found.append(TrainStepEnded(*header) if kind == "kept" else BackwardEnded(*header))
            if kind == "kept":
                self.model.append(("TrainStepEnded", self.seq))
                self.unfinished = False
        return found

    @rule(kinds=st.lists(st.sampled_from(["kept", "unkept", "lost"]), max_size=6), again=st.integers(0, 3))
    def write(self, kinds: list[str], again: int) -> None:
        """Holes are not gaps while the disk keeps up, and events that are delivered again are not written again."""
        events = self.events([*["kept"] * self.suspicious, *kinds, "kept"])
        self.suspicious = False
        self.writer.write(events)
        self.writer.write(events[-again:] if again else [])
        self.repeated += min(again, len(events))
        assert (self.writer.written_seq, self.writer.repeated) == (self.seq, self.repeated)

    @rule(
        count=st.integers(1, 6),
        rooms=st.lists(st.integers(0, 900), min_size=1, max_size=3),
        refuses_truncate=st.booleans(),
        lost=st.lists(st.sampled_from(["kept", "lost"]), max_size=8),
    )
    def write_to_a_full_disk(self, count: int, rooms: list[int], refuses_truncate: bool, lost: list[str]) -> None:
        """A batch is delivered until it is written; events that were dropped meanwhile are one gap."""
        events = self.events(["kept"] * count)
        failed = False
        for room in rooms:
            self.disk.room, self.disk.refuse_truncate = room, refuses_truncate
            before = self.writer.written_seq
            try:
                self.writer.write(events)
            except OSError as error:
                failed = str(error.filename).startswith(str(self.folder))  # it names the segment
                assert failed
                self.suspicious = self.disk_was_full = True
                assert before <= self.writer.written_seq < self.seq
            self.repeated += sum(event.seq <= before for event in events)
            self.follow(1)
        self.disk.room, self.disk.refuse_truncate = None, False
        self.repeated += sum(event.seq <= self.writer.written_seq for event in events)
        self.writer.write(events)
        if failed and "kept" in lost:
            first = self.seq + 1
            queued = self.events([*lost, "kept"], time=0.0)
            holes = [seq for seq in range(first, self.seq) if ("TrainStepEnded", seq) not in self.model]
            if holes:
                own = next(event.seq for event in queued if event.seq > holes[0]) - 1
                self.model.append(("JournalGap", own))
                self.model.sort(key=lambda line: line[1])
            self.writer.write(queued)
            if holes:
                gap = next(event for event in read_all(JournalReader(self.folder / "journal", own - 1)))
                assert isinstance(gap, JournalGap)
                assert (gap.first_seq, gap.last_seq, gap.lost) == (holes[0], holes[-1], len(holes))

    @rule(short=st.booleans())
    def write_in_short_pieces(self, short: bool) -> None:
        """A system call may take fewer bytes than it was given."""
        self.disk.short = short

    @rule(limit=st.integers(1, 5))
    def follow(self, limit: int) -> None:
        while batch := self.follower.read(limit):
            assert len(batch) <= limit
            self.followed += batch

    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        """A killed writer leaves a part of its next line; an event that lacks only its newline counts."""
        if self.writer._fd is not None:
            part = encode_lines(self.events(["kept"]), self.seq - 1)[:-1]
            cut = data.draw(st.integers(0, len(part)) | st.just(len(part)))
            self.disk._write(self.writer._fd, part[:cut])
            self.unfinished = cut == len(part)
            if cut < len(part):
                self.model.pop()
                self.torn += [(str(segments(self.folder)[-1]), cut)] if cut else []
            os.close(self.writer._fd)
        self.seq = journal_tail(self.folder / "journal").seq
        assert self.seq == max((seq for _, seq in self.model), default=0)
        self.attempt += 1
        self.repeated, self.suspicious = 0, False
        self.writer = open_journal(self.folder, segment_bytes=self.segment_bytes)
        self.left = {path: path.read_bytes() for path in segments(self.folder)}

    @rule(since=st.integers(0, 60))
    def check(self, since: int) -> None:
        """A line without its newline is finished by the next segment."""
        found = read_all(JournalReader(self.folder / "journal", since))
        model = self.model[:-1] if self.unfinished else self.model
        assert [(type(event).__name__, event.seq) for event in found] == [line for line in model if line[1] > since]

    def teardown(self) -> None:
        if not hasattr(self, "stack"):
            return
        with self.stack:
            self.write([], 0)
            self.writer.close()
            for since in (0, self.seq // 2, self.seq):
                self.check(since)
            self.follow(5)
            assert [(type(event).__name__, event.seq) for event in self.followed] == self.model
            assert all(skip.torn for skip in self.follower.skipped)
            assert {(skip.path, skip.length) for skip in self.follower.skipped}.issuperset(self.torn)
            tail = journal_tail(self.folder / "journal")
            # A segment that a full disk has left empty may have begun with an event that others have seen.
            assert tail.seq == self.seq or (self.seq < tail.seq <= tail.segment and self.disk_was_full)
            for path, data in self.left.items():
                assert path.read_bytes() == data


TestJournal = JournalMachine.TestCase
TestJournal.settings = settings(deadline=None, max_examples=50, stateful_step_count=15)


# ----------------------------------------------------------------------------------------- the disk refuses


def test_events_that_were_dropped_meanwhile_are_recorded_as_a_gap(tmp_path: Path, disk: BadDisk) -> None:
    """The gap stands where the events are missing, with the reason; its own seq is the last lost one."""
    writer = open_journal(tmp_path)
    writer.write(steps(1, 3))
    disk.room = 0
    with pytest.raises(OSError, match="No space"):
        writer.write(steps(4, 6))
    disk.room = None
    writer.write(steps(4, 6))  # the batch in hand is kept by the supervisor, the queue behind it is not
    queued = [msgspec.structs.replace(event, time=0.0) for event in steps(50, 52)]
    writer.write(queued)
    writer.close()
    assert seqs(tmp_path) == [1, 2, 3, 4, 5, 6, 49, 50, 51, 52]
    assert gaps(tmp_path) == [(49, 7, 49, 43)]
    gap = next(event for event in read_all(JournalReader(tmp_path / "journal", 6)))
    assert isinstance(gap, JournalGap)
    assert "No space left on device" in gap.reason
    assert (gap.run_id, gap.attempt, gap.global_step, gap.stage) == ("run", 1, 50, "train")


def test_a_damaged_digit_at_the_end_does_not_hide_what_a_new_attempt_writes(tmp_path: Path) -> None:
    """It is numbered above all that the end of the journal shows, not only above its last line."""
    write(tmp_path, steps(1, 250))
    (segment,) = segments(tmp_path)
    text = segment.read_bytes()
    segment.write_bytes(text.replace(b'"seq":250', b'"seq":150'))
    assert journal_tail(tmp_path / "journal").seq == 250  # the damaged line counts
    write(tmp_path, steps(251, 255))
    assert seqs(tmp_path)[-7:] == list(range(249, 256))
    assert gaps(tmp_path) == [(250, 250, 250, 1)]


@pytest.mark.parametrize("segment_bytes", [0, -1, "64MB", 1.5, True, None])
def test_an_impossible_size_of_segments_is_refused(segment_bytes: Any) -> None:
    """When it is given, not at each write."""
    with pytest.raises(ValueError, match=r"Journal\(segment_bytes=.*: give a number of bytes"):
        Journal(segment_bytes=segment_bytes)


def test_a_segment_that_was_deleted_is_an_error_once(tmp_path: Path) -> None:
    """Or the rest of the run would go into a file that has no name; what comes then is in a new segment."""
    writer = open_journal(tmp_path)
    writer.write(steps(1, 3))
    (segment,) = (tmp_path / "journal").iterdir()
    segment.unlink()
    with pytest.raises(FileNotFoundError, match="the segment was deleted, with all events in it") as caught:
        writer.write(steps(4, 6))
    assert caught.value.filename == str(segment)
    writer.write(steps(4, 6))
    writer.write(steps(7, 7))
    writer.close()
    assert seqs(tmp_path) == [3, 4, 5, 6, 7]
    assert gaps(tmp_path) == [(3, 1, 3, 3)]


def test_a_slow_disk_makes_holes_suspicious_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a write hangs the queue may overflow as if it had failed."""
    monkeypatch.setattr("events.journal.writer.SLOW_WRITE_S", -1.0)
    writer = open_journal(tmp_path)
    writer.write([step(1)])
    writer.write([msgspec.structs.replace(step(4), time=0.0)])
    assert gaps(tmp_path) == [(3, 2, 3, 2)]
    reason = next(e.reason for e in read_all(JournalReader(tmp_path / "journal")) if isinstance(e, JournalGap))
    assert "a write took" in reason


@pytest.mark.parametrize(
    "fields", [{"arguments": {"x": object()}}, {"module": "m" * 400}], ids=["cannot be encoded", "longer than a line"]
)
def test_an_event_that_no_line_can_hold_becomes_a_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    """Its neighbours are written; after an exception it would be delivered, and refused, for ever."""
    monkeypatch.setattr("events.journal.writer.MAX_LINE_BYTES", 400)
    writer = open_journal(tmp_path)
    bad = RunStarted("run", 1, 2, 0.0, 0, 0, 0, None, **{"module": "m", "epochs": 1, **fields})
    writer.write([step(1), bad, step(3)])
    assert seqs(tmp_path) == [1, 2, 3]
    assert gaps(tmp_path) == [(2, 2, 2, 1)]
    assert max(len(line) for line in segments(tmp_path)[0].read_bytes().splitlines()) <= 400


@pytest.mark.skipif(os.name == "nt", reason="file size limits are POSIX")
def test_a_real_limit_of_the_system_is_survived(tmp_path: Path) -> None:
    """The kernel refuses in the middle of a batch (RLIMIT_FSIZE); once it does not, the journal is whole."""
    code = f"""
import resource, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from events.journal.writer import Journal
from events.messages import TrainStepEnded
from events.sink import RunInfo
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
writer = Journal().open(RunInfo("run", run_dir={str(tmp_path)!r}))
events = [TrainStepEnded("run", 1, seq, time.time(), 0, seq, 0, "train", loss=1.0) for seq in range(1, 101)]
writer.write(events[:10])
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, hard))
failures = 0
for _ in range(3):
    try:
        writer.write(events)
    except OSError as error:
        failures += 1
        assert error.errno == 27, error
assert failures == 3
assert 10 < writer.written_seq < 100, writer.written_seq
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
writer.write(events)
writer.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert seqs(tmp_path) == list(range(1, 101))
    assert len(segments(tmp_path)) == 1


# ------------------------------------------------------------------------------------- the process is killed


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX")
def test_a_killed_writer_loses_nothing_that_write_returned_for(tmp_path: Path) -> None:
    """Killed while it writes as fast as it can, and is tailed; then a new attempt goes on behind it."""
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from events.journal.writer import Journal
from events.messages import TrainStepEnded
from events.sink import RunInfo
writer = Journal(segment_bytes=30_000).open(RunInfo("run", run_dir={str(tmp_path)!r}))
seq = 0
while True:
    batch = range(seq + 1, seq + 51)
    writer.write([TrainStepEnded("run", 1, seq, time.time(), 0, seq, 0, "train", loss=1.0) for seq in batch])
    seq += 50
    print(seq, flush=True)
"""
    reader = JournalReader(tmp_path / "journal")
    seen: list[Event] = []
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process:
        promised = 0
        while promised < 5_000:
            promised = int(process.stdout.readline())
            seen += reader.read(70)
        process.send_signal(signal.SIGKILL)
        promised = max([promised, *(int(line) for line in process.stdout if line.endswith("\n"))])
    seen += read_all(reader)
    assert [event.seq for event in seen] == list(range(1, len(seen) + 1))
    assert len(seen) >= promised
    last = journal_tail(tmp_path / "journal").seq
    assert last >= len(seen)
    write(tmp_path, [step(last + 1, attempt=2)])
    assert seqs(tmp_path)[-1] == last + 1
    assert read_all(reader)[-1].attempt == 2


# ---------------------------------------------------------------------------------------- garbage in the file

garbage = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([b"\0" * 5000, b"{}", b"null", b"[" * 3000, b'{"type":"RunEnded"}', b'{"type":"Later"}']),
    st.just(wire.encode_json(RunResumed("", 9, 2**40, 0.0, 0, 0, 0, None))),
    st.just(b'{"type":"Later","run_id":"run","seq":0}'),
).map(lambda data: data.replace(b"\n", b" "))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10), garbage), max_size=5), st.integers(1, 4))
def test_garbage_between_lines_is_skipped_and_reported(insertions: list[tuple[int, bytes]], limit: int) -> None:
    """Every whole valid line is still returned; each piece of garbage is reported with its place."""
    lines = [wire.encode_json(event) for event in steps(1, 10)]
    marked: list[tuple[bytes, bool]] = [(line, True) for line in lines]
    for at, data in sorted(insertions, key=lambda insertion: -insertion[0]):
        marked.insert(at, (data, False))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "journal"
        folder.mkdir()
        path = folder / "00000000000000000001.jsonl"
        path.write_bytes(b"".join(line + b"\n" for line, _ in marked))
        reader = JournalReader(folder)
        assert [event.seq for event in read_all(reader, limit)] == list(range(1, 11))
        wrong = [(number, line) for number, (line, good) in enumerate(marked, start=1) if not good and line]
        assert [(skip.line, skip.length) for skip in reader.skipped] == [(n, len(line)) for n, line in wrong]
        content = path.read_bytes()
        for skip, (_, line) in zip(reader.skipped, wrong, strict=True):
            assert content[skip.offset : skip.offset + skip.length] == line
            assert skip.reason
        assert journal_tail(folder).seq >= 10


def made(line: bytes) -> bool:
    try:
        return wire.decode_json(line).seq > 0
    except WireError:
        return False


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 40), st.binary(max_size=40)), max_size=4))
def test_bytes_changed_anywhere_cost_only_the_lines_they_touch(
    edits: list[tuple[int, int, bytes]],
) -> None:
    """Overwritten, removed or inserted bytes: every line that is still whole is returned."""
    lines = [wire.encode_json(event) for event in steps(1, 12)]
    content = bytearray(b"".join(line + b"\n" for line in lines))
    for at, remove, insert in edits:
        content[at : at + remove] = insert
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "journal"
        folder.mkdir()
        (folder / "00000000000000000001.jsonl").write_bytes(content)
        left = set(bytes(content).split(b"\n")[:-1])
        events = read_all(JournalReader(folder))
        returned = [event.seq for event in events if not isinstance(event, JournalGap)]
        assert [event.seq for event in events] == sorted({event.seq for event in events})
        whole = {seq for seq, line in enumerate(lines, start=1) if line in left}
        # An edit may have made an event of its own, with a seq that hides others as any repeat would.
        if not any(made(line) for line in left - set(lines)):
            assert set(returned) == whole
        list(read_history(folder))
        journal_tail(folder)


def test_a_damaged_seq_does_not_hide_what_follows(tmp_path: Path) -> None:
    """One wrong digit costs one event."""
    write(tmp_path, steps(1, 9))
    path = segments(tmp_path)[0]
    text = path.read_bytes().replace(b'"seq":4,', b'"seq":4000,')
    without = re.sub(rb',"crc32":"\w{8}"', b"", text)
    for content, reason in (
        (text, "its checksum does not match, so the line was changed"),
        (without, "its seq 4000 is not below that of the next line"),  # of a version without checksums
    ):
        path.write_bytes(content)
        reader = JournalReader(tmp_path / "journal")
        assert [event.seq for event in read_all(reader)] == list(range(1, 10))
        assert [(s.line, s.reason, s.first_seq, s.last_seq) for s in reader.skipped] == [(4, reason, 4, 4)]
        [gap] = [event for event in read_history(tmp_path / "journal") if isinstance(event, JournalGap)]
        assert (gap.first_seq, gap.last_seq, gap.lost) == (4, 4, 1)
        assert gap.reason == f"seq 4, at line 4 of {path.name}: {reason}"


def of_two_attempts() -> list[list[Event]]:
    """The events of a run that was resumed at step 6 of 8, with a hole in ``seq`` and numbers of every kind."""
    first: list[Event] = [RunStarted("run", 1, 1, 0.0, 0, 0, 0, None, module="m", epochs=1, arguments={"lr": 0.1})]
    first += [step(seq, 1, seq - 1, loss=1 / seq) for seq in range(2, 10)]
    first += [MetricsLogged("run", 1, 12, 1.0, 0, 8, 0, "train", metrics={"a/b": math.inf, "c": -1e-300})]
    after = resumed(14, 2, 6)
    second: list[Event] = [RunStarted("run", 2, 13, 0.0, 0, 0, 0, None, module="m", epochs=1), after]
    second += [step(seq, 2, seq - 8, loss=2 / seq) for seq in range(15, 20)]
    return [first, [*second, ended(20)]]


def test_no_flipped_bit_changes_a_value_or_loses_an_event_unseen(tmp_path: Path) -> None:
    """1,500 bits: what is returned is what was written, and each event that is not is in a gap that is reported."""
    attempts = of_two_attempts()
    for events in attempts:
        write(tmp_path, events)
    journal = tmp_path / "journal"
    written = {event.seq: event for events in attempts for event in events}
    history = [event.seq for event in read_history(journal)]
    assert history == [1, *range(2, 8), 13, *range(14, 21)]
    paths = segments(tmp_path)
    whole = [path.read_bytes() for path in paths]
    draw = random.Random(0)
    newlines = [(at, index) for at, data in enumerate(whole) for index, byte in enumerate(data) if byte == 10]
    places = [(at, index, bit) for at, index in newlines for bit in range(8)]
    while len(places) < 1_500:
        at = draw.randrange(2)
        places.append((at, draw.randrange(len(whole[at])), draw.randrange(8)))
    for at, index, bit in places:
        data = bytearray(whole[at])
        data[index] ^= 1 << bit
        paths[at].write_bytes(data)
        where = f"bit {bit} of byte {index} of segment {at}: {bytes(data[max(0, index - 30) : index + 30])!r}"
        skipped: list[SkippedLine] = []
        lost: set[int] = set()
        returned = []
        for event in read_history(journal, skipped=skipped):
            if isinstance(event, JournalGap):
                lost |= set(range(event.first_seq, event.last_seq + 1))
            else:
                returned.append(event.seq)
                assert msgspec.json.encode(event) == msgspec.json.encode(written[event.seq]), where
        assert set(returned) <= set(history), where  # nothing that was superseded counts again
        assert set(history) - set(returned) <= lost, where
        assert (set(history) == set(returned)) or skipped, where
        paths[at].write_bytes(whole[at])


def test_lines_are_json_with_a_checksum_that_others_can_verify(tmp_path: Path) -> None:
    """The schema describes both members; a line without its checksum gives the number."""
    for events in of_two_attempts():
        write(tmp_path, events)
    lines = [line for path in segments(tmp_path) for line in path.read_bytes().splitlines()]
    for line in lines:
        values = json.loads(line)
        body = line.removesuffix(b',"crc32":"%s"}' % values["crc32"].encode()) + b"}"
        assert values["crc32"] == f"{zlib.crc32(body):08x}"
        assert CHECKSUM in json_schema()["$defs"][values["type"]]["properties"]
    assert [(values["seq"], values["previous_seq"]) for values in map(json.loads, lines) if PREVIOUS_SEQ in values] == [
        (12, 9)
    ]


def test_a_resume_is_repeated_in_each_segment_of_its_attempt(tmp_path: Path) -> None:
    """So that losing lines or segments does not revive the steps that it superseded; readers return it once."""
    first, second = of_two_attempts()
    write(tmp_path, first)
    writer = open_journal(tmp_path, segment_bytes=1)
    for event in second:
        writer.write([event])
    writer.close()
    assert seqs(tmp_path) == [event.seq for event in (*first, *second)]
    resumes = [event for event in read_history(tmp_path / "journal") if isinstance(event, RunResumed)]
    assert [event.seq for event in resumes] == [14]
    assert [event.seq for event in EventFinder(tmp_path / "journal", [RunResumed]).find()] == [14]
    for path in segments(tmp_path)[1:4]:
        path.unlink()
    history = list(read_history(tmp_path / "journal"))
    done = [event.global_step for event in history if isinstance(event, TrainStepEnded)]
    assert done == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert [(e.first_seq, e.last_seq) for e in history if isinstance(e, JournalGap)] == [(13, 13), (15, 15)]


def test_a_damaged_end_is_named_once_nobody_writes(tmp_path: Path) -> None:
    """What follows a lost line usually names it; behind the last one nothing follows."""
    write(tmp_path, [*steps(1, 3), ended(4)])
    (path,) = segments(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"finished", b"cinished"))
    reader = JournalReader(tmp_path / "journal")
    assert [event.seq for event in read_all(reader)] == [1, 2, 3]
    [gap] = reader.finish()
    assert isinstance(gap, JournalGap)
    assert (gap.first_seq, gap.last_seq, reader.cursor) == (4, 4, 4)
    assert reader.finish() == []
    assert len(reader.skipped) == 1
    assert JournalReader(tmp_path / "journal", since=reader.cursor).finish() == []  # whoever has it is not told again


def test_lines_without_checksums_are_read_and_their_holes_are_not_gaps(tmp_path: Path) -> None:
    """As earlier versions wrote them; within a segment that has checksums such a line is damage."""
    journal = tmp_path / "journal"
    journal.mkdir()
    (journal / f"{1:020d}.jsonl").write_bytes(wire.encode_json_lines([step(1), step(5)]))
    write(tmp_path, [step(6), step(9)])
    assert seqs(tmp_path) == [1, 5, 6, 9]
    assert gaps(tmp_path) == []
    with open(segments(tmp_path)[1], "ab") as file:
        file.write(wire.encode_json_lines([step(10)]))
    reader = JournalReader(journal)
    assert [event.seq for event in read_all(reader)] == [1, 5, 6, 9]
    assert [skip.reason for skip in reader.skipped] == ["it has no checksum, and other lines of its segment have"]


def test_the_report_of_skipped_lines_is_bounded(tmp_path: Path) -> None:
    """A file full of garbage does not fill the memory; the count goes on."""
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / "00000000000000000001.jsonl").write_bytes(b"x\n" * 1_050)
    reader = JournalReader(tmp_path / "journal")
    assert reader.read() == []
    assert [skip.line for skip in reader.skipped] == list(range(51, 1_051))
    assert reader.skipped_count == 1_050


def test_a_lost_segment_is_passed_over(tmp_path: Path) -> None:
    """It is reported with what it held, whether it is gone before the reader reaches it or under the reader."""
    writer = open_journal(tmp_path, segment_bytes=1)
    for seq in range(1, 6):
        writer.write([step(seq)])
    segments(tmp_path)[2].unlink()
    reader = JournalReader(tmp_path / "journal")
    assert [event.seq for event in read_all(reader)] == [1, 2, 3, 4, 5]
    assert gaps(tmp_path) == [(3, 3, 3, 1)]
    assert [(skip.line, skip.length, skip.first_seq, skip.last_seq) for skip in reader.skipped] == [(1, 0, 3, 3)]
    assert "were removed" in reader.skipped[0].reason
    reader = JournalReader(tmp_path / "journal", since=4)
    assert [event.seq for event in reader.read()] == [5]
    segments(tmp_path)[-1].unlink()
    assert reader.read() == []
    assert reader.skipped[0].reason == "the segment is gone"
    with pytest.raises(FileNotFoundError):
        writer.write([step(6)])
    writer.write([step(6)])
    assert [event.seq for event in reader.read()] == [6]
    assert reader.skipped_count == 1


def put(path: Path, kind: str) -> None:
    """Put something that is not a regular file in a path's place."""
    path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        path.symlink_to(kind)


@pytest.mark.skipif(os.name == "nt", reason="special files are POSIX")
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("kind", ["folder", "FIFO", "/dev/zero", "../../outside", "missing", "."])
def test_what_is_not_a_regular_file_is_damage(tmp_path: Path, kind: str, place: int) -> None:
    """Nothing waits for it, follows it or raises; the other segments are read, and it is reported once."""
    writer = open_journal(tmp_path / "run", segment_bytes=1)
    for seq in range(1, 4):
        writer.write([step(seq)])
    writer.close()
    (tmp_path / "outside").write_bytes(wire.encode_json_lines([step(place + 1, loss=7.0)]))
    journal = tmp_path / "run" / "journal"
    bad = segments(tmp_path / "run")[place]
    put(bad, kind)
    left = [seq for seq in (1, 2, 3) if seq != place + 1]
    reader = JournalReader(journal)
    assert [event.seq for event in read_all(reader)] == ([1, 2, 3] if place < 2 else [1, 2])
    assert read_all(reader) == []
    [skip] = reader.skipped
    assert (skip.path, skip.length, skip.torn) == (str(bad), 0, False)
    assert "which is not opened below a run folder" in skip.reason
    history = list(read_history(journal))
    assert [event.seq for event in history] == [1, 2, 3]
    assert [event.seq for event in history if isinstance(event, JournalGap)] == [place + 1]
    assert [event.seq for event in EventFinder(journal, [TrainStepEnded]).find()] == left
    assert [event.seq for event in journal_tail(journal).events] == [left[-1]]
    assert journal_tail(journal).seq == 3  # nothing is numbered below what was there
    write(tmp_path / "run", [step(4, attempt=2)])
    assert [event.seq for event in read_all(reader)] == ([4] if place < 2 else [3, 4])
    assert reader.skipped_count == 1


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_the_folder_of_a_journal_is_not_a_link(tmp_path: Path) -> None:
    """Neither a reader nor a writer follows one; the run folder itself may be reached through one."""
    write(tmp_path / "elsewhere", steps(1, 2))
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")
    assert seqs(tmp_path / "linked") == [1, 2]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "journal").symlink_to(tmp_path / "elsewhere" / "journal")
    with pytest.raises(UnsafeFile, match="a symbolic link"):
        seqs(tmp_path / "run")
    with pytest.raises(RunFolderError, match="a symbolic link"):
        open_journal(tmp_path / "run")
    assert len(segments(tmp_path / "elsewhere")) == 1


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_a_link_in_the_place_of_the_next_segment_is_not_followed(tmp_path: Path) -> None:
    """The batch is refused once, and then gets a segment with another name."""
    target = tmp_path / "target"
    target.write_text("mine")
    writer = open_journal(tmp_path / "run")
    (tmp_path / "run" / "journal" / f"{1:020d}.jsonl").symlink_to(target)
    with pytest.raises(FileExistsError):
        writer.write(steps(1, 2))
    writer.write(steps(1, 2))
    writer.close()
    assert target.read_text() == "mine"
    assert seqs(tmp_path / "run") == [1, 2]


@pytest.mark.skipif(os.name == "nt", reason="files are not sparse there by default")
@pytest.mark.parametrize("after", [b"", b"\n"], ids=["without an end", "with an end"])
def test_a_sparse_segment_of_40_gb_costs_neither_memory_nor_time(tmp_path: Path, after: bytes) -> None:
    """The hole is one line that is too long: it is reported, and what stands before and after is read."""
    write(tmp_path, steps(1, 3))
    (path,) = segments(tmp_path)
    begin = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(40 * 10**9)
        file.write(b"x" + after + (encode_lines(steps(4, 5), 3) if after else b""))
    journal = tmp_path / "journal"
    tracemalloc.start()
    try:
        reader = JournalReader(journal)
        assert [event.seq for event in read_all(reader)] == ([1, 2, 3, 4, 5] if after else [1, 2, 3])
        assert [(skip.offset, skip.length) for skip in reader.skipped] == [(begin, 40 * 10**9 + 1 - begin)]
        last = 5 if after else 3
        assert journal_tail(journal).seq == (5 if after else 4)  # the hole counts
        assert [event.seq for event in EventFinder(journal, [TrainStepEnded]).find()][-1] == last
        assert [event.seq for event in read_history(journal) if not isinstance(event, JournalGap)][-1] == last
        write(tmp_path, [step(6, attempt=2)])
        assert [event.seq for event in read_all(reader)][-1] == 6
        assert reader.skipped_count == 1
        assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    finally:
        tracemalloc.stop()


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 600), max_size=6), st.integers(40, 400), st.booleans())
def test_a_line_that_is_too_long_costs_only_itself(lengths: list[int], piece: int, ends: bool) -> None:
    """Wherever it stands and however the bytes arrive, it is reported once, and every other line is returned."""
    limit = 300
    lines: list[bytes] = []
    for seq, length in enumerate(lengths, start=1):
        lines += [b"x" * length, wire.encode_json(step(seq))]
    data = b"\n".join([*lines, b"y" * 700]) + (b"\n" if ends else b"")
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr("events.journal.segment.MAX_LINE_BYTES", limit)
        patch.setattr("events.journal.segment._CHUNK", 64)
        journal = Path(name) / "journal"
        journal.mkdir()
        path = journal / f"{1:020d}.jsonl"
        reader = JournalReader(journal)
        seen: list[Event] = []
        for at in range(0, len(data), piece):
            with open(path, "ab") as file:
                file.write(data[at : at + piece])
            seen += read_all(reader)
        assert [event.seq for event in seen] == list(range(1, len(lengths) + 1))
        starts = [sum(len(line) + 1 for line in lines[:index]) for index in range(len(lines) + 1)]
        wrong = [start for start, line in zip(starts, lines, strict=False) if line[:1] == b"x"]
        assert [skip.offset for skip in reader.skipped] == [*wrong, starts[-1]]
        again = JournalReader(journal)
        assert [event.seq for event in read_all(again)] == [event.seq for event in seen]
        longer = [(skip.offset, skip.length) for skip in again.skipped if skip.length > limit]
        assert longer == [
            (start, len(line)) for start, line in zip(starts, [*lines, b"y" * 700], strict=True) if len(line) > limit
        ]


def test_garbage_holds_nobody_longer_than_they_allow(tmp_path: Path) -> None:
    """A reader and a finder return at their time, and continue there."""
    write(tmp_path, steps(1, 2))
    with open(segments(tmp_path)[0], "ab") as file:
        file.write(b"x\n" * 3 + b'{"type":"TrainStepEnded"\n' * 3 + encode_lines(steps(3, 3), 2))
    reader = JournalReader(tmp_path / "journal")
    found = [[event.seq for event in reader.read(until=0.0)] for _ in range(7)]
    assert found == [[1, 2], [], [], [], [], [], [3]]
    finder = EventFinder(tmp_path / "journal", [TrainStepEnded])
    assert [event.seq for event in finder.find(until=0.0)] == [1, 2, 3]  # it looks at a mebibyte at least
    assert list(finder.find(until=0.0)) == []


def test_a_new_attempt_stays_above_a_segment_whose_end_is_garbage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much of it there is: what it may have held is bounded by its size."""
    monkeypatch.setattr("events.journal.reader.MAX_LINE_BYTES", 2**18)
    write(tmp_path, steps(1, 50))
    with open(segments(tmp_path)[0], "ab") as file:
        file.write(b"x" * 2**20 + b"\n")
    assert journal_tail(tmp_path / "journal").seq >= 50
    write(tmp_path, [step(journal_tail(tmp_path / "journal").seq + 1, attempt=2)])
    assert len(seqs(tmp_path)) == 50 + 2
    assert len(gaps(tmp_path)) == 1


def filled(item: str, nbytes: int) -> bytes:
    return f"[{','.join([item] * (nbytes // (len(item) + 1)))}]".encode()


FILLS = {"lists": "[]", "maps": '{"":0}', "deep": "[" * 90 + "]" * 90, "texts": '"ab"', "numbers": "-6"}


@pytest.mark.parametrize("kind", sorted(FILLS))
def test_a_line_that_would_fill_the_memory_is_damage(tmp_path: Path, kind: str) -> None:
    """Nothing of it is decoded, its neighbours are read, and each reader finds what is behind it."""
    field = b'"x":%b' if kind == "numbers" else b'"module":"m","epochs":1,"config":{"a":%b}'
    field %= filled(FILLS[kind], 8_000_000)
    header = b'"run_id":"run","attempt":1,"seq":2,"time":1.0,"rank":0,"global_step":2,"epoch":0,"stage":null'
    body = b'{"type":"RunStarted",%b,%b}' % (header, field)
    large = b'%b,"crc32":"%08x"}\n' % (body[:-1], zlib.crc32(body))
    first, last = encode_lines([step(1)], 0), encode_lines([step(3)], 2)
    (tmp_path / "journal").mkdir()
    (tmp_path / "journal" / f"{1:020d}.jsonl").write_bytes(first + large + last)
    del field, body, large
    tracemalloc.start()
    try:
        reader = JournalReader(tmp_path / "journal")
        assert [(type(event).__name__, event.seq) for event in read_all(reader)] == [
            ("TrainStepEnded", 1), ("JournalGap", 2), ("TrainStepEnded", 3),
        ]  # fmt: skip
        assert [event.seq for event in journal_tail(tmp_path / "journal").events][-1] == 3
        assert journal_tail(tmp_path / "journal").seq == 3
        assert tracemalloc.get_traced_memory()[1] < 48 * 2**20
    finally:
        tracemalloc.stop()
    assert "bytes of memory when decoded" in reader.skipped[0].reason


def test_an_event_that_readers_would_refuse_becomes_a_gap(tmp_path: Path) -> None:
    """Just below the limit it is written, and read again as it was."""
    writer = open_journal(tmp_path)

    def started(seq: int, count: int) -> RunStarted:
        arguments: dict[str, Any] = {"a": [[]] * count}
        return RunStarted("run", 1, seq, 0.0, 0, 0, 0, None, module="m", epochs=1, arguments=arguments)

    low, high = 0, 1_000_000  # the first is written, the second is not
    while high - low > 1:
        middle = (low + high) // 2
        fits = decoded_bytes(encode_lines([started(5, middle)], 3)[:-1]) <= MAX_DECODED_BYTES
        low, high = (middle, high) if fits else (low, middle)
    writer.write([step(1), started(2, high), step(3), started(5, low), step(6)])
    assert seqs(tmp_path) == [1, 2, 3, 5, 6]
    assert gaps(tmp_path) == [(2, 2, 2, 1)]
    reader = JournalReader(tmp_path / "journal")
    events = read_all(reader)
    assert "RunStarted: it may take" in events[1].reason  # type: ignore[attr-defined]
    assert (events[3], reader.skipped) == (started(5, low), [])


def test_large_events_are_read_few_at_a_time(tmp_path: Path) -> None:
    """So that a read takes the memory of one of them, and not of ``limit``; also one of a journal's end."""
    writer = open_journal(tmp_path)
    for seq in range(1, 13):
        raw = b'{"type":"New","run_id":"run","attempt":1,"seq":%d,"x":"%b"}' % (seq, b"x" * 4_000_000)
        writer.write([UnknownEvent("run", 1, seq, 0.0, 0, 0, 0, None, unknown_type="New", raw=raw)])
    reader = JournalReader(tmp_path / "journal")
    assert [len(reader.read()) for _ in range(4)] == [5, 5, 2, 0]
    assert reader.skipped == []
    assert 1 <= len(journal_tail(tmp_path / "journal").events) <= 5


def test_other_files_are_no_segments(tmp_path: Path) -> None:
    """Indexes, editors' leftovers and folders may stand beside the segments."""
    write(tmp_path, [step(1)])
    (tmp_path / "journal" / "index.db").write_bytes(b"x")
    (tmp_path / "journal" / "00000000000000000001.jsonl~").write_bytes(b"x")
    (tmp_path / "journal" / "2.jsonl").write_bytes(b"x")
    (tmp_path / "journal" / f"{10**20 - 1}.jsonl").write_bytes(b"x")  # no seq reaches that
    assert segment_numbers(tmp_path / "journal") == [1]
    assert seqs(tmp_path) == [1]


def test_a_journal_that_does_not_exist_yet_is_empty(tmp_path: Path) -> None:
    """A reader may be there before the writer."""
    reader = JournalReader(tmp_path / "journal")
    assert reader.read() == []
    assert list(read_history(tmp_path / "journal")) == []
    assert journal_tail(tmp_path / "journal").seq == 0
    write(tmp_path, [step(1)])
    assert [event.seq for event in reader.read()] == [1]


def test_a_run_without_a_folder_has_no_journal(tmp_path: Path) -> None:
    """The error says so, also where the journal's folder is a file."""
    with pytest.raises(RunFolderError, match="has no folder"):
        Journal().open(RunInfo("run"))
    (tmp_path / "journal").write_text("")
    with pytest.raises(RunFolderError, match="cannot be opened"):
        open_journal(tmp_path)


# ------------------------------------------------------------------------------------------------- the writer


def test_the_journal_is_a_sink_that_never_gives_up() -> None:
    """It gets what is to be journalled and nothing that is built on demand; it is plain data."""
    journal = Journal(segment_bytes=5)
    assert isinstance(journal, Sink)
    assert delivery_of(journal) is JOURNAL_DELIVERY
    assert JOURNAL_DELIVERY.types is not None
    assert BackwardEnded not in JOURNAL_DELIVERY.types
    assert RunStarted in JOURNAL_DELIVERY.types
    assert msgspec.json.decode(msgspec.json.encode(journal), type=Journal) == journal


def test_a_reader_near_the_end_does_not_open_what_lies_before(tmp_path: Path) -> None:
    """Earlier segments are not read: here they could not even be."""
    writer = open_journal(tmp_path, segment_bytes=1)
    for seq in range(1, 6):
        writer.write([step(seq)])
    for path in segments(tmp_path)[:3]:
        path.unlink()
        path.mkdir()
    reader = JournalReader(tmp_path / "journal", since=3)
    assert [event.seq for event in read_all(reader)] == [4, 5]
    assert reader.skipped == []


def test_it_is_durable_at_the_end_of_the_run_at_a_roll_and_on_demand(tmp_path: Path, disk: BadDisk) -> None:
    """Ordinary batches cost no sync."""
    writer = open_journal(tmp_path, segment_bytes=1_000)
    writer.sync()  # nothing written yet
    writer.write([step(1)])
    after_first = disk.synced
    assert after_first == 1  # the folder, that names the segment
    writer.write([step(2)])
    assert disk.synced == after_first
    writer.sync()
    assert disk.synced == after_first + 1
    writer.write([ended(3)])
    assert disk.synced == after_first + 2
    writer.write(steps(4, 9))
    writer.write(steps(10, 11))  # a new segment: the old one and the folder
    assert disk.synced == after_first + 4
    writer.close()
    assert disk.synced == after_first + 5
    writer.close()
    assert disk.synced == after_first + 5


def test_a_sync_that_failed_at_the_end_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch is delivered again though all of it is written, and then the sync is made up for."""
    writer = open_journal(tmp_path)
    writer.write([step(1)])
    real, calls = os.fsync, []

    def fsync(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(fd)

    monkeypatch.setattr("events.journal.writer.os.fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        writer.write([ended(2)])
    writer.write([ended(2)])
    assert len(calls) == 2
    assert seqs(tmp_path) == [1, 2]


def test_a_file_is_closed_though_its_last_sync_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing tells of the failure and leaks nothing."""
    writer = open_journal(tmp_path)
    writer.write([step(1)])

    def refuse(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("events.journal.writer.os.fsync", refuse)
    with pytest.raises(OSError, match="Input/output"):
        writer.close()
    writer.close()


def test_what_the_journal_keeps_comes_back_as_it_was(tmp_path: Path) -> None:
    """NaNs, and events of a later version that somebody passed on."""
    later = wire.decode_json(
        b'{"type":"Later","run_id":"run","attempt":1,"seq":2,"time":1.5,\n"rank":0,"global_step":1,"epoch":0}'
    )
    metrics = MetricsLogged("run", 1, 3, 1.0, 0, 1, 0, "train", metrics={"a/b": math.inf})
    write(tmp_path, [step(1, loss=math.nan), later, metrics])
    first, unknown, last = read_all(JournalReader(tmp_path / "journal"))
    assert isinstance(first, TrainStepEnded)
    assert first.loss is not None
    assert math.isnan(first.loss)
    assert isinstance(unknown, UnknownEvent)
    assert unknown.unknown_type == "Later"
    assert last == metrics


# ------------------------------------------------------------------------------------------------- the reader


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 25), st.integers(15, 900), st.integers(1, 9), st.integers(0, 45))
def test_a_tail_sees_every_event_once_however_the_bytes_arrive(count: int, piece: int, limit: int, since: int) -> None:
    """The file grows by arbitrary pieces, also within lines, over two segments."""
    events = steps(1, count)
    split = count // 2
    with tempfile.TemporaryDirectory() as name:
        reader = JournalReader(name, since)
        seen: list[Event] = []
        for part in (events[:split], events[split:]):
            if not part:
                continue
            path = Path(name) / f"{part[0].seq:020d}.jsonl"
            data = wire.encode_json_lines(part)
            for at in range(0, len(data), piece):
                with open(path, "ab") as file:
                    file.write(data[at : at + piece])
                seen += reader.read(limit)
        seen += read_all(reader, limit)
        assert [event.seq for event in seen] == list(range(since + 1, count + 1))
        assert reader.cursor == max(since, count)
        assert reader.skipped == []


def test_lines_longer_than_a_read_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the search from the end."""
    monkeypatch.setattr("events.journal.segment._CHUNK", 16)
    write(tmp_path, steps(1, 5))
    assert seqs(tmp_path) == [1, 2, 3, 4, 5]
    assert journal_tail(tmp_path / "journal", chunk=16).seq == 5


# ------------------------------------------------------------------------------------------------ the history


def resumed(seq: int, attempt: int, global_step: int) -> RunResumed:
    return RunResumed("run", attempt, seq, 0.0, 0, global_step, 0, None)


def test_steps_that_were_done_again_are_left_out(tmp_path: Path) -> None:
    """The history reads as if the run had never been interrupted; what happened besides is still there."""
    slow = ObserverSlow("run", 1, 5, 0.0, 0, 4, 0, "train", observer="o", during="write", running_s=1.0)
    first: list[Event] = [step(1), step(2), step(3), step(4), slow]
    second: list[Event] = [resumed(6, 2, 2), step(7, 2, 3), step(8, 2, 4)]
    write(tmp_path, first)
    write(tmp_path, second)
    history = list(read_history(tmp_path / "journal"))
    assert [event.seq for event in history] == [1, 2, 5, 6, 7, 8]
    assert [event.global_step for event in history if isinstance(event, TrainStepEnded)] == [1, 2, 3, 4]
    assert [event.seq for event in read_history(tmp_path / "journal", since=2)] == [5, 6, 7, 8]


def test_attempts_that_are_far_apart_cost_no_memory(tmp_path: Path) -> None:
    """A line of 180 bytes may name any attempt up to the last one; a greater number is damage."""
    write(tmp_path, [step(1), step(2), step(3)])
    write(tmp_path, [resumed(4, LAST_ATTEMPT, 2), step(5, LAST_ATTEMPT, 3), resumed(6, LAST_ATTEMPT + 1, 0)])
    tracemalloc.start()
    try:
        history = list(read_history(tmp_path / "journal"))
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    assert [event.seq for event in history if not isinstance(event, JournalGap)] == [1, 2, 4, 5]
    assert [event.first_seq for event in history if isinstance(event, JournalGap)] == [6]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 8)), min_size=1, max_size=5))
def test_every_step_of_the_history_is_there_once(attempts: list[tuple[int, int]]) -> None:
    """For any chain of attempts that each resume at a finished step: by the newest that did the step."""
    with tempfile.TemporaryDirectory() as name:
        seq, finished = 0, 0
        by: dict[int, int] = {}
        for attempt, (back, forward) in enumerate(attempts, start=1):
            start = back % (finished + 1)
            events: list[Event] = [] if attempt == 1 else [resumed(seq + 1, attempt, start)]
            by = {at: who for at, who in by.items() if at <= start}
            for at in range(start + 1, start + forward + 1):
                events.append(step(seq + len(events) + 1, attempt, at))
                by[at] = attempt
            seq, finished = seq + len(events), start + forward
            if events:
                write(Path(name), events)
        history = [e for e in read_history(Path(name) / "journal") if isinstance(e, TrainStepEnded)]
        assert {event.global_step: event.attempt for event in history} == by
        assert len(history) == len(by)


def test_every_event_type_is_bound_to_a_step_or_not() -> None:
    """Whoever adds an event decides whether redoing the step replaces it."""
    stays = {
        *(
            RunStarted,
            RunResumed,
            RunEnded,
            RankEnded,
            ObserverFailed,
            ObserverRecovered,
            ObserverDropped,
            ObserverSlow,
        ),
        *(LoopHeld, JournalGap, CommandTaken, SystemSampled, RankReported, ObserversReported, WarningLogged),
        # They tell of what is on the disk, which no later attempt undoes.
        *(CheckpointStaged, CheckpointSkipped, CheckpointSaved, CheckpointFailed, CheckpointRejected, WeightsSaved),
        *(CheckpointUploading, CheckpointUploaded, CheckpointDeleted, TraceSaved),
    }
    assert set(EVENT_TYPES) == stays | set(SUPERSEDED_TYPES)
    assert not stays & set(SUPERSEDED_TYPES)


def test_the_history_reports_what_it_skipped(tmp_path: Path) -> None:
    """Garbage is no silent loss here either."""
    write(tmp_path, [step(1)])
    with open(segments(tmp_path)[0], "ab") as file:
        file.write(b'garbage "RunResumed"\n')
    skipped: list[SkippedLine] = []
    assert [event.seq for event in read_history(tmp_path / "journal", skipped=skipped)] == [1, 2]
    assert [(skip.line, skip.first_seq, skip.last_seq) for skip in skipped] == [(2, 2, 2)]


def test_empty_segments_are_read_in_linear_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One listing serves for all of them."""
    journal = tmp_path / "journal"
    journal.mkdir()
    for number in range(1, 500):
        (journal / f"{number:020d}.jsonl").touch()
    listings: list[int] = []
    list_all = journal_reader.segment_numbers
    monkeypatch.setattr(journal_reader, "segment_numbers", lambda folder: listings.append(1) or list_all(folder))
    assert JournalReader(journal).read() == []
    assert len(listings) <= 3
