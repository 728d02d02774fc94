"""The run folder: one holder at a time, whatever becomes of it."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from events.errors import RunFolderError, RunFolderHeld, RunFolderMismatch
from events.journal.writer import Journal
from events.messages import Event, TrainStepEnded
from events.run.folder import RunFolder, is_held
from events.sink import RunInfo

ROOT = Path(__file__).parents[2]
POSIX = pytest.mark.skipif(os.name == "nt", reason="flock and fork are POSIX")


def step(seq: int, attempt: int = 1, run_id: str = "run") -> Event:
    return TrainStepEnded(run_id, attempt, seq, time.time(), 0, seq, 0, "train", loss=1.0)


def write_journal(folder: Path, events: list[Event]) -> None:
    writer = Journal().open(RunInfo(events[0].run_id, run_dir=str(folder)))
    writer.write(events)
    writer.close()


def child(code: str) -> subprocess.Popen[str]:
    """A process that can import the library, with pipes for its input and output."""
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


# ---------------------------------------------------------------------------------------------- unhappy paths


def test_a_folder_that_another_process_holds_names_its_holder(tmp_path: Path) -> None:
    """The message says which process, where, for which run, since when, and what to do."""
    code = f"""
from events.run.folder import RunFolder
folder = RunFolder.open({str(tmp_path)!r}, "theirs")
print("held", flush=True)
input()
"""
    with child(code) as process:
        assert line_of(process) == "held"
        with pytest.raises(RunFolderHeld) as caught:
            RunFolder.open(tmp_path, "mine")
        message = str(caught.value)
        holder = json.loads((tmp_path / "run.lock").read_text())
        year = time.strftime("%Y", time.localtime(holder["since"]))
        for part in (
            str(tmp_path),
            f"process {process.pid}",
            socket.gethostname(),
            "'theirs'",
            year,
            "stop it",
        ):
            assert part in message
        process.communicate("\n")
    RunFolder.open(tmp_path, "mine").close()


def test_two_runs_in_one_process_conflict_too(tmp_path: Path) -> None:
    """A service that starts the same run twice would spoil its journal."""
    with RunFolder.open(tmp_path, "run"):
        with pytest.raises(RunFolderHeld, match=f"process {os.getpid()} "):
            RunFolder.open(tmp_path, "run")
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    RunFolder.open(tmp_path, "run").close()


def test_a_holder_that_has_not_signed_is_still_a_holder(tmp_path: Path) -> None:
    """The lock is the operating system's; the text in it is for people."""
    with RunFolder.open(tmp_path, "run"):
        (tmp_path / "run.lock").write_text("{")
        with pytest.raises(RunFolderHeld, match="has not signed"):
            RunFolder.open(tmp_path, "run")


@POSIX
def test_a_killed_trainer_frees_its_folder_while_its_forked_worker_lives_on(tmp_path: Path) -> None:
    """An orphaned dataloader worker must not hold the folder of a trainer that was killed."""
    code = f"""
import os
from events.run.folder import RunFolder
folder = RunFolder.open({str(tmp_path)!r}, "run")
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, b"x")
    os.close(1)  # the parent's end of the test's pipe must close with the parent
    input()
    os._exit(0)
os.read(read, 1)
print("forked", flush=True)
input()
"""
    with child(code) as process:
        assert line_of(process) == "forked"
        with pytest.raises(RunFolderHeld):  # the child's closing its copy has not unlocked the parent's
            RunFolder.open(tmp_path, "run")
        process.send_signal(signal.SIGKILL)
        process.wait()
        RunFolder.open(tmp_path, "run").close()  # the worker still waits for its input


@POSIX
def test_a_folder_is_closed_in_a_forked_child(tmp_path: Path) -> None:
    """A child has no part in the hold and cannot write the run's arguments."""
    code = f"""
import os
from events.errors import RunFolderError
from events.run.folder import RunFolder
folder = RunFolder.open({str(tmp_path)!r}, "run")
pid = os.fork()
if pid == 0:
    try:
        folder.write_json("arguments.json", {{}})
    except RunFolderError:
        os._exit(3)
    os._exit(0)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
input()
"""
    with child(code) as process:
        assert line_of(process) == "3"
        with pytest.raises(RunFolderHeld):
            RunFolder.open(tmp_path, "run")
        process.communicate("\n")


