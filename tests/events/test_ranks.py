"""The ranks of a run, and those that hold up the others."""

from __future__ import annotations

from typing import Any

import msgspec

from events.bounds import MAX_NAME_CHARS
from events.messages import Event, RankReported, RunStarted, StallLedger
from events.ranks import MAX_RANKS
from events.run.state import RunState


def report(rank: int, before_s: float | None, *, ranks: int = 4, attempt: int = 1, data_s: float = 0.0) -> RankReported:
    """Return a report of a rank whose steps take a second, ten of them."""
    return RankReported(
        *("r", attempt, 0, 1_000.0, 0, 7, 0, "train"),
        reported_rank=rank,
        ranks=ranks,
        host=f"host-{rank // 2}",
        phase="backward",
        steps=10,
        step_s=None if before_s is None else 1.0,
        before_exchange_s=before_s,
        ledger=StallLedger(wall_s=10.0, data_s=10 * data_s, steps=10),
        memory_bytes=1_000 + rank,
        device_memory_bytes=None,
    )


def a_round(*before_s: float | None, **more: Any) -> list[Event]:
    """Return a report of each rank."""
    return [report(rank, seconds, ranks=len(before_s), **more) for rank, seconds in enumerate(before_s)]


def slow(state: RunState) -> list[int]:
    """Return the ranks that hold up the others."""
    return [rank for rank, one in state.ranks.items() if one.is_slow]


def test_a_rank_is_slow_after_two_reports_in_a_row_by_a_clear_margin() -> None:
    state = RunState()
    state.add(a_round(0.2, 0.2, 0.5, 0.3))
    assert slow(state) == []
    assert state.health.problems == []
    state.add(a_round(0.2, 0.2, 0.5, 0.3)[:3])
    assert slow(state) == []  # the reports of a round are compared once all are here
    state.add(a_round(0.2, 0.2, 0.5, 0.3)[3:])
    assert slow(state) == [2]
    assert state.health.ranks.newly_slow == [state.ranks[2]]
    assert state.health.problems == [
        "rank 2 on host-1 holds up the others: it takes 0.5 s per step until gradients are exchanged; most ranks take"
        " 0.2 s (in 2 of 2 reports)"
    ]
    state.add(a_round(0.2, 0.2, 0.5, 0.3))
    assert state.health.ranks.newly_slow == []
    state.add(a_round(0.2, 0.2, 0.2, 0.3))
    assert slow(state) == []
    assert "(in 3 of 4 reports)" in state.health.problems[0]
    for _ in range(6):
        state.add(a_round(0.2, 0.2, 0.2, 0.3))
    assert state.health.problems == []  # it was slow for a small part of the run


def test_of_two_ranks_the_later_one_is_slow_and_its_data_is_named() -> None:
    state = RunState()
    for _ in range(2):
        state.add(a_round(0.7, 0.1, data_s=0.65))
    assert slow(state) == [0]
    assert "it takes 0.7 s per step until gradients are exchanged, 0.65 s of it waiting for" in state.health.problems[0]


def test_ranks_that_report_nothing_do_not_stop_the_comparison() -> None:
    """A rank without steps in the interval, and one whose reports are missing."""
    state = RunState()
    for _ in range(3):
        state.add([*a_round(0.1, 0.6, None, 0.1)[:3]])
    assert slow(state) == [1]
    assert (state.ranks[2].reports, state.ranks[2].step_s, len(state.ranks)) == (0, None, 3)


def test_a_new_attempt_and_a_single_process_have_no_ranks() -> None:
    state = RunState()
    state.add([*a_round(0.1, 0.9), *a_round(0.1, 0.9)])
    assert state.ranks[1].memory_bytes == 1_001
    state.add([RunStarted("r", 2, 0, 1_000.0, 0, 0, 0, None, module="Net", epochs=1)])
    assert state.ranks == {}
    assert state.health.problems == []


def test_thousands_of_ranks_are_bounded() -> None:
    state = RunState()
    for _ in range(2):
        state.add(a_round(*[0.1] * MAX_RANKS, *[0.9] * 10))
        state.add(a_round(*[0.1] * (MAX_RANKS - 20), *[0.9] * 20))
        state.add([report(5, 0.1, ranks=MAX_RANKS)])
    assert len(state.ranks) == MAX_RANKS
    assert len(slow(state)) == 0
    state = RunState()
    for _ in range(2):
        state.add(a_round(*[0.1] * (MAX_RANKS - 20), *[0.9] * 20))
    assert len(slow(state)) == 20
    problems = state.health.problems
    assert len(problems) == 9
    assert problems[-1] == "12 more ranks hold up the others"
    state.add([msgspec.structs.replace(report(0, 0.1), host="x" * 5_000)])
    assert len(state.ranks[0].host) == MAX_NAME_CHARS
