"""``kill -9`` at any instant of a run that trains and saves: what was announced is there, whole, and is resumed from.

The runs are forked from a process that has imported everything. Each reports a checkpoint at the moment at which it is
announced; what a checkpoint must hold is a function of its step, computed by a loop without a trainer.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import pytest

from events.checkpoint.manifest import CheckpointName

INJECTIONS = {
    "test_a_run_killed_at_any_time_is_resumed_from_what_it_last_announced_or_later": (1, 125),
    "test_a_run_killed_at_any_call_to_the_disk_leaves_what_was_announced": (1, 20),  # in parts
}
KILLS = 8
PARTS = 20
CHAINS: tuple[dict[str, Any], ...] = (
    {"every_steps": 1, "when_busy": "skip", "keep_last": 1},
    {"every_steps": 3, "when_busy": "skip", "keep_last": 2, "journal": True},
    {"every_steps": 1, "when_busy": "wait", "keep_last": 1, "journal": True},
    {"every_steps": 20, "when_busy": "wait", "keep_last": 3, "at_end": True},
)
"""Settings of `Checkpoints`, in turn."""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="fork and SIGKILL are POSIX")


@pytest.fixture(scope="module")
def reference(disk: Any) -> Any:
    return disk.Reference()


class Line:
    """A run that is killed again and again: what it must go on from each time."""

    def __init__(self, run_dir: Path, disk: Any, reference: Any) -> None:
        self.run_dir = run_dir
        self.newest: CheckpointName | None = None
        """What is to be resumed from."""
        self.saved = 0
        self._disk = disk
        self._reference = reference

    def after(self, said: dict[str, list[Any]]) -> None:
        """Compare what a killed attempt has said and left with what it began with."""
        began = self.newest.step if self.newest is not None else 0
        assert said.get("begins", []) in ([], [[began, self._reference[began]]])
        announced = [CheckpointName.parse(text) for text in said.get("saved", [])]
        self.saved += len(announced)
        sight = self._disk.look(self.run_dir, self._reference)
        assert not sight.rejected
        must = announced[-1] if announced else self.newest
        assert must is None or (sight.name is not None and not sight.name < must), (sight, must)
        self.newest = sight.name


def test_a_run_killed_at_any_time_is_resumed_from_what_it_last_announced_or_later(
    injection: int, disk: Any, nursery: Any, reference: Any, tmp_path: Path
) -> None:
    """A run is killed eight times at random, and goes on each time with the newest announced state or a newer one."""
    chance = random.Random(injection)
    line = Line(tmp_path / "run", disk, reference)
    for _ in range(KILLS):
        after = chance.choice((0, 0, 1, 2, 5))
        said, status, killed = nursery(
            "train",
            run_dir=line.run_dir,
            resume="auto",
            epochs=1_000_000,
            kill_after=after,
            # While it starts and resumes, or anywhere within the few saves that come next.
            kill_s=chance.uniform(0.0, 0.06 if after == 0 else 0.03),
            **CHAINS[injection % len(CHAINS)],
        )
        assert killed
        assert status == -9
        line.after(said)
    assert line.saved


def test_a_run_killed_at_any_call_to_the_disk_leaves_what_was_announced(
    injection: int, disk: Any, nursery: Any, reference: Any, tmp_path: Path
) -> None:
    """It dies at any call of the first three saves and two deletions, half of a write done; the next run goes on."""
    with disk.Calls(disk.Fault(10**9, None)) as calls:
        disk.make_trainer(tmp_path / "whole", callbacks=[disk.Tally()]).train()
    assert len(calls.made) > 100
    # The most delicate ones come first: they are the quick selection.
    numbers = sorted(range(len(calls.made)), key=lambda number: calls.made[number].name != "rename")
    each = -(-len(numbers) // PARTS)
    for number in numbers[injection * each : (injection + 1) * each]:
        line = Line(tmp_path / str(number), disk, reference)
        said, status, _ = nursery("train", run_dir=line.run_dir, kill_at=number)
        assert status == -9, f"it did not come to call {number}"
        line.after(said)
        said, status, _ = nursery("train", run_dir=line.run_dir, resume="auto")
        assert status == 0
        line.after(said)
        assert line.newest is not None
        assert line.newest.step == 6
        assert not disk.leftovers(line.run_dir)
