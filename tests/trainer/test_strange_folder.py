"""A run in a folder that a stranger has prepared: nothing of the user's outside of it is read, changed or removed."""

from __future__ import annotations

import logging
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from events.errors import RunFolderError
from events.inbox import send_command
from events.messages import CheckpointRejected, RunResumed
from events.protocol import Stop
from sinks import CSV, JSONL, Live, TensorBoard
from trainer import Checkpoints

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="links and FIFOs are POSIX"),
    pytest.mark.timeout(120),
]

KINDS = ("link", "dangling link", "hard link", "FIFO", "folder", "socket")
FILES = ("arguments.json", "config.json", "events.jsonl", "metrics.csv", "live.json", "weights.safetensors")
FOLDERS = ("media", "tensorboard", "commands", "sinks")


class Secret:
    """A file and a folder of the user, which no run may touch."""

    def __init__(self, folder: Path) -> None:
        self.file, self.folder, self.new = folder / "secret", folder / "private", folder / "new"
        self.file.write_bytes(b"secret\n")
        self.folder.mkdir()
        (self.folder / "step-1.a1").mkdir()
        (self.folder / "keep.json").write_bytes(b"{}")
        self.sockets: list[socket.socket] = []

    def put(self, path: Path, kind: str) -> None:
        """Put at a path what leads to them, or cannot be opened as a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if kind == "hard link":
            os.link(self.file, path)
        elif kind == "FIFO":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "socket":
            one = socket.socket(socket.AF_UNIX)
            here = Path.cwd()
            os.chdir(path.parent)  # an address has 108 bytes at most
            try:
                one.bind(path.name)
            finally:
                os.chdir(here)
            self.sockets.append(one)
        else:
            target = {"link": self.file, "dangling link": self.new, "linked folder": self.folder}[kind]
            path.symlink_to(target)

    def check(self) -> None:
        """See that they are as they were."""
        assert self.file.read_bytes() == b"secret\n"
        assert sorted(path.name for path in self.folder.rglob("*")) == ["keep.json", "step-1.a1"]
        assert (self.folder / "keep.json").read_bytes() == b"{}"
        assert not self.new.exists()


@pytest.fixture
def secret(tmp_path: Path) -> Iterator[Secret]:
    made = Secret(tmp_path)
    yield made
    for one in made.sockets:
        one.close()


def train(kit: Any, run_dir: Path, **options: Any) -> Any:
    """Train with all that writes to a run's folder."""

    class Talks(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.log("note", "x" * 10_000)
            return super().train_step(global_step, batch, device)

    own = {
        "sinks": [JSONL(), CSV(), TensorBoard(), Live(port=0)],
        "config": {"lr": 1},
        "checkpoints": Checkpoints(every_steps=1),
        "resume": "auto",
    }
    return kit.train(Talks(), run_dir=run_dir, run_id="run", journal=True, **(own | options))


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_of_a_run_is_written_through_what_a_stranger_put_there(
    kit: Any, tmp_path: Path, secret: Secret, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The run trains all the same; a sink that cannot be opened for it names the path."""
    run_dir = tmp_path / "run"
    for name in FILES:
        secret.put(run_dir / name, kind)
    with caplog.at_level(logging.WARNING):
        outcome = train(kit, run_dir)
    secret.check()
    if kind == "folder":  # which no file replaces
        assert isinstance(outcome.error, RunFolderError)
        assert str(run_dir / "arguments.json") in str(outcome.error)
        return
    assert outcome.result.status == "finished"
    for name in ("events.jsonl", "metrics.csv"):
        assert f"{run_dir / name}" in caplog.text
    assert (run_dir / "weights.safetensors").is_file()
    assert not (run_dir / "arguments.json").is_symlink()


def test_no_folder_of_a_run_is_written_through_a_link(
    kit: Any, tmp_path: Path, secret: Secret, caplog: pytest.LogCaptureFixture
) -> None:
    """Pictures, sinks and commands do without theirs, with a warning that names it."""
    run_dir = tmp_path / "run"
    for name in FOLDERS:
        secret.put(run_dir / name, "linked folder")
    with caplog.at_level(logging.WARNING):
        assert train(kit, run_dir).result.status == "finished"
    secret.check()
    for name in ("media", "tensorboard"):
        assert str(run_dir / name) in caplog.text


@pytest.mark.parametrize("name", ["run.lock", "journal", "checkpoints"])
@pytest.mark.parametrize("kind", ["link", "linked folder", "dangling link", "FIFO"])
def test_a_run_whose_lock_journal_or_checkpoints_lead_elsewhere_does_not_begin(
    kit: Any, tmp_path: Path, secret: Secret, name: str, kind: str
) -> None:
    """The error names the path, and says to remove it."""
    run_dir = tmp_path / "run"
    secret.put(run_dir / name, kind)
    outcome = train(kit, run_dir, sinks=[])
    secret.check()
    assert type(outcome.error).__module__ == "events.errors"
    assert str(run_dir / name) in str(outcome.error)
    assert "remove" in str(outcome.error)


@pytest.mark.parametrize("kind", ["link", "FIFO", "folder", "hard link"])
def test_a_command_that_is_not_a_file_is_refused_once(
    kit: Any, tmp_path: Path, secret: Secret, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where it can be removed it is; the commands after it are taken."""
    run_dir = tmp_path / "run"

    class Waits(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            if global_step == 1:
                secret.put(run_dir / "commands" / "99999999999999999998.json", kind)
                send_command(run_dir, Stop(id="1", reason="enough"))
            return super().train_step(global_step, batch, device)

    with caplog.at_level(logging.WARNING):
        outcome = kit.train(Waits(), run_dir=run_dir, journal=True, epochs=10**6)
    secret.check()
    assert outcome.result.reason == "enough"
    assert caplog.text.count("commands/99999999999999999998.json is not a command") == 1


# ----------------------------------------------------------------------------------- checkpoints of another run


def saved(kit: Any, run_dir: Path, run_id: str, **options: Any) -> Any:
    """Train two steps an epoch, with a checkpoint after each, and nothing else that names the run."""
    settings = Checkpoints(every_steps=1, when_busy="wait", keep_last=None, at_end=False, best="val_loss")
    return kit.train(kit.Net(), run_dir=run_dir, run_id=run_id, journal=False, **({"checkpoints": settings} | options))


@pytest.mark.parametrize("resume", ["auto", "best"])
def test_a_checkpoint_of_another_run_is_rejected_and_the_runs_own_is_resumed(
    kit: Any, tmp_path: Path, resume: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is newer, better and valid, but of another run: an event and a warning name both runs."""
    saved(kit, tmp_path / "theirs", "theirs", epochs=4)
    saved(kit, tmp_path / "run", "run", epochs=1)
    shutil.copytree(tmp_path / "theirs/checkpoints/step-8.a1", tmp_path / "run/checkpoints/step-8.a1")
    with caplog.at_level(logging.WARNING):
        outcome = saved(kit, tmp_path / "run", "run", epochs=2, resume=resume)
    assert outcome.of(RunResumed)[0].global_step == 2
    rejected = {event.checkpoint: event.error for event in outcome.of(CheckpointRejected)}
    assert "belongs to run 'theirs', not to 'run'" in rejected["step-8.a1"]
    assert caplog.text.count("belongs to run 'theirs', not to 'run'") >= 1
    assert outcome.result.global_step == 4


def test_a_folder_that_has_only_another_runs_checkpoints_starts_a_new_run(kit: Any, tmp_path: Path) -> None:
    """Named by its path, theirs is resumed all the same."""
    saved(kit, tmp_path / "theirs", "theirs", epochs=1)
    shutil.copytree(tmp_path / "theirs/checkpoints", tmp_path / "run/checkpoints")
    outcome = saved(kit, tmp_path / "run", "run", epochs=1, resume="auto")
    assert outcome.result.global_step == 2
    assert [(event.global_step, event.checkpoint) for event in outcome.of(RunResumed)] == [(0, None)]
    assert len(outcome.of(CheckpointRejected)) == 2
    named = saved(kit, tmp_path / "run", "run", epochs=2, resume=tmp_path / "theirs/checkpoints/step-2.a1")
    assert named.of(RunResumed)[0].global_step == 2


def test_a_checkpoint_of_another_run_is_neither_deleted_nor_the_best(kit: Any, tmp_path: Path) -> None:
    """It is not this run's to delete, whatever this run keeps of its own."""
    saved(kit, tmp_path / "theirs", "theirs", epochs=4)
    theirs = tmp_path / "run/checkpoints/step-8.a1"
    shutil.copytree(tmp_path / "theirs/checkpoints/step-8.a1", theirs)
    keeps_one = Checkpoints(every_steps=1, when_busy="wait", keep_last=1, keep_best=0, at_end=False, best="val_loss")
    outcome = saved(kit, tmp_path / "run", "run", epochs=1, checkpoints=keeps_one)
    assert theirs.is_dir()
    assert sorted(path.name for path in theirs.parent.glob("step-*")) == ["step-2.a2", "step-8.a1"]
    assert outcome.result.best_checkpoint == str(theirs.parent / "step-2.a2")
