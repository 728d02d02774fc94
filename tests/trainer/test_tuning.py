"""Finding a batch size and a learning rate: what they find, and that they leave no trace."""

from __future__ import annotations

import copy
import logging
import math
import os
import random
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.training import Boom, Net, make_trainer, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from trainer import ModuleInterface, TrainerArguments, find_batch_size, find_learning_rate
from trainer.errors import ArgumentsError, ContractError
from trainer.tuning.learning_rate import LearningRates


def arguments(**options: Any) -> TrainerArguments:
    return TrainerArguments(**{"train_batch_size": 4, "device": "cpu"} | options)


def limited(most: int, error: type[Exception] = torch.OutOfMemoryError, **options: Any) -> Net:
    """Return a module whose step has no memory for more than so many rows."""

    def step(net: Net, global_step: int, batch: Any) -> Any:
        if len(batch[0]) > most:
            raise error("CUDA out of memory. Tried to allocate 1 GiB")
        return net.forward_loss(batch)

    return Net(train_step=step, **options)


class Fixed(dict[str, int]):
    """Cannot be changed."""

    def clear(self) -> None:
        raise TypeError


class Keeping(ModuleInterface):
    """Keeps state of every kind: counters, lists, tensors, generators, an optimizer, a dataloader."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.register_buffer("not_saved", torch.zeros(()), persistent=False)
        self.net[0].weight.grad = torch.ones(8, 4)
        self.net[3].bias.requires_grad_(False)
        self.generator = torch.Generator().manual_seed(1)
        self.chance, self.numpy = random.Random(2), np.random.default_rng(2)
        x = torch.randn(24, 4, generator=torch.Generator().manual_seed(5))
        self.data = TensorDataset(x, x.sum(1, keepdim=True))
        self.loader = DataLoader(self.data, 4, shuffle=True, generator=self.generator)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=0.05)
        self.seen: dict[str, list[int]] = {"steps": []}
        self.last: deque[float] = deque([0.5], maxlen=2)
        self.mean, self.calls, self.fixed = torch.zeros(4), 0, Fixed(a=1)

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int, epochs: int) -> Any:
        return [self.optimizer], [torch.optim.lr_scheduler.StepLR(self.optimizer, 3)]

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        return self.loader

    def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
        return None

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        x, y = batch
        self.calls += 1
        self.seen["steps"].append(global_step)
        self.seen.setdefault(f"epoch {self.current_epoch}", [])
        self.last.append(self.chance.random() + self.numpy.random() + random.random() + np.random.random())
        self.mean += x.mean(0)
        self.not_saved += 1
        return nn.functional.mse_loss(self.net(x), y)

    val_step = train_step

    def on_end_train(self, global_step: int) -> None:
        self.net[3].bias.requires_grad_(True)
        self.ended = True


def state_of(net: Keeping) -> list[Any]:
    """All that a training changes, as plain values."""
    parameters = [(name, one.tolist(), one.requires_grad, one.grad is None) for name, one in net.named_parameters()]
    buffers = [(name, one.tolist()) for name, one in net.named_buffers()]
    kept = copy.deepcopy([net.seen, net.last, net.calls, sorted(vars(net)), net.optimizer.state_dict()])
    numbers = [random.getstate(), torch.get_rng_state().tolist(), net.generator.get_state().tolist()]
    numbers += [net.chance.getstate(), net.numpy.bit_generator.state, np.random.get_state()[1].tolist()]  # type: ignore[index]
    return [parameters, buffers, kept, net.mean.tolist(), numbers, net.training, net.current_epoch]


def find(name: str, net: ModuleInterface, **options: Any) -> Any:
    if name == "batch size":
        return find_batch_size(net, arguments(**options), max_size=4, steps=8)
    return find_learning_rate(net, arguments(**options), steps=12)


@pytest.mark.parametrize("name", ["batch size", "learning rate"])
def test_a_finder_leaves_no_trace(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is trained afterwards is what would have been trained without, bit for bit; no file is written."""
    monkeypatch.chdir(tmp_path)
    net, other = Keeping(), Keeping()
    for options in ({}, {"seed": 7}):
        before = state_of(net)
        find(name, net, **options)
        assert state_of(net) == before
    torch.manual_seed(9)
    train(net, train_batch_size=4, epochs=2)
    torch.manual_seed(9)
    train(other, train_batch_size=4, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert net.calls == other.calls == 12
    assert os.listdir(tmp_path) == []


def test_persistent_workers_of_a_kept_dataloader_end_with_the_trial() -> None:
    """They would start in the run otherwise, with a seed that the dataloader's generator draws then."""
    nets = [Keeping(), Keeping()]
    for net in nets:
        kind = {"shuffle": True, "generator": net.generator, "num_workers": 1, "persistent_workers": True}
        net.loader = DataLoader(net.data, 4, **kind)  # type: ignore[arg-type]
    find("batch size", nets[0])
    assert nets[0].loader._iterator is None  # its workers end with the last reference
    for net in nets:
        torch.manual_seed(9)
        train(net, train_batch_size=4, epochs=2)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True))


