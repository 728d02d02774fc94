"""A run's events for one observer, read from its journal: what a `Subscription` is in the process of the run.

Whoever reads from the journal cannot hold up who writes it, and what is in it is not lost when the reader dies: another
one goes on at the last event that was delivered. There is no queue to fill, so overflow policies have no part here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import anyio
import anyio.to_thread

from events.bus.backlog import Published
from events.bus.subscription import Statistics
from events.journal.reader import JournalReader, SkippedLine
from events.messages import Event
from events.sink import Delivery

_LEAST_POLL_S = 0.02
_COUNT_S = 0.5
"""How long counting what was left may take."""


class JournalFeed:
    """Has what `events.bus.observer.Observer` uses of a subscription. Belongs to the event loop's thread.

    Args:
        since: Events with a greater ``seq`` are delivered.
        on_delivered: Told the ``seq`` up to which everything was delivered, or was not meant for this observer; and how
            many events were delivered.
        wanted: Decides whether an event counts at all; None: each does.
        delivered: How many events a feed before this one has delivered, for the counts to go on.
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
        self._reader = JournalReader(Path(journal_dir), since)
        self._on_delivered = on_delivered
        self._wanted = wanted
        self._in_hand: list[Event] = []
        self._finishing = anyio.Event()
        self._until: int | None = None
        self._discarded = False
        self._ended = False
        self._limiter = anyio.CapacityLimiter(1)  # our own: the host's may be taken by whatever the host does

    async def receive(self) -> list[Published]:
        """Wait for the next batch, at least one event; counts the batch before it as delivered.

        A failing disk is asked again: what it cannot give now is given later.

        Raises:
            anyio.EndOfStream: `finish` was called, and everything up to there was received.
        """
        self.done()
        while not self._discarded:
            finishing = self._finishing.is_set()  # before reading: what is written later must not be missed
            read = await anyio.to_thread.run_sync(self._read, limiter=self._limiter)
            if read is not None:
                batch = [event for event in read if self._is_meant(event)]
                if batch:
                    self._in_hand = batch
                    self.statistics.published += len(batch)
                    self.statistics.queued += len(batch)
                    return [(event, None) for event in batch]
                if read:
                    self._advance()
                    continue
                if finishing and (self._until is None or self._reader.cursor >= self._until):
                    if self._ended:
                        break
                    self._ended = True  # nobody writes any more: the journal's end counts as it is
                    continue
            with anyio.move_on_after(max(self.delivery.latency_s, _LEAST_POLL_S) if not finishing else _LEAST_POLL_S):
                if finishing:
                    await anyio.sleep_forever()
                await self._finishing.wait()
        raise anyio.EndOfStream

    def done(self, count: int | None = None) -> None:
        """The batch in hand is delivered; or its first ``count`` events are, and the rest is left."""
        batch, self._in_hand = self._in_hand, []
        delivered = len(batch) if count is None else count
        self.statistics.delivered += min(delivered, len(batch))
        self.statistics.queued -= min(delivered, len(batch))
        if delivered >= len(batch):
            self._advance()
        elif delivered:
            self._advance(batch[delivered - 1].seq)

    @property
    def oldest(self) -> Event | None:
        """The event that has waited longest of those read; None if none waits."""
        return self._in_hand[0] if self._in_hand else None

    @property
    def skipped(self) -> list[SkippedLine]:
        """Lines of the journal that were no events: the newest thousand of those that it has come to."""
        return self._reader.skipped

    def finish(self) -> None:
        """The run writes no more: the receiver gets what there is, up to `stop_at`, then the end of the stream."""
        self._finishing.set()

    def stop_at(self, seq: int | None) -> None:
        """Deliver nothing behind this ``seq``, which the journal reaches; None: what stands in it at the end."""
        self._until = seq

    def discard(self) -> None:
        """Deliver nothing more. What is left stays in the journal."""
        self._discarded = True
        self._finishing.set()

    async def count_left(self) -> None:
        """Count what the journal still has for this observer, for its report: what half a second is enough for."""
        with anyio.move_on_after(_COUNT_S):
            while read := await anyio.to_thread.run_sync(self._read, limiter=self._limiter):
                left = sum(self._is_meant(event) for event in read)
                self.statistics.published += left
                self.statistics.queued += left

    def _read(self) -> list[Event] | None:
        """The next events; None if the disk refused."""
        try:
            return self._reader.read(self.delivery.batch) or (self._reader.finish() if self._ended else [])
        except OSError:
            return None

    def _is_meant(self, event: Event) -> bool:
        if self._until is not None and event.seq > self._until:
            return False
        types = self.delivery.types
        return (types is None or type(event) in types) and (self._wanted is None or self._wanted(event))

    def _advance(self, seq: int | None = None) -> None:
        self._on_delivered(self._reader.cursor if seq is None else seq, self.statistics.delivered)
