"""When checkpoints are due, without a run."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import Checkpoints
from trainer.checkpoint.due import NEVER, BestScores, DuePolicy

MINUTE = 60 * 10**9


class Snapshot:
    """Stands for a checkpoint that is being written."""

    def __init__(self, *, durable: bool = False, failed: bool = False) -> None:
        self.durable, self.failed = durable, failed


def policy(start: int = 0, **settings: Any) -> DuePolicy:
    one = DuePolicy(Checkpoints(**{"every_minutes": None, "every_epochs": None, **settings}))
    one.start(start, 0)
    return one


def test_without_settings_no_checkpoint_is_ever_due() -> None:
    one = DuePolicy(None)
    one.start(3, 0)
    one.taken(0)
    assert (one.step, one.ns) == (NEVER, NEVER)
    assert one.after_step(4, 10**18, last=False) == one.after_epoch(0, 10**18) == []


@given(every=st.integers(1, 7), start=st.integers(0, 20), skipped=st.sets(st.integers(1, 40)))
def test_every_n_steps_means_multiples_of_n(every: int, start: int, skipped: set[int]) -> None:
    one = policy(start, every_steps=every)
    due = [step for step in range(start + 1, start + 41) if step >= one.step and one.after_step(step, 0, last=False)]
    assert due == [step for step in range(start + 1, start + 41) if step % every == 0]


def test_minutes_count_from_the_checkpoint_before() -> None:
    """For whatever reason it was taken or skipped."""
    one = policy(every_minutes=2)
    assert one.after_step(1, 2 * MINUTE - 1, last=False) == []
    assert one.after_step(2, 2 * MINUTE, last=False) == ["minutes"]
    one.taken(3 * MINUTE)
    assert one.after_step(3, 5 * MINUTE - 1, last=False) == []
    assert one.after_epoch(0, 5 * MINUTE) == ["minutes"]


def test_more_minutes_than_a_clock_counts_are_never() -> None:
    assert policy(every_minutes=1e300).after_epoch(0, 10**16) == []


@given(every=st.integers(1, 5), minutes=st.none() | st.just(1))
def test_every_n_epochs_counts_from_the_first_and_comes_before_minutes(every: int, minutes: int | None) -> None:
    one = policy(every_epochs=every, every_minutes=minutes)
    otherwise = [] if minutes is None else ["minutes"]
    for epoch in range(12):
        assert one.after_epoch(epoch, MINUTE) == (["epochs"] if (epoch + 1) % every == 0 else otherwise)


def test_the_last_step_of_an_epoch_leaves_its_reasons_to_the_epoch() -> None:
    """One checkpoint instead of two, with the reasons of both."""
    one = policy(every_steps=2, every_epochs=1)
    one.found_best(2)
    assert one.after_step(2, 0, last=True) == []
    assert one.after_epoch(0, 0) == ["steps", "best", "epochs"]
    one.taken(0)
    assert one.after_epoch(1, 0) == ["epochs"]


def test_the_best_one_is_due_at_once() -> None:
    one = policy(every_steps=100)
    one.after_step(1, 0, last=False)
    one.found_best(5)
    assert one.step == 5
    assert one.after_step(5, 0, last=False) == ["best"]
    one.taken(0)
    assert one.after_step(6, 0, last=False) == []
    one.found_best(7)
    assert one.after_epoch(0, 0) == ["best"]


@pytest.mark.parametrize("mode", ["min", "max"])
@given(scores=st.lists(st.floats(-9, 9), max_size=12), keep=st.integers(0, 4))
def test_a_metric_enters_the_best_k_as_in_a_sorted_list(mode: str, scores: list[float], keep: int) -> None:
    sign = 1 if mode == "max" else -1
    best = BestScores(Checkpoints(best="m", best_mode=mode, keep_best=keep), {})  # type: ignore[arg-type]
    kept: list[float] = []
    for step, score in enumerate(scores, 1):
        enters = len(kept) < keep or (bool(kept) and sign * score > kept[-1])
        assert best.enters(step, score) is enters
        if enters:
            kept = sorted([*kept, sign * score], reverse=True)[:keep]
            best.add(step, score, Snapshot(durable=True))  # type: ignore[arg-type]


def test_a_failed_checkpoint_need_not_be_beaten() -> None:
    best = BestScores(Checkpoints(best="m", keep_best=1), {1: 0.5})
    lost = Snapshot()
    assert best.enters(2, 0.1)
    best.add(2, 0.1, lost)  # type: ignore[arg-type]
    assert not best.enters(3, 0.2)
    assert not best.enters(4, 0.2)
    lost.failed = True
    assert best.enters(4, 0.2)
    assert not best.enters(5, 0.7)
    assert not best.enters(6, float("nan"))


@pytest.mark.parametrize("sign", [1, -1])
def test_a_step_that_is_done_again_enters_only_with_a_better_metric(sign: int) -> None:
    """Unless its checkpoint failed."""
    mode: Any = "max" if sign == 1 else "min"
    for own, score, enters in ((3, 4, True), (0.3, 0.5, True), (4, 3, False), (0.5, 0.3, False), (2, 2, False)):
        best = BestScores(Checkpoints(best="m", best_mode=mode, keep_best=2), {})
        best.add(7, sign * own, Snapshot(durable=True))  # type: ignore[arg-type]
        for _ in range(2):
            assert best.enters(7, sign * score) is enters
        best.add(7, sign * own, Snapshot(failed=True))  # type: ignore[arg-type]
        assert best.enters(7, sign * score)
