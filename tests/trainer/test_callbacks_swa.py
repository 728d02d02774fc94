"""`SWA`: torch's recipe written by hand, batch norm statistics, and an exact resume."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.training import Batch, Net, train
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.swa_utils import SWALR, AveragedModel, get_swa_multi_avg_fn, update_bn
from torchmetrics import SumMetric

from events.messages import CheckpointSaved, TrainStepEnded, ValEpochEnded, ValEpochStarted
from events.protocol import Checkpoint
from trainer import Checkpoints
from trainer.callbacks import SWA
from trainer.errors import ContractError
from trainer.loop.control import Control

EACH_STEP = Checkpoints(every_minutes=None, every_steps=1, when_busy="wait", keep_last=None)


def with_scheduler(net: Any) -> Any:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return [optimizer], [ExponentialLR(optimizer, 0.9)]


class Normed(Net):
    """Has a batch norm and a dropout; its training data is a new list for each call."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"rows": 32, "optimizers": with_scheduler} | options)
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.1), nn.Linear(8, 1))

    def forward_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        predicted = self.net(batch[0])
        return nn.functional.mse_loss(predicted, batch[1]), predicted


def by_hand(net: Normed, start: int, epochs: int) -> tuple[list[float], list[float], nn.Module]:
    """The recipe of torch's documentation, with its classes; returns validation losses, rates and the average."""
    torch.manual_seed(0)
    (optimizer,), (scheduler,) = with_scheduler(net)
    averaged = AveragedModel(net.net, multi_avg_fn=get_swa_multi_avg_fn())
    losses, rates = [], []
    for epoch in range(epochs):
        if epoch == start:
            scheduler = SWALR(optimizer, 0.02, anneal_epochs=2, anneal_strategy="linear")
        for batch in net.batches(8):
            rates.append(optimizer.param_groups[0]["lr"])
            net.forward_loss(batch)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
        rng = torch.get_rng_state()
        evaluated = net.net
        if epoch >= start:
            averaged.update_parameters(net.net)
            update_bn([x for x, _ in net.batches(8)], averaged)
            evaluated = averaged.module
        evaluated.eval()
        with torch.no_grad():
            losses.append(sum(float(nn.functional.mse_loss(evaluated(x), y)) for x, y in net.batches(8)) / 4)
        net.train()
        torch.set_rng_state(rng)
        scheduler.step()
    return losses, rates, averaged.module


def test_it_is_torchs_recipe(tmp_path: Path) -> None:
    losses, rates, averaged = by_hand(hand := Normed(), 2, 6)
    net = Normed()
    swa = SWA(net, start_epoch=2, lr=0.02, anneal=2, anneal_strategy="linear")
    run = {"run_dir": tmp_path, "checkpoints": True, "val_interval_steps": 4}
    outcome = train(net, callbacks=[swa], epochs=6, seed=0, scheduler_interval="epoch", **run)
    assert [event.loss for event in outcome.of(ValEpochEnded)] == pytest.approx(losses, rel=1e-5)
    assert [event.lr for event in outcome.of(TrainStepEnded)] == pytest.approx(rates, rel=1e-9)
    for name, value in averaged.state_dict().items():
        torch.testing.assert_close(swa.weights()[f"net.{name}"], value)
        torch.testing.assert_close(load_file(tmp_path / "weights.safetensors")[f"net.{name}"], value)
    for name, value in hand.net.state_dict().items():
        torch.testing.assert_close(net.state_dict()[f"net.{name}"], value)


def test_training_does_not_depend_on_it() -> None:
    """The pass for batch norms draws random numbers, logs, and has a dataloader of its own."""

    def step(net: Any, global_step: int, batch: Batch) -> Any:
        net.log("grad", float(torch.is_grad_enabled()))
        net.total.update(batch[1])
        net.log("total", net.total)
        return net.forward_loss(batch)

    def shuffled(net: Net, size: int) -> Any:
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(net.x, net.y), size, shuffle=True)

    nets = []
    for every in (None, 1, 3):
        net = Normed(train_step=step, train_data=shuffled)
        net.total = SumMetric()
        callbacks = [] if every is None else [SWA(net, start_step=3, every_n_steps=every)]
        outcome = train(net, callbacks=callbacks, epochs=3, seed=0, val_interval_steps=2)
        assert outcome.logged()["grad"] == [(step, 1.0) for step in range(1, 13)]
        assert [total for _, total in outcome.logged()["total"]] == pytest.approx([float(net.y.sum())] * 3)
        assert not net.total.update_called
        nets.append(net.state_dict())
    for other in nets[1:]:
        assert all(torch.equal(value, other[name]) for name, value in nets[0].items())


