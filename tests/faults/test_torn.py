"""The machine stops: whatever the file system has made durable of a save by then, an announced checkpoint is there.

The calls of real saves are recorded, and played to a small model of a file system (`disk_crash`). After each call, the
states that it may be found in are made and read as a resumed run would read them. That this finds anything at all is
shown by the same for saves that leave out a sync, or do things in another order.
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

from events.checkpoint.manifest import CheckpointName
from events.checkpoint.store import CheckpointStore
from events.errors import CheckpointError
from trainer.checkpoint.loaded import Loaded

NEVER = 10**9
RESUME_EVERY = 40
"""From one of so many states a run goes on, and the others are only read."""
STRIDE = 8
INJECTIONS = {
    "test_after_a_power_failure_at_any_call_what_was_announced_is_there_and_whole": (1, 8),
    "test_what_a_killed_run_has_not_synced_does_not_cost_what_the_next_one_announces": (1, 8),
    "test_a_call_that_failed_before_the_power_did_costs_nothing_that_was_announced": (1, 8),
}


@pytest.fixture(scope="module")
def reference(disk: Any) -> Any:
    return disk.Reference()


@pytest.fixture
def states(helpers: Any, disk: Any, reference: Any, tmp_path: Path) -> States:
    return States(helpers("disk_crash"), disk, reference, tmp_path)


class States:
    """Plays recorded calls, and looks at what may be found after each."""

    def __init__(self, crash: Any, disk: Any, reference: Any, folder: Path) -> None:
        self.root = folder / "disk"
        self.root.mkdir()
        self.run_dir = self.root / "run"
        self.looked_at = 0
        self.made: list[Any] = []
        """The calls of the last record from its first announcement on."""
        self._crash = crash
        self._disk = disk
        self._reference = reference
        self._made = folder / "state"
        self._seen: set[Any] = set()

    def record(self, fault: Any = None, **options: Any) -> list[Any]:
        """The calls of a run with three saves and two deletions."""
        with self._disk.Calls(fault or self._disk.Fault(NEVER, None, from_event=1)) as calls:
            self._disk.make_trainer(self.run_dir, callbacks=[self._disk.Tally()], **options).train()
        self.made = calls.made
        return calls.log

    def bad(self, log: Iterable[Any], limit: int, *, start: int = 0, stride: int = 1) -> str | None:
        """What is wrong with the first state that must not be; None if there is none.

        Args:
            limit: States that are looked at after each call.
            start: Number of the first call after which they are looked at;
            stride: then after every so many.
        """
        chance = random.Random(start)
        machine = self._machine()
        announced = None
        for number, call in enumerate(log):
            if call.name == "announce":
                announced = CheckpointName.parse(call.path)
            else:
                machine.play(call)
            if number < start or (number - start) % stride:
                continue
            for tree in machine.states(limit, chance):
                key = announced, self._crash.fingerprint(tree)
                if key in self._seen:
                    continue
                self._seen.add(key)
                self.looked_at += 1
                if problem := self._problem(tree, announced, resumes=self.looked_at % RESUME_EVERY == 0):
                    return f"after {call.name} {call.path}: {problem}"
        return None

    def _machine(self) -> Any:
        return self._crash.Machine(self.root, unsynced=["run"])

    def _problem(self, tree: Any, announced: CheckpointName | None, *, resumes: bool) -> str | None:
        self._crash.make(tree, self._made)
        run_dir = self._made / "run"
        try:
            sight = self._disk.look(run_dir, self._reference)
            if announced is not None and (sight.name is None or sight.name < announced):
                return f"{announced} was announced, and {sight.name} is resumed from"
            store = CheckpointStore(run_dir / "checkpoints")
            for name in store.names():  # not only of those that were announced
                self._disk.check(Loaded(store.path(name)), self._reference)
            if resumes:
                self._resume(run_dir)
        except (CheckpointError, AssertionError) as error:
            return str(error)
        finally:
            shutil.rmtree(self._made)
        return None

    def _resume(self, run_dir: Path) -> None:
        """Train to the end from what there is."""
        module = self._disk.Counting()
        self._disk.make_trainer(run_dir, module=module, resume="auto", epochs=3, callbacks=[self._disk.Tally()]).train()
        assert self._disk.digest_of(module) == self._reference[18]
        assert not self._disk.leftovers(run_dir)

    def stop_after(self, log: list[Any]) -> None:
        """Have the disk as a process has left it that was killed after these calls."""
        machine = self._machine()
        for call in log:
            machine.play(call)
        shutil.rmtree(self.root)
        self._crash.make(machine.now(), self.root)


@pytest.mark.timeout(300)
def test_after_a_power_failure_at_any_call_what_was_announced_is_there_and_whole(
    injection: int, states: States, full: bool
) -> None:
    """Of three saves that delete the one before, all crash states are made; no name is that of a torn one, ever."""
    log = states.record()
    assert sum(call.name == "announce" for call in log) == 3
    assert states.bad(log, 10_000 if full else 5, start=injection, stride=STRIDE) is None
    assert states.looked_at > (100 if full else 30)


@pytest.mark.timeout(300)
def test_what_a_killed_run_has_not_synced_does_not_cost_what_the_next_one_announces(
    injection: int, states: States, full: bool
) -> None:
    """A process dies after any call, another goes on, and the power fails: it has relied on nothing unsynced."""
    first = states.record()
    for count in range(injection, len(first), 2 * STRIDE) if full else (1, 90):
        log = first[:count]
        states.stop_after(log)
        log += states.record(resume="auto", epochs=2)
        assert states.bad(log, 4 if full else 3, start=count, stride=3 if full else 17) is None


@pytest.mark.timeout(300)
def test_a_call_that_failed_before_the_power_did_costs_nothing_that_was_announced(
    injection: int, states: States, disk: Any, full: bool
) -> None:
    """Any call fails once, the writer cleans up and goes on, and the power fails at any call."""
    states.record()
    renamed = [call.name for call in states.made].index("rename")
    for number in range(injection, len(states.made), STRIDE) if full else (renamed + 2,):  # the sync of that
        shutil.rmtree(states.run_dir)
        log = states.record(disk.Fault(number, errno.EIO, from_event=1))
        assert states.bad(log, 4 if full else 3, stride=2 if full else 5) is None


# ---------------------------------------------------------------------------------------- saves that are not right

Change = Callable[[list[Any]], list[Any]]
_SAVED = r"/checkpoints/\.step-\d+\.a1\.\w+\.tmp"


def without_sync(path: str) -> Change:
    """Leave out the syncs of what has such a path."""

    def change(log: list[Any]) -> list[Any]:
        left = [call for call in log if not (call.name == "fsync" and re.search(path + "$", call.path))]
        assert len(left) < len(log)
        return left

    return change


def without_sync_of_deletions(log: list[Any]) -> list[Any]:
    """Remove files before it is certain that their checkpoint's name is gone."""
    begins = [number for number, call in enumerate(log) if call.name == "rename" and call.to.endswith(".tmp")]
    syncs = {next(number for number in range(begin, len(log)) if log[number].name == "fsync") for begin in begins}
    return [call for number, call in enumerate(log) if number not in syncs]


