"""A disk that is full, fails, or may not be written to: the checkpoint before stays, training goes on, up to a point.

At the border between the writer and ``os`` for all three reasons and at many points; and on real file systems that are
filled up, or made read-only, in a mount namespace of their own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from events.checkpoint.manifest import CheckpointName
from events.errors import CheckpointsFailing
from events.messages import CheckpointFailed, CheckpointSaved, RunEnded, TrainStepEnded

INJECTIONS = {
    "test_a_disk_that_refuses_costs_one_checkpoint_and_is_told_within_a_step": (2, 20),
    "test_a_disk_that_goes_on_refusing_ends_the_run_after_three_checkpoints": (1, 20),
    "test_a_real_disk_that_is_full_or_read_only_costs_no_checkpoint_that_was_saved": (3, 10),
}
POINTS = 20
REAL = [
    ("ext4", "almost full", False),
    ("tmpfs", "full", False),
    ("ext4", "read-only", True),
    ("ext4", "almost full", True),
    ("ext4", "full", False),
    ("ext4", "full", True),
    ("ext4", "read-only", False),
    ("tmpfs", "full", True),
    ("tmpfs", "read-only", False),
    ("tmpfs", "read-only", True),
]
"""File systems, what becomes of them, and whether that lasts."""
STEPS = 18
"""So many that there are steps left when the writer comes to the last of these calls."""
CODES = [errno.ENOSPC, errno.EIO, errno.EROFS]


@pytest.fixture(scope="module")
def reference(disk: Any) -> Any:
    return disk.Reference()


@pytest.fixture(scope="module")
def points(disk: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[int]]:
    """Twenty calls for each reason, over the second and third save and the deletions after them."""
    with disk.Calls(disk.Fault(10**9, None, from_event=1)) as calls:
        disk.make_trainer(tmp_path_factory.mktemp("whole") / "run", callbacks=[disk.Tally()]).train()
    found = {}
    for code in CODES:
        may_fail = [number for number, call in enumerate(calls.made) if disk.refused(code, call)]
        assert len(may_fail) > POINTS
        found[code] = [may_fail[index * len(may_fail) // POINTS] for index in range(POINTS)]
    return found


def noticing(disk: Any, fault: Any, arrivals: Any) -> Any:
    """A module whose first step that begins after the writer has met the fault does not end before that was told."""

    class Noticing(disk.Counting):  # type: ignore[misc, name-defined]
        noticed_in: int | None = None

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            if fault.noticed.is_set() and self.noticed_in is None:
                self.noticed_in = global_step
                arrivals.wait_for(CheckpointFailed)
            return super().train_step(global_step, batch, device)

    return Noticing(STEPS)


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_disk_that_refuses_costs_one_checkpoint_and_is_told_within_a_step(
    injection: int, code: int, points: dict[int, list[int]], disk: Any, reference: Any, tmp_path: Path
) -> None:
    """The one before is whole at that moment; it is told before the next step has ended; then saving goes on."""
    run_dir, arrivals = tmp_path / "run", disk.Arrivals()
    fault = disk.Fault(points[code][injection], code, lasting=True, from_event=1)

    def heal(name: str) -> None:
        fault.healed = True  # or we could not look either
        sight = disk.look(run_dir, reference)
        assert not sight.rejected
        assert not sight.name < CheckpointName.parse(calls.announced)

    module = noticing(disk, fault, arrivals)
    calls = disk.Calls(fault, on_failed=heal)
    with calls:
        result = disk.make_trainer(run_dir, module=module, sinks=[arrivals], callbacks=[disk.Tally()]).train()
    assert result.status == "finished"
    assert disk.digest_of(module) == reference[STEPS]
    (failed,) = arrivals.of(CheckpointFailed)
    assert os.strerror(code) in failed.error
    assert failed.consecutive == 1
    assert [event.checkpoint for event in arrivals.of(CheckpointSaved)] == [
        f"step-{step}.a1" for step in range(2, STEPS + 1, 2) if failed.during == "delete" or step != failed.global_step
    ]
    (step,) = [event for event in arrivals.of(TrainStepEnded) if event.global_step == module.noticed_in]
    assert arrivals.events.index(failed) < arrivals.events.index(step)
    assert disk.look(run_dir, reference) == (CheckpointName(STEPS, 1), [])


@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_disk_that_goes_on_refusing_ends_the_run_after_three_checkpoints(
    injection: int, code: int, points: dict[int, list[int]], disk: Any, reference: Any, tmp_path: Path
) -> None:
    """Each is told, then the run raises what the disk said; another attempt goes on from the last that was saved."""
    run_dir, arrivals = tmp_path / "run", disk.Arrivals()
    fault = disk.Fault(points[code][injection], code, lasting=True, from_event=1)
    calls = disk.Calls(fault)
    with calls, pytest.raises(CheckpointsFailing, match=r"3 checkpoints in a row.*run") as caught:
        disk.make_trainer(run_dir, epochs=10_000, sinks=[arrivals], callbacks=[disk.Tally()]).train()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == code
    failed = [event for event in arrivals.of(CheckpointFailed) if event.during == "write"]
    assert [event.consecutive for event in failed] == [1, 2, 3]
    assert arrivals.of(TrainStepEnded)[-1].global_step > failed[0].global_step
    (ended,) = arrivals.of(RunEnded)
    assert ended.status == "failed"
    assert "CheckpointsFailing" in ended.reason
    sight = disk.look(run_dir, reference)
    assert not sight.rejected
    assert not sight.name < CheckpointName.parse(calls.announced)
    again = disk.make_trainer(run_dir, resume="auto", epochs=4, callbacks=[disk.Tally()])
    assert again.train().global_step == 24
    assert disk.look(run_dir, reference) == (CheckpointName(24, 2), [])
    assert not disk.leftovers(run_dir)


class Refusing:
    """The module ``os``, of which everything that writes fails with an error number once there is one."""

    code: int | None = None

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in ("open", "write", "pwrite", "writev", "fsync", "rename", "replace", "mkdir", "posix_fallocate"):
            return real

        def call(*args: Any, **named: Any) -> Any:
            if self.code is not None and (name != "open" or args[1] & os.O_CREAT):
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **named)

        return call


@pytest.mark.timeout(60)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("parts", [["journal"], ["checkpoint"], ["journal", "checkpoint"]], ids=" and ".join)
@pytest.mark.parametrize("step", [1, 5], ids=["from the first step on", "at the end"])
@pytest.mark.parametrize("fails", [True, False], ids=["a step fails", "no step fails"])
def test_a_disk_that_refuses_does_not_use_up_the_drain_of_a_run(
    step: int, parts: list[str], code: int, fails: bool, disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run raises its own error, and its journal is given up long before the drain's deadline, by name."""
    refusing = Refusing()
    for name, module in list(sys.modules.items()):
        part = name.split(".")[1] if name.startswith(("events.journal.writer", "events.checkpoint.")) else ""
        if part in parts and getattr(module, "os", None) is os:
            monkeypatch.setattr(module, "os", refusing)
    monkeypatch.setattr("events.bus.observer.LAST_TRIES_S", 0.3)

    class Fails(disk.Counting):  # type: ignore[misc, name-defined]
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            if global_step == step:
                refusing.code = code
            if global_step == 6 and fails:
                raise ZeroDivisionError
            return super().train_step(global_step, batch, device)

    arrivals = disk.Arrivals()
    make = disk.make_trainer
    trainer = make(tmp_path / "run", module=Fails(), sinks=[arrivals], journal=True, drain_timeout_s=300.0)
    if fails:
        with pytest.raises((ZeroDivisionError, CheckpointsFailing)):
            trainer.train()
    else:
        with contextlib.suppress(CheckpointsFailing):
            trainer.train()
    assert arrivals.of(RunEnded)
    assert refusing.code == code


@pytest.mark.skipif(os.name == "nt", reason="mounts and fork are POSIX")
def test_a_real_disk_that_is_full_or_read_only_costs_no_checkpoint_that_was_saved(
    injection: int, nursery: Any, tmp_path: Path
) -> None:
    """A run on a small real file system, which refuses after three saves: two are told and lost, or the run ends."""
    kind, trouble, lasting = REAL[injection]
    run_dir = mount_at = tmp_path / "run"
    if trouble == "read-only":  # the lock in the run's folder is held open, and does not let the disk become so
        mount_at = run_dir / "checkpoints"
    mount_at.mkdir(parents=True)
    said, status, _ = nursery(
        "on_real_disk", run_dir=run_dir, mount_at=mount_at, kind=kind, trouble=trouble, lasting=lasting
    )
    if "skip" in said:
        pytest.skip(said["skip"][0])
    assert status == 0
    reason = os.strerror(errno.EROFS if trouble == "read-only" else errno.ENOSPC)
    assert len(said["errors"][0]) == (3 if lasting else 2)
    assert all(reason in error for error in said["errors"][0])