def test_a_finder_restores_a_module_whose_step_fails() -> None:
    net = Keeping()
    before = state_of(net)

    def fail(*_: Any) -> Any:
        net.calls += 1
        raise Boom

    object.__setattr__(net, "train_step", fail)
    for name in ("batch size", "learning rate"):
        with pytest.raises(Boom):
            find(name, net)
    del net.train_step
    assert state_of(net) == before


# -------------------------------------------------------------------------------------------------- batch size


@pytest.mark.parametrize("start", [1, 4, 37, 38, 300])
def test_the_batch_size_is_the_largest_that_fits(start: int) -> None:
    assert find_batch_size(limited(37, rows=700), arguments(train_batch_size=start), steps=1) == 37


@pytest.mark.parametrize(
    ("options", "size", "tried"),
    [
        ({"bisect": False}, 32, [4, 8, 16, 32, 64]),
        ({"max_size": 20}, 20, [4, 8, 16, 20]),
        ({"max_size": 3}, 3, [3, 3]),  # in two micro-batches: a step has 4 rows
        ({"steps": 2, "bisect": False}, 32, [4, 4, 8, 8, 16, 16, 32, 32, 64]),
    ],
)
def test_sizes_are_doubled_up_to_a_limit(options: dict[str, Any], size: int, tried: list[int]) -> None:
    seen: list[int] = []
    net = limited(37, rows=100)
    step = net.own_train_step
    assert step is not None
    net.own_train_step = lambda net, at, batch: seen.append(len(batch[0])) or step(net, at, batch)  # type: ignore[func-returns-value]
    wanted: dict[str, Any] = {"steps": 1, **options}
    assert find_batch_size(net, arguments(), **wanted) == size
    assert seen == tried


def test_all_rows_fit_and_larger_batches_cannot_be_tried(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "stagecast"):
        assert find_batch_size(Net(rows=22), arguments(), steps=1) == 22
    assert "gives at most 22 rows for batch_size=32, which fit; larger batches cannot be tried" in caplog.text
    assert [text for text in caplog.messages if text.endswith("rows fit")] == [
        "find_batch_size: 4 rows fit",
        "find_batch_size: 8 rows fit",
        "find_batch_size: 16 rows fit",
        "find_batch_size: 32 rows fit",
        "find_batch_size: 22 rows fit",
    ]


def test_a_step_of_several_micro_batches_is_tried_with_gradients_in_memory() -> None:
    """Where steps accumulate, the second micro-batch of a step runs out of memory, not the first."""

    def step(net: Net, global_step: int, batch: Any) -> Any:
        if net.linear.weight.grad is not None and net.linear.weight.grad.any() and len(batch[0]) > 5:
            raise MemoryError
        return net.forward_loss(batch)

    options = arguments(train_batch_size=64, gpu_batch_size_limit=4)
    assert find_batch_size(Net(rows=64, train_step=step), options, steps=1) == 5


def test_a_failed_allocation_on_the_host_is_caught() -> None:
    """Torch's own error on the CPU, in the forward or backward pass."""

    def step(net: Net, global_step: int, batch: Any) -> Any:
        loss, *_ = net.forward_loss(batch)
        if len(batch[0]) > 6:
            torch.empty(2**60, dtype=torch.uint8)
        return loss

    assert find_batch_size(Net(rows=64, train_step=step), arguments(), steps=1) == 6