@POSIX
def test_a_removed_lock_file_does_not_let_two_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock on a file that lost its name before it was locked excludes nobody, so another is taken."""
    import events.run.folder as module

    lock_descriptor = module.lock_descriptor
    removed = []

    def remove_first(fd: int) -> None:
        if not removed:
            removed.append(True)
            os.unlink(tmp_path / "run.lock")
        lock_descriptor(fd)

    monkeypatch.setattr(module, "lock_descriptor", remove_first)
    with RunFolder.open(tmp_path, "run"), pytest.raises(RunFolderHeld):
        RunFolder.open(tmp_path, "run")


def test_a_file_system_that_cannot_lock_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network file systems have no locks; to go on without one would not be safe. Nothing is left."""

    def refuse(fd: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("events.run.folder.lock_descriptor", refuse)
    with pytest.raises(RunFolderError, match=r"a/b cannot be used: .*choose another folder"):
        RunFolder.open(tmp_path / "a" / "b", "run")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_run_is_left_as_it_is(tmp_path: Path) -> None:
    """Both runs are named, and what to do; not even a lock file is added."""
    write_journal(tmp_path, [step(1, run_id="theirs")])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RunFolderMismatch, match=r"belongs to run 'theirs', not to 'mine'; choose") as caught:
        RunFolder.open(tmp_path, "mine")
    assert "run_id='theirs'" in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(RunFolderMismatch, match="'theirs'"):
        Journal().open(RunInfo("mine", run_dir=str(tmp_path)))


@pytest.mark.parametrize("inside", ["", "x", "x/y"])
def test_a_file_is_no_folder(tmp_path: Path, inside: str) -> None:
    """Nor is anything below one."""
    file = tmp_path / "file"
    file.write_text("precious")
    with pytest.raises(RunFolderError, match=r"file.* cannot be used: .*choose another folder"):
        RunFolder.open(file / inside, "run")
    assert file.read_text() == "precious"


@pytest.mark.parametrize("name", ["n" * 300, "nul\0", "a/" + "n" * 300])
def test_a_path_that_cannot_exist_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    """The parents that were created on the way are removed again."""
    with pytest.raises(RunFolderError, match="cannot be used"):
        RunFolder.open(tmp_path / name, "run")
    assert list(tmp_path.iterdir()) == []


def test_a_journal_that_is_a_file_leaves_nothing_behind(tmp_path: Path) -> None:
    """Found only after the lock was taken: the lock file goes again, and the lock with it."""
    (tmp_path / "journal").write_text("")
    for _ in range(2):
        with pytest.raises(RunFolderError, match="journal"):
            RunFolder.open(tmp_path, "run")
        assert [path.name for path in tmp_path.iterdir()] == ["journal"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    """The message says what was refused."""
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunFolderError, match="Permission denied"):
            RunFolder.open(tmp_path, "run")
    finally:
        tmp_path.chmod(0o700)


def test_arguments_that_cannot_be_written_leave_the_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is replaced as a whole or not at all, and nothing half-written stays."""

    def refuse(source: Any, target: Any, **folders: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with RunFolder.open(tmp_path, "run") as folder:
        folder.write_json("arguments.json", {"epochs": 1})
        monkeypatch.setattr("events.safe_files.os.replace", refuse)
        with pytest.raises(RunFolderError, match=r"arguments\.json cannot be written: .*No space"):
            folder.write_json("arguments.json", {"epochs": 2})
        assert json.loads((tmp_path / "arguments.json").read_text()) == {"epochs": 1}
        assert not list(tmp_path.glob("*.tmp"))


def test_a_closed_folder_writes_no_arguments(tmp_path: Path) -> None:
    """It may be another's by then."""
    folder = RunFolder.open(tmp_path, "run")
    folder.close()
    folder.close()
    with pytest.raises(RunFolderError, match="was closed"):
        folder.write_json("arguments.json", {})


# ------------------------------------------------------------------------------------------------ happy paths


def test_a_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    """It is empty but for the lock and the journal's folder, and its numbering starts from nothing."""
    with RunFolder.open(tmp_path / "runs" / "one", "run") as folder:
        assert folder.path == tmp_path / "runs" / "one"
        assert folder.journal_dir == folder.path / "journal"
        assert folder.journal_dir.is_dir()
        assert (folder.last_attempt, folder.last_seq) == (0, 0)
    holder = json.loads((tmp_path / "runs" / "one" / "run.lock").read_text())
    assert (holder["pid"], holder["run_id"], holder["host"]) == (os.getpid(), "run", socket.gethostname())


def test_a_run_is_taken_up_again_behind_its_history(tmp_path: Path) -> None:
    """The next attempt numbers on from what the journal holds, over several attempts and segments."""
    write_journal(tmp_path, [step(1), step(2)])
    write_journal(tmp_path, [step(3, attempt=2), step(9, attempt=2)])
    with RunFolder.open(tmp_path, "run") as folder:
        assert (folder.last_attempt, folder.last_seq) == (2, 9)


