"""A queue of events that a rule can shrink. Pure code: no threads, no waiting, no clock."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from events.messages import Event, MetricsLogged

if TYPE_CHECKING:
    from events.bus.fence import Fence


class Payload(msgspec.Struct, gc=False):
    """Data that accompanies an event inside the process and is never encoded."""

    outputs: Any = None
    """Outputs for callbacks."""
    fence: Fence | None = None
    nbytes: int = 0
    """Bytes that ``outputs`` holds."""


Published = tuple[Event, Payload | None]
Item = tuple[Event, Payload | None, int]
"""A published event with the bytes of memory it holds while it waits."""


def item_of(published: Published) -> Item:
    """Add the size: an estimate of the memory that an event holds, on the high side."""
    event, payload = published
    size = 512 if event.droppable else 4_096
    if type(event) is MetricsLogged:
        size += 160 * len(event.metrics)
    if payload is not None:
        size += payload.nbytes
    return event, payload, size


class Backlog:
    """Events in order, with the sum of their sizes.

    Those that must not be dropped are set aside when something older than they has to go, so that dropping takes
    constant time per event however many of them there are.
    """

    def __init__(self) -> None:
        self._kept: deque[Item] = deque()  # not droppable, and older than everything in `_items`
        self._items: deque[Item] = deque()
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._kept) + len(self._items)

    @property
    def oldest(self) -> Event | None:
        """The event that has waited longest; None if none waits."""
        queue = self._kept or self._items
        return queue[0][0] if queue else None

    def extend(self, items: Iterable[Item]) -> None:
        """Append the newest events."""
        for item in items:
            self._items.append(item)
            self.nbytes += item[2]

    def take(self, limit: int, limit_bytes: float = math.inf) -> list[Item]:
        """Remove and return the oldest events within the limits, at least one if there is one."""
        taken: list[Item] = []
        nbytes = 0
        for queue in (self._kept, self._items):
            while queue and len(taken) < limit and (not taken or nbytes + queue[0][2] <= limit_bytes):
                nbytes += queue[0][2]
                taken.append(queue.popleft())
            if queue:
                break
        self.nbytes -= nbytes
        return taken

    def drop_oldest(self, limit: int, limit_bytes: int, hard_limit: int, hard_limit_bytes: int) -> list[Item]:
        """Remove droppable events, oldest first, until both limits hold; returns the removed ones.

        When none is left, the others may take up the hard limits before the oldest of them goes too. The newest event
        stays, however many bytes it holds.
        """
        dropped: list[Item] = []
        while self._items and (len(self) > limit or (self.nbytes > limit_bytes and len(self) > 1)):
            item = self._items.popleft()
            if item[0].droppable:
                self.nbytes -= item[2]
                dropped.append(item)
            else:
                self._kept.append(item)
        while self._kept and (len(self) > hard_limit or (self.nbytes > hard_limit_bytes and len(self) > 1)):
            item = self._kept.popleft()
            self.nbytes -= item[2]
            dropped.append(item)
        return dropped

    def conflate(self) -> list[Item]:
        """Keep only the newest droppable event of each type and key; returns the others.

        Metrics are conflated by name: the newest `MetricsLogged` takes over the last value of every name that it does
        not carry itself.
        """
        newest: dict[tuple[type[Event], str | None], int] = {}
        metrics: dict[str | None, dict[str, float]] = {}
        survivors: list[Item] = []  # youngest first
        gone: list[Item] = []
        for item in reversed(self._items):
            event = item[0]
            if event.droppable:
                key = getattr(event, "key", None)
                if isinstance(event, MetricsLogged):
                    metrics[key] = event.metrics | metrics.get(key, {})
                if (type(event), key) in newest:
                    gone.append(item)
                    continue
                newest[type(event), key] = len(survivors)
            survivors.append(item)
        for key, merged in metrics.items():
            place = newest[MetricsLogged, key]
            event, payload, _ = survivors[place]
            # Other subscriptions share the event: it is replaced here, not changed.
            survivors[place] = item_of((replace(event, metrics=merged), payload))
        self._items = deque(reversed(survivors))
        self.nbytes = sum(item[2] for item in self._kept) + sum(item[2] for item in self._items)
        return gone
