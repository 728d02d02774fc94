"""What the shipped callbacks have in common, and what `LearningRateMonitor` and `ModelStatistics` log."""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from support.reads import watching_reads
from support.training import Boom, Net, Outcome, make_trainer, train
from torch import nn
from torch.optim import SGD, Adagrad, Adam
from torch.optim.lr_scheduler import StepLR

import trainer.loop.boundary
from events.messages import HistogramLogged, MetricsLogged, ObserverFailed, StepSkipped, TrainStepEnded
from events.sink import CALLBACK_DELIVERY, RunInfo
from sinks import Memory
from trainer import CallbackInterface, Checkpoints, inline
from trainer.callbacks import EMA, SWA, EarlyStopping, LearningRateMonitor, ModelStatistics, Profiler
from trainer.errors import ArgumentsError, ContractError

RATE = "lr/optimizer0/group0"
MOMENTUM = "momentum/optimizer0/group0"


def halving(kind: Any = SGD, rate: float | torch.Tensor = 0.5, **options: Any) -> Net:
    """Return a module of eight steps whose learning rate, 0.5, is halved after each of them."""

    def optimizers(net: Net) -> Any:
        optimizer = kind(net.parameters(), lr=rate)
        return [optimizer], [StepLR(optimizer, 1, gamma=0.5)]

    return Net(rows=64, optimizers=optimizers, **options)


