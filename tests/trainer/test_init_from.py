"""The source of a new run's weights, and the run that a folder belongs to."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.training import Net, make_trainer, train
from torch import nn

from events.checkpoint.store import CheckpointStore
from events.errors import CheckpointDamaged, RunFolderMismatch
from events.messages import RunResumed
from trainer import Checkpoints

OFF: dict[str, Any] = {"every_minutes": None}


def trained(folder: Path, **options: Any) -> Any:
    options = {"epochs": 1, "run_id": folder.name, "run_dir": folder, "checkpoints": Checkpoints(**OFF)} | options
    return train(Net(), **options)


def weights_of(**options: Any) -> dict[str, torch.Tensor]:
    """Run the test stage and return its weights."""

    net = Net(test_data=Net.batches)
    make_trainer(net, **options).test()
    return {name: tensor.detach().clone() for name, tensor in net.state_dict().items()}


@pytest.mark.parametrize("what", ["file", "run without checkpoints", "tensors of a checkpoint", "checkpoints"])
def test_init_from_finds_weights_in_every_folder_of_a_run(tmp_path: Path, what: str) -> None:
    old = tmp_path / "old"
    trained(old)
    place = {
        "file": old / "weights.safetensors",
        "run without checkpoints": old,
        "tensors of a checkpoint": old / "checkpoints/step-2.a1/tensors.safetensors",
        "checkpoints": old / "checkpoints",
    }[what]
    if what == "run without checkpoints":
        shutil.rmtree(old / "checkpoints")
    expected = load_file(old / "weights.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights_of(init_from=place).items())


def test_tied_weights_may_be_stored_under_one_name(tmp_path: Path) -> None:
    """Under any of their names; any other missing name is an error."""

    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = nn.Linear(4, 1, bias=False)
            self.again.weight = self.linear.weight

    weight, bias = torch.full((1, 4), 7.0), torch.zeros(1)
    for name in ("linear.weight", "again.weight"):
        save_file({name: weight, "linear.bias": bias}, tmp_path / "tied.safetensors")
        net = Tied()
        net.lr = 0.0
        assert train(net, init_from=tmp_path / "tied.safetensors").error is None
        assert torch.equal(net.again.weight, weight)
        assert net.again.weight is net.linear.weight
    save_file({"linear.weight": weight}, tmp_path / "torn.safetensors")
    assert "it lacks linear.bias" in str(train(Tied(), init_from=tmp_path / "torn.safetensors").error)


def test_a_pickle_is_refused_with_the_right_format(tmp_path: Path) -> None:
    torch.save(Net().state_dict(), tmp_path / "model.pt")
    outcome = train(Net(), init_from=tmp_path / "model.pt")
    assert isinstance(outcome.error, CheckpointDamaged)
    assert "model.pt" in str(outcome.error)
    assert "write the weights with safetensors.torch.save_file" in str(outcome.error)
    assert "TrainStepEnded" not in outcome.names()


def test_a_restart_does_not_need_the_weights_again(tmp_path: Path) -> None:
    remote = f"file://{tmp_path}/there"
    trained(tmp_path / "old", checkpoints=Checkpoints(upload=remote, **OFF))
    for name, source in (("by path", str(tmp_path / "old")), ("by address", f"{remote}/old")):
        begun = trained(tmp_path / name, init_from=source, resume="auto")
        assert begun.error is None
        assert not begun.of(RunResumed)
    shutil.rmtree(tmp_path / "old")
    shutil.rmtree(tmp_path / "there")
    for name, source in (("by path", str(tmp_path / "old")), ("by address", f"{remote}/old")):
        again = trained(tmp_path / name, init_from=source, resume="auto", epochs=2)
        assert [event.checkpoint for event in again.of(RunResumed)] == ["step-2.a1"]


def test_the_uploads_of_the_same_run_give_weights_and_no_history(tmp_path: Path) -> None:
    """They are not copied into the run's checkpoints."""
    remote = f"file://{tmp_path}/there"
    trained(tmp_path / "a" / "same", checkpoints=Checkpoints(upload=remote, **OFF))
    begun = trained(tmp_path / "b" / "same", init_from=f"{remote}/same")
    assert (begun.result.attempt, begun.result.global_step) == (1, 2)
    assert [str(name) for name in CheckpointStore(tmp_path / "b/same/checkpoints").names()] == ["step-2.a1"]


def test_init_from_with_a_named_checkpoint_is_ignored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path / "old")
    again = trained(tmp_path / "new", resume=tmp_path / "old", init_from=tmp_path / "old", epochs=2)
    assert again.result.global_step == 4
    assert [text for text in caplog.messages if text.startswith("init_from=") and "is ignored" in text]


# ----------------------------------------------------------------------------------------- the run of a folder


def test_a_folder_without_journal_and_checkpoints_knows_its_run(tmp_path: Path) -> None:
    """From its lock file, so a job that was killed before its first checkpoint keeps its id."""
    own: dict[str, Any] = {"run_dir": tmp_path / "run", "resume": "auto", "checkpoints": False}
    assert train(Net(), **own).result.run_id == train(Net(), **own).result.run_id


def test_a_folder_with_an_unreadable_id_starts_a_new_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.lock").write_bytes(b"\xff{")
    (tmp_path / "run" / "journal").write_bytes(b"no folder")
    assert "cannot be used" in str(train(Net(), run_dir=tmp_path / "run", resume="auto").error)
    (tmp_path / "run" / "journal").unlink()
    assert train(Net(), run_dir=tmp_path / "run", resume="auto").result.attempt == 1


@pytest.mark.parametrize("resume", ["best", "step-2.a1", "run", "run/checkpoints/step-2.a1"])
def test_resuming_a_checkpoint_of_the_folder_continues_its_run(tmp_path: Path, resume: str) -> None:
    run = tmp_path / "run"
    trained(run, journal=True, checkpoints=Checkpoints(best="val_loss", **OFF))
    again = train(Net(), epochs=2, run_dir=run, resume=resume, checkpoints=Checkpoints(**OFF))
    assert (again.result.run_id, again.of(RunResumed)[0].checkpoint) == ("run", "step-2.a1")


def test_a_new_run_in_the_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    trained(tmp_path / "run", journal=True)
    trained(tmp_path / "old")
    for given in ({"resume": tmp_path / "old"}, {"resume": "auto", "run_id": "other"}, {"init_from": tmp_path / "old"}):
        outcome = train(Net(), run_dir=tmp_path / "run", journal=True, **given)
        assert isinstance(outcome.error, RunFolderMismatch)
        assert "run_id='run' to continue that run" in str(outcome.error)


def test_a_run_that_is_named_is_found_without_journal_and_checkpoints(tmp_path: Path) -> None:
    trained(tmp_path / "runs" / "named", checkpoints=Checkpoints(best="val_loss", **OFF))
    expected = load_file(tmp_path / "runs/named/weights.safetensors")
    for resume in ("auto", "best"):
        found = weights_of(run_id="named", resume=resume)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
