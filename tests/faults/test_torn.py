"""The machine stops: whatever the file system has made durable of a save by then, an announced checkpoint is there.

The calls of real saves are recorded, and played to a small model of a file system (`disk_crash`). The states in which a
crash after each call may leave it are made, and read as a resumed run would read them. The same for saves that omit a
sync, or change the order, shows that this finds faults.
"""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from faults import disk_crash as crash
from faults.child import run_job
from faults.disk_kit import (
    NEVER,
    Call,
    Calls,
    Counting,
    Fault,
    Tally,
    check,
    leftovers,
    look,
    make_trainer,
    reference,
)
from faults.injections import FULL, injected

from events.checkpoint.manifest import CheckpointName
from events.checkpoint.store import CheckpointStore
from events.errors import CheckpointError
from trainer.checkpoint.loaded import Loaded

RESUME_EVERY = 40
"""A run resumes from one of this number of states; the others are only read."""
STRIDE = 8


class States:
    """Plays recorded calls, and reads the states in which a crash after each may leave the disk."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "disk"
        self.root.mkdir()
        self.run_dir = self.root / "run"
        self.read = 0
        self.made: list[Call] = []
        """The calls of the last record from its first announcement on."""
        self._made = folder / "state"
        self._seen: set[tuple[CheckpointName | None, int]] = set()

    def record(self, fault: Fault | None = None, **options: Any) -> list[Call]:
        """The calls of a run with three saves and two deletions."""
        with Calls(fault or Fault(NEVER, None, from_event=1)) as calls:
            make_trainer(self.run_dir, callbacks=[Tally()], **options).train()
        self.made = calls.made
        return calls.log

    def problem(self, log: Iterable[Call], limit: int, *, start: int = 0, stride: int = 1) -> str | None:
        """The problem of the first state that must not be possible.

        Args:
            limit: Maximum states that are read after a call.
            start: Number of the first call after which states are read; from there after every ``stride`` calls.
        """
        chance, machine, announced = random.Random(start), self._machine(), None
        for number, call in enumerate(log):
            if call.name == "announce":
                announced = CheckpointName.parse(call.path)
            else:
                machine.play(call)
            if number < start or (number - start) % stride:
                continue
            for tree in machine.states(limit, chance):
                key = announced, crash.fingerprint(tree)
                if key in self._seen:
                    continue
                self._seen.add(key)
                self.read += 1
                if problem := self._problem_of(tree, announced, resumes=self.read % RESUME_EVERY == 0):
                    return f"after {call.name} {call.path}: {problem}"
        return None

    def _machine(self) -> crash.Machine:
        return crash.Machine(self.root, unsynced=["run"])

    def _problem_of(self, tree: crash.Tree, announced: CheckpointName | None, *, resumes: bool) -> str | None:
        crash.make(tree, self._made)
        run_dir = self._made / "run"
        try:
            sight = look(run_dir)
            if announced is not None and (sight.name is None or sight.name < announced):
                return f"{announced} was announced, and {sight.name} is resumed from"
            store = CheckpointStore(run_dir / "checkpoints")
            for name in store.names():  # those that were not announced, too
                check(Loaded(store.path(name)))
            if resumes:
                module = Counting()
                make_trainer(run_dir, module=module, resume="auto", epochs=3, callbacks=[Tally()]).train()
                assert module.digest() == reference[18]
                assert not leftovers(run_dir)
        except (CheckpointError, AssertionError) as error:
            return str(error)
        finally:
            shutil.rmtree(self._made)
        return None

    def stop_after(self, log: list[Call]) -> None:
        """Make the disk as a process leaves it that is killed after these calls."""
        machine = self._machine()
        for call in log:
            machine.play(call)
        shutil.rmtree(self.root)
        crash.make(machine.now(), self.root)


@pytest.fixture
def states(tmp_path: Path) -> States:
    return States(tmp_path)


@pytest.mark.timeout(300)
@injected("injection", range(STRIDE), 1)
def test_after_a_power_failure_at_any_call_announced_checkpoints_are_there_and_complete(
    injection: int, states: States
) -> None:
    """All crash states of three saves that delete the one before; a name never leads to a torn checkpoint."""
    log = states.record()
    assert sum(call.name == "announce" for call in log) == 3
    assert states.problem(log, 10_000 if FULL else 5, start=injection, stride=STRIDE) is None
    assert states.read > (100 if FULL else 30)


@pytest.mark.timeout(300)
@injected("injection", range(STRIDE), 1)
def test_unsynced_work_of_a_killed_run_does_not_cost_what_the_next_one_announces(
    injection: int, states: States
) -> None:
    """A process dies after any call, another resumes, and the power fails: it did not rely on anything unsynced."""
    first = states.record()
    for count in range(injection, len(first), 2 * STRIDE) if FULL else (1, 90):
        log = first[:count]
        states.stop_after(log)
        log += states.record(resume="auto", epochs=2)
        assert states.problem(log, 4 if FULL else 3, start=count, stride=3 if FULL else 17) is None


@pytest.mark.timeout(300)
@injected("injection", range(STRIDE), 1)
def test_a_call_that_failed_before_the_power_did_costs_no_announced_checkpoint(injection: int, states: States) -> None:
    """Any call fails once, the writer removes the rest and continues, and the power fails at any call."""
    states.record()
    renamed = [call.name for call in states.made].index("rename")
    for number in range(injection, len(states.made), STRIDE) if FULL else (renamed + 2,):  # the sync of that rename
        shutil.rmtree(states.run_dir)
        log = states.record(Fault(number, errno.EIO, from_event=1))
        assert states.problem(log, 4 if FULL else 3, stride=2 if FULL else 5) is None


# ---------------------------------------------------------------------------------------- wrong saves

Change = Callable[[list[Call]], list[Call]]
_SAVED = r"/checkpoints/\.step-\d+\.a1\.\w+\.tmp"


def without_sync(path: str) -> Change:
    def change(log: list[Call]) -> list[Call]:
        left = [call for call in log if not (call.name == "fsync" and re.search(path + "$", call.path))]
        assert len(left) < len(log)
        return left

    return change


def without_sync_of_deletions(log: list[Call]) -> list[Call]:
    """Remove files before the removal of their checkpoint's name is durable."""
    begins = [number for number, call in enumerate(log) if call.name == "rename" and call.to.endswith(".tmp")]
    syncs = {next(number for number in range(begin, len(log)) if log[number].name == "fsync") for begin in begins}
    return [call for number, call in enumerate(log) if number not in syncs]


