"""`ModelStatistics`: what it computes, of what, and when."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from events.messages import HistogramLogged, MetricsLogged, TrainStepEnded
from trainer import CallbackInterface, Checkpoints, inline
from trainer.callbacks import ModelStatistics
from trainer.errors import ArgumentsError, ContractError


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


def metrics_at(outcome: Any, step: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for event in outcome.of(MetricsLogged):
        if event.global_step == step:
            found |= event.metrics
    return found


def norm(tensors: Any) -> float:
    return math.sqrt(sum(float(tensor.double().norm()) ** 2 for tensor in tensors))


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"module": nn.Linear(1, 1)}, "module must be the trained ModuleInterface, not Linear("),
        ({"every_n_steps": 0}, "every_n_steps must be an integer >= 1, not 0"),
        ({"every_n_steps": 1.5}, "every_n_steps must be an integer >= 1, not 1.5"),
        ({"norms": False}, "norms and histograms are both False; enable one of them"),
        ({"histograms": 64}, "histograms must be True or False, not 64"),
        ({"bins": 1}, "bins must be an integer >= 2, not 1"),
        ({"exclude": "*.bias"}, "exclude must be a list of patterns, such as ['*.bias'], not '*.bias'"),
        ({"exclude": [1]}, "exclude must be a list of patterns"),
        ({"exclude": None}, "exclude must be a list of patterns"),
    ],
)
def test_arguments_that_cannot_work_are_refused(kit: Any, arguments: dict[str, Any], problem: str) -> None:
    """When it is made."""
    with pytest.raises(ArgumentsError, match=r"^ModelStatistics: ") as caught:
        ModelStatistics(**{"module": kit.Net()} | arguments)
    assert problem in str(caught.value)


def test_another_module_is_refused(kit: Any) -> None:
    """Its statistics would go nowhere."""
    error = kit.train(kit.Net(), callbacks=[ModelStatistics(kit.Net(), 2)]).error
    assert isinstance(error, ContractError)
    assert "ModelStatistics has a Net that this run does not train" in str(error)


# ----------------------------------------------------------------------------------------------------------- norms


@pytest.mark.parametrize(
    "options",
    [{}, {"gpu_batch_size_limit": 2}, {"clip_grads": True, "max_grad_norm": 0.01}, {"precision": "float16"}],
    ids=["plain", "accumulating", "clipping", "float16"],
)
def test_norms_are_those_of_what_the_optimizer_got(kit: Any, options: dict[str, Any]) -> None:
    """Unscaled and clipped gradients, and the weights after the step."""
    net = kit.Net(rows=32)
    copies = Copies(net)
    outcome = kit.train(net, callbacks=[ModelStatistics(net, 2), copies], **options)
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
            assert outcome.of(TrainStepEnded)[step - 1].grad_norm > 0.1


def odd_net(kit: Any) -> Any:
    """Parameters of several types: sparse gradients, none at all, frozen, empty, shared, complex."""

    class Odd(kit.Net):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(5, 4, sparse=True)
            self.unused = nn.Parameter(torch.ones(3))
            self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
            self.empty = nn.Parameter(torch.ones(0, 3))
            self.half_ = nn.Parameter(torch.full((4,), 40_000.0, dtype=torch.float16))  # the norm is too large for it
            self.double_ = nn.Parameter(torch.ones(4, dtype=torch.float64))
            self.complex_ = nn.Parameter(torch.full((2,), 3 + 4j))
            self.tied = nn.Linear(4, 1)
            self.tied.weight = self.linear.weight

        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=1e-3)], []

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            x, y = batch
            x = x * (self.half_.float() * 1e-4) + self.double_.float() + self.table(torch.tensor([1, 3, 3])).sum(0)
            loss = nn.functional.mse_loss(self.tied(x), y) / 1e4
            return loss + self.complex_.abs().sum() + self.empty.sum()

    return Odd()


def test_parameters_of_every_kind_are_taken(kit: Any) -> None:
    """Half precision neither overflows nor loses digits; rows that come twice in a sparse gradient are added up."""
    net = odd_net(kit)
    copies = Copies(net)
    outcome = kit.train(
        net, callbacks=[ModelStatistics(net, 1, histograms=True), copies], max_steps=1, val_interval_epochs=0
    )
    metrics = metrics_at(outcome, 1)
    weights, gradients = copies.weights[1], copies.gradients[1]
    names = {"linear.weight", "table.weight", "half_", "double_", "complex_", "tied.bias"}
    assert {name for name in metrics if name.startswith("grad_norm/")} == {f"grad_norm/{name}" for name in names}
    seen = {name for name in metrics if name.startswith("weight_norm/")}
    assert seen == {f"weight_norm/{name}" for name in {*names, "unused", "linear.bias"}}
    assert metrics["weight_norm/half_"] == pytest.approx(weights["half_"].double().norm().item(), rel=1e-6)
    assert metrics["weight_norm/complex_"] == pytest.approx(weights["complex_"].norm().item())
    dense = gradients["table.weight"].to_dense()
    assert gradients["table.weight"].is_sparse
    assert dense[3].norm() > 1.5 * dense[1].norm()
    assert metrics["grad_norm/table.weight"] == pytest.approx(dense.norm().item(), rel=1e-5)
    parts = [metrics[f"grad_norm/{name}"] for name in names]
    assert metrics["grad_norm_total"] == pytest.approx(math.hypot(*parts), rel=1e-5)
    histograms = {event.name for event in outcome.of(HistogramLogged)}
    assert histograms == {f"gradients/{name}" for name in names} | {
        f"weights/{name}" for name in {*names, "unused", "linear.bias"}
    }


def test_a_module_without_gradients_has_weights_all_the_same(kit: Any) -> None:
    """An optimizer may let the gradients go by itself."""

    class Clears(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            self.zero_grad()

    class Net(kit.Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            return [Clears(self.parameters(), lr=0.1)], []

    net = Net()
    outcome = kit.train(net, callbacks=[ModelStatistics(net, 1, histograms=True)], max_steps=1)
    assert set(metrics_at(outcome, 1)) == {"weight_norm/linear.weight", "weight_norm/linear.bias", "weight_norm_total"}
    assert [event.name for event in outcome.of(HistogramLogged)] == ["weights/linear.weight", "weights/linear.bias"]


def test_gradients_that_are_not_finite_are_shown(kit: Any) -> None:
    """That is what one looks for."""

    class Diverges(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss, predicted = self.forward_loss(batch)
            return loss * float("inf"), predicted

    net = Diverges()
    outcome = kit.train(net, callbacks=[ModelStatistics(net, 1, histograms=True)], max_steps=1, val_interval_epochs=0)
    assert not math.isfinite(metrics_at(outcome, 1)["grad_norm_total"])
    gradient = next(event for event in outcome.of(HistogramLogged) if event.name == "gradients/linear.weight")
    assert gradient.non_finite == 4


@pytest.mark.parametrize(
    ("exclude", "left"),
    [(["*.bias"], ["linear.weight"]), (("linear.*",), []), (["*"], []), (["bias"], ["linear.weight", "linear.bias"])],
)
def test_what_is_excluded_counts_in_the_totals(kit: Any, exclude: Any, left: list[str]) -> None:
    """Patterns are of whole names."""
    net = kit.Net()
    copies = Copies(net)
    outcome = kit.train(net, callbacks=[ModelStatistics(net, 1, histograms=True, exclude=exclude), copies], max_steps=1)
    metrics = metrics_at(outcome, 1)
    assert metrics["grad_norm_total"] == pytest.approx(norm(copies.gradients[1].values()), rel=1e-5)
    assert [name for name in metrics if "/" in name] == [
        f"{kind}_norm/{one}" for kind in ("weight", "grad") for one in left
    ]
    shown = [event.name for event in outcome.of(HistogramLogged)]
    assert shown == [f"{kind}/{one}" for kind in ("weights", "gradients") for one in left]


# ------------------------------------------------------------------------------------------------------ histograms


def test_histograms_count_every_element(kit: Any) -> None:
    """With their range and number of bins, and without norms if those are disabled."""
    net = kit.Net()
    copies = Copies(net)
    statistics = ModelStatistics(net, 2, norms=False, histograms=True, bins=5)
    outcome = kit.train(net, callbacks=[statistics, copies], epochs=2)
    assert outcome.of(MetricsLogged) == []
    events = {(event.global_step, event.name): event for event in outcome.of(HistogramLogged)}
    names = [f"{kind}/linear.{one}" for kind in ("weights", "gradients") for one in ("weight", "bias")]
    assert list(events) == [(step, name) for step in (2, 4) for name in names]
    for kind, kept in (("weights", copies.weights), ("gradients", copies.gradients)):
        event, tensor = events[4, f"{kind}/linear.weight"], kept[4]["linear.weight"]
        assert (len(event.counts), sum(event.counts), event.non_finite) == (5, 4, 0)
        assert (event.low, event.high) == (tensor.min().item(), tensor.max().item())


# ------------------------------------------------------------------------------------------------------- its place


def test_it_does_not_change_the_run(kit: Any) -> None:
    """Weights are the same to the last bit with and without it."""
    nets = []
    for looked_at in (False, True):
        net = kit.Net(rows=64)
        callbacks = [ModelStatistics(net, 1, histograms=True)] if looked_at else []
        kit.train(net, callbacks=callbacks, epochs=2, clip_grads=True)
        nets.append(net)
    assert torch.equal(nets[0].linear.weight, nets[1].linear.weight)


def test_all_norms_of_a_type_are_one_call(kit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many parameters there are; and at other steps there is none."""
    calls: list[int] = []
    original = torch._foreach_norm

    def counted(tensors: Any, *rest: Any, **options: Any) -> Any:
        calls.append(len(tensors))
        return original(tensors, *rest, **options)

    monkeypatch.setattr(torch, "_foreach_norm", counted)
    net = kit.Net(rows=64)
    net.others = nn.ParameterList(torch.ones(2) for _ in range(50))
    kit.train(net, callbacks=[ModelStatistics(net, 4)])
    assert calls == [52, 2, 52, 2]


@pytest.mark.anyio
async def test_it_logs_in_a_run_within_an_event_loop(kit: Any) -> None:
    """As in `train`."""
    net, memory = kit.Net(), kit.Memory()
    async with kit.make_trainer(net, callbacks=[ModelStatistics(net, 1)], sinks=[memory]).run() as run:
        await run.result()
    events = [event for event in memory.events if type(event) is MetricsLogged]
    assert [event.global_step for event in events] == [1, 2]
    assert all(len(event.metrics) == 6 for event in events)


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(kit: Any, tmp_path: Path) -> None:
    """At the same steps, to the last bit."""
    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": Checkpoints(every_minutes=None)}

    def attempt(**options: Any) -> dict[int, dict[str, float]]:
        net = kit.Net(rows=32)  # four steps an epoch
        outcome = kit.train(net, callbacks=[ModelStatistics(net, 3)], epochs=2, **options)
        return {event.global_step: event.metrics for event in outcome.of(MetricsLogged)}

    whole = attempt()
    assert list(whole) == [3, 6]
    first = attempt(max_steps=4, **run)
    assert first | attempt(resume="auto", **run) == whole
    assert list(first) == [3]
