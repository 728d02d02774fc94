"""Optimizers and schedulers: how many, when they step, what is clipped, and what mixed precision changes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, LinearLR, ReduceLROnPlateau, StepLR

from events.messages import MonitorMissing, RunEnded, StepSkipped, TrainEpochEnded, TrainStepEnded, ValEpochEnded
from trainer import Checkpoints, Schedule, inline
from trainer.errors import ArgumentsError, MetricNotFound, OptimizerError


def halving(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda calls: 0.5**calls)


def module_with(kit: Any, make: Any, **extra: Any) -> Any:
    """A module whose optimizers and schedulers are ``make(module)``."""

    class Net(kit.Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            return make(self)

    for name, value in extra.items():
        setattr(Net, name, value)
    return Net()


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "it returned None: return [optimizer], []"),
        ([], "it returned []: return [optimizer], []"),
        (["sgd"], "it returned ['sgd']: return [optimizer], []"),
        (([], []), "returned no optimizer"),
        ((3, []), "must return two lists"),
        ((["sgd"], []), "which is not an optimizer"),
    ],
)
def test_what_is_no_pair_of_optimizers_and_schedulers_is_refused(kit: Any, returned: Any, said: str) -> None:
    """The error names the method, what it must return, and what came."""
    outcome = kit.train(module_with(kit, lambda net: returned))
    assert isinstance(outcome.error, OptimizerError)
    assert "get_optimizers_schedulers()" in str(outcome.error)
    assert said in str(outcome.error)
    assert outcome.names()[-1] == "RunEnded"


def test_an_optimizer_that_would_step_twice_is_refused(kit: Any) -> None:
    """It stands in the list twice."""

    def twice(net: Any) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.1)] * 2, []

    outcome = kit.train(module_with(kit, twice))
    assert isinstance(outcome.error, OptimizerError)
    assert "an optimizer twice" in str(outcome.error)


def test_a_scheduler_without_step_is_refused(kit: Any) -> None:
    """A class, or a number, in the second list is named."""

    def make(net: Any) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.1)], [0.5]

    outcome = kit.train(module_with(kit, make))
    assert isinstance(outcome.error, OptimizerError)
    assert "0.5, which has no step()" in str(outcome.error)


# ----------------------------------------------------------------------------------------------- several of them


def test_iterators_of_optimizers_are_accepted(kit: Any) -> None:
    """The contract says iterables: a generator is one."""

    def make(net: Any) -> Any:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        return (one for one in [optimizer]), (one for one in [halving(optimizer)])

    outcome = kit.train(module_with(kit, make))
    assert [e.lr for e in outcome.of(TrainStepEnded)] == [0.1, 0.05]


def test_gradients_are_cleared_as_an_optimizer_of_its_own_kind_does(kit: Any) -> None:
    """A class, or somebody since, that does more in `zero_grad` is asked; for torch's own the trainer does it."""
    calls: list[str] = []

    class Counting(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = True) -> None:
            calls.append("class")
            super().zero_grad(set_to_none)

    def make(net: Any) -> Any:
        subclass = Counting([net.linear.weight], lr=0.1)
        patched = torch.optim.SGD([net.linear.bias], lr=0.1)
        zero_grad = patched.zero_grad
        patched.zero_grad = lambda: (calls.append("patch"), zero_grad())  # type: ignore[method-assign,assignment]
        return [subclass, patched], []

    one = kit.train(module_with(kit, make), seed=0, epochs=2)
    steps = len(one.of(TrainStepEnded))
    assert calls == ["class", "patch"] * (steps + 2)  # before the first step and at the end, too
    plain = kit.train(module_with(kit, lambda net: ([torch.optim.SGD(net.parameters(), lr=0.1)], [])), seed=0, epochs=2)
    assert [e.loss for e in one.of(TrainStepEnded)] == pytest.approx([e.loss for e in plain.of(TrainStepEnded)])


