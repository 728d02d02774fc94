"""A run with uploads, from end to end: into a folder through ``file://``, and back on a machine that has nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.training import Net, Outcome, Scored, make_trainer, train

from events.checkpoint.remote import RemoteStore
from events.checkpoint.store import CHECKPOINTS_DIR
from events.errors import CheckpointNotFound, UploadError
from events.messages import (
    CheckpointDeleted,
    CheckpointFailed,
    CheckpointSaved,
    CheckpointUploaded,
    ObserverFailed,
    RunResumed,
)
from trainer import Checkpoints
from trainer.errors import ArgumentsError


def uploading(place: Path, **more: Any) -> Checkpoints:
    chosen = {"every_steps": 2, "every_minutes": None, "when_busy": "wait", "keep_last": 2}
    return Checkpoints(upload=f"file://{place}", **chosen | more)


def run(tmp_path: Path, folder: str = "run", epochs: int | None = 1, **more: Any) -> Outcome:
    """Train eight steps per epoch as run ``r`` in a folder, with uploads to ``there``."""
    own = {"run_id": "r", "checkpoints": uploading(tmp_path / "there"), "journal": True}
    return train(Net(rows=64), epochs=epochs, run_dir=tmp_path / folder, **own | more)


def stored(tmp_path: Path) -> list[str]:
    return [str(name) for name in RemoteStore(f"file://{tmp_path}/there/r").names()]


def newest(tmp_path: Path) -> str:
    return str(RemoteStore(f"file://{tmp_path}/there/r").line()[0])


def resumed_from(outcome: Outcome) -> tuple[int, str | None, int]:
    (resumed,) = outcome.of(RunResumed)
    return resumed.attempt, resumed.checkpoint, resumed.global_step


def test_saved_checkpoints_are_uploaded_and_deleted_ones_are_deleted_there(tmp_path: Path) -> None:
    """By the end of the run; each is announced after it is durable here."""
    outcome = run(tmp_path)
    assert outcome.error is None
    assert stored(tmp_path) == ["step-6.a1", "step-8.a1"]
    assert [str(name) for name in RemoteStore(f"file://{tmp_path}/there/r").line()] == ["step-8.a1", "step-6.a1"]
    uploaded = [event.checkpoint for event in outcome.of(CheckpointUploaded)]
    assert "step-8.a1" in uploaded
    assert set(uploaded) <= {event.checkpoint for event in outcome.of(CheckpointSaved)}
    deleted = {event.checkpoint for event in outcome.of(CheckpointDeleted) if event.where == "local"}
    assert deleted == {"step-2.a1", "step-4.a1"}


@pytest.mark.parametrize("damaged", [False, True], ids=["nothing is here", "the newest is damaged here"])
def test_a_run_resumes_from_the_store_exactly_and_continues_to_upload(tmp_path: Path, damaged: bool) -> None:
    """Attempts and events are numbered above those there, also after an interrupted fetch.

    ``resume="auto"`` would take an older valid checkpoint that is here: the address names the newest there.
    """
    whole = run(tmp_path / "other", epochs=2).result
    run(tmp_path)
    source, folder = "auto", "new"
    if damaged:
        source, folder = f"file://{tmp_path}/there/r", "run"
        (file,) = (tmp_path / "run" / CHECKPOINTS_DIR / "step-8.a1").glob("*.safetensors")
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(RemoteStore, "read", interrupted)
            assert isinstance(run(tmp_path, folder, resume=source).error, UploadError)
    outcome = run(tmp_path, folder, epochs=2, resume=source)
    assert resumed_from(outcome) == (2, "step-8.a1", 8)
    assert outcome.result.metrics["val_loss"] == whole.metrics["val_loss"]
    assert newest(tmp_path) == "step-16.a2"
    assert outcome.of(ObserverFailed) == []


def interrupted(store: RemoteStore, name: Any, parts: Any) -> Any:
    raise UploadError("the connection broke")
    yield b""


def test_the_best_checkpoint_of_the_lineage_is_fetched(tmp_path: Path) -> None:
    """Not a better one that the run has superseded."""
    scores = [0.4, 0.1], [0.4, 0.3, 0.2, 0.5]
    settings = uploading(tmp_path / "there", every_steps=None, best="score", keep_best=9, keep_last=9)
    own = {"run_dir": tmp_path / "run", "run_id": "r", "journal": True, "checkpoints": settings}
    train(Scored(*scores[0]), epochs=2, **own)
    train(Scored(*scores[1]), epochs=4, resume="step-1.a1", **own)
    shutil.rmtree(tmp_path / "run")
    assert resumed_from(train(Scored(*scores[1]), epochs=3, resume="best", **own))[1] == "step-3.a2"


@pytest.mark.parametrize(("checkpoint", "step"), [("", 8), ("/step-6.a1", 6)])
def test_another_run_resumes_from_an_address(tmp_path: Path, checkpoint: str, step: int) -> None:
    """The newest of a run, or the one it names; the new run's folder keeps it, and "auto" starts there again."""
    run(tmp_path)
    other = {"run_id": "other", "checkpoints": Checkpoints(every_minutes=None, at_end=False), "journal": False}
    outcome = run(tmp_path, "other", 2, resume=f"file://{tmp_path}/there/r{checkpoint}", **other)
    (resumed,) = outcome.of(RunResumed)
    assert (resumed.attempt, resumed.global_step, resumed.after_seq) == (1, step, 0)
    assert outcome.result.global_step == 16
    assert resumed_from(run(tmp_path, "other", 2, resume="auto", **other))[2] == step


