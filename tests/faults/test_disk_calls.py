"""Any call that a save makes to the disk may fail: that costs this checkpoint at most, and is told.

The calls are counted at the border between the writer and ``os``, and each is made to fail in a run of its own.
"""

from __future__ import annotations

import errno
import functools
import itertools
from pathlib import Path
from typing import Any

import pytest

from events.checkpoint import files
from events.checkpoint.manifest import CheckpointName
from events.checkpoint.store import CheckpointStore
from events.errors import CheckpointError
from events.messages import CheckpointDeleted, CheckpointFailed, CheckpointSaved, TrainStepEnded, WeightsSaved

INJECTIONS = {
    "test_a_call_that_fails_costs_one_checkpoint_at_most_and_is_told": (1, 12),
    "test_a_call_that_fails_at_the_start_is_raised_before_anything_is_trained_and_costs_nothing": (1, 4),
    "test_a_checkpoint_that_could_not_be_deleted_is_deleted_by_the_same_run_later": (1, 2),
}
STRIDE = 12
NEVER = 10**9


@pytest.fixture(scope="module")
def reference(disk: Any) -> Any:
    return disk.Reference()


@pytest.mark.parametrize("afterwards", [False, True], ids=["undone", "done"])
def test_a_call_that_fails_costs_one_checkpoint_at_most_and_is_told(
    injection: int, afterwards: bool, disk: Any, reference: Any, tmp_path: Path
) -> None:
    """After the first checkpoint each call fails once, done or not: the one before stays, training and saving go on."""
    with disk.Calls(disk.Fault(NEVER, None, from_event=1)) as calls:
        disk.make_trainer(tmp_path / "whole", weights=True).train()
    assert len(calls.made) > 80
    for number in range(injection, len(calls.made), STRIDE):
        run_dir = tmp_path / str(number)
        fault = disk.Fault(number, errno.EIO, afterwards=afterwards, from_event=1)
        arrivals, module = disk.Arrivals(), disk.Counting()
        calls = disk.Calls(fault)
        calls.on_failed = functools.partial(look, disk, run_dir, reference, calls)
        with disk.no_descriptor_leaks(), calls:
            result = disk.make_trainer(run_dir, module=module, sinks=[arrivals], weights=True).train()
        assert fault.struck
        assert result.status == "finished"
        assert disk.digest_of(module) == reference[6]
        saved, failed = arrivals.of(CheckpointSaved, WeightsSaved), arrivals.of(CheckpointFailed)
        lost = [event for event in failed if event.during == "write"]
        assert len(failed) == fault.noticed.is_set()  # not so if it has removed in vain what is not there
        assert len(saved) + len(lost) == 4  # three, and the weights
        assert not [name for name in disk.leftovers(run_dir) for event in lost if event.checkpoint in name]
        look(disk, run_dir, reference, calls)
        # The next attempt clears away what could not be cleared away at the very end.
        disk.make_trainer(run_dir, resume="auto", epochs=2).train()
        assert [str(name) for name in CheckpointStore(run_dir / "checkpoints").names()] == ["step-12.a2"]
        assert not disk.leftovers(run_dir)


def look(disk: Any, run_dir: Path, reference: Any, calls: Any, failed: str = "") -> None:
    """See that what was announced last, or what is newer, would be resumed from, and nothing is damaged."""
    sight = disk.look(run_dir, reference)
    assert not sight.rejected
    assert not sight.name < CheckpointName.parse(calls.announced)


def test_a_checkpoint_that_could_not_be_deleted_is_deleted_by_the_same_run_later(
    injection: int, disk: Any, reference: Any, tmp_path: Path
) -> None:
    """Whatever call of a deletion fails, the next save deletes what is left of it, and nobody is told twice."""
    with disk.Calls(disk.Fault(NEVER, None, from_event=2)) as calls:
        disk.make_trainer(tmp_path / "whole").train()
    deletion = list(itertools.takewhile(lambda call: "step-6" not in call.path, calls.made))
    assert {call.name for call in deletion} >= {"listdir", "rename", "fsync", "unlink", "rmdir"}
    for number in range(injection, len(deletion), 2):
        run_dir, arrivals = tmp_path / str(number), disk.Arrivals()
        with disk.Calls(disk.Fault(number, errno.EIO, from_event=2)):
            disk.make_trainer(run_dir, sinks=[arrivals]).train()
        assert [event.during for event in arrivals.of(CheckpointFailed)] == ["delete"]
        assert [str(name) for name in CheckpointStore(run_dir / "checkpoints").names()] == ["step-6.a1"]
        assert [event.checkpoint for event in arrivals.of(CheckpointDeleted)] == ["step-2.a1", "step-4.a1"]
        assert not disk.leftovers(run_dir)


