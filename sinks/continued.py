"""Writes a run's events to a store elsewhere, which may be away for hours: the journal is the queue.

Each writer continues behind the newest event in the store, so that every event is there once and in order, whichever
side was killed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from events.errors import SinkMisconfigured, WireError
from events.journal.lines import encode_lines, gap_before
from events.journal.reader import JournalReader
from events.journal.segment import JOURNAL_DIR
from events.log import logger
from events.messages import Event
from sinks.files.appended import newer, position_of

Message = tuple[Event, bytes]
"""An event, and its line in a journal, without the newline."""

WINDOW = 4_096
"""Maximum events that are published at a time."""
_CLOCK_S = 1.0


class Moved(ConnectionError):
    """The newest event in the store is another one than this writer knows: it continues behind that one."""


class Store(Protocol):
    """A store of events elsewhere, for one run."""

    newest: Event | None
    """The run's newest event there when the connection was made."""
    most_bytes: int
    """Maximum bytes per line."""
    fix: str
    """How a user avoids or raises that limit, for a warning."""

    def publish(self, messages: Sequence[Message], /) -> None:
        """Send events, at most `WINDOW`; all are stored when it returns.

        Raises:
            Moved: See there; ``newest`` is set.
            ConnectionError: The store is away, or does not take them now.
            SinkMisconfigured: It will not take them.
        """
        ...

    def is_taken(self) -> SinkMisconfigured:
        """Return the error for a run whose name is that of another run in the store."""
        ...

    def close(self) -> None:
        """Disconnect."""
        ...


class ContinuedWriter:
    """An open sink that writes to a `Store`. A write returns when all its events are stored.

    Args:
        user: The name of the sink, for warnings.
    """

    def __init__(self, store: Store, run_dir: str | None, user: str) -> None:
        self._store = store
        self._journal_dir = None if run_dir is None else Path(run_dir) / JOURNAL_DIR
        self._user = user
        self._last = (0, 0)
        self._is_first = True
        self._warned: set[str] = set()

    def write(self, events: Sequence[Event]) -> None:
        """Publish the events that are not in the store yet.

        Raises:
            ConnectionError: The store is away, does not answer, or does not take them now.
            SinkMisconfigured: It has another run of this ``run_id``, or refuses the credentials.
        """
        if self._is_first and events:
            self._last = (0, 0) if self._store.newest is None else position_of(self._store.newest)
            self._continue(events, self._store.newest)
            self._is_first = False
        self._publish(newer(events, self._last))

    def _continue(self, events: Sequence[Event], newest: Event | None) -> None:
        """Check that the stored events are of this run; publish earlier ones that are not stored."""
        if newest is not None and not self._is_known(events, newest):
            raise self._store.is_taken()
        if self._journal_dir is not None and events[0].seq > self._last[1] + 1:
            reader = JournalReader(self._journal_dir, self._last[1])
            while missed := [event for event in reader.read() if event.seq < events[0].seq]:
                self._publish(missed)

    def _is_known(self, events: Sequence[Event], newest: Event) -> bool:
        """Whether an event of the store belongs to this run."""
        stored, first = self._last, position_of(events[0])
        same = next((event for event in events if position_of(event) == stored), None)
        if same is None and self._journal_dir is not None:
            same = next(iter(JournalReader(self._journal_dir, newest.seq - 1).read(1)), None)
            if same is None and first <= stored and JournalReader(self._journal_dir).read(1):
                return False  # the journal has less than the store
        if same is not None and position_of(same) == stored:
            return same.time == newest.time
        # An event that is delivered again is not later than the newest one in the store.
        return first > stored or events[0].time <= newest.time + _CLOCK_S

    def _publish(self, events: Sequence[Event]) -> None:
        for start in range(0, len(events), WINDOW):
            window = events[start : start + WINDOW]
            try:
                self._store.publish(self._messages(window))
            except Moved:
                self._is_first = True
                raise
            self._last = position_of(window[-1])

    def _messages(self, events: Sequence[Event]) -> list[Message]:
        """The events with their lines; a gap replaces one that the store or the encoding does not allow."""
        most = self._store.most_bytes
        previous = self._last[1]
        try:
            lines = encode_lines(events, previous).split(b"\n")[:-1]
            if max(map(len, lines)) <= most:
                return list(zip(events, lines, strict=True))
        except WireError:
            pass
        messages: list[Message] = []
        for event in events:
            try:
                line = encode_lines([event], previous)[:-1]
                reason = f"its line has {len(line):,} bytes, and the server takes {most:,}; {self._store.fix}"
            except WireError as error:
                line, reason = b"", str(error)
            if not line or len(line) > most:
                name = type(event).__name__
                if name not in self._warned:
                    self._warned.add(name)
                    logger.warning(f"{self._user} does not publish event {event.seq}, {name}: {reason}")
                event = gap_before(event, event.seq, event.seq, event.seq, 1, f"{name}: {reason}")
                line = encode_lines([event], previous)[:-1]
            messages.append((event, line))
            previous = event.seq
        return messages

    def close(self) -> None:
        """Disconnect. All that was written is stored."""
        self._store.close()
