"""A run in a folder that a stranger has prepared: nothing outside of it is read, changed or removed."""

from __future__ import annotations

import itertools
import logging
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.training import Net, Outcome, train

from events.checkpoint import files, store
from events.checkpoint.manifest import CheckpointName
from events.errors import CheckpointError, RunFolderError, SinkMisconfigured
from events.messages import CheckpointFailed, CheckpointRejected, CheckpointSaved, RunResumed
from events.protocol import Stop
from events.run.inbox import FolderCommands
from events.sink import RunInfo
from sinks import CSV, JSONL, Live, Prometheus, TensorBoard
from sinks.files import tensorboard
from trainer import Checkpoints
from trainer.cli.main import main
from trainer.remote.launch import launch

pytestmark = [
    pytest.mark.skipif(os.name == "nt", reason="links and FIFOs are POSIX"),
    pytest.mark.timeout(120),
]

KINDS = ("link", "dangling link", "hard link", "FIFO", "folder", "socket")
FILES = ("arguments.json", "config.json", "events.jsonl", "metrics.csv", "live.json", "weights.safetensors")
FOLDERS = ("media", "tensorboard", "commands", "sinks")


class Secret:
    """A file and a folder of the user."""

    def __init__(self, folder: Path) -> None:
        self.file, self.folder, self.new = folder / "secret", folder / "private", folder / "new"
        self.file.write_bytes(b"secret\n")
        self.folder.mkdir()
        (self.folder / "step-1.a1").mkdir()
        (self.folder / "keep.json").write_bytes(b"{}")
        self.sockets: list[socket.socket] = []

    def put(self, path: Path, kind: str) -> None:
        """Put a link to them at a path, or something that cannot be opened as a file."""
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


def train_all(run_dir: Path, **options: Any) -> Outcome:
    """Train with every part that writes to a run folder."""
    net = Net()
    net.act = lambda step: net.log("note", "x" * 10_000)
    own = {
        "sinks": [JSONL(), CSV(), TensorBoard(), Live(port=0)],
        "config": {"lr": 1},
        "checkpoints": Checkpoints(every_steps=1),
        "resume": "auto",
    }
    return train(net, run_dir=run_dir, run_id="run", journal=True, **(own | options))


