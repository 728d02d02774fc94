"""The ranks of a run, and which of them holds up the others, from their reports. No clock, no thread, no I/O."""

from __future__ import annotations

import itertools
import statistics

import msgspec

from events.bounds import MAX_LINE_CHARS, MAX_NAME_CHARS, BoundName, BoundText, Int64
from events.messages import RankReported

MAX_RANKS = 4_096
MAX_METRICS = 64
"""Maximum metrics per rank."""
_MARGIN = 0.2
"""Minimum part of the time of a step by which a slow rank comes later than most..."""
_IN_A_ROW = 2
"""...in this many reports in a row."""
_MIN_PART = 1 / 3
"""Minimum part of its reports in which a rank was slow that makes it a problem of the run."""
_MAX_SENTENCES = 8


class RankState(msgspec.Struct):
    """One rank, as servers send it. See `events.messages.RankReported`."""

    rank: Int64
    host: BoundName = ""
    phase: BoundText = ""
    step_s: float | None = None
    before_exchange_s: float | None = None
    data_s: float | None = None
    """Mean seconds per step of waiting for data."""
    memory_bytes: Int64 | None = None
    device_memory_bytes: Int64 | None = None
    metrics: dict[BoundName, float] = {}
    """Means of the numbers that it has logged in training lately."""
    is_slow: bool = False
    """Whether it holds up the others."""
    reports: Int64 = 0
    """Reports with steps..."""
    slow_reports: Int64 = 0
    """...and those of them in which it came later than most."""
    in_a_row: Int64 = 0
    """The newest of these."""
    sentence: BoundText = ""
    """About the newest report in which it came later."""


class RankTable:
    """The ranks of a run's newest attempt.

    Attributes:
        ranks: By number.
        newly_slow: Those that have become slow with the last event.
    """

    def __init__(self) -> None:
        self.ranks: dict[int, RankState] = {}
        self.newly_slow: list[RankState] = []
        self._round: list[RankState] = []  # that have reported and are not compared yet

    def add(self, e: RankReported) -> None:
        """Take a report. Rank 0 publishes them by rank, in rounds; those of a round are compared."""
        self.newly_slow = []
        if e.reported_rank >= MAX_RANKS:
            return
        if self._round and e.reported_rank <= self._round[-1].rank:
            self._compare()  # the last ranks had nothing to report
        one = self.ranks.setdefault(e.reported_rank, RankState(e.reported_rank))
        one.host, one.phase = e.host[:MAX_NAME_CHARS], e.phase[:MAX_LINE_CHARS]
        one.step_s, one.before_exchange_s = e.step_s, e.before_exchange_s
        one.data_s = e.ledger.data_s / e.steps if e.steps else None
        one.memory_bytes, one.device_memory_bytes = e.memory_bytes, e.device_memory_bytes
        numbers = itertools.islice(e.metrics.items(), MAX_METRICS)
        one.metrics = {name[:MAX_NAME_CHARS]: value for name, value in numbers}
        self._round.append(one)
        if e.reported_rank == min(e.ranks, MAX_RANKS) - 1:
            self._compare()

    @property
    def problems(self) -> list[str]:
        """A sentence about each rank that held up the others for long; the worst first."""
        found = [
            one
            for one in self.ranks.values()
            if one.slow_reports >= _IN_A_ROW and one.slow_reports >= _MIN_PART * one.reports
        ]
        found.sort(key=lambda one: -one.slow_reports)
        sentences = [f"{one.sentence} (in {one.slow_reports:,} of {one.reports:,} reports)" for one in found]
        more = len(sentences) - _MAX_SENTENCES
        return [*sentences[:_MAX_SENTENCES], f"{more:,} more ranks hold up the others"] if more > 0 else sentences

    def _compare(self) -> None:
        known = [
            (one, one.before_exchange_s, one.step_s)
            for one in self._round
            if one.before_exchange_s is not None and one.step_s is not None
        ]
        self._round = []
        if len(known) < 2:
            return
        usual_s = statistics.median_low(before_s for _, before_s, _ in known)
        for one, before_s, step_s in known:
            one.reports += 1
            if before_s - usual_s > _MARGIN * step_s:
                one.slow_reports += 1
                one.in_a_row += 1
                one.sentence = _sentence(one, before_s, usual_s)
            else:
                one.in_a_row = 0
            if one.in_a_row == _IN_A_ROW:
                self.newly_slow.append(one)
            one.is_slow = one.in_a_row >= _IN_A_ROW


def _sentence(one: RankState, before_s: float, usual_s: float) -> str:
    data = ""
    if one.data_s is not None and one.data_s > 0.5 * (before_s - usual_s):
        data = f", {one.data_s:.3g} s of it waiting for data"
    return (
        f"rank {one.rank} on {one.host} holds up the others: it takes {before_s:.3g} s per step until gradients are"
        f" exchanged{data}; most ranks take {usual_s:.3g} s"
    )