def test_parameters_that_join_an_optimizer_later_are_cleared_too(kit: Any) -> None:
    """A layer that is unfrozen in mid-run: its gradients do not add up over the steps."""
    seen: list[Any] = []

    class Net(kit.Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            self.linear.bias.requires_grad_(False)
            self.optimizer = torch.optim.SGD([self.linear.weight], lr=0.0)
            return [self.optimizer], []

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            seen.append(self.linear.bias.grad)
            if global_step == 2:
                self.linear.bias.requires_grad_()
                self.optimizer.add_param_group({"params": [self.linear.bias], "lr": 0.0})
            return super().train_step(global_step, batch, device)

    steps = kit.train(Net(), epochs=3).result.global_step
    assert steps > 3
    assert seen == [None] * steps


def test_all_optimizers_and_schedulers_step_together(kit: Any) -> None:
    """Two optimizers over two halves of the parameters equal one over all of them; each scheduler steps once."""

    def two(net: Any) -> Any:
        optimizers = [torch.optim.SGD([p], lr=0.05) for p in net.parameters()]
        return optimizers, [halving(o) for o in optimizers]

    def one(net: Any) -> Any:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        return [optimizer], [halving(optimizer)]

    split, whole = module_with(kit, two), module_with(kit, one)
    kit.train(split, epochs=2)
    kit.train(whole, epochs=2)
    assert torch.equal(split.linear.weight, whole.linear.weight)
    assert torch.equal(split.linear.bias, whole.linear.bias)


@pytest.mark.parametrize(
    ("interval", "rates"), [("step", [0.1, 0.05, 0.025, 0.0125]), ("epoch", [0.1, 0.1, 0.05, 0.05])]
)
def test_schedulers_step_at_their_interval(kit: Any, interval: str, rates: list[float]) -> None:
    """After each optimizer step, or after each epoch; the event has the rate that the step was taken with."""

    def make(net: Any) -> Any:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        return [optimizer], [halving(optimizer)]

    outcome = kit.train(module_with(kit, make), epochs=2, scheduler_interval=interval)
    assert [e.lr for e in outcome.of(TrainStepEnded)] == pytest.approx(rates)


def test_a_learning_rate_that_was_loaded_is_reported(kit: Any) -> None:
    """`load_state_dict` puts new parameter groups in the place of the old ones."""

    class Net(kit.Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.5)
            return [self.optimizer], []

        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            state = self.optimizer.state_dict()
            state["param_groups"][0]["lr"] = 0.25
            self.optimizer.load_state_dict(state)

    assert [e.lr for e in kit.train(Net()).of(TrainStepEnded)] == [0.5, 0.25]


def test_a_learning_rate_that_is_a_tensor_is_reported_as_it_was(kit: Any) -> None:
    """Capturable optimizers keep it in a tensor, which the scheduler changes in place."""

    def make(net: Any) -> Any:
        optimizer = torch.optim.Adam(net.parameters(), lr=torch.tensor(0.5), foreach=False)
        return [optimizer], [halving(optimizer)]

    outcome = kit.train(module_with(kit, make))
    assert [e.lr for e in outcome.of(TrainStepEnded)] == [0.5, 0.25]


# --------------------------------------------------------------------------------------------------- schedules


def warmup_and(second: Any) -> Any:
    def make(net: Any) -> Any:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.8)
        return [optimizer], [Schedule(LinearLR(optimizer, 0.25, total_iters=3), "step"), second(optimizer)]

    return make


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_each_schedule_has_its_own_interval(kit: Any, interval: str) -> None:
    """A warmup by step and a decay by epoch, whatever the interval of the others is."""
    make = warmup_and(lambda optimizer: Schedule(StepLR(optimizer, 1, gamma=0.5), interval="epoch"))
    outcome = kit.train(module_with(kit, make), epochs=3, scheduler_interval=interval)
    # 0.25, 0.5, then (after the first epoch's halving) three quarters and all of it.
    assert [e.lr for e in outcome.of(TrainStepEnded)] == pytest.approx([0.2, 0.4, 0.3, 0.4, 0.2, 0.2])


def test_a_warmup_by_step_goes_with_a_plateau_by_validation(kit: Any) -> None:
    """Each with its own metric: the constant one never improves, the other always does."""

    class Net(kit.Net):
        validations = 0

        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.8)
            return [optimizer], [
                Schedule(LinearLR(optimizer, 0.25, total_iters=3), "step"),
                Schedule(ReduceLROnPlateau(optimizer, factor=0.5, patience=0), monitor="same"),
                Schedule(ReduceLROnPlateau(optimizer, factor=0.1, patience=0), monitor="better"),
            ]

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.log("same", 1.0)
            self.log("better", -float(global_step))
            return super().val_step(global_step, batch, device)

    outcome = kit.train(Net(), epochs=4, scheduler_interval="epoch")
    assert [e.lr for e in outcome.of(TrainStepEnded)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.4, 0.4, 0.2, 0.2])