class Copies(CallbackInterface):
    """Keeps weights and gradients as they are at the end of each step."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.gradients: dict[int, dict[str, torch.Tensor]] = {}

    @inline
    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        named = dict(self.module.named_parameters())
        self.weights[global_step] = {name: one.detach().clone() for name, one in named.items()}
        self.gradients[global_step] = {name: one.grad.clone() for name, one in named.items() if one.grad is not None}


def norm(tensors: Iterable[torch.Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().norm()) ** 2 for tensor in tensors))


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("kind", "arguments", "problem"),
    [
        (EarlyStopping, {"monitor": ""}, "monitor must be a metric's name, not ''"),
        (EarlyStopping, {"monitor": None}, "monitor must be a metric's name, not None"),
        (EarlyStopping, {"monitor": "train_loss"}, "follow 'train_epoch_loss'"),
        (EarlyStopping, {"mode": "smallest"}, "mode must be 'min' or 'max', not 'smallest'"),
        (EarlyStopping, {"patience": 0}, "patience must be an integer >= 1, not 0"),
        (EarlyStopping, {"patience": 2.0}, "patience must be an integer >= 1, not 2.0"),
        (EarlyStopping, {"patience": True}, "patience must be an integer"),
        (EarlyStopping, {"min_delta": -0.1}, "min_delta must be a number from 0, not -0.1"),
        (EarlyStopping, {"min_delta": math.nan}, "min_delta must be a number from 0, not nan"),
        (EarlyStopping, {"check_finite": 1}, "check_finite must be True or False, not 1"),
        (EarlyStopping, {"target": "low"}, "target must be a number or None, not 'low'"),
        (EarlyStopping, {"mode": "up", "patience": -1}, "not 'up'; patience must be an integer"),
        (EMA, {"module": "net"}, "module must be an instance of a torch module, not 'net'"),
        (EMA, {"module": nn.Linear}, "module must be an instance of a torch module"),
        (EMA, {"decay": 1.0}, "decay must be a number from 0 to less than 1, not 1.0"),
        (EMA, {"decay": -0.1}, "decay must be a number from 0 to less than 1, not -0.1"),
        (EMA, {"decay": "0.9"}, "decay must be a number from 0 to less than 1, not '0.9'"),
        (EMA, {"every_n_steps": 0}, "every_n_steps must be an integer >= 1, not 0"),
        (EMA, {"buffers": None}, "buffers must be True or False, not None"),
        (EMA, {"validate": 1}, "validate must be True or False, not 1"),
        (SWA, {"module": nn.Linear}, "module must be an instance of a torch module"),
        (SWA, {}, "give one of start_epoch and start_step"),
        (SWA, {"start_epoch": 1, "start_step": 1}, "give one of start_epoch and start_step"),
        (SWA, {"start_epoch": -1}, "start_epoch must be an integer >= 0, not -1"),
        (SWA, {"start_epoch": 0.75}, "start_epoch must be an integer >= 0, not 0.75"),
        (SWA, {"start_step": 0}, "start_step must be an integer >= 1, not 0"),
        (SWA, {"start_epoch": 1, "every_n_steps": True}, "every_n_steps must be an integer >= 1, not True"),
        (SWA, {"start_epoch": 1, "lr": -0.1}, "lr must be a number from 0 or None, not -0.1"),
        (SWA, {"start_epoch": 1, "lr": [0.1]}, "lr must be a number from 0 or None, not [0.1]"),
        (SWA, {"start_epoch": 1, "anneal": 1.5}, "anneal must be an integer >= 0, not 1.5"),
        (SWA, {"start_epoch": 1, "anneal_strategy": "exp"}, "anneal_strategy must be 'cos' or 'linear', not 'exp'"),
        (SWA, {"start_epoch": 1, "validate": None}, "validate must be True or False, not None"),
        (SWA, {"start_epoch": 1, "update_bn": 0}, "update_bn must be an integer >= 1, not 0"),
        (LearningRateMonitor, {"module": nn.Linear(1, 1)}, "module must be the trained ModuleInterface, not Linear("),
        (LearningRateMonitor, {"module": CallbackInterface}, "not the class CallbackInterface"),
        (LearningRateMonitor, {"every_n_steps": 0}, "every_n_steps must be an integer >= 1, not 0"),
        (LearningRateMonitor, {"every_n_steps": "1"}, "every_n_steps must be an integer >= 1, not '1'"),
        (LearningRateMonitor, {"momentum": "yes"}, "momentum must be True or False, not 'yes'"),
        (ModelStatistics, {"module": nn.Linear(1, 1)}, "module must be the trained ModuleInterface, not Linear("),
        (ModelStatistics, {"every_n_steps": 0}, "every_n_steps must be an integer >= 1, not 0"),
        (ModelStatistics, {"every_n_steps": 1.5}, "every_n_steps must be an integer >= 1, not 1.5"),
        (ModelStatistics, {"norms": False}, "norms and histograms are both False; enable one of them"),
        (ModelStatistics, {"histograms": 64}, "histograms must be True or False, not 64"),
        (ModelStatistics, {"bins": 1}, "bins must be an integer >= 2, not 1"),
        (
            ModelStatistics,
            {"exclude": "*.bias"},
            "exclude must be a list of patterns, such as ['*.bias'], not '*.bias'",
        ),
        (ModelStatistics, {"exclude": [1]}, "exclude must be a list of patterns"),
        (ModelStatistics, {"exclude": None}, "exclude must be a list of patterns"),
    ],
)
def test_invalid_arguments_are_refused_by_the_constructor(kind: Any, arguments: dict[str, Any], problem: str) -> None:
    valid = {} if kind is EarlyStopping else {"module": Net()}
    with pytest.raises(ArgumentsError, match=f"^{kind.__name__}: ") as caught:
        kind(**valid | arguments)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        (EMA, "EMA has a Net of which this run trains no parameter"),
        (functools.partial(SWA, start_epoch=0), "SWA has a Net of which this run trains no parameter"),
        (LearningRateMonitor, "LearningRateMonitor has a Net that this run does not train"),
        (ModelStatistics, "ModelStatistics has a Net that this run does not train"),
    ],
)
def test_a_module_that_the_run_does_not_train_is_refused(kind: Any, problem: str) -> None:
    error = train(Net(), callbacks=[kind(Net(), every_n_steps=2)]).error
    assert isinstance(error, ContractError)
    assert problem in str(error)


@pytest.mark.parametrize(
    ("make", "during"),
    [
        (lambda: EarlyStopping("acuracy"), "should_stop"),
        (lambda: LearningRateMonitor(Net()), "bind_optimizers"),
        (Profiler, "around_run"),  # a run without a folder
    ],
    ids=["should_stop", "bind_optimizers", "around_run"],
)
def test_a_failure_outside_of_hooks_follows_the_error_policy(make: Any, during: str) -> None:
    failed = train(Net(), callbacks=[make()]).error
    assert failed is not None
    assert f"in {during}" in failed.__notes__[0] or f".{during}" in failed.__notes__[0]
    outcome = train(Net(), callbacks=[(make(), replace(CALLBACK_DELIVERY, on_error="disable"))], epochs=3)
    assert (outcome.result.status, outcome.result.global_step) == ("finished", 6)
    assert [(event.during, event.action) for event in outcome.of(ObserverFailed)] == [(during, "disabled")]
    assert outcome.logged() == {}


@pytest.mark.parametrize("fails", [False, True])
def test_around_run_is_entered_before_the_data_and_left_however_the_run_ends(fails: bool) -> None:
    class Surrounds(CallbackInterface):
        @contextlib.contextmanager
        def around_run(self, run: RunInfo, module: Any) -> Iterator[None]:
            seen.append((run.run_id, module is net, threading.current_thread()))
            try:
                yield
            finally:
                seen.append(steps[-1])

    def data(net: Net, size: int) -> Any:
        assert len(seen) == 1
        return net.batches(size)

    seen: list[Any] = []
    steps: list[int] = []

    def act(step: int) -> None:
        steps.append(step)
        if fails and step == 2:
            raise Boom

    net = Net(rows=64, train_data=data, act=act)
    outcome = train(net, callbacks=[Surrounds()], run_id="r")
    assert isinstance(outcome.error, Boom) is fails
    assert seen == [("r", True, threading.current_thread()), 2 if fails else 8]


# ------------------------------------------------------------------------------------------------- learning rates


@pytest.mark.parametrize("options", [{}, {"gpu_batch_size_limit": 3}, {"scheduler_interval": "epoch", "epochs": 3}])
def test_the_logged_rate_is_that_of_the_step(options: dict[str, Any]) -> None:
    net = halving()
    outcome = train(net, callbacks=[LearningRateMonitor(net)], **options)
    rates = [(event.global_step, event.lr) for event in outcome.of(TrainStepEnded)]
    assert outcome.logged() == {RATE: rates}
    assert len({rate for _, rate in rates}) > 2


def test_each_group_of_each_optimizer_is_logged() -> None:
    def optimizers(net: Net) -> Any:
        groups = [{"params": [net.linear.weight], "lr": 0.1}, {"params": [], "lr": 0.2, "betas": (0.8, 0.9)}]
        return [Adam(groups), SGD([net.linear.bias], 0.3, momentum=0.7)], []

    net = Net(optimizers=optimizers)
    outcome = train(net, callbacks=[LearningRateMonitor(net, momentum=True)], max_steps=1)
    assert outcome.logged() == {
        RATE: [(1, 0.1)],
        MOMENTUM: [(1, 0.9)],
        "lr/optimizer0/group1": [(1, 0.2)],
        "momentum/optimizer0/group1": [(1, 0.8)],
        "lr/optimizer1/group0": [(1, 0.3)],
        "momentum/optimizer1/group0": [(1, 0.7)],
    }


@pytest.mark.parametrize(
    ("net", "arguments", "expected"),
    [
        (lambda: halving(Adagrad), {"momentum": True}, None),  # it has no momentum
        # Schedulers change a tensor in place, before its number is read.
        (lambda: halving(Adam, torch.tensor(0.5)), {}, [(n, 0.5**n) for n in range(1, 9)]),
        (halving, {"every_n_steps": 3}, [(3, 0.125), (6, 0.5**6)]),
        # The second call is of a step that is skipped.
        (lambda: halving(scales={2: math.nan}), {"every_n_steps": 2}, [(2, 0.25), (4, 0.5**4), (6, 0.5**6)]),
    ],
    ids=["no momentum", "tensor", "every third step", "skipped step"],
)
def test_which_rates_are_logged(net: Any, arguments: dict[str, Any], expected: Any) -> None:
    module = net()
    outcome = train(module, callbacks=[LearningRateMonitor(module, **arguments)], non_finite="skip")
    assert list(outcome.logged()) == [RATE]
    assert expected is None or outcome.logged()[RATE] == expected
    assert len(outcome.of(StepSkipped)) == (module.scales is not None)


def test_a_group_that_is_added_later_is_logged_from_then_on() -> None:
    class Grows(Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            self.optimizer = SGD([self.linear.weight], lr=0.1)
            return [self.optimizer], []

        def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
            if epoch == 1:
                self.optimizer.add_param_group({"params": [self.linear.bias], "lr": 0.2})

    net = Grows(rows=8)
    outcome = train(net, callbacks=[LearningRateMonitor(net)], epochs=2)
    assert outcome.logged()["lr/optimizer0/group1"] == [(2, 0.2)]


def test_any_callback_receives_the_optimizers_once_before_the_first_hook() -> None:
    calls: list[Any] = []

    class Own(CallbackInterface):
        def bind_optimizers(self, optimizers: Any) -> None:
            calls.append([type(one).__name__ for one in optimizers])

        def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
            calls.append(epoch)

    train(Net(), callbacks=[Own()], epochs=2)
    assert calls == [["SGD"], 0, 1]


# ----------------------------------------------------------------------------------------------- model statistics


def metrics_at(outcome: Outcome, step: int) -> dict[str, float]:
    return {name: value for name, values in outcome.logged().items() for at, value in values if at == step}


def histograms_of(outcome: Outcome) -> list[str]:
    return [event.name for event in outcome.of(HistogramLogged)]


@pytest.mark.parametrize(
    "options",
    [{}, {"gpu_batch_size_limit": 2}, {"clip_grads": True, "max_grad_norm": 0.01}, {"precision": "float16"}],
    ids=["plain", "accumulating", "clipping", "float16"],
)
def test_norms_are_those_that_the_optimizer_used(options: dict[str, Any]) -> None:
    net = Net(rows=32)
    copies = Copies(net)
    outcome = train(net, callbacks=[ModelStatistics(net, 2), copies], **options)
    last = outcome.result.global_step
    assert last >= 2
    for step in range(1, last + 1):
        metrics = metrics_at(outcome, step)
        if step % 2:
            assert metrics == {}
            continue
        expected = {"weight_norm_total": norm(copies.weights[step].values())}
        expected |= {"grad_norm_total": norm(copies.gradients[step].values())}
        expected |= {f"weight_norm/{name}": norm([one]) for name, one in copies.weights[step].items()}
        expected |= {f"grad_norm/{name}": norm([one]) for name, one in copies.gradients[step].items()}
        assert metrics == pytest.approx(expected, rel=1e-5)
        if "clip_grads" in options:
            assert metrics["grad_norm_total"] == pytest.approx(0.01, rel=1e-3)
            assert (outcome.of(TrainStepEnded)[step - 1].grad_norm or 0) > 0.1


class Odd(Net):
    """Parameters of several types: sparse gradients, none at all, frozen, empty, shared, complex."""

    def __init__(self) -> None:
        super().__init__(lr=1e-3)
        self.table = nn.Embedding(5, 4, sparse=True)
        self.unused = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.empty = nn.Parameter(torch.ones(0, 3))
        self.half_ = nn.Parameter(torch.full((4,), 40_000.0, dtype=torch.float16))  # the norm is too large for it
        self.double_ = nn.Parameter(torch.ones(4, dtype=torch.float64))
        self.complex_ = nn.Parameter(torch.full((2,), 3 + 4j))
        self.tied = nn.Linear(4, 1)
        self.tied.weight = self.linear.weight

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        x, y = batch
        x = x * (self.half_.float() * 1e-4) + self.double_.float() + self.table(torch.tensor([1, 3, 3])).sum(0)
        loss = nn.functional.mse_loss(self.tied(x), y) / 1e4
        return loss + self.complex_.abs().sum() + self.empty.sum()


def test_norms_of_parameters_of_every_kind() -> None:
    """Half precision neither overflows nor loses digits; repeated rows of a sparse gradient are added up."""
    net = Odd()
    copies = Copies(net)
    statistics = ModelStatistics(net, 1, histograms=True)
    outcome = train(net, callbacks=[statistics, copies], max_steps=1, val_interval_epochs=0)
    metrics = metrics_at(outcome, 1)
    weights, gradients = copies.weights[1], copies.gradients[1]
    names = {"linear.weight", "table.weight", "half_", "double_", "complex_", "tied.bias"}
    all_names = {*names, "unused", "linear.bias"}
    assert {name for name in metrics if name.startswith("grad_norm/")} == {f"grad_norm/{name}" for name in names}
    assert {name for name in metrics if name.startswith("weight_norm/")} == {f"weight_norm/{one}" for one in all_names}
    assert metrics["weight_norm/half_"] == pytest.approx(weights["half_"].double().norm().item(), rel=1e-6)
    assert metrics["weight_norm/complex_"] == pytest.approx(weights["complex_"].norm().item())
    dense = gradients["table.weight"].to_dense()
    assert gradients["table.weight"].is_sparse
    assert dense[3].norm() > 1.5 * dense[1].norm()
    assert metrics["grad_norm/table.weight"] == pytest.approx(dense.norm().item(), rel=1e-5)
    parts = [metrics[f"grad_norm/{name}"] for name in names]
    assert metrics["grad_norm_total"] == pytest.approx(math.hypot(*parts), rel=1e-5)
    assert set(histograms_of(outcome)) == {f"gradients/{one}" for one in names} | {
        f"weights/{one}" for one in all_names
    }


def test_only_weights_are_logged_if_the_optimizer_frees_the_gradients() -> None:
    class Clears(SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.zero_grad()

    net = Net(optimizers=lambda net: ([Clears(net.parameters(), lr=0.1)], []))
    outcome = train(net, callbacks=[ModelStatistics(net, 1, histograms=True)], max_steps=1)
    assert set(metrics_at(outcome, 1)) == {"weight_norm/linear.weight", "weight_norm/linear.bias", "weight_norm_total"}
    assert histograms_of(outcome) == ["weights/linear.weight", "weights/linear.bias"]


def test_gradients_that_are_not_finite_are_logged() -> None:
    net = Net(scales={1: math.inf})
    outcome = train(net, callbacks=[ModelStatistics(net, 1, histograms=True)], max_steps=1, val_interval_epochs=0)
    assert not math.isfinite(metrics_at(outcome, 1)["grad_norm_total"])
    gradient = next(event for event in outcome.of(HistogramLogged) if event.name == "gradients/linear.weight")
    assert gradient.non_finite == 4


@pytest.mark.parametrize(
    ("exclude", "left"),
    [(["*.bias"], ["linear.weight"]), (("linear.*",), []), (["*"], []), (["bias"], ["linear.weight", "linear.bias"])],
)
def test_excluded_parameters_count_in_the_totals(exclude: Any, left: list[str]) -> None:
    net = Net()
    copies = Copies(net)
    outcome = train(net, callbacks=[ModelStatistics(net, 1, histograms=True, exclude=exclude), copies], max_steps=1)
    metrics = metrics_at(outcome, 1)
    assert metrics["grad_norm_total"] == pytest.approx(norm(copies.gradients[1].values()), rel=1e-5)
    assert [one for one in metrics if "/" in one] == [
        f"{kind}_norm/{one}" for kind in ("weight", "grad") for one in left
    ]
    assert histograms_of(outcome) == [f"{kind}/{one}" for kind in ("weights", "gradients") for one in left]


def test_histograms_count_every_element() -> None:
    net = Net()
    copies = Copies(net)
    statistics = ModelStatistics(net, 2, norms=False, histograms=True, bins=5)
    outcome = train(net, callbacks=[statistics, copies], epochs=2)
    assert outcome.of(MetricsLogged) == []
    events = {(event.global_step, event.name): event for event in outcome.of(HistogramLogged)}
    names = [f"{kind}/linear.{one}" for kind in ("weights", "gradients") for one in ("weight", "bias")]
    assert list(events) == [(step, name) for step in (2, 4) for name in names]
    for kind, kept in (("weights", copies.weights), ("gradients", copies.gradients)):
        event, tensor = events[4, f"{kind}/linear.weight"], kept[4]["linear.weight"]
        assert (len(event.counts), sum(event.counts), event.non_finite) == (5, 4, 0)
        assert (event.low, event.high) == (tensor.min().item(), tensor.max().item())


def test_all_norms_of_a_type_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = torch._foreach_norm

    def counted(tensors: Any, *rest: Any, **options: Any) -> Any:
        calls.append(len(tensors))
        return original(tensors, *rest, **options)

    monkeypatch.setattr(torch, "_foreach_norm", counted)
    net = Net(rows=64)
    net.others = nn.ParameterList(torch.ones(2) for _ in range(50))
    train(net, callbacks=[ModelStatistics(net, 4)])
    assert calls == [52, 2, 52, 2]


# --------------------------------------------------------------------------------------------------- all of them


class Mixed(Net):
    """Weights of two types, a batch norm, and a learning rate on the device."""

    def __init__(self) -> None:
        super().__init__(
            rows=32, optimizers=lambda net: ([SGD(net.parameters(), torch.tensor(0.01), foreach=True)], [])
        )
        self.norm = nn.BatchNorm1d(4)
        self.scale = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))

    def forward_loss(self, batch: Any) -> Any:
        x, y = batch
        predicted = self.linear(self.norm(x) * self.scale.float())
        return nn.functional.mse_loss(predicted, y), predicted


def callbacks_of(net: Net) -> list[CallbackInterface]:
    return [
        EMA(net, buffers=True, validate=True),
        SWA(net, start_step=2, every_n_steps=1, validate=False, update_bn=False),
        LearningRateMonitor(net, momentum=True),
        ModelStatistics(net, 1, histograms=True, exclude=["norm.*"]),
        EarlyStopping(patience=100),
    ]


@pytest.mark.anyio
async def test_callbacks_change_no_weight_and_log_the_same_by_both_doors() -> None:
    results: list[Any] = []
    for within in (True, False):
        net, memory = halving(), Memory()
        ema = EMA(net, 0.5)
        callbacks = [
            ema,
            LearningRateMonitor(net),
            ModelStatistics(net, 1),
            EarlyStopping("train_epoch_loss", "max", 1),
        ]
        ready = make_trainer(net, callbacks=callbacks, sinks=[memory], epochs=9)
        if within:
            async with ready.run() as run:
                result = await run.result()
        else:
            result = ready.train()
        assert (result.status, result.global_step) == ("stopped", 16)
        averages = {name: one.tolist() for name, one in ema.weights().items()}
        results.append((Outcome(result, None, memory).logged(), averages, net.linear.weight.tolist()))
    assert results[0] == results[1]
    assert len(results[0][0][RATE]) == len(results[0][0]["grad_norm_total"]) == 16
    bare = halving()
    train(bare, epochs=2)
    assert bare.linear.weight.tolist() == results[0][2]


def test_a_resumed_run_logs_the_same_as_an_uninterrupted_one(tmp_path: Path) -> None:
    def attempt(**options: Any) -> Outcome:
        net = halving()
        return train(net, callbacks=[LearningRateMonitor(net, 3), ModelStatistics(net, 3)], epochs=2, **options)

    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": Checkpoints(every_minutes=None)}
    whole = attempt().logged()
    assert whole[RATE] == [(step, 0.5**step) for step in (3, 6, 9, 12, 15)]
    first, second = attempt(max_steps=8, **run).logged(), attempt(resume="auto", **run).logged()
    assert {name: first[name] + second[name] for name in first} == whole
    assert len(first[RATE]) == 2


def reads_of(net: Net, callbacks: list[CallbackInterface], **options: Any) -> tuple[list[str], Outcome]:
    found: list[str] = []
    with watching_reads(found):
        outcome = train(net, callbacks=callbacks, epochs=2, seed=0, **options)
    assert outcome.result.global_step == 8
    return found, outcome


def test_a_read_in_a_hook_is_seen() -> None:
    class Reads(CallbackInterface):
        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            outputs[0].sum().item()

    found, _ = reads_of(Net(rows=32), [Reads()])
    assert found.count("Tensor.item") == 8


@pytest.mark.parametrize("options", [{}, {"gpu_batch_size_limit": 2}, {"clip_grads": True, "precision": "bfloat16"}])
def test_no_step_reads_a_tensor(options: dict[str, Any]) -> None:
    """Only the validation reads the number that may stop the run."""
    bare, _ = reads_of(Mixed(), [], **options)  # what torch's optimizer does with such a learning rate
    net = Mixed()
    found, outcome = reads_of(net, callbacks_of(net), **options)
    for one in bare:
        found.remove(one)
    # Each of two validations is of one number, which is seen from Python and underneath.
    assert found.count("Tensor.__float__") == 2
    assert set(found) <= {"Tensor.__float__", "aten._local_scalar_dense", "aten.item"}
    assert found.count("aten._local_scalar_dense") == 2
    assert {RATE, "weight_norm_total", "grad_norm_total", "grad_norm/scale"} <= set(outcome.logged())
    assert len(outcome.of(HistogramLogged)) == 8 * 2 * 3


def test_no_outputs_are_kept_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    collated: list[int] = []
    original = trainer.loop.boundary.collate_outputs

    def counted(outputs: Any, notice: Any) -> Any:
        collated.append(len(outputs))
        return original(outputs, notice)

    class Own(CallbackInterface):
        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            assert [tuple(one.shape) for one in outputs] == [(2,), (8, 1)]

    monkeypatch.setattr(trainer.loop.boundary, "collate_outputs", counted)
    for own in ([], [Own()]):
        net = Net(rows=32)
        outcome = train(net, callbacks=[*callbacks_of(net), *own], gpu_batch_size_limit=4)
        assert collated == [2] * len(own) * len(outcome.of(TrainStepEnded))
