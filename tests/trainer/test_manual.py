"""Manual optimization, compared with loops written by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support.training import Net, make_trainer, train
from torch import nn
from torch.optim.lr_scheduler import StepLR

from events.messages import MetricsLogged, NonFiniteGradient, StepSkipped, TrainStepEnded, WarningLogged
from events.messages import NonFiniteLoss as NonFiniteLossEvent
from trainer import CallbackInterface, Checkpoints
from trainer.errors import ArgumentsError, ContractError, NonFiniteError, OptimizerError

SGD = torch.optim.SGD


class Gan(Net):
    manual_optimization = True
    every = 3

    def __init__(self, rows: int = 48) -> None:
        super().__init__(rows=rows)
        torch.manual_seed(1)
        self.generator, self.critic = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))

    def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
        self.optimizers = [
            torch.optim.Adam(self.critic.parameters(), lr=0.01),
            SGD(self.generator.parameters(), lr=0.1, momentum=0.9),
        ]
        return self.optimizers, [StepLR(self.optimizers[0], 2, 0.5)]

    def critic_loss(self, x: torch.Tensor) -> torch.Tensor:
        difference = self.critic(self.generator(x.flip(0))) - self.critic(x)
        return difference.float().mean() * 1e-3  # or float16 overflows

    def generator_loss(self, x: torch.Tensor) -> torch.Tensor:
        return -self.critic(self.generator(x.flip(0))).float().mean() * 1e-3

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        x, _ = batch
        loss = self.critic_loss(x)
        assert self.optimize(loss)
        self.log("critic", loss)
        if global_step % self.every == 0:
            assert self.optimize(self.generator_loss(x), self.optimizers[1])
        return loss.detach()

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return self.critic_loss(batch[0])


def by_hand(net: Any, epochs: int, clip: float | None = None, scaler: Any = None) -> list[float]:
    """Train with a loop written by hand and return its losses."""
    optimizers, schedulers = net.get_optimizers_schedulers(0, 0)
    losses, step = [], 0

    def apply(optimizer: Any, make_loss: Any, x: torch.Tensor) -> float:
        optimizer.zero_grad()
        if scaler is None:
            loss = make_loss(x)
            loss.backward()
        else:
            with torch.autocast("cpu", torch.float16):
                loss = make_loss(x)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        return loss.item()

    for _ in range(epochs):
        for x, _ in net.batches(8):
            step += 1
            losses.append(apply(optimizers[0], net.critic_loss, x))
            if step % net.every == 0:
                apply(optimizers[1], net.generator_loss, x)
            for scheduler in schedulers:
                scheduler.step()
    return losses


@pytest.mark.parametrize(
    "options",
    [{}, {"clip_grads": True, "max_grad_norm": 0.05}, {"precision": "float16"}, {"non_finite": "skip"}],
    ids=["plain", "clip", "float16", "skip"],
)
def test_an_alternating_gan_equals_the_loop_by_hand(options: dict[str, Any]) -> None:
    net = Gan()
    bare = copy.deepcopy(net)
    outcome = train(net, epochs=2, **options)
    scaler = torch.amp.GradScaler("cpu") if options.get("precision") == "float16" else None
    expected = by_hand(bare, 2, options.get("max_grad_norm"), scaler)
    assert [e.loss for e in outcome.of(TrainStepEnded)] == expected
    assert outcome.result.global_step == 12
    assert all(map(torch.equal, net.parameters(), bare.parameters()))
    logged = [e.metrics["critic"] for e in outcome.of(MetricsLogged) if "critic" in e.metrics]
    assert logged == expected
    assert all(p.grad is None for p in net.parameters())
    norms = [e.grad_norm is not None for e in outcome.of(TrainStepEnded)]
    assert norms == ["clip_grads" in options] * 12


def test_a_manual_run_resumes_exactly(tmp_path: Any) -> None:
    settings = Checkpoints(every_steps=1, keep_last=None, when_busy="wait")
    whole, rest = Gan(), Gan()
    train(whole, epochs=2, run_dir=tmp_path / "run", checkpoints=settings)
    again = train(rest, epochs=2, resume=tmp_path / "run" / "checkpoints" / "step-4.a1")
    assert len(again.of(TrainStepEnded)) == 8
    assert all(map(torch.equal, whole.parameters(), rest.parameters()))


def test_every_backward_pass_calls_the_hooks() -> None:
    seen: list[Any] = []

    class Watching(CallbackInterface):
        def on_end_backward(self, global_step: int, loss_tensor: torch.Tensor) -> None:
            seen.append(("backward", global_step))

        def on_before_optimizer_step(self, global_step: int) -> None:
            seen.append(("step", global_step))

    outcome = train(Gan(rows=24), callbacks=[Watching()])
    pair = lambda step: [("backward", step), ("step", step)]  # noqa: E731
    assert seen == pair(0) + pair(1) + pair(2) * 2
    assert outcome.result.ledger.steps == 3


def test_a_module_may_step_its_optimizer_itself() -> None:
    """Also with gradients over several steps."""

    class Own(Net):
        manual_optimization = True

        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            self.optimizer = SGD(self.parameters(), lr=0.05)
            return [self.optimizer], []

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss, predicted = self.forward_loss(batch)
            (loss / 2).backward()
            if global_step % 2 == 0:
                self.optimizer.step()
                self.optimizer.zero_grad()
            return loss.detach(), predicted

    own, accumulated = Own(rows=32), Net(rows=32)
    outcome = train(own)
    assert (outcome.result.global_step, outcome.of(WarningLogged)) == (4, [])
    train(accumulated, train_batch_size=16, gpu_batch_size_limit=8)
    for one, other in zip(own.parameters(), accumulated.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("clip", [False, True])
def test_an_update_that_is_not_finite_is_skipped_alone(clip: bool) -> None:
    class Diverging(Gan):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            x, _ = batch
            done.append(self.optimize(self.critic_loss(x) * (math.nan if global_step == 2 else 1.0)))
            done.append(self.optimize(self.generator_loss(x), 1))
            return torch.zeros(())

    done: list[bool] = []
    net = Diverging(rows=32)
    outcome = train(net, non_finite="skip", clip_grads=clip)
    assert done == [True, True, False, True] + [True] * 4
    assert outcome.result.global_step == 4
    assert [e.reason for e in outcome.of(StepSkipped)] == ["non_finite_loss"]
    assert [e.action for e in outcome.of(NonFiniteLossEvent)] == ["skipped"]
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_schedulers_stay_where_every_update_was_skipped() -> None:
    """As in the first steps of float16; torch would warn about a scheduler that steps before its optimizer."""

    class Diverging(Gan):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss = self.critic_loss(batch[0])
            self.optimize(loss * math.nan if global_step in (1, 3) else loss)
            return loss.detach()

    outcome = train(Diverging(rows=48), non_finite="skip", val_interval_epochs=0)
    assert [e.lr for e in outcome.of(TrainStepEnded)] == pytest.approx([0.01, 0.01, 0.01, 0.01, 0.005, 0.005])


def test_warn_stop_and_the_limit_hold_for_updates() -> None:
    class Diverging(Gan):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss = self.critic_loss(batch[0])
            self.optimize(loss * math.inf if global_step > 2 else loss)
            return loss.detach()

    outcome = train(Diverging(), val_interval_epochs=0)
    assert [e.global_step for e in outcome.of(NonFiniteGradient)][:1] == [3]  # the loss that is shown is finite
    outcome = train(Diverging(), non_finite="stop")
    assert isinstance(outcome.error, NonFiniteError)
    assert "step 3" in str(outcome.error)
    outcome = train(Diverging(), non_finite="skip", max_skipped_steps=3)
    assert isinstance(outcome.error, NonFiniteError)
    assert "3 steps in a row were skipped (max_skipped_steps), the first at step 3" in str(outcome.error)


def test_a_closure_and_an_update_share_a_step() -> None:
    class Mixed(Net):
        manual_optimization = True

        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            return [torch.optim.LBFGS([self.linear.weight], lr=0.5, max_iter=3), SGD([self.linear.bias], 0.1)], []

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.optimize(None, 0, closure=lambda: self.forward_loss(batch)[0])
            loss = self.forward_loss(batch)[0]
            self.optimize(loss, 1)
            return loss.detach()

    net = Mixed(rows=32)
    bare = copy.deepcopy(net)
    train(net)
    first, second = bare.get_optimizers_schedulers(0, 0)[0]
    for batch in bare.batches(8):

        def closure(batch: Any = batch) -> torch.Tensor:
            bare.zero_grad()
            loss = bare.forward_loss(batch)[0]
            loss.backward()
            return loss

        first.step(closure)
        bare.zero_grad()
        bare.forward_loss(batch)[0].backward()
        second.step()
    assert all(map(torch.equal, net.parameters(), bare.parameters()))
    assert isinstance(train(Mixed(), precision="float16").error, OptimizerError)


def manual_net(step: Any, manual: Any = True) -> Any:
    net = Net(train_step=lambda net, _, batch: step(net, net.forward_loss(batch)[0]))
    net.manual_optimization = manual

    return net


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda net, loss: net.optimize(loss, 1), "optimizer=1"),
        (lambda net, loss: net.optimize(loss, -1), "optimizer=-1"),
        (lambda net, loss: net.optimize(loss, SGD(net.parameters(), 0.1)), "did not return"),
        (lambda net, loss: net.optimize(loss.detach()), "which is not a loss"),
        (lambda net, loss: net.optimize(loss.item()), "which is not a loss"),
        (lambda net, loss: net.optimize(None), "a loss or a closure"),
        (lambda net, loss: net.optimize(loss, closure=lambda: loss), "a loss or a closure"),
        (lambda net, loss: net.optimize(None, closure=3), "closure=3; give it a function that computes the loss"),
        (lambda net, loss: net.optimize(loss.expand(3)), "a tensor of shape (3,), which is not a loss"),
        (lambda net, loss: net.optimize(loss, SGD(net.parameters(), 0.1)), "optimizer=a SGD, which"),
    ],
)
def test_an_invalid_argument_of_optimize_is_named(step: Any, said: str) -> None:
    outcome = train(manual_net(step))
    assert isinstance(outcome.error, ContractError)
    assert said in str(outcome.error)
    assert not any("has applied no loss" in warned.message for warned in outcome.of(WarningLogged))


def test_an_optimizer_that_computes_the_loss_needs_a_closure() -> None:
    net = manual_net(lambda net, loss: net.optimize(loss))
    net.own_optimizers = lambda net: ([torch.optim.LBFGS(net.parameters())], [])
    error = train(net).error
    assert isinstance(error, ContractError)
    assert "a loss for LBFGS, which computes the loss itself; give it optimize(None, closure=...)" in str(error)


@pytest.mark.parametrize(("rows", "steps"), [(16, 2), (808, 100)])
def test_a_run_that_applies_no_loss_is_a_warning(rows: int, steps: int) -> None:
    """Soon, or at its end; a module that steps its optimizer itself applies losses."""
    net = Net(rows, train_step=lambda net, _, batch: net.forward_loss(batch)[0].detach())
    net.manual_optimization = True
    (warned,) = train(net).of(WarningLogged)
    assert warned.message == f"Net.train_step() has applied no loss in {steps} steps; call self.optimize(loss) in it"


def test_the_flag_is_a_bool() -> None:
    with pytest.raises(ArgumentsError, match=r"Net.manual_optimization is 'yes'; set it to True or False"):
        make_trainer(manual_net(None, manual="yes"))


def test_optimize_needs_manual_optimization_and_a_step() -> None:
    """Without the flag the trainer would apply the loss again; outside of a run there is no optimizer."""
    outcome = train(manual_net(lambda net, loss: net.optimize(loss), manual=False))
    assert isinstance(outcome.error, ContractError)
    assert "manual_optimization = True" in str(outcome.error)
    net = manual_net(lambda net, loss: loss.detach())
    train(net)
    with pytest.raises(ContractError, match="within train_step of a run"):
        net.optimize(torch.zeros((), requires_grad=True))


def test_manual_optimization_takes_whole_batches() -> None:
    """Each call of `train_step` is a step."""
    outcome = train(Gan(), gpu_batch_size_limit=2)
    assert isinstance(outcome.error, ArgumentsError)
    assert "gpu_batch_size_limit=2" in str(outcome.error)


@pytest.mark.parametrize("options", [{"precision": "float16"}, {"non_finite": "skip"}])
def test_a_skipped_update_is_reported_once(options: dict[str, Any]) -> None:
    """Its gradient norm is not the step's, which would count as another bad gradient."""

    def step(net: Any, loss: torch.Tensor) -> torch.Tensor:
        net.calls = getattr(net, "calls", 0) + 1
        net.optimize(loss * (math.nan if net.calls == 2 else 1e-3))
        return loss.detach()

    outcome = train(manual_net(step), clip_grads=True, epochs=4, **options)
    assert outcome.error is None
    assert [e.reason for e in outcome.of(StepSkipped)] == ["non_finite_loss"]
    assert len(outcome.of(NonFiniteLossEvent)) == 1
    assert outcome.of(NonFiniteGradient) == []