def without_temporary_folder(log: list[Any]) -> list[Any]:
    """Write to the place where the checkpoint is to be found."""
    saving = [call for call in log if not (call.name == "rename" and re.search(_SAVED, call.path))]
    return [call._replace(path=re.sub(r"/\.(step-\d+\.a1)\.\w+\.tmp", r"/\1", call.path)) for call in saving]


def with_the_manifest_first(log: list[Any]) -> list[Any]:
    """Write to that place, and the manifest before everything else."""
    placed = without_temporary_folder(log)
    changed = list(placed)
    for call in placed:
        if call.name == "mkdir" and "/step-" in call.path:
            manifest = [one for one in placed if one.path == f"{call.path}/manifest.json" and one.name != "unlink"]
            changed = [one for one in changed if one not in manifest]
            changed[changed.index(call) + 1 : changed.index(call) + 1] = manifest
    return changed


def deleting_first(log: list[Any]) -> list[Any]:
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
def test_a_save_that_leaves_out_a_sync_or_an_order_is_found_out(
    change: Change, announcements: int, states: States
) -> None:
    """The same states of a save that is not right hold one that must not be: so the others would have shown it."""
    log = states.record()
    changed = change(log)
    start = [0, *(number for number, call in enumerate(changed) if call.name == "announce")][announcements]
    first = next(number for number, call in enumerate(changed) if call is not log[number])
    assert states.bad(changed, 64, start=max(start, first)) is not None