def test_drop_last_with_more_rows_than_there_are_is_too_large() -> None:
    def loader(net: Net, size: int) -> Any:
        return DataLoader(TensorDataset(net.x, net.y), size, drop_last=True)

    assert find_batch_size(Net(rows=11, train_data=loader), arguments(), steps=1) == 11


@pytest.mark.parametrize(
    ("net", "options", "error", "says"),
    [
        (limited(0), {}, MemoryError, "a batch of one row cannot be trained: CUDA out of memory"),
        (Net(train_data=lambda net, size: net.batches(8)), {}, ContractError, "returned a batch of 8 rows for batch"),
        (Net(), {"max_size": 0}, ArgumentsError, "find_batch_size got max_size=0; give an integer >= 1"),
        (Net(), {"steps": 1.0}, ArgumentsError, "find_batch_size got steps=1.0"),
        (nn.Linear(1, 1), {}, ArgumentsError, "module is a Linear; give an instance of a ModuleInterface"),
        (limited(2, RuntimeError), {}, None, ""),
        (limited(2, ValueError), {}, ValueError, "CUDA out of memory"),
        (
            Net(train_data=lambda net, size: [{}], train_step=lambda net, step, batch: net.linear.weight.sum()),
            {},
            ArgumentsError,
            "rows of a dict cannot be counted; give find_batch_size a max_size",
        ),
    ],
)  # fmt: skip
def test_what_the_batch_size_finder_refuses(
    net: Any, options: dict[str, Any], error: type[Exception] | None, says: str
) -> None:
    if error is None:
        assert find_batch_size(net, arguments(), **options) == 2
        return
    with pytest.raises(error) as caught:
        find_batch_size(net, arguments(), **options)
    assert says in str(caught.value)


def test_a_module_that_is_being_trained_is_refused() -> None:
    errors: list[str] = []

    def act(step: int) -> None:
        with pytest.raises(ContractError) as caught:
            find_batch_size(net, arguments())
        errors.append(str(caught.value))

    net = Net(act=act)
    make_trainer(net, max_steps=1).train()
    assert errors == ["this Net is being trained by a run; tune it before or after"]


# ----------------------------------------------------------------------------------------------- learning rate


class Curved(Net):
    """Two parameter groups, and a scheduler that the test ignores."""

    def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
        groups = [{"params": [self.linear.weight]}, {"params": [self.linear.bias], "lr": 0.1}]
        optimizer = torch.optim.SGD(groups, lr=0.05)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)]


def by_hand(net: Net, lrs: list[float]) -> list[float]:
    """The losses of a range test: each before the step with its learning rate, over batches that repeat."""
    groups = [{"params": [net.linear.weight]}, {"params": [net.linear.bias]}]
    optimizer, losses, batches = torch.optim.SGD(groups, lr=1.0), [], net.batches(4)
    for i, lr in enumerate(lrs):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = lr, 2 * lr
        loss, _ = net.forward_loss(batches[i % len(batches)])
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("linear", [False, True])
def test_the_range_test_is_that_of_a_loop_by_hand(linear: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "stagecast"):
        found = find_learning_rate(Curved(), arguments(), low=1e-4, high=0.2, steps=40, linear=linear)
    assert "find_learning_rate reads the data again: an epoch has 4 steps, and the test has taken 40" in caplog.text
    grow = np.linspace if linear else np.geomspace
    assert found.lrs == pytest.approx(grow(1e-4, 0.2, 40).tolist())
    assert found.losses == by_hand(Curved(), found.lrs)

    mean, smoothed = 0.0, []
    for i, loss in enumerate(found.losses):
        mean = 0.98 * mean + 0.02 * loss
        smoothed.append(mean / (1 - 0.98 ** (i + 1)))
    assert found.smoothed == pytest.approx(smoothed)
    slopes = np.gradient(np.array(smoothed[4:39]), np.log(found.lrs[4:39]))
    assert found.suggestion == found.lrs[4 + int(slopes.argmin())]
    figure = found.plot()
    (axes,) = figure.axes
    assert axes.get_xscale() == ("linear" if linear else "log")
    assert [line.get_xydata().tolist() for line in axes.lines[:2]] == [  # type: ignore[union-attr]
        [list(point) for point in zip(found.lrs, values, strict=True)] for values in (found.losses, found.smoothed)
    ]


