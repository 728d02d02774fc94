"""``kill -9`` at any instant of a run that trains and saves: each announced checkpoint is intact and resumed from.

Each run reports a checkpoint when it is announced; the content of a checkpoint must be a function of its step, computed
by a loop without a trainer.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest
from faults.child import Outcome, run_job
from faults.disk_kit import Tally, calls_of, leftovers, look, reference
from faults.injections import injected

from events.checkpoint.manifest import CheckpointName

KILLS, PARTS = 8, 30
CHAINS: tuple[dict[str, Any], ...] = (
    {"every_steps": 1, "when_busy": "skip", "keep_last": 1},
    {"every_steps": 3, "when_busy": "skip", "keep_last": 2, "journal": True},
    {"every_steps": 1, "when_busy": "wait", "keep_last": 1, "journal": True},
    {"every_steps": 20, "when_busy": "wait", "keep_last": 3, "at_end": True},
)
"""Settings of `Checkpoints`, in turn."""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="fork and SIGKILL are POSIX")


class Line:
    """A run that is killed again and again."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.newest: CheckpointName | None = None
        """The checkpoint that the next attempt must resume from."""
        self.saved = 0

    def attempt(self, **options: Any) -> Outcome:
        """Run one attempt; compare its reports, and what it leaves, with the checkpoint that it had to start from."""
        outcome = run_job("train", run_dir=self.run_dir, **options)
        start = self.newest.step if self.newest is not None else 0
        assert outcome.reports.get("starts", []) in ([], [[start, reference[start]]])
        announced = [CheckpointName.parse(text) for text in outcome.reports.get("saved", [])]
        self.saved += len(announced)
        sight = look(self.run_dir)
        assert not sight.rejected
        must = announced[-1] if announced else self.newest
        assert must is None or (sight.name is not None and not sight.name < must), (sight, must)
        self.newest = sight.name
        return outcome


@injected("injection", range(125), 1)
def test_a_run_killed_at_any_time_resumes_from_its_last_announced_checkpoint_or_a_newer_one(
    injection: int, tmp_path: Path
) -> None:
    """A run is killed eight times at random instants."""
    chance, line = random.Random(injection), Line(tmp_path / "run")
    for _ in range(KILLS):
        after = chance.choice((0, 0, 1, 2, 5))
        _, status, errors = line.attempt(
            resume="auto",
            epochs=1_000_000,
            kill_after=after,
            # While it starts and resumes, or anywhere within the few saves that come next.
            kill_s=chance.uniform(0.0, 0.06 if after == 0 else 0.03),
            **CHAINS[injection % len(CHAINS)],
        )
        assert status == -9, errors
    assert line.saved


@injected("injection", range(PARTS), 1)
def test_a_run_killed_at_any_call_to_the_disk_leaves_what_it_announced(injection: int, tmp_path: Path) -> None:
    """It dies at any call of the first three saves and two deletions, half of a write done; the next attempt ends."""
    made = calls_of(tmp_path / "whole", callbacks=[Tally()])
    assert len(made) > 100
    # The quick selection are renames, the most delicate calls.
    numbers = sorted(range(len(made)), key=lambda number: made[number].name != "rename")
    each = -(-len(numbers) // PARTS)
    for number in numbers[injection * each : (injection + 1) * each]:
        line = Line(tmp_path / str(number))
        assert line.attempt(kill_at=number).status == -9, f"it did not come to call {number}"
        _, status, errors = line.attempt(resume="auto")
        assert status == 0, errors
        assert line.newest is not None
        assert line.newest.step == 6
        assert not leftovers(line.run_dir)