def test_a_scheduler_of_ones_own_that_needs_a_metric_gets_it(kit: Any) -> None:
    """Told by its signature, or by a monitor."""
    got: list[float] = []

    class Own:
        def step(self, metrics: float) -> None:
            got.append(metrics)

    class Optional:
        def step(self, value: float | None = None) -> None:
            got.append(value)

    def make(net: Any) -> Any:
        return [torch.optim.SGD(net.parameters(), lr=0.1)], [Own(), Schedule(Optional(), monitor="val_loss")]

    outcome = kit.train(module_with(kit, make))
    assert got == [outcome.of(ValEpochEnded)[0].loss] * 2


def test_schedules_resume_exactly(kit: Any, tmp_path: Any) -> None:
    """In the middle of an epoch, between a warmup's steps."""
    make = warmup_and(lambda optimizer: Schedule(ReduceLROnPlateau(optimizer, patience=0), monitor="val_loss"))
    settings = Checkpoints(every_steps=1, keep_last=9, when_busy="wait")
    whole = kit.train(module_with(kit, make), epochs=3, run_dir=tmp_path / "run", checkpoints=settings)
    rest = kit.train(module_with(kit, make), epochs=3, resume=tmp_path / "run" / "checkpoints" / "step-3.a1")
    rates = [e.lr for e in whole.of(TrainStepEnded)]
    assert [e.lr for e in rest.of(TrainStepEnded)] == rates[3:]


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda s: Schedule(3), "is not a scheduler"),
        (lambda s: Schedule(StepLR), "is not a scheduler"),
        (lambda s: Schedule(Schedule(s)), "is not a scheduler"),
        (lambda s: Schedule(s, "steps"), "interval='steps'"),
        (lambda s: Schedule(s, monitor=""), "monitor=''"),
        (lambda s: Schedule(s, "step", "val_loss"), "after each validation"),
    ],
)
def test_a_schedule_that_cannot_work_is_refused_where_it_is_built(build: Any, said: str) -> None:
    """The value, and what is allowed."""
    scheduler = StepLR(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1), 1)
    with pytest.raises(ArgumentsError, match=said):
        build(scheduler)


def test_a_scheduler_in_a_dict_is_told_of_schedule(kit: Any) -> None:
    """As other trainers take it."""

    def make(net: Any) -> Any:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": halving(optimizer), "interval": "step"}]

    outcome = kit.train(module_with(kit, make))
    assert isinstance(outcome.error, OptimizerError)
    assert "write Schedule(scheduler, interval, monitor)" in str(outcome.error)


# --------------------------------------------------------------------------------------------------- gradients


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_it_is_reported(kit: Any) -> None:
    """Inline hooks of the step see the clipped gradients; the event says what they were."""
    from trainer import inline

    norms: list[float] = []
    before: list[float] = []

    class Net(kit.Net):
        def on_end_backward(self, global_step: int, loss_tensor: Any) -> None:
            before.append(self.norm())

        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            norms.append(self.norm())

        def norm(self) -> float:
            return float(torch.cat([p.grad.flatten() for p in self.parameters()]).norm())

    outcome = kit.train(Net(), clip_grads=True, max_grad_norm=0.01)
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    assert min(before) > 0.1
    assert [e.grad_norm for e in outcome.of(TrainStepEnded)] == pytest.approx(before)


def test_without_clipping_there_is_no_norm(kit: Any) -> None:
    """Computing it would cost a step time."""
    assert [e.grad_norm for e in kit.train(kit.Net()).of(TrainStepEnded)] == [None, None]


def test_gradients_do_not_outlive_the_run(kit: Any) -> None:
    """Memory of gradients is given back, and none of them leaks into a later run."""
    net = kit.Net()
    kit.train(net)
    assert all(p.grad is None for p in net.parameters())


# ----------------------------------------------------------------------------------------- ReduceLROnPlateau


def plateau(net: Any) -> Any:
    """A scheduler that writes down what it gets."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    scheduler = ReduceLROnPlateau(optimizer)
    net.got = []
    original = scheduler.step

    def step(metrics: Any, epoch: Any = None) -> None:
        net.got.append(metrics)
        original(metrics)

    scheduler.step = step  # type: ignore[method-assign]
    return [optimizer], [scheduler]


def test_a_plateau_scheduler_gets_the_validation_loss(kit: Any) -> None:
    """Once after each validation, the row-weighted mean."""
    net = module_with(kit, plateau)
    outcome = kit.train(net, epochs=2)
    assert net.got == pytest.approx([e.loss for e in outcome.of(ValEpochEnded)], rel=1e-12)


def test_a_plateau_scheduler_can_follow_a_metric_of_the_modules_hook(kit: Any) -> None:
    """The module's on_end_val_epoch is fenced, so what it logs is there in time."""

    def on_end_val_epoch(self: Any, global_step: int, *outputs: Any, key: str = "default") -> None:
        self.log("score", torch.tensor(float(global_step)))

    net = module_with(kit, plateau, on_end_val_epoch=on_end_val_epoch)
    kit.train(net, epochs=2, monitor="score")
    assert net.got == [2.0, 4.0]


