"""The journal: every event of a run, appended to JSON lines in segments.

Segments are created exclusively, and no link is followed. An event that has more than `MAX_LINE_BYTES` as a line, or
whose line readers refuse because it may take more than `MAX_DECODED_BYTES` of memory, is replaced by a `JournalGap`, as
is one that cannot be encoded.

`events.journal.reader` reads it. The promises of the writer, because of which a reader needs no lock and no index:

- A line that ends in a newline is one whole event and never changes. A segment is never written to once a
  newer one exists, so no half line is ever followed by a whole one in the same file.
- Events are in the order of their ``seq``, each once, however often they are delivered. One exception: `RunResumed` is
  written three times, and again at the beginning of each further segment of its attempt, with the same ``seq``:
  without it, the superseded steps of earlier attempts would count again.
- Each line has a checksum, and names the ``seq`` of the line before if the two are not consecutive
  (`events.journal.lines`). So a reader can tell a changed or lost line from an event that was never kept.
- When `JournalWriter.write` returns, the operating system has the events: they survive the process, whichever signal
  kills it. They are on stable storage (survive the machine) at each `RunEnded`, each new segment, `sync` and `close`.

**When the disk refuses** (full, failing), `write` raises after it has cut the file back to its last whole line. The
supervisor publishes `ObserverFailed`, pauses, and delivers the batch again, while further events wait in the bounded
queue of the subscription: a short outage loses nothing. In a long one the queue drops events, droppable ones first, and
counts them (`ObserverDropped`). When the disk accepts writes again, a `JournalGap` records the missing ``seq`` in their
place. Its ``lost`` is an upper bound, because the writer cannot distinguish a lost event from one that the journal does
not keep (``journalled = False``). Training never waits for any of this.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from msgspec import Meta

from events.checkpoint import disk
from events.errors import RunFolderError, RunFolderMismatch, WireError
from events.journal.lines import ALWAYS_FITS_BYTES, check_size, encode_lines, gap_before
from events.journal.segment import JOURNAL_DIR, MAX_LINE_BYTES, open_segment, segment_name
from events.journal.tail import journal_tail
from events.log import logger
from events.messages import EVENT_TYPES, Event, RunEnded, RunResumed
from events.safe_files import make_folder_below
from events.sink import Delivery, RunInfo
from events.strict import Strict

JOURNAL_DELIVERY = Delivery(
    types=frozenset(event_type for event_type in EVENT_TYPES if event_type.journalled),
    overflow="drop_oldest",
    capacity=65_536,
    capacity_bytes=64 * 2**20,
    latency_s=0.2,
    on_error="retry",
    # As long as the run lasts: a full disk has room again once files are deleted.
    retries=2**31 - 1,
    backoff_s=0.1,
    max_backoff_s=5.0,
)
"""How events reach the journal. It waits for the disk as long as the run lasts, and a moment longer."""

SLOW_WRITE_S = 1.0
"""A write that took this long may have let the queue overflow, so holes behind it are recorded as gaps."""


class Journal(Strict, frozen=True, kw_only=True):
    """The sink that keeps a run's history in its folder.

    The folder must be held by the caller (`events.run.folder.RunFolder`): two writers would spoil each other's
    lines.
    """

    segment_bytes: Annotated[int, Meta(ge=1)] = 64 * 2**20
    """A segment that has reached this size is followed by a new one; one batch may exceed it."""

    delivery: ClassVar[Delivery] = JOURNAL_DELIVERY

    def __post_init__(self) -> None:
        # A Struct's constructor takes anything; only decoding would validate.
        if type(self.segment_bytes) is not int or self.segment_bytes < 1:
            raise ValueError(f"Journal(segment_bytes={self.segment_bytes!r:.80}): give a number of bytes, at least 1")

    def open(self, run: RunInfo) -> JournalWriter:
        """Open the journal of ``run.run_dir`` for appending, behind whatever it holds.

        Raises:
            RunFolderError: The run has no folder, or the journal's cannot be made or is a link.
            RunFolderMismatch: The journal there is another run's.
        """
        if run.run_dir is None:
            raise RunFolderError(
                f"run {run.run_id!r} has no folder, so it cannot have a journal; give it one, or run without a journal"
            )
        folder = Path(run.run_dir) / JOURNAL_DIR
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            make_folder_below(folder.parent, JOURNAL_DIR)
            tail = journal_tail(folder)
        except OSError as error:
            raise RunFolderError(f"the journal {folder} cannot be opened: {error}; is the folder yours?") from error
        if tail.run_id not in ("", run.run_id):
            raise RunFolderMismatch(
                f"the journal {folder} belongs to run {tail.run_id!r}, not to {run.run_id!r}; "
                "choose another folder, or that run_id to continue the run"
            )
        return JournalWriter(folder, self.segment_bytes, tail.seq, tail.segment)


class JournalWriter:
    """Appends to a journal. Made by `Journal.open`.

    `write` and `close` belong to the sink's thread and wait for the disk. A new writer always begins a new
    segment, so that it never appends to what a killed process left.
    """

    def __init__(self, folder: Path, segment_bytes: int, written_seq: int = 0, last_segment: int = 0) -> None:
        self._folder = folder
        self._segment_bytes = segment_bytes
        self._written_seq = written_seq
        self._line_seq = written_seq  # of the last line
        self._resumed: RunResumed | None = None  # this attempt's
        self._last_segment = last_segment
        self._size = 0  # of the whole lines in the segment
        self._directory_dirty = False
        self._sync_due = False
        self._suspect_until = 0.0  # Unix seconds: up to then, events may have been dropped on their way here
        self._failing = False  # the last write failed
        self._reason = ""  # why events may be missing
        self._fd: int | None = None
        self._fd_lock = threading.Lock()  # held while the descriptor is replaced, or duplicated by `sync`
        self._written = threading.Condition()  # notified when `written_seq` has risen
        self.repeated = 0
        """Events that were delivered though their ``seq``, or a higher one, stood in the journal already."""

    @property
    def written_seq(self) -> int:
        """Up to here, what the journal keeps has reached the operating system. Read it from any thread."""
        return self._written_seq

    @property
    def _path(self) -> Path:
        return self._folder / segment_name(self._last_segment) if self._last_segment else self._folder

    def write(self, events: Sequence[Event]) -> None:
        """Append a batch; returns when the system has it, and stable storage too if it holds a `RunEnded`.

        Raises:
            OSError: The disk refused. Deliver the batch again: what was written of it is not written twice.
        """
        fresh = [event for event in events if event.seq > self._written_seq]
        self.repeated += len(events) - len(fresh)
        last_seq = fresh[-1].seq if fresh else self._written_seq
        self._sync_due = self._sync_due or any(type(event) is RunEnded for event in fresh)
        try:
            kept: list[Event] = []
            for event in self._with_gap(fresh):
                if event.journalled:
                    kept.append(event)
                    if type(event) is RunResumed:
                        self._resumed = event
                        kept += [event, event]  # one changed newline joins, and so loses, two lines
            if kept:
                self._append(*self._encode(kept))
            with self._written:
                self._written_seq = last_seq
                self._written.notify_all()
            if self._sync_due:
                self.sync()
                self._sync_due = False
        except OSError as error:
            if error.filename is None:
                error.filename = str(self._path)
            self._failing, self._reason = True, f"{type(error).__name__}: {error}"
            raise
        if self._failing:
            self._failing, self._suspect_until = False, time.time()

    def wait_for(self, seq: int, timeout_s: float) -> bool:
        """Wait until `written_seq` has reached ``seq``; False if it has not in that time. Any other thread."""
        with self._written:
            return self._written.wait_for(lambda: self._written_seq >= seq, timeout_s)

    def sync(self) -> None:
        """Bring everything up to `written_seq` to stable storage.

        From any thread; waits for the disk, but not for a `write` that is under way.

        Raises:
            OSError: The disk refused, so what the operating system had kept back may be lost.
        """
        with self._fd_lock:
            fd = None if self._fd is None else os.dup(self._fd)
        if fd is None:
            return  # nothing written, or all in a segment that was synced before it was left
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def close(self) -> None:
        """Bring everything to stable storage and close the file. May be called twice.

        Raises:
            OSError: The disk refused the last sync; the file is closed all the same.
        """
        try:
            self.sync()
        finally:
            self._leave_segment()

    # ------------------------------------------------------------------------------------------------ gaps

    def _with_gap(self, fresh: list[Event]) -> list[Event]:
        """Put a `JournalGap` where events are missing that were dropped while the disk did not keep up.

        One for the whole batch, in its first hole, with that hole's last ``seq`` as its own: no other has it.
        """
        if not (self._failing or self._suspect_until):
            return fresh
        first = last = lost = at = own_seq = 0
        previous = self._written_seq
        for index, event in enumerate(fresh):
            if event.seq > previous + 1:
                if not lost:
                    first, own_seq, at = previous + 1, event.seq - 1, index
                lost += event.seq - previous - 1
                last = event.seq - 1
            previous = event.seq
            if not self._failing and event.time > self._suspect_until:
                self._suspect_until = 0.0  # events that happened after the outage found room in the queue
                break
        if not lost:
            return fresh
        gap = gap_before(fresh[at], own_seq, first, last, lost, self._reason)
        return [*fresh[:at], gap, *fresh[at:]]

    def _encode(self, kept: list[Event]) -> tuple[bytes, list[Event]]:
        """Encode a batch to lines; returns them and their events. A gap replaces an event that no line can hold."""
        try:
            block = encode_lines(kept, self._line_seq)
            if len(block) <= min(MAX_LINE_BYTES, ALWAYS_FITS_BYTES):
                return block, kept
        except WireError:
            pass
        for index, event in enumerate(kept):
            try:
                line = encode_lines([event], max(0, event.seq - 2))[:-1]  # with all that a line can have
                if len(line) > MAX_LINE_BYTES:
                    raise WireError(f"its line has {len(line):,} bytes, more than {MAX_LINE_BYTES:,}")
                check_size(line)
            except WireError as error:
                # An exception would have it delivered again, and refused, for ever.
                reason = f"{type(event).__name__}: {error}"
                logger.warning("the journal does not keep event %d, %s", event.seq, reason)
                kept[index] = gap_before(event, event.seq, event.seq, event.seq, 1, reason)
        return encode_lines(kept, self._line_seq), kept

    # ---------------------------------------------------------------------------------------------- the file

    def _append(self, block: bytes, lines: list[Event]) -> None:
        """Write whole lines. If the disk refuses in the middle, the whole ones count as written."""
        if self._fd is not None and not os.fstat(self._fd).st_nlink:
            self._leave_segment()
            raise FileNotFoundError(errno.ENOENT, "the segment was deleted, with all events in it", str(self._path))
        if self._fd is None or self._size >= self._segment_bytes:
            self._next_segment(lines[0].seq)
            if self._resumed is not None and self._resumed.seq < lines[0].seq:
                block = encode_lines([self._resumed], self._resumed.seq - 1) + block
                lines = [self._resumed, *lines]
        if self._directory_dirty:
            disk.sync_folder(self._folder)
            self._directory_dirty = False
        assert self._fd is not None
        started = time.monotonic()
        done = 0
        view = memoryview(block)
        try:
            while done < len(block):
                written = os.write(self._fd, view[done:])
                if written == 0:
                    raise OSError(errno.EIO, "the file takes no bytes")
                done += written
        except OSError:
            whole = block.rfind(b"\n", 0, done) + 1
            if whole:
                self._size += whole
                self._line_seq = max(self._line_seq, lines[block.count(b"\n", 0, whole) - 1].seq)
                self._written_seq = max(self._written_seq, self._line_seq)
            self._cut_back()
            raise
        self._size += len(block)
        self._line_seq = lines[-1].seq
        if time.monotonic() - started > SLOW_WRITE_S:
            self._suspect_until = time.time()
            self._reason = f"a write took {time.monotonic() - started:.1f} s"

    def _cut_back(self) -> None:
        """Remove a half line, so that nothing is appended to it; if that fails too, start a new segment."""
        assert self._fd is not None
        try:
            os.ftruncate(self._fd, self._size)
        except OSError:
            with contextlib.suppress(OSError):
                self.sync()
            self._leave_segment()

    def _next_segment(self, first_seq: int) -> None:
        # Higher than any before, even where the one before was left without a whole line: readers go by the
        # names.
        number = max(first_seq, self._last_segment + 1)
        if self._fd is not None:
            self.sync()
        try:
            fd = open_segment(self._folder, number, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND)
        except FileExistsError:
            self._last_segment = number  # not our file: the batch is delivered again and gets the next number
            raise
        self._leave_segment()
        self._fd, self._size, self._last_segment = fd, 0, number
        self._directory_dirty = True

    def _leave_segment(self) -> None:
        with self._fd_lock:
            fd, self._fd = self._fd, None
        if fd is not None:
            with contextlib.suppress(OSError):  # everything was written with a result of its own
                os.close(fd)