@pytest.mark.parametrize("kind", KINDS)
def test_no_file_of_a_run_is_written_through_a_planted_one(
    tmp_path: Path, secret: Secret, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The run trains; a sink that cannot be opened names the path."""
    run_dir = tmp_path / "run"
    for name in FILES:
        secret.put(run_dir / name, kind)
    with caplog.at_level(logging.WARNING):
        outcome = train_all(run_dir)
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
    tmp_path: Path, secret: Secret, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    for name in FOLDERS:
        secret.put(run_dir / name, "linked folder")
    with caplog.at_level(logging.WARNING):
        assert train_all(run_dir).result.status == "finished"
    secret.check()
    for name in ("media", "tensorboard"):
        assert str(run_dir / name) in caplog.text


def test_a_sink_host_whose_folder_is_a_link_is_disabled_and_not_restarted(tmp_path: Path, secret: Secret) -> None:
    secret.put(tmp_path / "run" / "sinks", "linked folder")
    outcome = train(Net(), run_dir=tmp_path / "run", run_id="run", journal=True, sinks=[JSONL()], sinks_in="process")
    secret.check()
    assert outcome.result.status == "finished"
    (problem,) = [line for line in outcome.result.problems if "sink host" in line]
    assert f"a symbolic link, which is not opened below a run folder: '{tmp_path}/run/sinks'; remove that" in problem


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_launched_run_whose_log_is_a_link_is_an_error(
    tmp_path: Path, secret: Secret, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "launched"))
    secret.put(tmp_path / "run" / "log.txt", "link")
    with pytest.raises(RunFolderError, match=r"run/log\.txt cannot be written: .*a symbolic link.*; remove it"):
        async with launch("launched_jobs:build", {}, run_dir=tmp_path / "run", run_id="run") as run:
            await run.result()
    secret.check()


@pytest.mark.parametrize("name", ["run.lock", "journal", "checkpoints"])
@pytest.mark.parametrize("kind", ["link", "linked folder", "dangling link", "FIFO"])
def test_a_run_whose_lock_journal_or_checkpoints_are_links_does_not_start(
    tmp_path: Path, secret: Secret, name: str, kind: str
) -> None:
    run_dir = tmp_path / "run"
    secret.put(run_dir / name, kind)
    outcome = train_all(run_dir, sinks=[])
    secret.check()
    assert type(outcome.error).__module__ == "events.errors"
    assert str(run_dir / name) in str(outcome.error)
    assert "remove" in str(outcome.error)


@pytest.mark.parametrize("attempt", [10**9 - 1, 10**18 - 1])
def test_an_invented_attempt_number_makes_no_later_checkpoint_unfindable(tmp_path: Path, attempt: int) -> None:
    """After the last valid number the run does not start; a greater one is not the name of a checkpoint."""
    (tmp_path / "run/checkpoints" / f"step-1.a{attempt}").mkdir(parents=True)
    outcome = train(Net(), run_dir=tmp_path / "run", run_id="run", checkpoints=Checkpoints(every_steps=1))
    if attempt < 10**9:
        assert isinstance(outcome.error, RunFolderError)
        assert "has attempt 999,999,999" in str(outcome.error)
    else:
        assert [str(name) for name in store.CheckpointStore(tmp_path / "run/checkpoints").names()][-1] == "step-2.a1"


@pytest.mark.parametrize("kind", ["link", "FIFO", "folder", "hard link"])
def test_a_command_that_is_not_a_file_is_refused_once(
    tmp_path: Path, secret: Secret, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Later commands are taken."""
    run_dir = tmp_path / "run"

    class Waits(Net):
        planted = False

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            # The inbox removes what was there before it started.
            if not self.planted and any(thread.name == "stagecast-inbox" for thread in threading.enumerate()):
                self.planted = True
                secret.put(run_dir / "commands" / "00000000000000000001.json", kind)
                FolderCommands(run_dir).send(Stop(id="1", reason="enough"))
            return super().train_step(global_step, batch, device)

    with caplog.at_level(logging.WARNING):
        outcome = train(Waits(), run_dir=run_dir, journal=True, epochs=10**6)
    secret.check()
    assert outcome.result.reason == "enough"
    assert caplog.text.count("commands/00000000000000000001.json is not a command") == 1


# ----------------------------------------------------------------------------------- checkpoints of another run


def saved(run_dir: Path, run_id: str, **options: Any) -> Outcome:
    """Train two steps per epoch, with a checkpoint after each, and nothing else that names the run."""
    settings = Checkpoints(every_steps=1, when_busy="wait", keep_last=None, at_end=False, best="val_loss")
    return train(Net(), run_dir=run_dir, run_id=run_id, journal=False, **({"checkpoints": settings} | options))


@pytest.mark.parametrize("resume", ["auto", "best"])
def test_a_checkpoint_of_another_run_is_rejected_and_the_runs_own_is_resumed(
    tmp_path: Path, resume: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An event and a warning name both runs."""
    saved(tmp_path / "theirs", "theirs", epochs=4)
    saved(tmp_path / "run", "run", epochs=1)
    shutil.copytree(tmp_path / "theirs/checkpoints/step-8.a1", tmp_path / "run/checkpoints/step-8.a1")
    with caplog.at_level(logging.WARNING):
        outcome = saved(tmp_path / "run", "run", epochs=2, resume=resume)
    assert outcome.of(RunResumed)[0].global_step == 2
    rejected = {event.checkpoint: event.error for event in outcome.of(CheckpointRejected)}
    assert "belongs to run 'theirs', not to 'run'" in rejected["step-8.a1"]
    assert caplog.text.count("belongs to run 'theirs', not to 'run'") >= 1
    assert outcome.result.global_step == 4


def test_a_folder_that_has_only_another_runs_checkpoints_starts_a_new_run(tmp_path: Path) -> None:
    saved(tmp_path / "theirs", "theirs", epochs=1)
    shutil.copytree(tmp_path / "theirs/checkpoints", tmp_path / "run/checkpoints")
    outcome = saved(tmp_path / "run", "run", epochs=1, resume="auto")
    assert outcome.result.global_step == 2
    assert [(event.global_step, event.checkpoint) for event in outcome.of(RunResumed)] == [(0, None)]
    assert len(outcome.of(CheckpointRejected)) == 2
    named = saved(tmp_path / "run", "run", epochs=2, resume=tmp_path / "theirs/checkpoints/step-2.a1")
    assert named.of(RunResumed)[0].global_step == 2


def test_a_checkpoint_of_another_run_is_neither_deleted_nor_the_best(tmp_path: Path) -> None:
    saved(tmp_path / "theirs", "theirs", epochs=4)
    theirs = tmp_path / "run/checkpoints/step-8.a1"
    shutil.copytree(tmp_path / "theirs/checkpoints/step-8.a1", theirs)
    keeps_one = Checkpoints(every_steps=1, when_busy="wait", keep_last=1, keep_best=0, at_end=False, best="val_loss")
    outcome = saved(tmp_path / "run", "run", epochs=1, checkpoints=keeps_one)
    assert theirs.is_dir()
    assert sorted(path.name for path in theirs.parent.glob("step-*")) == ["step-2.a2", "step-8.a1"]
    assert outcome.result.best_checkpoint == str(theirs.parent / "step-2.a2")


# ------------------------------------------------------------------------------- what is exchanged during a checkpoint


def exchange(path: Path, target: Path) -> None:
    """Put a link in the place of a folder."""
    path.rename(path.with_name(f"{path.name}.away"))
    path.symlink_to(target)


@pytest.mark.parametrize("what", ["temporary folder", "checkpoints"])
def test_a_link_that_replaces_a_folder_during_a_checkpoint_is_not_followed(
    tmp_path: Path, secret: Secret, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That checkpoint fails; once the link is gone, the next one is saved."""
    folder, begin = tmp_path / "run/checkpoints", store.CheckpointStore.begin

    def exchanged(self: store.CheckpointStore, name: CheckpointName) -> Any:
        made = begin(self, name)
        if name.step == 1:
            (temporary,) = folder.glob(".step-1.*")
            if what == "checkpoints":
                shutil.copytree(temporary, secret.folder / temporary.name)
            exchange(temporary if what == "temporary folder" else folder, secret.folder)
        elif what == "checkpoints":
            pytest.fail("a checkpoint was begun behind a link")
        return made

    monkeypatch.setattr(store.CheckpointStore, "begin", exchanged)
    settings = Checkpoints(every_steps=1, when_busy="wait", at_end=False, weights=False)
    outcome = train(Net(), run_dir=tmp_path / "run", run_id="run", epochs=1, checkpoints=settings)
    for path in secret.folder.glob(".step-1.*"):
        path.rmdir()  # it was not written to
    secret.check()
    assert [event.checkpoint for event in outcome.of(CheckpointFailed)][:1] == ["step-1.a1"]
    expected = ["step-2.a1"] if what == "temporary folder" else []
    assert [event.checkpoint for event in outcome.of(CheckpointSaved)] == expected


def test_a_link_that_replaces_the_checkpoints_during_a_deletion_is_not_followed(
    tmp_path: Path, secret: Secret, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run/checkpoints"
    (folder / "step-1.a1").mkdir(parents=True)
    (folder / "step-1.a1" / "file").write_bytes(b"old")
    checkpoints, rename = store.CheckpointStore(folder), os.replace

    def exchanged(source: Any, target: Any, **options: Any) -> None:
        monkeypatch.undo()
        rename(source, target, **options)
        shutil.copytree(secret.folder, secret.folder / Path(target).name)
        exchange(folder, secret.folder)

    monkeypatch.setattr(os, "rename", exchanged)
    monkeypatch.setattr(os, "replace", exchanged)
    with pytest.raises(OSError, match="symbolic link"):
        checkpoints.remove(CheckpointName(1, 1))
    (copy,) = secret.folder.glob(".step-1.*")
    assert (copy / "keep.json").is_file()
    shutil.rmtree(copy)
    secret.check()


def test_an_event_file_is_not_created_through_a_link_that_replaces_its_folder(
    tmp_path: Path, secret: Secret, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = itertools.count

    def exchanged(first: int) -> Any:
        exchange(tmp_path / "run/tensorboard", secret.folder)
        return count(first)

    monkeypatch.setattr(tensorboard, "itertools", SimpleNamespace(count=exchanged))
    with pytest.raises(SinkMisconfigured, match="symbolic link"):
        TensorBoard().open(RunInfo("run", run_dir=str(tmp_path / "run")))
    secret.check()


@pytest.mark.parametrize("kind", [*KINDS, "linked folder"])
def test_a_download_replaces_what_has_the_name_of_its_checkpoint(tmp_path: Path, secret: Secret, kind: str) -> None:
    settings = Checkpoints(every_steps=1, when_busy="wait", upload=(tmp_path / "store").as_uri())
    saved(tmp_path / "run", "run", epochs=1, checkpoints=settings)
    secret.put(tmp_path / "here/checkpoints/step-2.a1", kind)
    secret.put(tmp_path / "here/checkpoints/attempt-1.json", "link")
    outcome = saved(tmp_path / "here", "run", epochs=2, resume=f"{(tmp_path / 'store').as_uri()}/run/step-2.a1")
    secret.check()
    assert outcome.of(RunResumed)[0].global_step == 2
    assert outcome.result.global_step == 4
    assert not (tmp_path / "here/checkpoints/attempt-1.json").is_symlink()


@pytest.mark.parametrize("name", ["checkpoints", "resumed"])
def test_a_download_does_not_follow_a_linked_folder(tmp_path: Path, secret: Secret, name: str) -> None:
    settings = Checkpoints(every_steps=1, when_busy="wait", upload=(tmp_path / "store").as_uri())
    saved(tmp_path / "run", "run", epochs=1, checkpoints=settings)
    secret.put(tmp_path / "here" / name, "linked folder")
    url = f"{(tmp_path / 'store').as_uri()}/run/step-2.a1"
    own = name == "checkpoints"
    outcome = saved(tmp_path / "here", "run" if own else "other", epochs=2, **{"resume" if own else "init_from": url})
    secret.check()
    assert str(tmp_path / "here" / name) in str(outcome.error)


# ------------------------------------------------------------------------------------- what is read of a checkpoint


def spoil(secret: Secret, path: Path, kind: str) -> None:
    """Put something at a path that is not a small regular file; of a link, it leads to what was there."""
    if kind == "sparse":
        with open(path, "r+b") as file:
            file.truncate(40 * 2**30)
    elif kind == "linked original":
        original = secret.file.with_name(f"{path.parent.name} {path.name}")
        path.rename(original)
        path.symlink_to(original)
    elif kind == "device":
        path.unlink()
        path.symlink_to("/dev/zero")
    else:
        secret.put(path, kind)


SPOILED = ("FIFO", "folder", "sparse", "linked original", "device", "socket")


@pytest.mark.parametrize("kind", SPOILED)
def test_a_file_of_a_checkpoint_that_is_not_a_small_regular_one_is_damage_and_an_older_one_is_resumed(
    tmp_path: Path, secret: Secret, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Resuming and the command neither wait for it, nor follow it, nor read it into memory; both name it."""
    saved(tmp_path / "run", "run", epochs=2)
    folder = tmp_path / "run/checkpoints"
    for number, file in enumerate(("manifest.json", "state.msgpack", "tensors.safetensors")):
        spoil(secret, folder / f"step-{4 - number}.a1" / file, kind)
    spoil(secret, folder / "attempt-1.json", kind)
    import resource  # not on Windows

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["checkpoints", "list", str(tmp_path / "run")]) == 0
    listed = capsys.readouterr().out
    assert listed.count("damaged") == 3
    assert main(["checkpoints", "verify", str(tmp_path / "run")]) == 1
    assert capsys.readouterr().out.count("damaged") == 3
    assert main(["checkpoints", "export", str(tmp_path / "run"), str(tmp_path / "out.safetensors")]) == 0
    outcome = saved(tmp_path / "run", "run", epochs=2, resume="auto")
    assert outcome.of(RunResumed)[0].global_step == 1
    assert {event.checkpoint for event in outcome.of(CheckpointRejected)} == {
        *("step-4.a1", "step-3.a1", "step-2.a1", "attempt-1.json")
    }
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
    secret.check()


@pytest.mark.parametrize("kind", ["link", "FIFO", "linked folder", "folder", "hard link"])
def test_planted_temporary_folders_and_checkpoints_are_removed_without_following_links(
    tmp_path: Path, secret: Secret, kind: str
) -> None:
    folder = tmp_path / "run/checkpoints"
    for name in (".step-1.a1.tmp", ".step-9.a9.tmp", ".attempt-1.json.tmp", ".step-2.a1.tmp/inside", "step-1.a9"):
        secret.put(folder / name, kind)
    secret.put(tmp_path / "run/.weights.safetensors.tmp", kind)
    settings = Checkpoints(every_steps=1, when_busy="wait", keep_last=1)
    outcome = saved(tmp_path / "run", "run", epochs=1, checkpoints=settings)
    assert outcome.result.status == "finished"
    assert (tmp_path / "run/weights.safetensors").is_file()
    assert not list(folder.glob(".*"))
    assert len(list(folder.glob("step-*"))) <= 2
    secret.check()


@pytest.mark.parametrize("kind", ["FIFO", "sparse", "device"])
def test_weights_that_are_not_a_regular_file_that_fits_the_memory_are_refused_unread(
    tmp_path: Path, secret: Secret, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_MEMORY_BYTES", 2**34)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"")
    spoil(secret, path, kind)
    outcome = train(Net(), init_from=path)
    assert isinstance(outcome.error, CheckpointError)
    assert str(path) in str(outcome.error)


def test_weights_are_read_through_a_link_only_if_the_user_names_it(tmp_path: Path, secret: Secret) -> None:
    train(Net(), run_dir=tmp_path / "own", run_id="own", checkpoints=Checkpoints(every_steps=1))
    weights = tmp_path / "own/weights.safetensors"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/weights.safetensors").symlink_to(weights)
    assert train(Net(), init_from=tmp_path / "run/weights.safetensors").result.status == "finished"
    outcome = train(Net(), init_from=tmp_path / "run")
    assert isinstance(outcome.error, CheckpointError)
    assert "a symbolic link, which is not opened below a run folder" in str(outcome.error)


@pytest.mark.parametrize("name", ["events.jsonl", "metrics.csv"])
def test_a_file_with_an_endless_line_is_not_continued(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It would be read into memory."""
    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / name, "wb") as file:
        file.write(b"run_id,attempt,seq,time,global_step,epoch,stage,name,value\n" if name == "metrics.csv" else b"")
        file.truncate(40 * 2**30)
    with caplog.at_level(logging.WARNING):
        outcome = train(Net(), run_dir=tmp_path / "run", journal=True, sinks=[JSONL(), CSV()])
    assert outcome.result.status == "finished"
    assert f"{name} has a line of more than" in caplog.text


def test_a_checkpoint_of_another_run_is_not_uploaded_as_this_runs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "theirs", "theirs", epochs=4)
    shutil.copytree(tmp_path / "theirs/checkpoints/step-8.a1", tmp_path / "run/checkpoints/step-8.a1")
    settings = Checkpoints(every_steps=2, when_busy="wait", upload=(tmp_path / "store").as_uri())
    with caplog.at_level(logging.WARNING):
        outcome = saved(tmp_path / "run", "run", epochs=1, checkpoints=settings)
    assert outcome.result.status == "finished"
    there = {path.name for path in (tmp_path / "store/run").iterdir()}
    assert "step-8.a1" not in there
    assert any(name.startswith("step-2.a2") for name in there)
    assert caplog.text.count("step-8.a1 is not uploaded; it belongs to run 'theirs'") == 1


@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link", "FIFO"])
def test_the_address_for_prometheus_is_written_to_a_file_of_its_own(tmp_path: Path, secret: Secret, kind: str) -> None:
    """It is beside the run folder, where others may write."""
    path = tmp_path / "prometheus-run.json"
    for name in ("prometheus-run.json", "prometheus-run.part"):
        secret.put(tmp_path / name, kind)
    writer = Prometheus(port=0).open(RunInfo("run", run_dir=str(tmp_path / "run")))
    assert b"targets" in path.read_bytes()
    writer.close()
    secret.check()


@pytest.mark.parametrize("sink", [CSV, JSONL])
def test_the_path_argument_of_a_sink_may_be_a_link_and_must_be_a_regular_file(tmp_path: Path, sink: Any) -> None:
    """Nothing waits for a FIFO."""
    (tmp_path / "link").symlink_to(tmp_path / "target")
    sink(path=str(tmp_path / "link")).open(RunInfo("run", run_dir=str(tmp_path / "run"))).close()
    assert (tmp_path / "target").is_file()
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(SinkMisconfigured, match="fifo is not a regular file; name another path"):
        sink(path=str(tmp_path / "fifo")).open(RunInfo("run", run_dir=None))


def test_folders_nested_without_end_are_left_with_a_warning(tmp_path: Path, caplog: Any) -> None:
    """Each level would take a descriptor and a recursive call."""
    deep = tmp_path / "checkpoints" / ".step-1.a1.tmp"
    deep.mkdir(parents=True)
    inner = os.open(deep, os.O_RDONLY)
    for _ in range(200):
        os.mkdir("d", dir_fd=inner)
        below = os.open("d", os.O_RDONLY, dir_fd=inner)
        os.close(inner)
        inner = below
    os.close(inner)
    outcome = train(Net(), run_id="r", run_dir=tmp_path, checkpoints=Checkpoints(every_steps=1))
    assert outcome.error is None
    assert not outcome.of(CheckpointFailed)
    assert "remove them by hand" in caplog.text
    shutil.rmtree(deep)