def test_auto_starts_a_new_run_if_there_is_no_checkpoint(tmp_path: Path) -> None:
    """The usual first start of a job that may be restarted."""
    (tmp_path / "there").mkdir()
    outcome = run(tmp_path, resume="auto")
    assert outcome.result.global_step == 8
    assert outcome.of(RunResumed) == []


@pytest.mark.anyio
async def test_a_service_fetches_beside_its_event_loop(tmp_path: Path) -> None:
    run(tmp_path)
    own = {"run_id": "r", "checkpoints": uploading(tmp_path / "there"), "journal": True, "resume": "auto"}
    async with make_trainer(Net(rows=64), epochs=2, run_dir=tmp_path / "new", **own).run() as service:
        result = await service.result()
    assert (result.attempt, result.global_step) == (2, 16)


def test_an_address_without_checkpoints_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    outcome = run(tmp_path, resume=f"file://{tmp_path}/there/nobody")
    assert isinstance(outcome.error, CheckpointNotFound | UploadError)
    assert outcome.events == []


@pytest.mark.parametrize("address", ["ftp://host/x", "s3://user:secret@bucket/x", "bucket/x"])
def test_a_wrong_address_is_refused_by_the_constructor_without_its_secret(address: str) -> None:
    with pytest.raises(ArgumentsError, match="Checkpoints\\(upload") as caught:
        make_trainer(Net(), checkpoints=Checkpoints(upload=address))
    assert "secret" not in str(caught.value)


def test_a_store_that_cannot_be_used_costs_no_training(tmp_path: Path) -> None:
    """The failure is reported with the checkpoints that the store lacks, and nothing is deleted here."""
    (tmp_path / "there").write_text("a file, where a folder should be")
    outcome = run(tmp_path, checkpoints=uploading(tmp_path / "there", end_timeout_s=0.5))
    assert outcome.result.status == "finished"
    assert any(event.observer == "uploads" for event in outcome.of(ObserverFailed))
    assert outcome.of(CheckpointDeleted) == []
    assert len(outcome.of(CheckpointSaved)) == 4
    (error,) = (event.error for event in outcome.of(CheckpointFailed) if "when the run ended" in event.error)
    assert all(f"step-{step}.a1" in error for step in (6, 8))


def test_the_uploads_of_another_run_of_the_same_name_are_not_touched(tmp_path: Path) -> None:
    """Whatever its attempts are called; retention here still works."""
    run(tmp_path, "alice")
    before = stored(tmp_path)
    run(tmp_path, "bob", None, checkpoints=Checkpoints(every_minutes=None))
    outcome = run(tmp_path, "bob", 2, resume="auto")
    assert any("another run of this name" in event.error for event in outcome.of(CheckpointFailed))
    assert stored(tmp_path) == before
    assert len(list((tmp_path / "bob/checkpoints").glob("step-*"))) == 2


@pytest.mark.parametrize("below", ["", "inside"])
def test_an_upload_into_the_runs_own_folder_is_refused(tmp_path: Path, below: str) -> None:
    """Retention there would delete the run's own files."""
    place = tmp_path / "runs" / ("r" if below else "") / below
    upload = Checkpoints(upload=f"file://{place}")
    outcome = train(Net(), run_id="r", run_dir=tmp_path / "runs/r", checkpoints=upload)
    assert isinstance(outcome.error, ArgumentsError)
    assert not (tmp_path / "runs/r/journal").exists()