# -------------------------------------------------------------------------------------------- is the record whole?


def test_the_kernel_sees_no_change_of_the_disk_that_was_not_recorded(nursery: Any, tmp_path: Path) -> None:
    """strace and the record agree about every call that changes something there, and about their order."""
    if shutil.which("strace") is None:
        pytest.skip("there is no strace here")
    folder = str(tmp_path / "run" / "checkpoints")
    said, status, _ = nursery("traced", run_dir=tmp_path / "run", trace=tmp_path / "trace")
    if "skip" in said:
        pytest.skip(said["skip"][0])
    assert status == 0
    recorded = [(name, path, to) for name, path, to, flags in said["calls"][0] if changes(name, flags)]
    recorded = [call for call in recorded if call[1].startswith(folder)]
    seen = [call for call in kernel_calls(tmp_path) if folder in (call[1] + call[2])]
    assert len(recorded) > 60
    assert seen == recorded


CHANGING = {"write", "pwrite", "ftruncate", "fsync", "rename", "unlink", "rmdir", "mkdir"}
_KERNEL_NAMES = {
    "pwrite64": "pwrite",
    "openat": "open",
    "creat": "open",
    "mkdirat": "mkdir",
    "renameat": "rename",
    "renameat2": "rename",
}
_READING = {
    *("stat", "lstat", "fstat", "newfstatat", "statx", "access", "faccessat", "faccessat2", "readlink", "readlinkat"),
    *("getcwd", "chdir", "statfs", "fstatfs", "getdents64", "read", "pread64", "lseek", "close", "fcntl", "ioctl"),
    *("dup", "dup2", "dup3", "poll", "ppoll", "select", "pselect6", "epoll_ctl", "epoll_wait", "epoll_pwait"),
    *("inotify_add_watch", "execve", "readv", "flock", "getxattr", "pipe2", "eventfd2", "epoll_create1", "fadvise64"),
}
_LINE = re.compile(r"(\d+\.\d+) (\w+)\((.*)\)\s+= (-?\d+)")


def changes(name: str, flags: int) -> bool:
    return name in CHANGING or (name == "open" and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)))


def kernel_calls(folder: Path) -> list[tuple[str, str, str]]:
    """What strace has seen that is not mere reading: the call, its path, and the path that it leads to."""
    found = []
    for path in folder.glob("trace.*"):
        for line in path.read_text().splitlines():
            match = _LINE.match(line)
            if match is None or match[4].startswith("-"):  # an error has changed nothing
                continue
            time, name, arguments = match[1], match[2], match[3]
            if name in _READING or (name == "mmap" and not ("MAP_SHARED" in arguments and "PROT_WRITE" in arguments)):
                continue
            if name in ("open", "openat") and not re.search("O_WRONLY|O_RDWR|O_CREAT|O_TRUNC", arguments):
                continue
            if name == "unlinkat" or name == "unlink":
                name = "rmdir" if "AT_REMOVEDIR" in arguments else "unlink"
            paths = re.findall(r'"([^"]*)"', arguments) if not re.match(r"\d+<", arguments) else []
            of_descriptor = re.match(r"\d+<([^>]*)>", arguments)
            first = of_descriptor[1] if of_descriptor is not None else paths[0] if paths else ""
            second = paths[1] if len(paths) > 1 else ""
            if _KERNEL_NAMES.get(name, name) in ("open", "mkdir", "rename", "unlink", "rmdir") and of_descriptor:
                within, names = re.findall(r"\d+<([^>]*)>", arguments), re.findall(r'"([^"]*)"', arguments)
                first, second = [f"{within[at]}/{inside}" for at, inside in enumerate(names)] + [""] * (2 - len(names))
            found.append((float(time), (_KERNEL_NAMES.get(name, name), first, second)))
    return [call for _, call in sorted(found)]
