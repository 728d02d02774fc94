"""Puts the events of a run in their order again. No I/O; the time is given.

The server may refuse one event and take later ones, when its disk is nearly full or a cluster elects a leader. The sink
repeats what was refused, which then stands behind the later ones. Every line names the event before it, so that a
reader notices, waits, and can tell a lost event from one that was never published.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from events.errors import WireError
from events.journal.lines import decode_line, gap_before
from events.log import logger
from events.messages import Event, UnknownEvent
from events.text import plain_text
from sinks.continued import WINDOW  # no event is misplaced by more

_PATIENCE_S = 30.0
"""Seconds for which a reader waits for an event that is missing."""


class InOrder:
    """The events of one run after a cursor, each once.

    The first line that arrives begins the history: what it misses was removed from the stream.

    Args:
        run_id: Events of another run are skipped, with a warning.
        cursor: ``seq`` of the last event that is known.
    """

    def __init__(self, run_id: str, cursor: int = 0) -> None:
        self.cursor = cursor
        """``seq`` of the last event that was returned."""
        self._run_id = run_id
        self._waiting: dict[int, tuple[int, Event]] = {}  # by seq: the seq before it, and the event
        self._seqs: list[int] = []  # a heap of theirs
        self._since: float | None = None  # when the first of them was found to miss one
        self._begun = False
        self._warned = False

    def add(self, line: bytes, now: float) -> list[Event]:
        """Take a line; return the events that are next."""
        try:
            event, previous = decode_line(line)
            is_nameless = not event.run_id and isinstance(event, UnknownEvent)  # of a later version
            if (event.run_id != self._run_id and not is_nameless) or event.seq < 1:
                raise WireError(f"it is event {event.seq} of run {plain_text(event.run_id, 80)!r}")
        except WireError as error:
            if not self._warned:
                self._warned = True
                run = plain_text(self._run_id, 80)
                logger.warning(f"a message of run {run!r} in the stream is skipped: {plain_text(str(error))}")
            return []
        if event.seq <= self.cursor:
            self._begun = True
            return []
        if event.seq not in self._waiting:
            heapq.heappush(self._seqs, event.seq)
            self._waiting[event.seq] = (event.seq - 1 if previous is None else previous, event)
        return list(self._ready(now, is_full=len(self._waiting) > WINDOW))

    def wait(self, now: float) -> list[Event]:
        """Return what has waited long enough for an event that is missing, with a gap in its place."""
        return list(self._ready(now, is_full=False)) if self._waiting else []

    def _ready(self, now: float, *, is_full: bool) -> Iterator[Event]:
        while self._seqs:
            seq = self._seqs[0]
            previous, event = self._waiting[seq]
            if previous > self.cursor:
                self._since = now if self._since is None else self._since
                if self._begun and not is_full and now - self._since < _PATIENCE_S:
                    return
                first, self.cursor = self.cursor + 1, previous
                reason = f"seq {first:,} to {previous:,} are not in the stream"
                yield gap_before(event, previous, first, previous, previous - first + 1, reason)
            self._since, self._begun, is_full = None, True, False
            del self._waiting[heapq.heappop(self._seqs)]
            self.cursor = seq
            yield event