def test_the_test_ends_where_the_loss_diverges() -> None:
    found = find_learning_rate(Net(), arguments(), low=1e-3, high=1e3, steps=200)
    assert found.smoothed[-1] > 4 * min(found.smoothed)
    assert all(one <= 4 * min(found.smoothed[: i + 1]) for i, one in enumerate(found.smoothed[:-1]))
    assert len(found.lrs) == len(found.losses) < 200
    assert found.suggestion is not None
    assert 1e-3 < found.suggestion < 1


def test_the_test_ends_before_a_loss_that_is_not_finite() -> None:
    net = Net(scales=dict.fromkeys(range(31, 400), math.nan))
    found = find_learning_rate(net, arguments(), low=1e-4, high=0.01, steps=60)
    assert len(found.losses) == 30
    assert all(map(math.isfinite, found.smoothed))
    assert found.suggestion is not None


def test_one_of_several_optimizers_is_varied_and_a_loss_without_descent_has_no_suggestion(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made: list[list[torch.optim.Optimizer]] = []

    def optimizers(net: Net) -> Any:
        weight = torch.optim.SGD([net.linear.weight], lr=0.0)
        bias = torch.optim.SGD([net.linear.bias], lr=torch.tensor(0.5))
        made.append([weight, bias])
        return made[-1], []

    def step(net: Net, global_step: int, batch: Any) -> Any:
        seen.append((made[-1][0].param_groups[0]["lr"], float(made[-1][1].param_groups[0]["lr"])))
        return net.linear.weight.sum() * 0 + net.linear.bias.sum() * 0

    seen: list[tuple[float, float]] = []
    net = Net(optimizers=optimizers, train_step=step)
    with caplog.at_level(logging.WARNING, "stagecast"):
        found = find_learning_rate(net, arguments(), low=0.1, high=1.0, steps=10, linear=True, optimizer=1)
    assert found.suggestion is None
    assert "has no suggestion: the loss did not fall in 10 steps" in caplog.text
    assert seen == [(0.0, pytest.approx(lr)) for lr in found.lrs]
    found.plot()
    with pytest.raises(ArgumentsError, match="got optimizer=2, and the module has 2; give an index from 0"):
        find_learning_rate(net, arguments(), optimizer=2)


def test_manual_optimization_and_closures_are_tested_too() -> None:
    class Manual(Net):
        manual_optimization = True

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss, _ = self.forward_loss(batch)
            self.optimize(loss)
            return loss.detach()

    options: dict[str, Any] = {"low": 1e-4, "high": 0.2, "steps": 20}
    assert find_learning_rate(Manual(), arguments(), **options) == find_learning_rate(Net(), arguments(), **options)
    closures = Net(optimizers=lambda net: ([torch.optim.LBFGS(net.parameters(), max_iter=2)], []))
    found = find_learning_rate(closures, arguments(), **options)
    assert len(found.losses) == 20
    assert found.suggestion is not None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"low": 0}, "find_learning_rate got low=0; give a finite number above 0"),
        ({"high": math.inf}, "find_learning_rate got high=inf; give a finite number above 0"),
        ({"low": 2.0}, "find_learning_rate got high=1.0, which is not above low=2.0"),
        ({"steps": 9}, "find_learning_rate got steps=9; give an integer >= 10"),
    ],
)
def test_what_the_learning_rate_finder_refuses(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentsError, match=says):
        find_learning_rate(Net(), arguments(), **options)


def test_a_plot_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    found = LearningRates(lrs=[1.0], losses=[1.0], smoothed=[1.0], suggestion=None)
    with pytest.raises(ImportError, match=r"plot\(\) needs matplotlib; pip install 'stagecast\[media\]'"):
        found.plot()
