"""A run with uploads, from end to end: into a folder by way of ``file://``, and back on a machine that has nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

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


def settings(place: Path, **more: Any) -> Checkpoints:
    chosen = {"every_steps": 2, "every_minutes": None, "when_busy": "wait", "keep_last": 2}
    return Checkpoints(upload=f"file://{place}", **chosen | more)


def run_in(tmp_path: Path, place: Path, **more: Any) -> dict[str, Any]:
    return {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": settings(place), "journal": True} | more


def test_what_is_saved_is_uploaded_and_what_is_deleted_is_deleted_there(kit: Any, tmp_path: Path) -> None:
    """By the end of the run; each is announced after it is durable here."""
    outcome = kit.train(kit.Net(rows=64), **run_in(tmp_path, tmp_path / "there"))
    assert outcome.error is None
    there = RemoteStore(f"file://{tmp_path}/there/r")
    assert [str(name) for name in there.names()] == ["step-6.a1", "step-8.a1"]
    assert [str(name) for name in there.line()] == ["step-8.a1", "step-6.a1"]
    uploaded = [event.checkpoint for event in outcome.of(CheckpointUploaded)]
    assert "step-8.a1" in uploaded
    assert set(uploaded) <= {event.checkpoint for event in outcome.of(CheckpointSaved)}
    deleted = [(event.checkpoint, event.where) for event in outcome.of(CheckpointDeleted)]
    assert {"step-2.a1", "step-4.a1"} == {name for name, where in deleted if where == "local"}


def test_auto_goes_on_from_there_where_nothing_is_here(kit: Any, tmp_path: Path) -> None:
    """With the numbers of attempts and events above all that was there; and goes on uploading."""
    whole = kit.train(kit.Net(rows=64), epochs=2, **run_in(tmp_path, tmp_path / "there")).result
    shutil.rmtree(tmp_path / "there")
    kit.train(kit.Net(rows=64), epochs=1, **run_in(tmp_path, tmp_path / "there", run_dir=tmp_path / "first"))
    shutil.rmtree(tmp_path / "first")
    outcome = kit.train(
        kit.Net(rows=64), epochs=2, resume="auto", **run_in(tmp_path, tmp_path / "there", run_dir=tmp_path / "new")
    )
    (resumed,) = outcome.of(RunResumed)
    assert (resumed.attempt, resumed.checkpoint, resumed.global_step) == (2, "step-8.a1", 8)
    assert outcome.result.metrics["val_loss"] == whole.metrics["val_loss"]
    assert [str(name) for name in RemoteStore(f"file://{tmp_path}/there/r").line()][:1] == ["step-16.a2"]
    assert outcome.of(ObserverFailed) == []


def test_the_best_one_is_fetched_where_nothing_is_here(kit: Any, tmp_path: Path) -> None:
    """Of the line: what the run had gone back before is not the best one of it."""
    scores = iter([0.4, 0.1, 0.3, 0.2, 0.5])

    class Scored(kit.Net):
        def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
            self.log("score", next(scores))

    own = run_in(tmp_path, tmp_path / "there")
    own["checkpoints"] = settings(tmp_path / "there", every_steps=None, best="score", keep_best=9, keep_last=9)
    kit.train(Scored(), epochs=2, **own)
    kit.train(Scored(), epochs=4, resume="step-2.a1", **own)
    shutil.rmtree(tmp_path / "run")
    outcome = kit.train(Scored(), epochs=3, resume="best", **own)
    assert [event.checkpoint for event in outcome.of(RunResumed)] == ["step-6.a2"]


def test_an_own_checkpoint_that_is_damaged_is_had_again_by_its_address(kit: Any, tmp_path: Path) -> None:
    """ "auto" would go on from the older one that is whole here: who wants the newest names it."""
    whole = kit.train(kit.Net(rows=64), epochs=2, **run_in(tmp_path / "other", tmp_path / "elsewhere")).result
    place = run_in(tmp_path, tmp_path / "there")
    kit.train(kit.Net(rows=64), epochs=1, **place)
    (file,) = (tmp_path / "run" / CHECKPOINTS_DIR / "step-8.a1").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    outcome = kit.train(kit.Net(rows=64), epochs=2, resume=f"file://{tmp_path}/there/r", **place)
    (resumed,) = outcome.of(RunResumed)
    assert (resumed.attempt, resumed.checkpoint, resumed.global_step) == (2, "step-8.a1", 8)
    assert outcome.result.metrics["val_loss"] == whole.metrics["val_loss"]
    assert [str(name) for name in RemoteStore(f"file://{tmp_path}/there/r").line()][:1] == ["step-16.a2"]


@pytest.mark.parametrize("address", ["file://{there}/r", "file://{there}/r/step-6.a1"])
def test_an_address_is_resumed_from_by_another_run(kit: Any, tmp_path: Path, address: str) -> None:
    """The newest of a run, or the one it names; it is kept in the new run's folder, and "auto" begins there again."""
    kit.train(kit.Net(rows=64), **run_in(tmp_path, tmp_path / "there"))
    other = {
        "run_dir": tmp_path / "other",
        "run_id": "other",
        "checkpoints": Checkpoints(every_minutes=None, at_end=False),
    }
    expected = 6 if address.endswith("a1") else 8
    source = address.format(there=tmp_path / "there")
    outcome = kit.train(kit.Net(rows=64), epochs=2, resume=source, **other)
    (resumed,) = outcome.of(RunResumed)
    assert (resumed.attempt, resumed.global_step, resumed.after_seq) == (1, expected, 0)
    assert outcome.result.global_step == 16
    again = kit.train(kit.Net(rows=64), epochs=2, resume="auto", **other)
    assert again.of(RunResumed)[0].global_step == expected


