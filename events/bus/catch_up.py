"""Lossless delivery: events that do not fit into a subscription's memory are read from the journal."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import anyio

from events.bus.backlog import Item, item_of
from events.journal.follow import Follower
from events.messages import Event, JournalGap

if TYPE_CHECKING:
    from events.bus.subscription import Statistics

_POLL_S = 0.02
_READ = 64
"""Maximum events per read of the journal: they are in memory beyond the limits of the subscription."""
_FAR = 100_000
"""Events from which on it is cheaper to find the next ones by their segment than to read on up to them."""
_PATIENCE_S = 1.0
"""Seconds until an event that a settled journal does not have is lost: the journal may repeat a write that failed."""


class WrittenJournal(NamedTuple):
    """The journal that a run in this process writes."""

    folder: Path
    settled: Callable[[], bool]
    """Whether it has written all that was delivered so far, or cannot write at present."""


class CatchUp:
    """The events that a full subscription left to the journal, in order. Belongs to the event loop's thread.

    Args:
        after: ``seq`` of the last event that was delivered before the subscription.
        wants: Whether the subscription receives an event.
        statistics: The subscription's: events here count as queued, those that the journal does not have as dropped.
    """

    def __init__(
        self, journal: WrittenJournal, after: int, wants: Callable[[Event], bool], statistics: Statistics
    ) -> None:
        self.count = 0
        """Events that wait in the journal, or on their way there."""
        self._first = self._last = 0  # their `seq`
        self._journal = journal
        self._follower = Follower(journal.folder, after)
        self._wants = wants
        self._statistics = statistics

    def leave(self, items: list[Item]) -> list[Item]:
        """Leave events to the journal; returns those that it does not keep."""
        kept = [item for item in items if item[0].journalled]
        if kept:
            if not self.count:
                self._first = kept[0][0].seq
                if self._first - self._follower.cursor > _FAR:
                    self._follower = Follower(self._journal.folder, self._first - 1)
            self._last = kept[-1][0].seq
            self.count += len(kept)
        return [item for item in items if not item[0].journalled]

    async def read(self, limit: int) -> list[Item]:
        """Wait for the next events; none once the journal does not have them. A cancelled call loses nothing."""
        give_up_at: float | None = None
        while self.count:
            settled = self._journal.settled()  # asked before reading: an event that is written later must not be missed
            try:
                events = await self._follower.read(min(limit, _READ))
            except OSError:
                events = []  # as if it did not have them: it is asked again
            found = [event for event in events if self._first <= event.seq <= self._last and self._wants(event)]
            if not self.count:
                break  # discarded meanwhile
            self._count(found)
            if found:
                return [item_of((event, None)) for event in found]
            if events or not settled:
                give_up_at = None
            elif give_up_at is None:
                give_up_at = time.monotonic() + _PATIENCE_S
            elif time.monotonic() > give_up_at:
                self._lose()
            if not events:
                await anyio.sleep(_POLL_S)
        return []

    def _count(self, found: list[Event]) -> None:
        gaps = sum(type(event) is JournalGap for event in found)  # they come from the journal itself
        self._statistics.published += gaps
        self._statistics.queued += gaps
        self.count -= len(found) - gaps
        if self._follower.cursor >= self._last:
            self._lose()

    def _lose(self) -> None:
        self._statistics.dropped += self.count
        self._statistics.queued -= self.count
        self.count = 0

    def discard(self) -> None:
        """Read no more of them."""
        self.count = 0
