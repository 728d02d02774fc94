"""`Trainer.validate` and the hook at the end of a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import Diary, Net, make_trainer, train
from torch import nn

from events.messages import RunEnded, RunStarted, TrainStepEnded, ValEpochEnded
from sinks import Memory
from trainer import CallbackInterface, Checkpoints, observer
from trainer.errors import ArgumentsError, ContractError


class Scored(Net):
    """Logs in the step and in the hook of a validation, on two dataloaders."""

    def __init__(self, **options: Any) -> None:
        super().__init__(val_data=lambda net, size: {"default": net.batches(size), "half": net.batches(size)[:1]})

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        self.log("seen", float(len(batch[0])))
        return super().val_step(global_step, batch, device)

    def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
        self.log("rows", float(len(outputs[1])))


def loss_by_hand(net: Net) -> float:
    with torch.no_grad():
        return float(nn.functional.mse_loss(net.linear(net.x), net.y))


def test_validate_returns_the_metrics_of_one_validation() -> None:
    """It publishes them, runs the hooks of the module and of callbacks, and trains nothing."""
    net, memory, diary = Scored(), Memory(), Diary()
    before = loss_by_hand(net)
    metrics = make_trainer(net, sinks=[memory], callbacks=[diary]).validate()
    assert metrics["val_loss"] == pytest.approx(before, rel=1e-6)
    assert metrics["rows"] == 16
    assert {name: value for name, value in metrics.items() if "half" in name}["rows/half"] == 8
    assert metrics["seen"] == 8
    assert [one.key for one in memory.of(ValEpochEnded)] == ["default", "half"]
    assert memory.of(TrainStepEnded) == []
    assert diary.names == ["on_end_val_epoch"] * 2
    assert (len(memory.of(RunStarted)), [one.status for one in memory.of(RunEnded)]) == (1, ["finished"])
    assert loss_by_hand(net) == before
    assert net.training


def test_validate_uses_the_best_checkpoint(tmp_path: Path) -> None:
    options: dict[str, Any] = {"run_dir": tmp_path / "run", "run_id": "one"}
    options["checkpoints"] = Checkpoints(best="val_loss", every_epochs=1)
    outcome = train(Scored(), epochs=3, **options)
    best = outcome.result.best_metric
    metrics = make_trainer(Scored(), resume="best", **options).validate()
    assert metrics["val_loss"] == pytest.approx(best, rel=1e-6)
    again = make_trainer(Scored(), init_from=tmp_path / "run", checkpoints=False).validate()
    assert again["val_loss"] == pytest.approx(outcome.of(ValEpochEnded)[-2].loss, rel=1e-6)


def test_validate_without_data_is_an_error() -> None:
    with pytest.raises(ContractError, match=r"get_val_dataloaders\(\) returned no dataloader: implement it"):
        make_trainer(Net(val_data=lambda net, size: None)).validate()


def test_validate_obeys_the_limit_of_batches() -> None:
    memory = Memory()
    make_trainer(Scored(), sinks=[memory], max_val_steps_per_epoch=1).validate()
    assert [one.steps for one in memory.of(ValEpochEnded)] == [1, 1]


class EndOfTests(CallbackInterface):
    """Writes down what the hook of a test receives; and any hook that a test must not call."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, str, list[int]]] = []
        self.others: list[str] = []

    def on_end_test_epoch(self, global_step: int, *outputs: Any, key: str) -> None:
        self.seen.append((global_step, key, [len(one) for one in outputs]))
        self.log("tested", float(len(outputs[1])))

    def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
        self.others.append("val")

    def on_end_train(self, global_step: int) -> None:
        self.others.append("train")


def test_the_hook_of_a_test_receives_the_outputs_of_each_dataloader() -> None:
    """Of the module and of callbacks, on the loop's thread; what it logs is published."""

    class Module(Net):
        def on_end_test_epoch(self, global_step: int, *, key: str) -> None:
            keys.append(key)

    keys: list[str] = []
    callback, memory = EndOfTests(), Memory()
    module = Module(test_data=lambda net, size: {"a": net.batches(size), "b": net.batches(size)[:1]})
    outputs = make_trainer(module, callbacks=[callback], sinks=[memory]).test()
    assert callback.seen == [(0, "a", [2, 16]), (0, "b", [1, 8])]
    assert callback.others == []
    assert keys == ["a", "b"]
    assert {name: len(values[1]) for name, values in outputs.items()} == {"a": 16, "b": 8}
    assert memory.metrics("tested/a") == [(0, 16.0)]


def test_the_hook_of_a_test_runs_only_inline_and_not_in_training() -> None:
    class Marked(CallbackInterface):
        @observer
        def on_end_test_epoch(self, global_step: int, *outputs: Any, key: str) -> None: ...

    with pytest.raises(ArgumentsError, match="on_end_test_epoch runs only inline"):
        make_trainer(Net(), callbacks=[Marked()]).test()
    callback = EndOfTests()
    train(Scored(), callbacks=[callback], epochs=1)
    assert callback.seen == []
    assert callback.others == ["val", "val", "train"]