def test_auto_begins_anew_where_nothing_is_anywhere(kit: Any, tmp_path: Path) -> None:
    """The usual first start of a job that may be restarted."""
    (tmp_path / "there").mkdir()
    outcome = kit.train(kit.Net(), resume="auto", **run_in(tmp_path, tmp_path / "there"))
    assert outcome.result.global_step == 2
    assert outcome.of(RunResumed) == []


@pytest.mark.anyio
async def test_a_service_fetches_beside_its_event_loop(kit: Any, tmp_path: Path) -> None:
    """Under both backends."""
    kit.train(kit.Net(rows=64), **run_in(tmp_path, tmp_path / "there"))
    shutil.rmtree(tmp_path / "run")
    trainer = kit.make_trainer(kit.Net(rows=64), epochs=2, resume="auto", **run_in(tmp_path, tmp_path / "there"))
    async with trainer.run() as run:
        result = await run.result()
    assert (result.attempt, result.global_step) == (2, 16)


def test_an_address_where_nothing_is_says_so(kit: Any, tmp_path: Path) -> None:
    """Before anything runs, and without a trace of a run."""
    (tmp_path / "there").mkdir()
    outcome = kit.train(kit.Net(), resume=f"file://{tmp_path}/there/nobody", run_dir=tmp_path / "run")
    assert isinstance(outcome.error, CheckpointNotFound | UploadError)
    assert outcome.events == []


@pytest.mark.parametrize("address", ["ftp://host/x", "s3://user:secret@bucket/x", "bucket/x"])
def test_an_address_that_is_none_is_refused_at_once(kit: Any, address: str) -> None:
    """By the constructor; what may be a secret is not repeated."""
    with pytest.raises(ArgumentsError, match="Checkpoints\\(upload") as caught:
        kit.make_trainer(kit.Net(), checkpoints=Checkpoints(upload=address))
    assert "secret" not in str(caught.value)


def test_a_store_that_cannot_be_used_costs_no_training(kit: Any, tmp_path: Path) -> None:
    """It is told, nothing is deleted here, and the run ends in time."""
    (tmp_path / "there").write_text("a file, where a folder ought to be")
    place = settings(tmp_path / "there", end_timeout_s=0.5)
    outcome = kit.train(kit.Net(rows=64), **run_in(tmp_path, tmp_path / "there", checkpoints=place))
    assert outcome.result.status == "finished"
    assert any(event.observer == "uploads" for event in outcome.of(ObserverFailed))
    assert outcome.of(CheckpointDeleted) == []
    assert len(outcome.of(CheckpointSaved)) == 4


def test_a_fetch_that_was_interrupted_is_made_again(kit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves nothing that would be taken for a run which has begun anew: that would delete what was uploaded."""
    kit.train(kit.Net(rows=64), **run_in(tmp_path, tmp_path / "there"))
    new = run_in(tmp_path, tmp_path / "there", run_dir=tmp_path / "new")

    def broken(store: RemoteStore, name: Any, parts: Any) -> Any:
        raise UploadError("the connection broke")
        yield b""

    with monkeypatch.context() as patch:
        patch.setattr(RemoteStore, "read", broken)
        assert isinstance(kit.train(kit.Net(rows=64), epochs=2, resume="auto", **new).error, UploadError)
    outcome = kit.train(kit.Net(rows=64), epochs=2, resume="auto", **new)
    assert outcome.of(RunResumed)[0].checkpoint == "step-8.a1"


def test_another_runs_uploads_are_not_touched(kit: Any, tmp_path: Path) -> None:
    """Of the same name, whatever its attempts are called; and what is here is deleted all the same."""
    kit.train(kit.Net(rows=64), **run_in(tmp_path, tmp_path / "there", run_dir=tmp_path / "alice"))
    before = [str(name) for name in RemoteStore(f"file://{tmp_path}/there/r").names()]
    bob = run_in(tmp_path, tmp_path / "there", run_dir=tmp_path / "bob")
    kit.train(kit.Net(rows=64), **bob | {"checkpoints": Checkpoints(every_minutes=None)})
    outcome = kit.train(kit.Net(rows=64), epochs=2, resume="auto", **bob)
    assert any("another run of this name" in event.error for event in outcome.of(CheckpointFailed))
    assert [str(name) for name in RemoteStore(f"file://{tmp_path}/there/r").names()] == before
    assert len(list((tmp_path / "bob/checkpoints").glob("step-*"))) == 2


@pytest.mark.parametrize("below", ["", "inside"])
def test_a_place_that_is_the_runs_own_folder_is_refused(kit: Any, tmp_path: Path, below: str) -> None:
    """Tidying up there would take the run's own files."""
    place = tmp_path / "runs" / ("r" if below else "") / below
    outcome = kit.train(
        kit.Net(), run_id="r", run_dir=tmp_path / "runs/r", checkpoints=Checkpoints(upload=f"file://{place}")
    )
    assert isinstance(outcome.error, ArgumentsError)
    assert not (tmp_path / "runs/r/journal").exists()


def test_what_is_left_at_the_end_is_told(kit: Any, tmp_path: Path) -> None:
    """Which checkpoints are not in the store, before the sinks are closed."""
    (tmp_path / "there").write_text("a file, where a folder ought to be")
    place = settings(tmp_path / "there", end_timeout_s=0.2, keep_last=9)
    outcome = kit.train(kit.Net(rows=64), **run_in(tmp_path, tmp_path / "there", checkpoints=place))
    told = [event.error for event in outcome.of(CheckpointFailed) if "when the run ended" in event.error]
    assert len(told) == 1
    assert all(f"step-{step}.a1" in told[0] for step in (2, 4, 6, 8))
