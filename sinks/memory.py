"""A sink that keeps the events in memory, for tests and notebooks."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, TypeVar

from events.messages import Event
from events.metrics import metrics_of
from events.sink import Delivery, RunInfo
from events.strict import Strict

E = TypeVar("E", bound=Event)


class Memory(Strict, frozen=True, dict=True):
    """Keeps the newest events of the runs it is attached to::

        sink = Memory()
        Trainer(module, arguments, sinks=[sink]).train()
        sink.of(TrainEpochEnded)[-1].loss
        sink.metrics("val_loss")

    It may be read on any thread at any time; methods return snapshots. When `Trainer.train` or ``run.result()`` has
    returned, every event of the run has arrived. A sink of several runs keeps the events of all of them, in order of
    arrival; ``run_id`` and ``attempt`` distinguish them.

    The events stay in the process that opened the sink: an encoded, pickled or copied `Memory` is a new, empty one.
    """

    capacity: int = 100_000
    """Maximum events per sink; beyond it the oldest are dropped and counted in `dropped`."""

    # Not `block`, which could hold the loop of a test on a busy machine, and not `catch_up`, which needs a journal.
    # Appending cannot hang, so a timeout could only lose events.
    delivery: ClassVar[Delivery] = Delivery(capacity=100_000, capacity_bytes=2**28, timeout_s=None, runs_in="thread")

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise ValueError(f"Memory(capacity={self.capacity}): capacity must be >= 1")

    def open(self, run: RunInfo) -> MemoryWriter:
        """Return the writer that appends to this sink, one for all of its runs."""
        return self._writer

    @property
    def events(self) -> list[Event]:
        """The kept events, in order of arrival."""
        return self._writer.snapshot()

    @property
    def dropped(self) -> int:
        """Number of events dropped beyond ``capacity``."""
        return self._writer.dropped

    def of(self, event_type: type[E]) -> list[E]:
        """The events of one type (or of its subclasses), in order."""
        return [event for event in self.events if isinstance(event, event_type)]

    def metrics(self, name: str) -> list[tuple[int, float]]:
        """A metric's values as ``(global_step, value)``, in order; empty if it was never logged.

        The names are those of `events.metrics.metrics_of`: logged ones, ``train_loss``, ``val_loss`` and so on;
        a dataloader other than ``"default"`` appends its key: ``accuracy/KEY``.
        """
        return [(e.global_step, value) for e in self.events for known, value in metrics_of(e) if known == name]

    def clear(self) -> None:
        """Remove all events, and reset `dropped`."""
        self._writer.clear()

    # In the instance's dictionary, because a field would be encoded, compared and pickled.
    @cached_property
    def _writer(self) -> MemoryWriter:
        return MemoryWriter(self.capacity)


class MemoryWriter:
    """An open `Memory`. Any thread; only waits while another one copies the events."""

    def __init__(self, capacity: int) -> None:
        self._lock = threading.Lock()  # iterating a deque fails while another thread appends to it
        self._events: deque[Event] = deque(maxlen=capacity)
        self._capacity = capacity
        self.dropped = 0
        """See `Memory.dropped`."""

    def write(self, events: Sequence[Event]) -> None:
        """Append a batch."""
        with self._lock:
            self.dropped += max(0, len(self._events) + len(events) - self._capacity)
            self._events.extend(events)

    def close(self) -> None:
        """Do nothing: the events stay readable."""

    def snapshot(self) -> list[Event]:
        """The kept events."""
        with self._lock:
            return list(self._events)

    def clear(self) -> None:
        """Remove all events, and reset `dropped`."""
        with self._lock:
            self._events.clear()
            self.dropped = 0
