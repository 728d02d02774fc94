"""A disk that is full, fails, or is read-only: the checkpoint before stays, and training continues, up to a point.

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
from faults.child import run_job
from faults.disk_kit import (
    Arrivals,
    Calls,
    Counting,
    Fault,
    Tally,
    calls_of,
    is_refused,
    leftovers,
    look,
    look_since,
    make_trainer,
    reference,
)
from faults.injections import injected

from events.checkpoint.manifest import CheckpointName
from events.errors import CheckpointsFailing
from events.messages import CheckpointFailed, CheckpointSaved, RunEnded, TrainStepEnded

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
"""File systems, their trouble, and whether it lasts."""
STEPS = 18
"""Enough that steps are left when the writer comes to the last of these calls."""
CODES = [errno.ENOSPC, errno.EIO, errno.EROFS]


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[int]]:
    """Twenty calls for each reason, over the second and third save and the deletions after them."""
    made = calls_of(tmp_path_factory.mktemp("whole") / "run", from_event=1, callbacks=[Tally()])
    found = {}
    for code in CODES:
        may_fail = [number for number, call in enumerate(made) if is_refused(code, call)]
        assert len(may_fail) > POINTS
        found[code] = [may_fail[index * len(may_fail) // POINTS] for index in range(POINTS)]
    return found


@injected("injection", range(POINTS), 2)
@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_disk_that_refuses_costs_one_checkpoint_and_is_reported_within_a_step(
    injection: int, code: int, points: dict[int, list[int]], tmp_path: Path
) -> None:
    """The failure is reported before the next step has ended, the checkpoint before is intact, and saving continues."""
    run_dir, arrivals = tmp_path / "run", Arrivals()
    fault = Fault(points[code][injection], code, lasting=True, from_event=1)
    noticed_in: list[int] = []

    class Noticing(Counting):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            if fault.noticed.is_set() and not noticed_in:
                noticed_in.append(global_step)
                arrivals.wait_for(CheckpointFailed)
            return super().train_step(global_step, batch, device)

    def heal(name: str) -> None:
        fault.healed = True  # or this reader would fail, too
        look_since(run_dir, calls.announced)

    module, calls = Noticing(STEPS), Calls(fault, on_failed=heal)
    with calls:
        result = make_trainer(run_dir, module=module, sinks=[arrivals], callbacks=[Tally()]).train()
    assert result.status == "finished"
    assert module.digest() == reference[STEPS]
    [failed] = arrivals.of(CheckpointFailed)
    assert os.strerror(code) in failed.error
    assert failed.consecutive == 1
    assert [event.checkpoint for event in arrivals.of(CheckpointSaved)] == [
        f"step-{step}.a1" for step in range(2, STEPS + 1, 2) if failed.during == "delete" or step != failed.global_step
    ]
    [step] = [event for event in arrivals.of(TrainStepEnded) if event.global_step in noticed_in]
    assert arrivals.events.index(failed) < arrivals.events.index(step)
    assert look(run_dir) == (CheckpointName(STEPS, 1), [])


@injected("injection", range(POINTS), 1)
@pytest.mark.parametrize("code", CODES, ids=errno.errorcode.get)
def test_a_disk_that_keeps_refusing_ends_the_run_after_three_checkpoints(
    injection: int, code: int, points: dict[int, list[int]], tmp_path: Path
) -> None:
    """Each failure is reported, then the run raises the disk's error; another attempt resumes from the last save."""
    run_dir, arrivals = tmp_path / "run", Arrivals()
    calls = Calls(Fault(points[code][injection], code, lasting=True, from_event=1))
    with calls, pytest.raises(CheckpointsFailing, match=r"3 checkpoints in a row.*run") as caught:
        make_trainer(run_dir, epochs=10_000, sinks=[arrivals], callbacks=[Tally()]).train()
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == code
    failed = [event for event in arrivals.of(CheckpointFailed) if event.during == "write"]
    assert [event.consecutive for event in failed] == [1, 2, 3]
    assert arrivals.of(TrainStepEnded)[-1].global_step > failed[0].global_step
    [ended] = arrivals.of(RunEnded)
    assert ended.status == "failed"
    assert "CheckpointsFailing" in ended.reason
    look_since(run_dir, calls.announced)
    again = make_trainer(run_dir, resume="auto", epochs=4, callbacks=[Tally()])
    assert again.train().global_step == 24
    assert look(run_dir) == (CheckpointName(24, 2), [])
    assert not leftovers(run_dir)


class Refusing:
    """The module ``os``, of which everything that writes fails with an error number, once there is one."""

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


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("parts", [["journal"], ["checkpoint"], ["journal", "checkpoint"]], ids=" and ".join)
@pytest.mark.parametrize("step", [1, 5], ids=["from the first step on", "at the end"])
@pytest.mark.parametrize("fails", [True, False], ids=["a step fails", "no step fails"])
def test_a_disk_that_refuses_does_not_use_up_the_drain_of_a_run(
    step: int, parts: list[str], code: int, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run raises its own error, and the journal's last tries end long before the drain's deadline."""
    refusing, arrivals = Refusing(), Arrivals()
    for name, module in list(sys.modules.items()):
        part = name.split(".")[1] if name.startswith(("events.journal.writer", "events.checkpoint.")) else ""
        if part in parts and getattr(module, "os", None) is os:
            monkeypatch.setattr(module, "os", refusing)
    monkeypatch.setattr("events.bus.observer.LAST_TRIES_S", 0.3)

    class Fails(Counting):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            if global_step == step:
                refusing.code = code
            if global_step == 6 and fails:
                raise ZeroDivisionError
            return super().train_step(global_step, batch, device)

    run = make_trainer(tmp_path / "run", module=Fails(), sinks=[arrivals], journal=True, drain_timeout_s=300.0)
    expected = contextlib.suppress(CheckpointsFailing)
    with pytest.raises((ZeroDivisionError, CheckpointsFailing)) if fails else expected:
        run.train()
    assert arrivals.of(RunEnded)
    assert refusing.code == code


@pytest.mark.skipif(os.name == "nt", reason="mounts and fork are POSIX")
@injected("kind, trouble, lasting", REAL, 3)
def test_a_real_disk_that_is_full_or_read_only_costs_no_saved_checkpoint(
    kind: str, trouble: str, lasting: bool, tmp_path: Path
) -> None:
    """A small real file system refuses after three saves: two checkpoints are lost, with a report, or the run ends."""
    run_dir = mount_at = tmp_path / "run"
    if trouble == "read-only":  # the open lock in the run's folder would prevent that
        mount_at = run_dir / "checkpoints"
    mount_at.mkdir(parents=True)
    reports, status, errors = run_job(
        "train_on_real_disk", run_dir=run_dir, mount_at=mount_at, kind=kind, trouble=trouble, lasting=lasting
    )
    if "skip" in reports:
        pytest.skip(reports["skip"][0])
    assert status == 0, errors
    reason = os.strerror(errno.EROFS if trouble == "read-only" else errno.ENOSPC)
    assert len(reports["errors"][0]) == (3 if lasting else 2)
    assert all(reason in error for error in reports["errors"][0])