def without_temporary_folder(log: list[Call]) -> list[Call]:
    """Write to the final folder of the checkpoint."""
    saving = [call for call in log if not (call.name == "rename" and re.search(_SAVED, call.path))]
    return [call._replace(path=re.sub(r"/\.(step-\d+\.a1)\.\w+\.tmp", r"/\1", call.path)) for call in saving]


def with_the_manifest_first(log: list[Call]) -> list[Call]:
    """Write to that folder, the manifest before the other files."""
    placed = without_temporary_folder(log)
    changed = list(placed)
    for call in placed:
        if call.name == "mkdir" and "/step-" in call.path:
            manifest = [one for one in placed if one.path == f"{call.path}/manifest.json" and one.name != "unlink"]
            changed = [one for one in changed if one not in manifest]
            changed[changed.index(call) + 1 : changed.index(call) + 1] = manifest
    return changed


def deleting_first(log: list[Call]) -> list[Call]:
    """Delete the old checkpoint before the new one has its name."""
    announced = [number for number, call in enumerate(log) if call.name == "announce"][1]
    end = next(number for number in range(announced, len(log)) if log[number].name == "rmdir") + 1
    new = next(number for number in range(announced, 0, -1) if log[number].name == "rename")
    return [*log[:new], *log[announced + 1 : end], *log[new : announced + 1], *log[end:]]


