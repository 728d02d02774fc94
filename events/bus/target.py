"""The two ends of an observer: the source of its events, and the target that handles them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Protocol

from events.bus.backlog import Published
from events.bus.subscription import Statistics
from events.messages import Event
from events.sink import Delivery, RunInfo, Sink, SinkWriter


class Source(Protocol):
    """Where the batches of an observer come from: a `Subscription`, or an `events.journal.feed.JournalFeed`."""

    name: str
    delivery: Delivery
    statistics: Statistics

    @property
    def oldest(self) -> Event | None:
        """The event that has waited longest; None if none waits."""
        ...

    async def receive(self) -> list[Published]:
        """Wait for the next batch; counts the batch before it as delivered. Raises `anyio.EndOfStream` at the end."""
        ...

    def done(self, count: int | None = None) -> None:
        """Count the batch in hand as delivered; or its first ``count`` events, and drop the rest."""
        ...

    def finish(self) -> None:
        """Take no more events: the observer gets what is queued, then the end of the stream."""
        ...

    def discard(self) -> None:
        """Drop all that waits, and end the stream."""
        ...


class Target(Protocol):
    """What handles the events of an observer: a `SinkTarget`, or the hooks of a callback."""

    payloads: bool
    """Whether it receives the payloads with the events."""
    blocking: bool
    """Whether `deliver` runs on the observer's thread; if not, it returns an awaitable at once. Known after `open`.

    `open` and `close` always run on the thread. If any of the three returns an awaitable, the event loop awaits it.
    """

    def open(self) -> None:
        """Prepare; on the observer's thread."""
        ...

    def deliver(self, batch: Sequence[Published], /) -> object:
        """Handle a batch, or what is left of it when it is delivered again."""
        ...

    def close(self) -> object:
        """Flush and close."""
        ...

    def abandon(self) -> None:
        """Start nothing new in the call in progress: no one waits for it any more. From the event loop."""
        ...

    @property
    def progress(self) -> tuple[str, int | None]:
        """The call in progress, in a word, and how many events of the batch are done (None: all or nothing)."""
        ...


class SinkTarget:
    """A sink as a target."""

    payloads = False
    blocking = True

    def __init__(self, sink: Sink, run: RunInfo) -> None:
        self._sink = sink
        self._run = run
        self.writer: SinkWriter | None = None

    def open(self) -> None:
        writer = self._sink.open(self._run)
        opened: object = writer
        if inspect.iscoroutine(opened):
            opened.close()
            raise TypeError(
                f"{type(self._sink).__name__}.open() is async, but a sink is opened on a thread of its own: make it a"
                f" plain function that returns the writer, and connect in the writer's first `async def write`"
            )
        self.blocking = not inspect.iscoroutinefunction(writer.write)
        self.writer = writer

    def deliver(self, batch: Sequence[Published], /) -> object:
        assert self.writer is not None
        events: list[Event] = [event for event, _ in batch]
        return self.writer.write(events)

    def abandon(self) -> None:
        """Do nothing: a write has no parts that could be skipped."""

    def close(self) -> object:
        return self.writer.close() if self.writer is not None else None

    @property
    def progress(self) -> tuple[str, int | None]:
        return ("write" if self.writer is not None else "open"), None