def test_an_attempt_that_was_claimed_is_not_used_again(tmp_path: Path) -> None:
    """Though nothing of it has reached the journal, and whatever else was written over the claim."""
    with RunFolder.open(tmp_path, "run") as folder:
        folder.claim(1)
    with RunFolder.open(tmp_path, "run") as folder:
        assert folder.last_attempt == 1
        folder.claim(2)
        assert json.loads((tmp_path / "run.lock").read_text())["attempt"] == 2
    with RunFolder.open(tmp_path, "run") as folder:
        assert (folder.last_attempt, folder.last_seq) == (2, 0)
    with pytest.raises(RunFolderError, match="was closed"):
        folder.claim(3)
    with RunFolder.open(tmp_path, "another") as folder:
        assert folder.last_attempt == 0
    for junk in (b"", b"[", b'{"pid":1,"host":"h","run_id":"run","since":0,"attempt":-1}', b" " * 100_000):
        (tmp_path / "run.lock").write_bytes(junk)
        with RunFolder.open(tmp_path, "run") as folder:
            assert folder.last_attempt == 0
        assert (tmp_path / "run.lock").stat().st_size < 66_000
        assert json.loads((tmp_path / "run.lock").read_text())["run_id"] == "run"


def test_a_torn_end_is_read_past(tmp_path: Path) -> None:
    """What others may have seen of a line that was never finished is not numbered again."""
    write_journal(tmp_path, [step(1), step(2)])
    write_journal(tmp_path, [step(3, attempt=2)])
    newest = sorted((tmp_path / "journal").iterdir())[-1]
    newest.write_bytes(newest.read_bytes()[:-20])
    with RunFolder.open(tmp_path, "run") as folder:
        assert (folder.last_attempt, folder.last_seq) == (1, 3)
    newest.write_bytes(b"\0" * 2_000_000)  # what some file systems leave after a loss of power
    with RunFolder.open(tmp_path, "run") as folder:
        assert (folder.last_attempt, folder.last_seq) == (1, 3)


def test_arguments_are_plain_json_for_people(tmp_path: Path) -> None:
    """Indented, and whatever is no plain value is text; a later attempt replaces them."""
    with RunFolder.open(tmp_path, "run") as folder:
        folder.write_json("arguments.json", {"epochs": 3, "device": Path("cpu"), "lr": math.nan})
        text = (tmp_path / "arguments.json").read_text()
        assert json.loads(text) == {"epochs": 3, "device": "cpu", "lr": None}
        assert text.startswith('{\n  "epochs"')
        folder.write_json("arguments.json", {"epochs": 4})
        assert json.loads((tmp_path / "arguments.json").read_text()) == {"epochs": 4}
        endless = {"interval_s": math.inf, "bounds": [1.0, {"low": -math.inf}]}
        folder.write_json("arguments.json", endless)
        assert json.loads((tmp_path / "arguments.json").read_text(), parse_constant=pytest.fail) == endless


def test_who_only_looks_keeps_nobody_from_taking_the_folder(tmp_path: Path) -> None:
    """Watchers look again and again whether a run is under way, and one may begin at that moment."""
    RunFolder.open(tmp_path / "run", "run").close()
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            is_held(tmp_path / "run")

    lookers = [threading.Thread(target=look) for _ in range(3)]
    for looker in lookers:
        looker.start()
    try:
        for _ in range(200):
            with RunFolder.open(tmp_path / "run", "run"):
                pass
    finally:
        over.set()
        for looker in lookers:
            looker.join()


@POSIX
def test_another_user_cannot_lock_a_folder_that_they_may_read(tmp_path: Path) -> None:
    """Whoever may open the lock file may lock it, so its owner alone may: also one that is there from before."""
    (tmp_path / "run.lock").touch(0o644)
    RunFolder.open(tmp_path, "run").close()
    RunFolder.open(tmp_path / "new", "run").close()
    assert [stat.S_IMODE(os.stat(one / "run.lock").st_mode) for one in (tmp_path, tmp_path / "new")] == [0o600, 0o600]


@POSIX
@pytest.mark.skipif(os.name != "nt" and os.geteuid() != 0, reason="needs to become another user")
def test_another_users_run_is_under_way_while_its_journal_grows() -> None:
    """Its lock is not for us to open."""
    code = """
import os
import sys
from pathlib import Path
from events.run.folder import is_held
os.setgid(65534)
os.setuid(65534)
folder = Path(sys.argv[1])
try:
    os.open(folder / "run.lock", os.O_RDONLY)
except PermissionError:
    print(is_held(folder))
"""
    with tempfile.TemporaryDirectory() as name, RunFolder.open(name, "run") as folder:
        os.chmod(name, 0o755)
        write_journal(Path(name), [step(1)])
        [segment] = folder.journal_dir.iterdir()
        for age_s, expected in ((0, "True"), (10**4, "False"), (-(10**4), "False")):
            os.utime(segment, (time.time() - age_s,) * 2)
            result = subprocess.run([sys.executable, "-c", code, name], cwd=ROOT, capture_output=True, text=True)
            assert (result.stdout.strip(), result.stderr) == (expected, "")
