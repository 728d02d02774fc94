"""A run's events for one observer, read from its journal: what a `Subscription` is in the process of the run.

A reader of the journal cannot delay its writer, and no event in it is lost when the reader dies: the next reader
resumes after the last event that was delivered. There is no queue to fill, so overflow policies do not apply.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

import anyio

from events.bus.backlog import Published
from events.bus.subscription import Statistics
from events.journal.follow import Follower
from events.journal.reader import SkippedLine
from events.messages import Event
from events.sink import Delivery

_LEAST_POLL_S = 0.02
_RETRY_S = 0.5
"""Seconds until a disk that refused is asked again."""
_COUNT_S = 0.5
"""Maximum seconds for counting the events that are left."""


class JournalFeed:
    """An `events.bus.observer.Source`. Belongs to the event loop's thread.

    Args:
        since: Events with a greater ``seq`` are delivered.
        on_delivered: Receives the ``seq`` up to which every event was delivered or was not meant for this observer, and
            the number of events delivered.
        wanted: Whether an event counts at all; None: each does.
        delivered: Number of events that an earlier feed delivered, where the counts start.
    """

    def __init__(
        self,
        name: str,
        delivery: Delivery,
        journal_dir: str | os.PathLike[str],
        since: int,
        on_delivered: Callable[[int, int], None],
        wanted: Callable[[Event], bool] | None = None,
        delivered: int = 0,
    ) -> None:
        self.name = name
        self.delivery = delivery
        self.statistics = Statistics(published=delivered, delivered=delivered)
        poll_s = max(delivery.latency_s, _LEAST_POLL_S)
        self._follower = Follower(journal_dir, since, over=self._is_over, poll_s=poll_s)
        self._on_delivered = on_delivered
        self._wanted = wanted
        self._in_hand: list[Event] = []
        self._finishing = False
        self._until: int | None = None
        self._discarded = False

    async def receive(self) -> list[Published]:
        """Wait for the next batch, at least one event; counts the batch before it as delivered.

        A failing disk is asked again: what it cannot give now is given later.

        Raises:
            anyio.EndOfStream: `finish` was called, and everything up to there was received.
        """
        self.done()
        while not self._discarded:
            try:
                read = await self._follower.receive(self.delivery.batch)
            except OSError:
                await anyio.sleep(_RETRY_S)
                continue
            self._in_hand = [event for event in read if self._is_meant(event)]
            if self._in_hand:
                self.statistics.published += len(self._in_hand)
                self.statistics.queued += len(self._in_hand)
                return [(event, None) for event in self._in_hand]
            self._advance(self._follower.cursor)
        raise anyio.EndOfStream

    def done(self, count: int | None = None) -> None:
        """The batch in hand is delivered; or its first ``count`` events are, and the rest is left."""
        batch, self._in_hand = self._in_hand, []
        delivered = len(batch) if count is None else min(count, len(batch))
        self.statistics.delivered += delivered
        self.statistics.queued -= delivered
        if delivered == len(batch):
            self._advance(self._follower.cursor)
        elif delivered:
            self._advance(batch[delivered - 1].seq)

    @property
    def oldest(self) -> Event | None:
        """The event that has waited longest of those read; None if none waits."""
        return self._in_hand[0] if self._in_hand else None

    @property
    def skipped(self) -> list[SkippedLine]:
        """Lines of the journal that are not events: the newest thousand of those before its cursor."""
        return self._follower.skipped

    def finish(self) -> None:
        """The run writes no more: the receiver gets what there is, up to `stop_at`, then the end of the stream."""
        self._finishing = True
        self._follower.wake()

    def stop_at(self, seq: int | None) -> None:
        """Deliver nothing behind this ``seq``, which the journal reaches; None: up to its end."""
        self._until = seq

    def discard(self) -> None:
        """Deliver nothing more. What is left stays in the journal."""
        self._discarded = True
        self._follower.wake()

    async def count_left(self) -> None:
        """Count the events that the journal still has for this observer, as far as half a second suffices."""
        with contextlib.suppress(OSError), anyio.move_on_after(_COUNT_S):
            while read := await self._follower.read(self.delivery.batch):
                left = sum(self._is_meant(event) for event in read)
                self.statistics.published += left
                self.statistics.queued += left

    def _is_over(self) -> bool:
        reached = self._until is None or self._follower.cursor >= self._until
        return self._discarded or (self._finishing and reached)

    def _is_meant(self, event: Event) -> bool:
        if self._until is not None and event.seq > self._until:
            return False
        types = self.delivery.types
        return (types is None or type(event) in types) and (self._wanted is None or self._wanted(event))

    def _advance(self, seq: int) -> None:
        self._on_delivered(seq, self.statistics.delivered)
