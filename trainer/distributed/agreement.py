"""The agreement of all ranks on commands: a log of grants and decisions. Without clock, thread or I/O.

A *tick* is a place in training that all ranks reach in the same order: the end of a step, of a validation batch, the
begin of an epoch. Ticks are numbered from 1 within a *segment*, a stretch of ticks of one kind (training, validation),
because one kind may be a thousand times faster than another and a grant must not last a thousand times longer.

Rank 0 appends entries to the log (`LogAuthor`), and every rank reads all of them in order (`LogReader`). An entry
grants ticks, and may carry a decision. The decision is taken at the first tick that no earlier entry has granted, which
no rank can have passed. So all ranks take the same decisions at the same tick, however late each of them reads the log,
and none waits for another's loop: it waits for a grant at most, and their author waits for no one.

The first entry with an ``abort``, which any rank may append, ends the log.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable

import msgspec

from events.protocol import AnyCommand, Stop

_EVERYTHING = sys.maxsize
_MIN_AHEAD = 2
"""Minimum ticks that are granted in advance: with fewer, ranks would wait in each of them."""
_RATE_S = 0.2
"""Minimum seconds over which the rate of ticks is measured."""
_POLLS_PER_S = 1280.0
"""Maximum polls per second of all ranks together; one server answers about 68,000 requests per second."""


def poll_s(world_size: int) -> float:
    """Return the seconds between two polls of a rank."""
    return max(0.05, world_size / _POLLS_PER_S)


def look_ahead_s(world_size: int) -> float:
    """Return the seconds of ticks that are granted in advance: how long a decision may take to have an effect."""
    return max(0.5, 2.5 * poll_s(world_size))


class Failure(msgspec.Struct, frozen=True, omit_defaults=True):
    """Why a rank ends the run."""

    rank: int
    host: str
    text: str
    """Type and text of an exception, or what another rank has observed."""
    phase: str
    """What the rank was doing: the name of a method or hook, or a few words."""
    global_step: int = 0
    is_observed: bool = False
    """Whether others have seen it: phase and step are those of the rank's last sign of life."""

    def __str__(self) -> str:
        place = f"in {self.phase} after global_step {self.global_step}"
        if self.is_observed:
            return f"rank {self.rank} on {self.host}: {self.text} (last seen {place})"
        return f"rank {self.rank} on {self.host} {place}: {self.text}"


class Grant(msgspec.Struct, frozen=True):
    """The ticks that may be passed: all of earlier segments, and these."""

    segment: int = 0
    until: int = 0
    """The last tick of this segment..."""
    ahead: int = 0
    """...and the last one of the segment after it."""

    def limit(self, segment: int) -> int:
        """Return the last tick of a segment that may be passed; 0: none."""
        if segment <= self.segment:
            return _EVERYTHING if segment < self.segment else self.until
        return self.ahead if segment == self.segment + 1 else 0


class Entry(msgspec.Struct, frozen=True, omit_defaults=True):
    """An entry of the log."""

    grant: Grant = Grant()
    """All that is granted from here on; never less than in the entry before."""
    commands: list[AnyCommand] = []
    failure: Failure | None = None
    """All ranks raise it at one tick."""
    abort: Failure | None = None
    """The run ends at once, because this rank reaches no further tick."""

    @property
    def is_decision(self) -> bool:
        """Whether it must be taken at a tick."""
        return bool(self.commands) or self.failure is not None


class LogReader:
    """One rank's view of the log, and its place in it. Not thread-safe.

    Attributes:
        segment: The current segment, from 0.
        tick: The current tick of it, from 1; 0 before the first.
        kind: What its ticks are.
        abort: Why the run ends at once, if it does.
    """

    def __init__(self) -> None:
        self.kind: str | None = None
        self.segment = self.tick = 0
        self.abort: Failure | None = None
        self._granted = Grant()
        self._decisions: deque[tuple[Grant, Entry]] = deque()  # with all that was granted before each

    def read(self, entry: Entry) -> None:
        """Add the next entry of the log."""
        if self.abort is not None:
            return
        self.abort = entry.abort
        if entry.is_decision:
            self._decisions.append((self._granted, entry))
        if entry.abort is None:
            self._granted = entry.grant

    @property
    def free_until(self) -> int:
        """The last tick of this segment that may be passed without a look at the log."""
        if self.abort is not None:
            return 0
        granted = self._decisions[0][0] if self._decisions else self._granted
        return granted.limit(self.segment)

    @property
    def may_pass(self) -> bool:
        """Whether the current tick is granted. Take the decisions that are due first."""
        return self.tick <= self._granted.limit(self.segment)

    def take(self, *, paused: bool = False) -> Entry | None:
        """Remove and return the next decision, if it is due at the current tick.

        Args:
            paused: The decisions taken at this tick have paused the run, so that the next is due here too.
        """
        if self._decisions and (paused or self.tick > self._decisions[0][0].limit(self.segment)):
            return self._decisions.popleft()[1]
        return None


class LogAuthor:
    """What rank 0 appends to the log. Not thread-safe.

    Args:
        look_ahead_s: Seconds of ticks to grant in advance.
    """

    def __init__(self, look_ahead_s: float) -> None:
        self._look_ahead_s = look_ahead_s
        self._granted = Grant()
        self._rates: dict[str | None, float] = {}  # ticks per second, by kind of segment
        self._measured: tuple[float, int, int] | None = None  # time, segment and tick of the last measurement
        self._stops = False

    def decide(
        self,
        now_s: float,
        kind: str | None,
        segment: int,
        tick: int,
        commands: Iterable[AnyCommand] = (),
        failure: Failure | None = None,
    ) -> Entry | None:
        """Return the next entry of the log, if one is needed now.

        Args:
            now_s: A monotonic clock.
            kind: The kind of rank 0's segment.
            segment: Rank 0's segment...
            tick: ...and its tick there.
            commands: What to decide, in order of arrival. A stop after another is dropped: the first one counts, and
                the same signal reaches every rank.
            failure: What ends the run.
        """
        self._measure(now_s, kind, segment, tick)
        decided = [command for command in commands if self._is_first(command)]
        until, ahead = self._granted.limit(segment), self._granted.ahead
        moved = segment > self._granted.segment
        if moved:  # the ticks that were granted of this segment in advance remain so
            ahead = self._ahead(min(self._rates.values(), default=0.0))
        look = self._ahead(self._rates.get(kind, 0.0))
        if not (moved or decided or failure is not None) and tick + look <= until + look // 2:
            return None
        self._granted = Grant(segment, max(until, tick + look), ahead)
        return Entry(self._granted, decided, failure)

    def _is_first(self, command: AnyCommand) -> bool:
        if not isinstance(command, Stop):
            return True
        is_first, self._stops = not self._stops, True
        return is_first

    def _ahead(self, rate: float) -> int:
        return max(_MIN_AHEAD, int(rate * self._look_ahead_s))

    def _measure(self, now_s: float, kind: str | None, segment: int, tick: int) -> None:
        if self._measured is None or self._measured[1] != segment:
            self._measured = now_s, segment, tick
            return
        seconds = now_s - self._measured[0]
        if seconds >= _RATE_S:
            rate = (tick - self._measured[2]) / seconds
            before = self._rates.get(kind)
            # Upwards by halves: a burst must not grant the ticks of a minute. Downwards at once.
            self._rates[kind] = rate if before is None else min(rate, (before + rate) / 2)
            self._measured = now_s, segment, tick