def test_a_plateau_scheduler_can_follow_one_of_several_dataloaders(kit: Any) -> None:
    """By the key behind the metric's name."""

    def get_val_dataloaders(self: Any, sampler: Any, batch_size: int) -> Any:
        return {"a": self.batches(8), "b": self.batches(8)[:1]}

    net = module_with(kit, plateau, get_val_dataloaders=get_val_dataloaders)
    outcome = kit.train(net, monitor="val_loss/b")
    assert net.got == pytest.approx([outcome.of(ValEpochEnded)[1].loss], rel=1e-12)


def test_a_plateau_scheduler_can_follow_the_training_loss(kit: Any) -> None:
    """Once an epoch, the same mean that TrainEpochEnded has: over rows, not over steps."""

    class Net(kit.Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            return plateau(self)

    net = Net(rows=20)
    outcome = kit.train(net, epochs=2, monitor="train_epoch_loss")
    assert net.got == pytest.approx([e.loss for e in outcome.of(TrainEpochEnded)], rel=1e-6)


def test_a_metric_that_nobody_logged_is_an_error_that_names_the_others(kit: Any) -> None:
    """A typing error in monitor ends the run at the first validation."""

    def val_step(self: Any, global_step: int, batch: Any, device: Any) -> Any:
        self.log("accuracy", 0.5)
        return self.forward_loss(batch)

    outcome = kit.train(module_with(kit, plateau, val_step=val_step), monitor="acuracy")
    assert isinstance(outcome.error, MetricNotFound)
    assert "(available: accuracy, val_loss); set it to 'accuracy'" in str(outcome.error)
    missing = [(event.monitor, event.wanted_by, event.known) for event in outcome.of(MonitorMissing)]
    assert missing == [("acuracy", "ReduceLROnPlateau", ["accuracy", "val_loss"])]
    assert outcome.of(RunEnded)[0].status == "failed"


@pytest.mark.parametrize("how", ["never", "no loaders"])
def test_a_plateau_scheduler_without_validation_is_an_error_and_not_a_silent_no_op(kit: Any, how: str) -> None:
    """Nobody computes val_loss, so the learning rate would stay for ever, and nobody would know why."""
    if how == "never":
        outcome = kit.train(module_with(kit, plateau), val_interval_epochs=0)
    else:
        outcome = kit.train(module_with(kit, plateau, get_val_dataloaders=lambda self, sampler, size: None))
    assert isinstance(outcome.error, MetricNotFound)
    assert "val_loss" in str(outcome.error)


def test_without_validation_a_plateau_scheduler_follows_what_the_training_logs(kit: Any) -> None:
    """Once an epoch: the last value."""

    def train_step(self: Any, global_step: int, batch: Any, device: Any) -> Any:
        self.log("step", global_step)
        return self.forward_loss(batch)

    net = module_with(kit, plateau, train_step=train_step)
    kit.train(net, epochs=2, monitor="step", val_interval_epochs=0)
    assert net.got == [2.0, 4.0]


# ---------------------------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_steps_of_every_stage_run_under_autocast(kit: Any, precision: str, dtype: torch.dtype) -> None:
    """Training and validation; the weights stay in float32, and the loss falls."""
    seen = set()

    class Net(kit.Net):
        def forward_loss(self, batch: Any) -> Any:
            x, y = batch
            predicted = self.linear(x)
            seen.add((self.training, predicted.dtype))
            return torch.nn.functional.mse_loss(predicted.float(), y), predicted

    net = Net()
    outcome = kit.train(net, precision=precision, epochs=10)
    assert seen == {(True, dtype), (False, dtype)}
    assert net.linear.weight.dtype == torch.float32
    losses = [e.loss for e in outcome.of(TrainStepEnded)]
    assert losses[-1] < losses[0] / 2


def test_a_float16_overflow_skips_the_step_for_all_optimizers(kit: Any) -> None:
    """One gradient overflows, of one optimizer: neither steps, global_step and schedulers stay, StepSkipped says so."""

    class Net(kit.Net):
        calls = 0

        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            self.optimizers = [torch.optim.SGD([p], lr=0.05) for p in self.parameters()]
            self.stepped = []
            for optimizer in self.optimizers:
                optimizer.register_step_post_hook(lambda o, *_: self.stepped.append((self.calls, id(o))))
            return self.optimizers, [halving(self.optimizers[0])]

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.calls += 1
            loss, _ = self.forward_loss(batch)
            # The bias alone gets an infinite gradient; the loss itself is finite.
            return loss * 1e-3 + (self.linear.bias.sum() * 0 * 1e38 * 1e38 if self.calls == 2 else 0)

    net = Net(rows=32)
    outcome = kit.train(net, precision="float16", val_interval_epochs=0)
    assert [(e.reason, e.global_step) for e in outcome.of(StepSkipped)] == [("gradient_overflow", 1)]
    assert [call for call, _ in net.stepped] == [1, 1, 3, 3, 4, 4]
    assert [e.global_step for e in outcome.of(TrainStepEnded)] == [1, 2, 3]
    assert [e.lr for e in outcome.of(TrainStepEnded)] == pytest.approx([0.05, 0.025, 0.0125])
    assert outcome.result.global_step == 3


def test_float16_clips_unscaled_gradients_and_hooks_see_the_unscaled_loss(kit: Any) -> None:
    """The scale of 65,536 shows neither in the norm nor in the loss."""
    losses: list[float] = []

    class Net(kit.Net):
        def on_end_backward(self, global_step: int, loss_tensor: torch.Tensor) -> None:
            losses.append(float(loss_tensor.detach()))

        def forward_loss(self, batch: Any) -> Any:
            loss, predicted = super().forward_loss(batch)
            return loss * 1e-3, predicted  # so that the first scale does not overflow

    exact = kit.train(Net(), clip_grads=True, val_interval_epochs=0)
    losses.clear()
    outcome = kit.train(Net(), clip_grads=True, val_interval_epochs=0, precision="float16")
    norms = [e.grad_norm for e in exact.of(TrainStepEnded)]
    assert [e.grad_norm for e in outcome.of(TrainStepEnded)] == pytest.approx(norms, rel=0.05)
    assert losses == [e.loss for e in outcome.of(TrainStepEnded)]


# ---------------------------------------------------------------------------------------- gradients of others


def test_gradients_from_before_the_run_are_not_in_its_first_step(kit: Any) -> None:
    """Somebody looked for a learning rate, or checked that backward works."""
    clean, used = kit.Net(), kit.Net()
    used.forward_loss(used.batches(8)[0])[0].mul(1_000).backward()
    kit.train(clean, max_steps=1)
    kit.train(used, max_steps=1)
    assert torch.equal(clean.linear.weight, used.linear.weight)


def test_gradients_of_parameters_in_no_optimizer_are_cleared_too(kit: Any) -> None:
    """Or what on_end_backward sees would grow with each step."""
    seen: list[float] = []

    class Net(kit.Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            return [torch.optim.SGD([self.linear.weight], lr=0.0)], []

        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            return self.batches(batch_size)[:1] * 3

        def on_end_backward(self, global_step: int, loss_tensor: Any) -> None:
            seen.append(float(self.linear.bias.grad))

    kit.train(Net())
    assert seen == [seen[0]] * 3


# ------------------------------------------------------------------------------ optimizers with eval() and train()


class Averaging(torch.optim.SGD):
    """Stands for a schedule-free one: its weights in evaluation are an average, as stored in checkpoints."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, lr=lr)
        self.param_groups[0]["training"] = False
        self.modes: list[str] = []

    @torch.no_grad()
    def _switch(self, training: bool) -> None:
        group = self.param_groups[0]
        if group["training"] != training:
            self.modes.append("train" if training else "eval")
            group["training"] = training
            for parameter in group["params"]:
                other = self.state[parameter].setdefault("other", parameter.clone())
                held = parameter.clone()
                parameter.copy_(other)
                other.copy_(held)

    def eval(self) -> None:
        self._switch(False)

    def train(self) -> None:
        self._switch(True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert self.param_groups[0]["training"]
        result = super().step(closure)
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["other"].lerp_(parameter, 0.25)
        return result


def averaging_net(kit: Any, rows: int = 32) -> Any:
    class Net(kit.Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            self.optimizer = Averaging(self.parameters())
            self.seen: list[bool] = []
            return [self.optimizer], []

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.seen.append(self.optimizer.param_groups[0]["training"])
            return super().val_step(global_step, batch, device)

    return Net(rows=rows)


def test_optimizers_are_switched_around_validation_and_at_the_end(kit: Any) -> None:
    """The step itself asserts that it trains; when the run is over the module holds the weights to be used."""
    net = averaging_net(kit)
    kit.train(net, epochs=2)
    assert net.seen == [False] * 8
    assert net.optimizer.modes == ["train", "eval", "train", "eval", "train", "eval"]


@pytest.mark.parametrize("place", ["step-1.a1", "step-4.a1", "step-6.a1"])
def test_a_checkpoint_holds_the_weights_as_they_are_evaluated(kit: Any, tmp_path: Any, place: str) -> None:
    """And a run that is resumed from it continues exactly."""
    settings = Checkpoints(every_steps=1, every_epochs=1, keep_last=None, when_busy="wait")
    whole, rest, other = averaging_net(kit), averaging_net(kit), averaging_net(kit)
    kit.train(whole, epochs=2, run_dir=tmp_path / "run", checkpoints=settings)
    kit.train(
        rest, epochs=2, run_dir=tmp_path / "rest", checkpoints=settings, resume=tmp_path / "run/checkpoints" / place
    )
    assert all(map(torch.equal, whole.parameters(), rest.parameters()))
    kit.train(other, epochs=2)
    assert all(map(torch.equal, whole.parameters(), other.parameters()))


# ------------------------------------------------------------------------------------------------ optional hooks


@pytest.mark.parametrize("options", [{"precision": "float16"}, {"gpu_batch_size_limit": 2}, {"precision": "bfloat16"}])
def test_on_before_optimizer_step_sees_the_gradients_that_are_applied(kit: Any, options: dict[str, Any]) -> None:
    """Unscaled and clipped, of all micro-batches; of the module and of callbacks, once a step that is taken."""
    from trainer import CallbackInterface

    class Net(kit.Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            return [torch.optim.SGD(self.parameters(), lr=1.0)], []

        def on_before_optimizer_step(self, global_step: int) -> None:
            seen.append(
                (global_step, [p.grad.clone() for p in self.parameters()], [p.clone() for p in self.parameters()])
            )

    class Other(CallbackInterface):
        def on_before_optimizer_step(self, global_step: int) -> None:
            steps.append(global_step)

    seen: list[Any] = []
    steps: list[int] = []
    net = Net(rows=64)
    outcome = kit.train(net, callbacks=[Other()], clip_grads=True, max_grad_norm=0.1, **options)
    taken = len(outcome.of(TrainStepEnded))
    assert steps == [step for step, _, _ in seen] == list(range(taken))
    for (_, gradients, before), (_, _, after) in itertools.pairwise(seen):
        assert float(torch.cat([one.flatten() for one in gradients]).norm()) <= 0.1 + 1e-6
        for gradient, old, new in zip(gradients, before, after, strict=True):
            assert torch.allclose(old - gradient, new, atol=1e-6)


def test_on_begin_val_epoch_runs_before_each_dataloader(kit: Any) -> None:
    """Inline, on live weights: what it changes is what is validated."""

    class Net(kit.Net):
        def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
            return {"a": self.batches(16), "b": self.batches(16)}

        def on_begin_val_epoch(self, global_step: int, key: str) -> None:
            assert not self.training
            calls.append((global_step, key))
            with torch.no_grad():
                self.linear.weight.zero_()

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            calls.append(float(self.linear.weight.abs().sum()))
            return super().val_step(global_step, batch, device)

    calls: list[Any] = []
    kit.train(Net())
    assert calls == [(2, "a"), 0.0, (2, "b"), 0.0]


@pytest.mark.parametrize("name", ["on_begin_val_epoch", "on_before_optimizer_step"])
def test_an_optional_hook_with_a_wrong_signature_or_lane_is_refused(kit: Any, name: str) -> None:
    """When the trainer is built."""
    from trainer import fenced

    net = type("Net", (kit.Net,), {name: lambda self: None})()
    with pytest.raises(Exception, match=name):
        kit.make_trainer(net)
    net = type("Net", (kit.Net,), {name: fenced(lambda self, global_step, key="": None)})()
    with pytest.raises(ArgumentsError, match="only inline"):
        kit.make_trainer(net).train()
