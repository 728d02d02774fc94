"""Optimizers that need a closure, which covers the step's micro-batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.training import Net, logging_net, train
from torch.optim.lr_scheduler import StepLR

from events.messages import NonFiniteGradient, NonFiniteLoss, StepSkipped, TrainStepEnded
from trainer.errors import NonFiniteLossError, OptimizerError


class Sam(torch.optim.Optimizer):
    """A small sharpness-aware optimizer: it applies the gradients of a point uphill to the original weights."""

    def __init__(self, params: Any, lr: float = 0.05, rho: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        uphill = [self.param_groups[0]["rho"] * p.grad.sign() for p in parameters]
        torch._foreach_add_(parameters, uphill)
        closure()
        torch._foreach_sub_(parameters, uphill)
        for parameter in parameters:
            parameter.sub_(self.param_groups[0]["lr"] * parameter.grad)
        return loss


class Asserting(Sam):
    """Its signature makes the closure optional, and it starts with the existing gradients."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is not None, "SAM needs a closure"
        uphill = iter([p.grad.clone() for group in self.param_groups for p in group["params"]])
        evaluated: list[Any] = []

        def first_is_done() -> Any:
            if evaluated:
                return closure()
            evaluated.append(None)
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.grad = next(uphill)
            return None

        return super().step(first_is_done)


def lbfgs(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(parameters, lr=0.5, max_iter=4, history_size=3)


def net_with(make: Any, rows: int = 16) -> Any:
    def optimizers(net: Net) -> Any:
        made = make(net)
        return made, [StepLR(made[0], 1, 0.5)]

    def log(net: Net, step: int, batch: Any) -> None:
        net.calls += 1
        net.log("evaluations", net.calls)

    return logging_net(log, rows=rows, optimizers=optimizers)


def by_hand(net: Any, make: Any, epochs: int, clip: float | None = None) -> list[float]:
    """Train with a loop written by hand and return its losses."""
    optimizers = make(net)
    scheduler = StepLR(optimizers[0], 1, 0.5)
    losses: list[float] = []
    for _ in range(epochs):
        for batch in net.batches(8):
            first: list[float] = []

            def closure(batch: Any = batch, first: list[float] = first) -> torch.Tensor:
                net.zero_grad()
                with torch.enable_grad():
                    loss, _ = net.forward_loss(batch)
                    loss.backward()
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
                first.append(loss.item())
                return loss.detach()

            for optimizer in optimizers:
                if isinstance(optimizer, Asserting):
                    closure()
                optimizer.step(closure)
            scheduler.step()
            losses.append(first[0])
    return losses


MAKERS = {
    "lbfgs": lambda net: [lbfgs(net.parameters())],
    "sam": lambda net: [Sam(net.parameters())],
    "asserting": lambda net: [Asserting(net.parameters())],
    "two": lambda net: [torch.optim.SGD([net.linear.weight], lr=0.1), lbfgs([net.linear.bias])],
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_closure_optimizers_train_as_in_a_loop_by_hand(name: str, clip: float | None) -> None:
    net, bare = net_with(MAKERS[name]), Net()
    options = {} if clip is None else {"clip_grads": True, "max_grad_norm": clip}
    outcome = train(net, epochs=2, val_interval_epochs=0, **options)
    assert [e.loss for e in outcome.of(TrainStepEnded)] == by_hand(bare, MAKERS[name], 2, clip)
    assert all(map(torch.equal, net.parameters(), bare.parameters()))
    assert len(outcome.logged()["evaluations"]) == 4
    assert net.calls > 4


@pytest.mark.parametrize("name", ["lbfgs", "sam"])
def test_a_closure_covers_all_micro_batches_of_its_step(name: str) -> None:
    split, whole = net_with(MAKERS[name]), net_with(MAKERS[name])
    train(split, gpu_batch_size_limit=2, val_interval_epochs=0)
    train(whole, val_interval_epochs=0)
    for one, other in zip(split.parameters(), whole.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("bad_evaluation", [1, 2])
def test_a_step_that_is_skipped_changes_nothing(bad_evaluation: int) -> None:
    """Also if the loss is NaN at a point that the optimizer has only tried."""
    net = net_with(MAKERS["sam"], rows=24)
    forward_loss, seen = net.forward_loss, []

    def diverges(batch: Any) -> Any:
        loss, predicted = forward_loss(batch)
        seen.append([p.detach().clone() for p in net.parameters()])
        return (loss * math.nan if len(seen) == 2 + bad_evaluation else loss), predicted

    net.forward_loss = diverges
    outcome = train(net, non_finite="skip", val_interval_epochs=0)
    assert [(e.reason, e.global_step) for e in outcome.of(StepSkipped)] == [("non_finite_loss", 1)]
    assert outcome.result.global_step == 2
    before, after = seen[2], seen[2 + bad_evaluation]
    assert all(map(torch.equal, before, after))
    assert outcome.of(NonFiniteGradient) == []


def test_stop_ends_a_closure_step() -> None:
    net = net_with(MAKERS["lbfgs"])
    forward_loss, evaluations = net.forward_loss, []

    def diverges(batch: Any) -> Any:
        evaluations.append(batch)
        loss, predicted = forward_loss(batch)
        return loss * (math.inf if len(evaluations) > 3 else 1.0), predicted

    net.forward_loss = diverges
    outcome = train(net, non_finite="stop", val_interval_epochs=0)
    assert isinstance(outcome.error, NonFiniteLossError)
    assert [e.action for e in outcome.of(NonFiniteLoss)] == ["stopped"]
    assert all(bool(p.isfinite().all()) for p in net.parameters())


@pytest.mark.parametrize(("name", "kind"), [("two", "LBFGS"), ("asserting", "Asserting")])
def test_float16_refuses_closures_with_the_reason(name: str, kind: str) -> None:
    """One decision per step about the loss scale does not fit several evaluations."""
    outcome = train(net_with(MAKERS[name]), precision="float16", epochs=9)
    assert isinstance(outcome.error, OptimizerError)
    assert str(outcome.error).startswith(f"{kind} computes the loss several times per step")


def test_a_closure_that_is_never_called_is_an_error() -> None:
    class Lazy(Sam):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            return None

    outcome = train(net_with(lambda net: [Lazy(net.parameters())]))
    assert isinstance(outcome.error, OptimizerError)
    assert "did not call the closure" in str(outcome.error)


def test_an_optimizers_own_error_about_a_closure_propagates() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("the closure is broken")

    outcome = train(net_with(lambda net: [Broken(net.parameters(), lr=0.1)]))
    assert isinstance(outcome.error, RuntimeError)
    assert "the closure is broken" in str(outcome.error)


def test_lbfgs_resumes_exactly(tmp_path: Any) -> None:
    from trainer import Checkpoints

    settings = Checkpoints(every_steps=1, keep_last=9, when_busy="wait")
    whole = net_with(MAKERS["lbfgs"], rows=48)
    train(whole, run_dir=tmp_path / "run", checkpoints=settings, val_interval_epochs=0)
    rest = net_with(MAKERS["lbfgs"], rows=48)
    again = train(rest, resume=tmp_path / "run" / "checkpoints" / "step-3.a1", val_interval_epochs=0)
    assert len(again.of(TrainStepEnded)) == 3
    assert all(map(torch.equal, whole.parameters(), rest.parameters()))