@pytest.mark.parametrize("count", [1, 1000, 4096, 5000])
def test_a_disk_that_takes_only_a_part_of_each_write_has_all_of_it_in_the_end(
    count: int, disk: Any, reference: Any, tmp_path: Path
) -> None:
    """A write may do less than it was asked to, by whole pages or not: the rest is written with the next one."""
    steps = 2 if count == 1 else 6
    with disk.Calls(takes=lambda length: min(length, count)) as calls:
        disk.make_trainer(tmp_path / "run", module=disk.Counting(steps), weights=True).train()
    assert len([call for call in calls.log if call.name in ("write", "pwrite")]) > 20
    assert disk.look(tmp_path / "run", reference) == (CheckpointName(steps, 1), [])


def test_a_disk_that_takes_nothing_and_says_nothing_is_no_endless_loop(disk: Any, tmp_path: Path) -> None:
    """The checkpoint has failed."""
    arrivals = disk.Arrivals()
    with disk.Calls(takes=lambda length: 0), pytest.raises(CheckpointError, match="takes no bytes"):
        disk.make_trainer(tmp_path / "run", sinks=[arrivals]).train()
    assert not arrivals.of(TrainStepEnded)  # the note of the attempt could not be written


def test_a_best_checkpoint_that_cannot_be_read_for_the_moment_is_not_deleted(
    disk: Any, reference: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That its metric is not known now does not make it a worse one."""
    run_dir = tmp_path / "run"
    manifest = run_dir / "checkpoints" / "step-2.a1" / "manifest.json"
    read, refused = files.read_below, []

    def read_below(root: Path, name: str, limit_bytes: int) -> bytes:
        path = root / name
        if path == manifest and len(refused) < 1 and (run_dir / "checkpoints" / "step-4.a1").exists():
            refused.append(path)
            raise OSError(errno.EIO, "read error", str(path))
        return read(root, name, limit_bytes)

    class Validated(disk.Counting):  # type: ignore[misc, name-defined]
        def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
            return [self.batch]

    monkeypatch.setattr(files, "read_below", read_below)
    disk.make_trainer(run_dir, module=Validated(), val_interval_steps=2, best="val_loss").train()
    assert refused
    assert [str(name) for name in CheckpointStore(run_dir / "checkpoints").names()] == ["step-2.a1", "step-6.a1"]


def test_a_call_that_fails_at_the_start_is_raised_before_anything_is_trained_and_costs_nothing(
    injection: int, disk: Any, reference: Any, tmp_path: Path
) -> None:
    """A run that cannot note what it starts from says so before it trains; what there is stays as it is."""
    run_dir = tmp_path / "run"
    disk.make_trainer(run_dir).train()
    with disk.Calls(disk.Fault(NEVER, None)) as calls:
        disk.make_trainer(run_dir, resume="auto").train()  # the epoch is over: nothing is saved
    assert len(calls.made) > 10
    for number in range(injection, len(calls.made), 4):
        arrivals = disk.Arrivals()
        fault = disk.Fault(number, errno.EIO)
        with disk.no_descriptor_leaks(), disk.Calls(fault), pytest.raises((CheckpointError, OSError)):
            disk.make_trainer(run_dir, resume="auto", epochs=2, sinks=[arrivals]).train()
        assert fault.struck
        assert not arrivals.of(TrainStepEnded)
        assert disk.look(run_dir, reference) == (CheckpointName(6, 1), [])
    assert disk.make_trainer(run_dir, resume="auto", epochs=2).train().global_step == 12
