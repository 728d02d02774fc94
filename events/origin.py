"""Where a run stands now: the source of every event's header."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from events.messages import Event, StageName

Header = tuple[str, int, int, float, int, int, int, StageName | None]


def header_of(event: Event) -> Header:
    """The header of something that belongs to an earlier event: its place in the run and its time, no ``seq`` yet."""
    return (event.run_id, event.attempt, 0, event.time, event.rank, event.global_step, event.epoch, event.stage)


class Origin:
    """The run's present position. Written by the loop's thread alone; read by any."""

    __slots__ = ("attempt", "epoch", "global_step", "rank", "run_id", "stage")

    def __init__(self, run_id: str, attempt: int = 1, rank: int = 0) -> None:
        self.run_id = run_id
        self.attempt = attempt
        self.rank = rank
        self.global_step = 0
        self.epoch = 0
        self.stage: StageName | None = None

    @contextlib.contextmanager
    def at_epoch(self, epoch: int) -> Iterator[None]:
        """Let the run stand at another epoch for the length of a block."""
        before, self.epoch = self.epoch, epoch
        try:
            yield
        finally:
            self.epoch = before

    def header(self) -> Header:
        """The first eight fields of an event that happens now; ``seq`` is 0 until the pump assigns it."""
        return (
            self.run_id,
            self.attempt,
            0,
            time.time(),
            self.rank,
            self.global_step,
            self.epoch,
            self.stage,
        )

    def header_at(self, global_step: int, epoch: int | None = None) -> Header:
        """The header of an event that happens now and belongs to another step, by default of this epoch."""
        epoch = self.epoch if epoch is None else epoch
        return (self.run_id, self.attempt, 0, time.time(), self.rank, global_step, epoch, None)