@pytest.mark.parametrize(
    ("change", "announcements"),
    [
        pytest.param(without_sync("/checkpoints"), 1, id="parent-folder-not-synced"),
        pytest.param(without_sync(_SAVED), 1, id="folder-not-synced"),
        pytest.param(without_sync(_SAVED + "/tensors.safetensors"), 1, id="tensors-not-synced"),
        pytest.param(without_sync(_SAVED + "/state.msgpack"), 1, id="state-not-synced"),
        pytest.param(without_sync(_SAVED + "/callback-0.msgpack"), 1, id="callback-not-synced"),
        pytest.param(without_sync(_SAVED + "/manifest.json"), 1, id="manifest-not-synced"),
        pytest.param(without_sync("/disk/run"), 1, id="run-folder-not-synced"),
        pytest.param(without_sync("/disk"), 1, id="folder-of-runs-not-synced"),
        pytest.param(without_sync_of_deletions, 2, id="deletion-not-synced"),
        pytest.param(without_temporary_folder, 0, id="no-temporary-folder"),
        pytest.param(with_the_manifest_first, 0, id="manifest-first"),
        pytest.param(deleting_first, 1, id="deleting-before-the-rename"),
    ],
)
def test_a_save_that_omits_a_sync_or_changes_the_order_is_detected(
    change: Change, announcements: int, states: States
) -> None:
    """Among the same states of a wrong save is one that must not be possible: so the other tests would detect it."""
    log = states.record()
    changed = change(log)
    start = [0, *(number for number, call in enumerate(changed) if call.name == "announce")][announcements]
    first = next(number for number, call in enumerate(changed) if call is not log[number])
    assert states.problem(changed, 64, start=max(start, first)) is not None


# -------------------------------------------------------------------------------------------- is the record complete?


def test_the_kernel_sees_no_change_of_the_disk_that_was_not_recorded(tmp_path: Path) -> None:
    """strace and the record agree about every call that changes the folder, and about the order."""
    if shutil.which("strace") is None:
        pytest.skip("there is no strace here")
    folder = str(tmp_path / "run" / "checkpoints")
    reports, status, errors = run_job("traced", run_dir=tmp_path / "run", trace=tmp_path / "trace")
    if "skip" in reports:
        pytest.skip(reports["skip"][0])
    assert status == 0, errors
    recorded = [(name, path, to) for name, path, to, flags in reports["calls"][0] if changes(name, flags)]
    recorded = [call for call in recorded if call[1].startswith(folder)]
    assert len(recorded) > 60
    assert [call for call in kernel_calls(tmp_path) if folder in (call[1] + call[2])] == recorded


CHANGING = {"write", "pwrite", "ftruncate", "fsync", "rename", "unlink", "rmdir", "mkdir"}
_KERNEL_NAMES = {"pwrite64": "pwrite", "openat": "open", "creat": "open", "mkdirat": "mkdir"}
_KERNEL_NAMES |= {"renameat": "rename", "renameat2": "rename"}
_READING = re.compile(
    r"[lf]?stat|newfstatat|statx|access|faccessat2?|readlink(at)?|getcwd|chdir|f?statfs|getdents64|readv?|pread64|lseek"
    r"|close|fcntl|ioctl|dup[23]?|p?poll|select|pselect6|epoll_(ctl|wait|pwait|create1)|inotify_add_watch|execve|flock"
    r"|getxattr|pipe2|eventfd2|fadvise64"
)
_LINE = re.compile(r"(\d+\.\d+) (\w+)\((.*)\)\s+= (-?\d+)")


def changes(name: str, flags: int) -> bool:
    return name in CHANGING or (name == "open" and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)))


def kernel_calls(folder: Path) -> list[tuple[str, str, str]]:
    """The calls in the trace that change something: the name, the path, and the path of a rename's target."""
    found = []
    for path in folder.glob("trace.*"):
        for match in filter(None, map(_LINE.match, path.read_text().splitlines())):
            time, name, arguments, result = match.groups()
            if result.startswith("-"):  # an error has changed nothing
                continue
            if _READING.fullmatch(name) or (
                name == "mmap" and not ("MAP_SHARED" in arguments and "PROT_WRITE" in arguments)
            ):
                continue
            if name in ("open", "openat") and not re.search("O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", arguments):
                continue
            if name in ("unlink", "unlinkat"):
                name = "rmdir" if "AT_REMOVEDIR" in arguments else "unlink"
            name = _KERNEL_NAMES.get(name, name)
            descriptors, paths = re.findall(r"\d+<([^>]*)>", arguments), re.findall(r'"([^"]*)"', arguments)
            if not re.match(r"\d+<", arguments):
                first, second, *_ = [*paths, "", ""]
            elif name in ("open", "mkdir", "rename", "unlink", "rmdir"):  # below a descriptor
                first, second, *_ = [*(f"{descriptors[at]}/{inside}" for at, inside in enumerate(paths)), ""]
            else:
                first, second = descriptors[0], ""
            found.append((float(time), (name, first, second)))
    return [call for _, call in sorted(found)]
