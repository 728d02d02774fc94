"""Where a journal ends, found from its end."""

from __future__ import annotations

import os
from collections.abc import Callable

import msgspec

from events.journal.lines import decoded_bytes, event_of, events_in, is_checked, mended
from events.journal.reader import READ_BYTES
from events.journal.segment import MAX_LINE_BYTES, open_segment, read_tail, segment_numbers
from events.messages import Event
from events.safe_files import UnsafeFile

_LINES = 10_000
_BETWEEN_LINES = 8
_LEAST_LINE_BYTES = 64
"""Minimum bytes per line of an event: its header alone has more."""


class JournalTail(msgspec.Struct, frozen=True):
    """The end of a journal. All zeros and empty for one without events."""

    run_id: str = ""
    attempt: int = 0
    seq: int = 0
    """No event in the journal has a greater one."""
    segment: int = 0
    """The number that names the newest segment."""
    events: list[Event] = []
    """The newest events, oldest first: some hundreds, or fewer if they are large."""

    @property
    def last_seq(self) -> int:
        """``seq`` of the last event; of the one before the newest segment, where no event can be read."""
        return self.events[-1].seq if self.events else max(0, self.segment - 1)


def journal_tail(
    journal_dir: str | os.PathLike[str], between: Callable[[], None] = lambda: None, *, chunk: int = 2**18
) -> JournalTail:
    """Find the last event of a journal. Raises `OSError` if it cannot be read.

    Args:
        between: Called now and then, because a damaged end takes long.
        chunk: Bytes that are read first; more if no event is in them.
    """
    numbers = segment_numbers(journal_dir)
    least = numbers[-1] if numbers else 0
    for number in reversed(numbers):
        events, damaged, is_all = _last_events(journal_dir, number, chunk, between)
        if events:
            # The highest of several, because a damaged digit may have made the last one small. A newest segment without
            # one whole event began with an event that others may have seen: stay above.
            attempt, seq = max(event.attempt for event in events), max(event.seq for event in events)
            return JournalTail(events[-1].run_id, attempt, max(seq + damaged, least), numbers[-1], events)
        if not is_all:  # stay above all the lines that it may hold
            least = max(least, number + _size_of(journal_dir, number) // _LEAST_LINE_BYTES)
    return JournalTail(seq=least, segment=numbers[-1]) if numbers else JournalTail()


def _size_of(journal_dir: str | os.PathLike[str], number: int) -> int:
    """Bytes of a segment; 0 if it is gone or is not a regular file."""
    try:
        fd = open_segment(journal_dir, number)
    except (FileNotFoundError, UnsafeFile):
        return 0
    try:
        return min(os.fstat(fd).st_size, _LEAST_LINE_BYTES * 2**40)
    finally:
        os.close(fd)


def _last_events(
    journal_dir: str | os.PathLike[str], number: int, length: int, between: Callable[[], None]
) -> tuple[list[Event], int, bool]:
    """Find whole events at the end of a segment, of large ones up to `READ_BYTES`.

    Returns:
        The events, the number of damaged lines after them, and whether the whole segment was searched. An event that
        lacks only its newline counts, as it does for readers of an older segment.
    """
    is_all = False
    while not is_all and length <= 2 * MAX_LINE_BYTES:
        try:
            data, is_all = read_tail(journal_dir, number, length)
        except (FileNotFoundError, UnsafeFile):
            return [], 0, True
        *lines, rest = data.rsplit(b"\n", _LINES)
        checked = any(map(is_checked, reversed(lines)))
        newest: list[Event] = []
        damaged = spent = 0
        if (event := event_of(mended(rest), checked)) is not None:
            newest, spent = [event], decoded_bytes(rest)
        for index, line in enumerate(reversed(lines)):
            if spent >= READ_BYTES:
                break
            if index % _BETWEEN_LINES == 0:
                between()
            if (event := event_of(line, checked)) is not None:
                newest.append(event)
                spent += decoded_bytes(line)
            elif line and checked and not newest:
                damaged += events_in(line)
        if newest:
            return newest[::-1], damaged, is_all
        length *= 4
    return [], 0, is_all
