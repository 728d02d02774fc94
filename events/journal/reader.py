"""Reading a journal: from a cursor on, while it grows, whatever happened to its files.

A journal is a folder of segments: files of JSON lines that are named by the first ``seq`` in them. A line that ends in
a newline never changes, and segments are only added. The bytes after the last newline of the newest segment are still
being written, or a killed process left them. So a reader that waits for the newline until a newer segment exists sees
every event once and in order.

Everything here is synchronous and belongs to one thread. Nothing raises for the content of a journal: lines that are
not events, lines that are too long, and segments that are not regular files are skipped and reported. A segment that
exists and cannot be read raises `OSError`, and so does a journal whose folder is a link.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections import deque
from pathlib import Path

import msgspec

from events.errors import WireError
from events.journal.lines import decode_line, decoded_bytes, event_of, events_in, gap_before, mended
from events.journal.segment import MAX_LINE_BYTES, SegmentLines, TooLong, segment_name, segment_numbers
from events.messages import Event
from events.safe_files import UnsafeFile

_MAX_SKIPPED = 1_000
_REASON = 200
"""Maximum characters per reason of a skipped line."""
_SEQ = re.compile(rb'"seq":(\d{1,16}),')
READ_BYTES = 16 * 2**20
"""Maximum bytes of memory, as `decoded_bytes` estimates them, that the events of one read take before its last one."""


class SkippedLine(msgspec.Struct, frozen=True):
    """Bytes of a journal that are not an event of its run."""

    path: str
    line: int
    """From 1, within the segment."""
    offset: int
    length: int
    """Bytes, without the newline; 0 for a segment that is gone or is not a regular file."""
    reason: str
    torn: bool = False
    """Whether it is the beginning of a line whose writer died; a later attempt continues in a new segment."""
    first_seq: int | None = None
    """First ``seq`` of the events that are lost there, if any; `JournalReader.read` returns a `JournalGap` for them."""
    last_seq: int | None = None


class JournalReader:
    """Reads a journal's events in order, each once.

    It never waits: `read` returns the events that are there. Call it again to follow a journal that grows, or let a
    `Follower` do so. The journal may not exist yet, be written by another process, be cut or lose segments meanwhile.
    """

    def __init__(self, journal_dir: str | os.PathLike[str], since: int = 0, chunk_bytes: int | None = None) -> None:
        """Start after the event with ``seq == since``; opens nothing yet.

        Args:
            journal_dir: The folder of segments.
            since: Events up to this ``seq`` are skipped; 0 for all.
            chunk_bytes: Bytes per read, which are kept until they are decoded; a mebibyte by default.
        """
        self._dir = Path(journal_dir)
        self._cursor = since
        self._skipped: deque[SkippedLine] = deque(maxlen=_MAX_SKIPPED)
        self.skipped_count = 0
        """Number of lines that were skipped."""
        self._chunk_bytes = chunk_bytes
        self._segment: SegmentLines | None = None  # the one being read
        self._offset = 0  # of the next line in it
        self._line = 0  # lines before that
        self._lines: list[bytes | TooLong] = []  # whole lines from there on that are not decoded yet, last first
        self._rest = False  # whether the rest of it ends without a newline
        self._damaged = 0  # events that the lines skipped since the last event may have held, torn lines apart
        self._why = ""  # the last of them was skipped
        self._behind_gap: Event | None = None  # to return next
        self._last: Event | None = None  # that was returned
        self.last_bytes = 0
        """Bytes of memory that the events of the last `read` take, as `decoded_bytes` estimates them."""

    @property
    def cursor(self) -> int:
        """``seq`` of the last event returned: pass it as ``since`` to another reader to continue there."""
        return self._cursor

    @property
    def skipped(self) -> list[SkippedLine]:
        """The newest thousand of the lines that were skipped, oldest first; `skipped_count` counts all."""
        return list(self._skipped)

    def read(self, limit: int = 1_024, until: float = math.inf) -> list[Event]:
        """Return the next events, at most ``limit``; none when no more are written yet.

        Fewer if they are large: a read ends with the event that exceeds `READ_BYTES` of memory.

        Args:
            until: If no event was found by this time (`time.monotonic`), return none; the next call continues.

        Raises:
            OSError: A segment exists but cannot be read, or the journal is a link. Nothing is lost; it may be called
                again.
        """
        events: list[Event] = []
        spent = self.last_bytes = 0
        while (
            len(events) < limit and spent < READ_BYTES and (self._behind_gap is not None or self._lines or self._fill())
        ):
            event, self._behind_gap = self._behind_gap, None
            if event is None:
                line = self._lines.pop()
                event = self._decode(line)
                if isinstance(line, TooLong):
                    self._offset += line.length + 1
                else:
                    self._offset += len(line) + 1
                    spent += decoded_bytes(line) if event is not None else 0
                self._line += 1
            if event is not None:
                self._cursor = event.seq
                self._last = event
                events.append(event)
            elif until < math.inf and time.monotonic() > until:
                break
        self.last_bytes = spent
        return events

    def finish(self) -> list[Event]:
        """Return the end of a journal that is not written any more, once `read` returns none. Raises `OSError`.

        That is an event without its newline, or a gap for damaged lines after the last event. `skipped` reports the
        rest of an unfinished line.
        """
        found = self.read()
        if not found and self._segment is not None and not self._segment.finished and self._segment.rest:
            self._begin_rest(self._segment)
            found = self.read()
        if not found and self._damaged and self._last is not None:
            last = self._cursor + self._damaged
            found = [self._gap(self._last, last)]
            self._cursor = last
        return found

    def _decode(self, line: bytes | TooLong) -> Event | None:
        """Decode the next line: to an event that was not returned yet, or the gap before it; None for others."""
        assert self._segment is not None
        if isinstance(line, TooLong):
            self._skip(line.length, f"it is longer than {MAX_LINE_BYTES:,} bytes")
            return None
        if not line:
            return None
        try:
            event, previous = decode_line(line)
        except WireError as error:
            seq = _SEQ.search(line) if self._last is None else None
            if seq is None or int(seq[1]) > self._cursor:  # else the damage precedes the events to return
                self._skip(len(line), str(error), torn=self._rest, events=events_in(line))
            return None
        if previous is None and self._segment.checked:
            self._skip(len(line), "it has no checksum, and other lines of its segment have", torn=self._rest)
            return None
        if event.seq < 1 or not event.run_id:
            self._skip(len(line), f"an event with run_id {event.run_id!r}, seq {event.seq} is not of any run")
            return None
        if event.seq <= self._cursor:
            self._damaged = 0
            return None  # a repeat
        if previous is None:
            if self._misplaced(event):
                self._skip(len(line), f"its seq {event.seq} is not below that of the next line")
                return None
            # Without checksums only its remains show that a line is lost.
            previous = event.seq - 1 if self._damaged else self._cursor
        if self._cursor < previous < event.seq:
            self._behind_gap = event
            return self._gap(event, previous)
        self._damaged = 0
        return event

    def _gap(self, beside: Event, last: int) -> Event:
        """Make the gap for the events up to ``last``, which are lost."""
        assert self._segment is not None
        first = self._cursor + 1
        if not self._damaged:
            self._skip(0, "events are missing before this line: lines or a segment were removed")
        place = f"line {self._skipped[-1].line} of {segment_name(self._segment.number)}" if self._skipped else "a line"
        if self._skipped:
            self._skipped[-1] = msgspec.structs.replace(self._skipped[-1], first_seq=first, last_seq=last)
        self._damaged = 0
        which = f"seq {first:,}" if first == last else f"seq {first:,} to {last:,}"
        return gap_before(beside, last, first, last, last - first + 1, f"{which}, at {place}: {self._why}")

    def _misplaced(self, event: Event) -> bool:
        """Whether a ``seq`` is wrong: one damaged digit would hide all the events that follow."""
        if event.seq == self._cursor + 1 or not self._lines:
            return False
        following = next((other for line in self._lines[-1:-8:-1] if (other := event_of(line))), None)
        return following is not None and self._cursor < following.seq <= event.seq

    def _fill(self) -> bool:
        """Read whole lines into ``_lines``; False if there are none at present."""
        numbers: list[int] = []
        while True:
            # List first: the writer has left a segment before it creates the next, so one that is read to its
            # end after a newer one was seen is complete. One listing serves for all the segments that it names.
            if self._segment is None or not numbers or numbers[-1] <= self._segment.number:
                numbers = segment_numbers(self._dir)
            if self._segment is None or self._segment.finished:
                following = self._following(numbers)
                if following is None:
                    return False
                self._segment, self._offset, self._line = SegmentLines(self._dir, following, self._chunk_bytes), 0, 0
            newer = bool(numbers) and numbers[-1] > self._segment.number
            self._lines = self._read_on(self._segment)
            self._rest = not self._lines
            if not self._lines:
                if not newer:
                    return False
                self._segment.finished = True
                if not self._segment.rest:
                    continue
                self._begin_rest(self._segment)
                return True
            self._offset = self._segment.start
            self._lines.reverse()
            return True

    def _begin_rest(self, segment: SegmentLines) -> None:
        """Treat the rest without a newline as a line: it is torn, or lacks only its newline."""
        self._lines = [mended(segment.rest)]
        self._offset, self._rest, segment.finished = segment.start, True, True

    def _following(self, numbers: list[int]) -> int | None:
        """Find the segment to read next."""
        if self._segment is not None:
            return next((number for number in numbers if number > self._segment.number), None)
        # Every event above the cursor is in the last segment named at or below its successor, or in a later
        # one.
        start = [number for number in numbers if number <= self._cursor + 1]
        return start[-1] if start else numbers[0] if numbers else None

    def _read_on(self, segment: SegmentLines) -> list[bytes | TooLong]:
        """Read whole lines, if there are any; reports a segment that is gone, or is not a file, once."""
        try:
            return segment.read()
        except (FileNotFoundError, UnsafeFile) as error:
            segment.finished = True
            self._skip(0, "the segment is gone" if isinstance(error, FileNotFoundError) else str(error.strerror))
            return []

    def _skip(self, length: int, reason: str, *, torn: bool = False, events: int = 1) -> None:
        assert self._segment is not None
        self.skipped_count += 1
        if not torn:
            self._damaged += events
            self._why = reason[:_REASON]
        path = str(self._dir / segment_name(self._segment.number))
        self._skipped.append(SkippedLine(path, self._line + 1, self._offset, length, reason[:_REASON], torn))
