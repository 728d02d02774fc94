"""Any call that a save makes to the disk may fail: that costs one checkpoint at most, and is reported.

The calls are counted at the border between the writer and ``os``; each of them fails in a run of its own.
"""

from __future__ import annotations

import errno
import itertools
from pathlib import Path
from typing import Any

import pytest
from faults.disk_kit import (
    Arrivals,
    Calls,
    Counting,
    Fault,
    calls_of,
    leftovers,
    look,
    look_since,
    make_trainer,
    names_in,
    no_descriptor_leaks,
    reference,
)
from faults.injections import FULL, injected

from events.checkpoint import files
from events.checkpoint.manifest import CheckpointName
from events.errors import CheckpointError
from events.messages import CheckpointDeleted, CheckpointFailed, CheckpointSaved, TrainStepEnded, WeightsSaved

STRIDE = 12


@injected("injection", range(STRIDE), 1)
@pytest.mark.parametrize("afterwards", [False, True], ids=["undone", "done"])
def test_a_call_that_fails_costs_one_checkpoint_at_most_and_is_reported(
    injection: int, afterwards: bool, tmp_path: Path
) -> None:
    """After the first checkpoint each call fails once, done or not: training and saving continue."""
    count = len(calls_of(tmp_path / "whole", from_event=1, weights="last"))
    assert count > 80
    # The quick selection shares the calls between both cases.
    for number in range(injection + (afterwards and not FULL) * STRIDE, count, STRIDE if FULL else 2 * STRIDE):
        run_dir, arrivals, module = tmp_path / str(number), Arrivals(), Counting()
        fault = Fault(number, errno.EIO, afterwards=afterwards, from_event=1)
        calls = Calls(fault)
        calls.on_failed = lambda name: look_since(run_dir, calls.announced)  # noqa: B023  # of this round
        with no_descriptor_leaks(), calls:
            result = make_trainer(run_dir, module=module, sinks=[arrivals], weights="last").train()
        assert fault.struck
        assert result.status == "finished"
        assert module.digest() == reference[6]
        saved, failed = arrivals.of(CheckpointSaved, WeightsSaved), arrivals.of(CheckpointFailed)
        lost = [event for event in failed if event.during == "write"]
        assert len(failed) == fault.noticed.is_set()  # not set if the call removed a file that did not exist
        assert len(saved) + len(lost) == 4  # three, and the weights
        assert not [name for name in leftovers(run_dir) for event in lost if event.checkpoint in name]
        look_since(run_dir, calls.announced)
        # The next attempt removes what this one could not remove at the very end.
        make_trainer(run_dir, resume="auto", epochs=2).train()
        assert names_in(run_dir) == ["step-12.a2"]
        assert not leftovers(run_dir)


@injected("injection", range(2), 1)
def test_a_checkpoint_that_could_not_be_deleted_is_deleted_by_the_same_run_later(
    injection: int, tmp_path: Path
) -> None:
    """Any call of a deletion fails: the next save deletes the rest, and one failure is reported."""
    made = calls_of(tmp_path / "whole", from_event=2)
    deletion = list(itertools.takewhile(lambda call: "step-6" not in call.path, made))
    assert {call.name for call in deletion} >= {"listdir", "rename", "fsync", "unlink", "rmdir"}
    for number in range(injection, len(deletion), 2):
        run_dir, arrivals = tmp_path / str(number), Arrivals()
        with Calls(Fault(number, errno.EIO, from_event=2)):
            make_trainer(run_dir, sinks=[arrivals]).train()
        assert [event.during for event in arrivals.of(CheckpointFailed)] == ["delete"]
        assert names_in(run_dir) == ["step-6.a1"]
        assert [event.checkpoint for event in arrivals.of(CheckpointDeleted)] == ["step-2.a1", "step-4.a1"]
        assert not leftovers(run_dir)


@pytest.mark.parametrize("count", [7, 1000, 4096, 5000])
def test_a_disk_that_takes_only_a_part_of_each_write_gets_all_of_it(count: int, tmp_path: Path) -> None:
    """By complete pages or not: the next write continues there."""
    steps = 2 if count == 7 else 6
    with Calls(takes=lambda length: min(length, count)) as calls:
        make_trainer(tmp_path / "run", module=Counting(steps), weights="last").train()
    assert len([call for call in calls.log if call.name in ("write", "pwrite")]) > 20
    assert look(tmp_path / "run") == (CheckpointName(steps, 1), [])


def test_a_disk_that_takes_no_bytes_fails_the_write(tmp_path: Path) -> None:
    arrivals = Arrivals()
    with Calls(takes=lambda length: 0), pytest.raises(CheckpointError, match="takes no bytes"):
        make_trainer(tmp_path / "run", sinks=[arrivals]).train()
    assert not arrivals.of(TrainStepEnded)  # the note of the attempt could not be written


def test_a_best_checkpoint_that_cannot_be_read_at_one_moment_is_not_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown metric is not a worse one."""
    run_dir = tmp_path / "run"
    manifest = run_dir / "checkpoints" / "step-2.a1" / "manifest.json"
    read, refused = files.read_below, []

    def read_below(root: Path, name: str, limit_bytes: int) -> bytes:
        path = root / name
        if path == manifest and not refused and (run_dir / "checkpoints" / "step-4.a1").exists():
            refused.append(path)
            raise OSError(errno.EIO, "read error", str(path))
        return read(root, name, limit_bytes)

    class Validated(Counting):
        def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
            return [self.batch]

    monkeypatch.setattr(files, "read_below", read_below)
    make_trainer(run_dir, module=Validated(), val_interval_steps=2, best="val_loss").train()
    assert refused
    assert names_in(run_dir) == ["step-2.a1", "step-6.a1"]


@injected("injection", range(4), 1)
def test_a_call_that_fails_at_the_start_is_raised_before_training_and_changes_nothing(
    injection: int, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    make_trainer(run_dir).train()
    count = len(calls_of(run_dir, resume="auto"))  # the epoch is over: nothing is saved
    assert count > 10
    for number in range(injection, count, 4):
        arrivals, fault = Arrivals(), Fault(number, errno.EIO)
        with no_descriptor_leaks(), Calls(fault), pytest.raises((CheckpointError, OSError)):
            make_trainer(run_dir, resume="auto", epochs=2, sinks=[arrivals]).train()
        assert fault.struck
        assert not arrivals.of(TrainStepEnded)
        assert look(run_dir) == (CheckpointName(6, 1), [])
    assert make_trainer(run_dir, resume="auto", epochs=2).train().global_step == 12