def test_frozen_batch_norms_keep_their_statistics_and_momentum() -> None:
    class Frozen(Normed):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = nn.BatchNorm1d(4, momentum=0.3)
            self.frozen.eval()
            self.net[1].momentum = 0.2

        def forward_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            assert not self.frozen.training
            return super().forward_loss((self.frozen(batch[0]), batch[1]))

    net = Frozen()
    swa = SWA(net, start_epoch=0, update_bn=2)
    assert train(net, callbacks=[swa], epochs=2).error is None
    weights = swa.weights()
    assert torch.equal(weights["frozen.running_mean"], torch.zeros(4))
    assert weights["net.1.num_batches_tracked"] == 2
    assert net.net[1].num_batches_tracked == 8
    assert (net.frozen.momentum, net.net[1].momentum) == (0.3, 0.2)


def test_without_a_validation_the_statistics_are_those_of_the_last_average() -> None:
    net = Normed(val_data=lambda net, size: None)
    swa = SWA(net, start_epoch=1, every_n_steps=3, validate=False)
    train(net, callbacks=[swa], epochs=2)
    averaged = copy.deepcopy(net.net)
    averaged.load_state_dict({n.removeprefix("net."): v for n, v in swa.weights().items() if n.startswith("net.")})
    torch.nn.init.zeros_(averaged[1].running_mean)
    update_bn([x for x, _ in net.batches(8)], averaged)
    torch.testing.assert_close(swa.weights()["net.1.running_mean"], averaged[1].running_mean)
    assert not swa.is_stale


def test_a_dataloader_that_cannot_be_read_twice_is_named(caplog: Any) -> None:
    class Keeps(Normed):
        kept: Any = None

        def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
            self.kept = self.kept or (batch for _ in range(3) for batch in self.batches(batch_size))
            return self.kept

    net = Keeps()
    outcome = train(net, callbacks=[SWA(net, start_step=2, every_n_steps=1)], max_steps=12, val_interval_steps=4)
    assert outcome.result.global_step == 12
    assert "SWA cannot compute batch norm statistics" in caplog.text
    assert "those of an earlier average" not in caplog.text


def test_endless_data_is_read_for_as_many_steps_as_the_run_has() -> None:
    def endless(net: Net, size: int) -> Any:
        while True:
            yield from net.batches(size)

    net = Normed(train_data=endless)
    swa = SWA(net, start_step=2, every_n_steps=1)
    assert train(net, callbacks=[swa], max_steps=6, epochs=1).error is None
    assert swa.weights()["net.1.num_batches_tracked"] == 6


def test_manual_optimization_is_refused_where_train_step_would_train() -> None:
    class Manual(Normed):
        manual_optimization = True

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.optimize(self.forward_loss(batch)[0])

    net = Manual()
    error = train(net, callbacks=[SWA(net, start_epoch=0)]).error
    assert isinstance(error, ContractError)
    assert "give it update_bn=False" in str(error)
    net = Manual()
    swa = SWA(net, start_epoch=0, update_bn=False, lr=0.01, anneal=0)
    outcome = train(net, callbacks=[swa], epochs=2)
    assert (outcome.error, swa.steps) == (None, 2)
    assert [event.lr for event in outcome.of(TrainStepEnded)] == [0.01] * 8


def test_half_precision_is_averaged_in_float32() -> None:
    """In bfloat16 the average of many weights would stop to move."""
    part = nn.Module()
    part.weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    swa = SWA(part, start_epoch=0, every_n_steps=1)
    for step in range(1, 1001):
        part.weight.data.fill_(float(step % 2))
        swa.on_end_train_step(step)
    torch.testing.assert_close(dict(swa.averages())[part.weight], torch.full((3,), 0.5))
    assert swa.weights()["weight"].dtype is torch.bfloat16


def test_a_run_that_ends_before_its_start_has_averaged_nothing(caplog: Any) -> None:
    net = Normed()
    assert train(net, callbacks=[SWA(net, start_epoch=9)], epochs=2).error is None
    assert "SWA(module=Normed, start_epoch=9) has averaged nothing" in caplog.text


def test_a_second_run_starts_anew() -> None:
    net = Normed()
    swa = SWA(net, start_epoch=1, lr=0.5, anneal=0)
    assert [train(net, callbacks=[swa], epochs=3).error for _ in range(2)] == [None, None]
    assert swa.steps == 2


def test_a_checkpoint_within_the_pass_for_batch_norms_holds_the_trained_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the pass continues with what it had computed."""
    controls: list[Control] = []
    make = Control.__init__

    def keep(control: Control) -> None:
        make(control)
        controls.append(control)

    monkeypatch.setattr(Control, "__init__", keep)

    def attempt(folder: str, *, asks: bool) -> Any:
        calls: list[int] = []

        def step(net: Net, global_step: int, batch: Batch) -> Any:
            if not torch.is_grad_enabled():
                calls.append(global_step)
                if asks and len(calls) == 2:
                    controls[-1].send(Checkpoint(id="now"))
            return net.forward_loss(batch)

        net = Normed(train_step=step)
        swa = SWA(net, start_epoch=0)
        settings = Checkpoints(every_minutes=None, when_busy="wait", keep_last=None)
        return swa, train(net, callbacks=[swa], epochs=1, seed=0, run_dir=tmp_path / folder, checkpoints=settings)

    (swa, _), (other, outcome) = attempt("whole", asks=False), attempt("asked", asks=True)
    assert all(map(torch.equal, other.weights().values(), swa.weights().values()))
    staged, end = (event.checkpoint for event in outcome.of(CheckpointSaved))
    folder = tmp_path / "asked/checkpoints"
    within, after = (load_file(folder / name / "tensors.safetensors") for name in (staged, end))
    names = [name for name in after if name.startswith("module.")]
    assert "module.net.1.running_mean" in names
    assert all(torch.equal(within[name], after[name]) for name in names)


@pytest.mark.parametrize(
    ("options", "every", "stops"),
    [
        ({"start_epoch": 1, "lr": 0.02, "anneal": 3}, 6, [4, 5, 8, 11]),
        ({"start_step": 3, "every_n_steps": 2, "lr": 0.3, "anneal": 5, "anneal_strategy": "linear"}, 3, [2, 7, 12]),
        ({"start_epoch": 1, "lr": 0.02}, None, ["statistics", "validation"]),
        ({"start_step": 2, "every_n_steps": 1}, 3, ["statistics", "validation"]),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, options: dict[str, Any], every: int | None, stops: list[Any]
) -> None:
    """Also where it stops within a step's epoch, within the pass for batch norms, and within a validation."""

    def attempt(folder: str, stop: Any = None, **run: Any) -> Any:
        calls = {"statistics": 0, "validation": 0}

        def act(at: Any) -> None:
            if at in calls:
                calls[at] += 1
                at = at if calls[at] == 7 else None
            if at is not None and at == stop:
                os.kill(os.getpid(), signal.SIGINT)

        def step(net: Net, global_step: int, batch: Batch) -> Any:
            act(global_step if torch.is_grad_enabled() else "statistics")
            return net.forward_loss(batch)

        def val_step(net: Net, global_step: int, batch: Batch) -> Any:
            act("validation")
            return net.forward_loss(batch)

        net = Normed(train_step=step, val_step=val_step)
        swa = SWA(net, **options)
        run = {"run_dir": tmp_path / folder, "run_id": "r", "checkpoints": EACH_STEP, "val_interval_steps": every} | run
        outcome = train(net, callbacks=[swa], epochs=3, seed=0, **run)
        if stop is None:
            assert outcome.result.global_step == 12
        return net, swa, outcome

    net, swa, outcome = attempt("whole")
    losses = {event.global_step: event.loss for event in outcome.of(ValEpochEnded)}
    for stop in stops:
        *_, stopped = attempt(f"at {stop}", stop)
        assert stopped.result.status == "stopped"
        again, average, rest = attempt(f"at {stop}", resume="auto")
        assert all(map(torch.equal, again.state_dict().values(), net.state_dict().values()))
        assert all(map(torch.equal, average.weights().values(), swa.weights().values()))
        found = [stopped, rest]
        assert {event.global_step: event.loss for one in found for event in one.of(ValEpochEnded)} == losses
        assert [event.global_step for one in found for event in one.of(ValEpochStarted)] == list(losses)
        rates = {event.global_step: event.lr for one in found for event in one.of(TrainStepEnded)}
        assert rates == {event.global_step: event.lr for event in outcome.of(TrainStepEnded)}
