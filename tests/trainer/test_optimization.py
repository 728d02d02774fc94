"""Optimizers and schedulers: when they step, what is clipped, and what mixed precision changes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.training import Net, Scored, make_trainer, train
from torch.optim.lr_scheduler import LambdaLR, LinearLR, LRScheduler, ReduceLROnPlateau, StepLR

from events.messages import (
    MonitorMissing,
    RunEnded,
    StepSkipped,
    TrainEpochEnded,
    TrainStepEnded,
    ValEpochEnded,
    WarningLogged,
)
from trainer import CallbackInterface, Checkpoints, Schedule, fenced, inline
from trainer.errors import ArgumentsError, MetricNotFound, OptimizerError

Optimizer = torch.optim.Optimizer


def sgd(net: Net, lr: float = 0.1) -> Optimizer:
    return torch.optim.SGD(net.parameters(), lr=lr)


def halving(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda calls: 0.5**calls)


def with_scheduler(make: Callable[[Optimizer], Any], lr: float = 0.1) -> Callable[[Net], Any]:
    """Build SGD and the schedulers that ``make`` returns."""

    def build(net: Net) -> Any:
        optimizer = sgd(net, lr)
        made = make(optimizer)
        return [optimizer], made if isinstance(made, list) else [made]

    return build


def rates(outcome: Any) -> Any:
    return pytest.approx([event.lr for event in outcome.of(TrainStepEnded)])


# --------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda net: None, "it returned None: return [optimizer], []"),
        (lambda net: [], "it returned []: return [optimizer], []"),
        (lambda net: ["sgd"], "it returned ['sgd']: return [optimizer], []"),
        (lambda net: ([], []), "returned no optimizer"),
        (lambda net: (3, []), "must return two lists"),
        (lambda net: (["sgd"], []), "which is not an optimizer"),
        (lambda net: ([sgd(net)] * 2, []), "an optimizer twice"),
        (with_scheduler(lambda optimizer: 0.5), "0.5, which has no step()"),
        (
            with_scheduler(lambda optimizer: {"scheduler": halving(optimizer), "interval": "step"}),
            "write Schedule(scheduler, interval, monitor)",
        ),
    ],
)
def test_wrong_optimizers_and_schedulers_are_refused_by_value(make: Any, says: str) -> None:
    outcome = train(Net(optimizers=make))
    assert isinstance(outcome.error, OptimizerError)
    assert "get_optimizers_schedulers()" in str(outcome.error)
    assert says in str(outcome.error)
    assert outcome.names()[-1] == "RunEnded"


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda s: Schedule(3), "is not a scheduler"),  # type: ignore[arg-type]
        (lambda s: Schedule(StepLR), "is not a scheduler"),
        (lambda s: Schedule(Schedule(s)), "is not a scheduler"),
        (lambda s: Schedule(s, "steps"), "interval='steps'"),  # type: ignore[arg-type]
        (lambda s: Schedule(s, monitor=""), "monitor=''"),
        (lambda s: Schedule(s, "step", "val_loss"), "after each validation"),
    ],
)
def test_a_wrong_schedule_is_refused_where_it_is_built(build: Callable[[LRScheduler], Schedule], says: str) -> None:
    with pytest.raises(ArgumentsError, match=says):
        build(StepLR(sgd(Net()), 1))


# ----------------------------------------------------------------------------------------------- several of them


class Wrapping(torch.optim.SGD):
    """An optimizer that steps another one, as SAM does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.base = torch.optim.SGD([{"params": group["params"]} for group in self.param_groups], lr=0.1)

    def step(self, closure: Any = None) -> Any:
        return self.base.step(closure)


@pytest.mark.parametrize(
    ("make", "warns"),
    [
        (lambda net: ([sgd(net)], [halving(sgd(net))]), True),
        (lambda net: (lambda one: ([one], [halving(one.base)]))(Wrapping(net.parameters())), False),
        (lambda net: (lambda one: ([one], [halving(torch.optim.SGD(one.param_groups, 0.1))]))(sgd(net)), False),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")  # torch's, after the first step
def test_a_scheduler_of_an_optimizer_that_is_not_stepped_is_a_warning(make: Any, warns: bool) -> None:
    outcome = train(Net(optimizers=make))
    assert outcome.error is None
    told = [one.message for one in outcome.of(WarningLogged)]
    assert told == (
        [
            "LambdaLR changes the learning rate of a SGD that get_optimizers_schedulers() did not return; build it with"
            " one of the returned optimizers"
        ]
        if warns
        else []
    )


def test_iterators_of_optimizers_are_accepted() -> None:
    def make(net: Net) -> Any:
        optimizer = sgd(net)
        return iter([optimizer]), iter([halving(optimizer)])

    assert rates(train(Net(optimizers=make))) == [0.1, 0.05]


def test_zero_grad_of_a_subclass_or_a_patch_is_called() -> None:
    """The trainer clears the gradients of torch's own optimizers itself."""
    calls: list[str] = []

    class Counting(torch.optim.SGD):
        def zero_grad(self, set_to_none: bool = True) -> None:
            calls.append("class")
            super().zero_grad(set_to_none)

    def make(net: Net) -> Any:
        patched = torch.optim.SGD([net.linear.bias], lr=0.1)
        zero_grad = patched.zero_grad
        patched.zero_grad = lambda: (calls.append("patch"), zero_grad())  # type: ignore[method-assign,assignment]
        return [Counting([net.linear.weight], lr=0.1), patched], []

    one = train(Net(optimizers=make), epochs=2).of(TrainStepEnded)
    assert calls == ["class", "patch"] * (len(one) + 2)  # also before the first step and after the last one
    plain = train(Net(lr=0.1), epochs=2).of(TrainStepEnded)
    assert [event.loss for event in one] == pytest.approx([event.loss for event in plain])


def test_gradients_of_parameters_that_join_an_optimizer_later_are_cleared() -> None:
    seen: list[Any] = []

    def make(net: Net) -> Any:
        net.linear.bias.requires_grad_(False)
        optimizers.append(torch.optim.SGD([net.linear.weight], lr=0.0))
        return optimizers, []

    def step(net: Net, global_step: int, batch: Any) -> Any:
        seen.append(net.linear.bias.grad)
        if global_step == 2:
            optimizers[0].add_param_group({"params": [net.linear.bias.requires_grad_()], "lr": 0.0})
        return net.forward_loss(batch)

    optimizers: list[Optimizer] = []
    train(Net(optimizers=make, train_step=step), epochs=3)
    assert seen == [None] * 6


def test_a_scheduler_that_cannot_take_a_group_that_was_added_is_named() -> None:
    def step(net: Net, global_step: int, batch: Any) -> Any:
        if global_step == 2:
            optimizer.add_param_group({"params": [net.linear.bias]})
        return net.forward_loss(batch)

    net = Net(train_step=step)
    optimizer = torch.optim.SGD([net.linear.weight], lr=0.1)
    net.own_optimizers = lambda net: ([optimizer], [LambdaLR(optimizer, lambda step: 0.5)])
    outcome = train(net)
    assert isinstance(outcome.error, ValueError)
    assert "LambdaLR was built for 1 parameter groups, and its optimizer has 2 now" in outcome.error.__notes__[0]


def test_all_optimizers_and_schedulers_step_together() -> None:
    """Two optimizers for one parameter each train like one for both."""

    def two(net: Net) -> Any:
        optimizers = [torch.optim.SGD([p], lr=0.05) for p in net.parameters()]
        return optimizers, [halving(o) for o in optimizers]

    split, whole = Net(optimizers=two), Net(optimizers=with_scheduler(halving, 0.05))
    train(split, epochs=2)
    train(whole, epochs=2)
    assert all(map(torch.equal, split.parameters(), whole.parameters()))


def test_the_event_has_the_learning_rate_of_the_step_although_a_hook_loads_another() -> None:
    """`load_state_dict` replaces the parameter groups."""

    class Loads(Net):
        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            state = optimizers[0].state_dict()
            state["param_groups"][0]["lr"] = 0.25
            optimizers[0].load_state_dict(state)

    def make(net: Net) -> Any:
        optimizers.append(sgd(net, 0.5))
        return optimizers, []

    optimizers: list[Optimizer] = []
    assert rates(train(Loads(optimizers=make))) == [0.5, 0.25]


def test_a_learning_rate_in_a_tensor_is_reported_as_it_was_at_the_step() -> None:
    """Capturable optimizers keep it in a tensor, which the scheduler changes in place."""

    def make(net: Net) -> Any:
        optimizer = torch.optim.Adam(net.parameters(), lr=torch.tensor(0.5), foreach=False)
        return [optimizer], [halving(optimizer)]

    assert rates(train(Net(optimizers=make))) == [0.5, 0.25]


# --------------------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize(
    ("interval", "expected"), [("step", [0.1, 0.05, 0.025, 0.0125]), ("epoch", [0.1, 0.1, 0.05, 0.05])]
)
def test_schedulers_step_at_their_interval(interval: str, expected: list[float]) -> None:
    outcome = train(Net(optimizers=with_scheduler(halving)), epochs=2, scheduler_interval=interval)
    assert rates(outcome) == expected


def warmup_and(second: Callable[[Optimizer], Schedule]) -> Callable[[Net], Any]:
    return with_scheduler(lambda o: [Schedule(LinearLR(o, 0.25, total_iters=3), "step"), second(o)], lr=0.8)


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_each_schedule_has_its_own_interval(interval: str) -> None:
    """A warmup by step and a decay by epoch, whatever the interval of the others is."""
    make = warmup_and(lambda optimizer: Schedule(StepLR(optimizer, 1, gamma=0.5), interval="epoch"))
    outcome = train(Net(optimizers=make), epochs=3, scheduler_interval=interval)
    # 0.25, 0.5, then (after the first epoch's halving) three quarters and all of it.
    assert rates(outcome) == [0.2, 0.4, 0.3, 0.4, 0.2, 0.2]


def test_a_warmup_by_step_works_with_plateaus_by_validation() -> None:
    """Each plateau has its own metric: the constant one never improves, the other always does."""

    def make(optimizer: Optimizer) -> list[Schedule]:
        return [
            Schedule(LinearLR(optimizer, 0.25, total_iters=3), "step"),
            Schedule(ReduceLROnPlateau(optimizer, factor=0.5, patience=0), monitor="same"),
            Schedule(ReduceLROnPlateau(optimizer, factor=0.1, patience=0), monitor="better"),
        ]

    def val_step(net: Net, global_step: int, batch: Any) -> Any:
        net.log("same", 1.0)
        net.log("better", -float(global_step))
        return net.forward_loss(batch)

    net = Net(optimizers=with_scheduler(make, 0.8), val_step=val_step)
    outcome = train(net, epochs=4, scheduler_interval="epoch")
    assert rates(outcome) == [0.2, 0.4, 0.6, 0.8, 0.4, 0.4, 0.2, 0.2]


def test_a_users_scheduler_that_needs_a_metric_receives_it() -> None:
    """Its signature or a monitor shows the need."""
    got: list[float | None] = []

    class Required:
        def step(self, metrics: float) -> None:
            got.append(metrics)

    class Optional:
        def step(self, value: float | None = None) -> None:
            got.append(value)

    make = with_scheduler(lambda _: [Required(), Schedule(Optional(), monitor="val_loss")])  # type: ignore[arg-type]
    outcome = train(Net(optimizers=make))
    assert got == [outcome.of(ValEpochEnded)[0].loss] * 2


def test_schedules_resume_exactly_between_the_steps_of_a_warmup(tmp_path: Path) -> None:
    make = warmup_and(lambda optimizer: Schedule(ReduceLROnPlateau(optimizer, patience=0), monitor="val_loss"))
    settings = Checkpoints(every_steps=1, keep_last=9, when_busy="wait")
    whole = train(Net(optimizers=make), epochs=3, run_dir=tmp_path / "run", checkpoints=settings)
    rest = train(Net(optimizers=make), epochs=3, resume=tmp_path / "run" / "checkpoints" / "step-3.a1")
    assert rates(rest) == [event.lr for event in whole.of(TrainStepEnded)][3:]


# ------------------------------------------------------------------------------------------- ReduceLROnPlateau


def plateau_net(kind: Callable[..., Net] = Net, **options: Any) -> tuple[list[Any], Net]:
    """A module with a ReduceLROnPlateau, and the metrics that the scheduler receives."""
    got: list[Any] = []

    def make(optimizer: Optimizer) -> ReduceLROnPlateau:
        scheduler = ReduceLROnPlateau(optimizer)
        original = scheduler.step
        scheduler.step = lambda metrics: (got.append(metrics), original(metrics))  # type: ignore[method-assign,assignment]
        return scheduler

    return got, kind(optimizers=with_scheduler(make, 0.01), **options)


def test_a_plateau_scheduler_receives_the_row_weighted_loss_of_each_validation() -> None:
    got, net = plateau_net()
    outcome = train(net, epochs=2)
    assert got == pytest.approx([e.loss for e in outcome.of(ValEpochEnded)], rel=1e-12)


def test_a_plateau_scheduler_can_monitor_what_the_modules_hook_logs() -> None:
    """The module's on_end_val_epoch is fenced, so the metric exists in time."""
    got, net = plateau_net(lambda **options: Scored(2.0, 4.0, **options))
    train(net, epochs=2, monitor="score")
    assert got == [2.0, 4.0]


def test_a_plateau_scheduler_can_monitor_one_of_several_dataloaders() -> None:
    got, net = plateau_net(val_data=lambda net, size: {"a": net.batches(8), "b": net.batches(8)[:1]})
    outcome = train(net, monitor="val_loss/b")
    assert got == pytest.approx([outcome.of(ValEpochEnded)[1].loss], rel=1e-12)


def test_a_plateau_scheduler_can_monitor_the_training_loss_over_rows() -> None:
    got, net = plateau_net(rows=20)
    outcome = train(net, epochs=2, monitor="train_epoch_loss")
    assert got == pytest.approx([e.loss for e in outcome.of(TrainEpochEnded)], rel=1e-6)


def test_without_validation_a_plateau_scheduler_receives_the_last_value_that_the_training_logs() -> None:
    def step(net: Net, global_step: int, batch: Any) -> Any:
        net.log("step", global_step)
        return net.forward_loss(batch)

    got, net = plateau_net(train_step=step)
    train(net, epochs=2, monitor="step", val_interval_epochs=0)
    assert got == [2.0, 4.0]


def test_a_missing_metric_is_an_error_that_names_the_others() -> None:
    def val_step(net: Net, global_step: int, batch: Any) -> Any:
        net.log("accuracy", 0.5)
        return net.forward_loss(batch)

    outcome = train(plateau_net(val_step=val_step)[1], monitor="acuracy")
    assert isinstance(outcome.error, MetricNotFound)
    assert "(available: accuracy, val_loss); set it to 'accuracy'" in str(outcome.error)
    missing = [(event.monitor, event.wanted_by, event.known) for event in outcome.of(MonitorMissing)]
    assert missing == [("acuracy", "ReduceLROnPlateau", ["accuracy", "val_loss"])]
    assert outcome.of(RunEnded)[0].status == "failed"


@pytest.mark.parametrize(
    ("data", "options"),
    [(None, {"val_interval_epochs": 0}), (lambda net, size: None, {})],
    ids=["never", "no loaders"],
)
def test_a_plateau_scheduler_without_validation_is_an_error(data: Any, options: dict[str, Any]) -> None:
    outcome = train(plateau_net(val_data=data)[1], **options)
    assert isinstance(outcome.error, MetricNotFound)
    assert "val_loss" in str(outcome.error)


# --------------------------------------------------------------------------------------------------- gradients


def norm_of(net: Net) -> float:
    return float(torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None]).norm())


def test_gradients_are_clipped_and_the_event_has_the_norm_before() -> None:
    norms: list[float] = []
    before: list[float] = []

    class Clipped(Net):
        def on_end_backward(self, global_step: int, loss_tensor: Any) -> None:
            before.append(norm_of(self))

        @inline
        def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
            norms.append(norm_of(self))

    outcome = train(Clipped(), clip_grads=True, max_grad_norm=0.01)
    assert norms == pytest.approx([0.01, 0.01], rel=1e-3)
    assert min(before) > 0.1
    assert [e.grad_norm for e in outcome.of(TrainStepEnded)] == pytest.approx(before)


def test_gradients_are_cleared_before_and_after_the_run_and_their_norm_is_computed_for_clipping_only() -> None:
    clean, used = Net(), Net()
    used.forward_loss(used.batches(8)[0])[0].mul(1_000).backward()
    train(clean)
    outcome = train(used)
    assert [e.grad_norm for e in outcome.of(TrainStepEnded)] == [None, None]
    assert torch.equal(clean.linear.weight, used.linear.weight)
    assert all(p.grad is None for p in used.parameters())


def test_gradients_of_parameters_in_no_optimizer_are_cleared_too() -> None:
    seen: list[float] = []

    class Looks(Net):
        def on_end_backward(self, global_step: int, loss_tensor: Any) -> None:
            assert self.linear.bias.grad is not None
            seen.append(float(self.linear.bias.grad))

    def make(net: Net) -> Any:
        return [torch.optim.SGD([net.linear.weight], lr=0.0)], []

    train(Looks(optimizers=make, train_data=lambda net, size: net.batches(size)[:1] * 3))
    assert seen == [seen[0]] * 3


# ---------------------------------------------------------------------------------------------- mixed precision


@pytest.mark.parametrize(("precision", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)])
def test_steps_of_every_stage_run_under_autocast(precision: str, dtype: torch.dtype) -> None:
    """The weights stay in float32, and the loss falls."""
    seen = set()

    class Autocast(Net):
        def forward_loss(self, batch: Any) -> Any:
            predicted = self.linear(batch[0])
            seen.add((self.training, predicted.dtype))
            return torch.nn.functional.mse_loss(predicted.float(), batch[1]), predicted

    net = Autocast()
    losses = [event.loss for event in train(net, precision=precision, epochs=10).of(TrainStepEnded)]
    assert seen == {(True, dtype), (False, dtype)}
    assert net.linear.weight.dtype == torch.float32
    assert losses[-1] < losses[0] / 2


def test_a_float16_overflow_skips_the_step_for_all_optimizers() -> None:
    """One gradient of one optimizer overflows: neither steps, and global_step and schedulers keep their values."""
    stepped: list[int] = []

    def make(net: Net) -> Any:
        optimizers = [torch.optim.SGD([p], lr=0.05) for p in net.parameters()]
        for optimizer in optimizers:
            optimizer.register_step_post_hook(lambda *_: stepped.append(net.calls))
        return optimizers, [halving(optimizers[0])]

    def step(net: Net, global_step: int, batch: Any) -> Any:
        net.calls += 1
        # The bias alone gets an infinite gradient; the loss itself is finite.
        infinite = net.linear.bias.sum() * 0 * 1e38 * 1e38 if net.calls == 2 else 0
        return net.forward_loss(batch)[0] * 1e-3 + infinite

    net = Net(rows=32, optimizers=make, train_step=step)
    outcome = train(net, precision="float16", val_interval_epochs=0)
    assert [(e.reason, e.global_step) for e in outcome.of(StepSkipped)] == [("gradient_overflow", 1)]
    assert stepped == [1, 1, 3, 3, 4, 4]
    assert [e.global_step for e in outcome.of(TrainStepEnded)] == [1, 2, 3]
    assert rates(outcome) == [0.05, 0.025, 0.0125]
    assert outcome.result.global_step == 3


def test_float16_clips_unscaled_gradients_and_hooks_receive_the_unscaled_loss() -> None:
    losses: list[float] = []

    class Small(Net):
        def on_end_backward(self, global_step: int, loss_tensor: torch.Tensor) -> None:
            losses.append(float(loss_tensor.detach()))

        def forward_loss(self, batch: Any) -> Any:
            loss, predicted = super().forward_loss(batch)
            return loss * 1e-3, predicted  # so that the first scale does not overflow

    exact = train(Small(), clip_grads=True, val_interval_epochs=0).of(TrainStepEnded)
    losses.clear()
    scaled = train(Small(), clip_grads=True, val_interval_epochs=0, precision="float16").of(TrainStepEnded)
    assert [e.grad_norm for e in scaled] == pytest.approx([e.grad_norm for e in exact], rel=0.05)
    assert losses == [e.loss for e in scaled]


# ------------------------------------------------------------------------------ optimizers with eval() and train()


class Averaging(torch.optim.SGD):
    """Like a schedule-free optimizer: its weights in evaluation are an average, as stored in checkpoints."""

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


class AveragingNet(Net):
    def __init__(self) -> None:
        super().__init__(rows=32)
        self.seen: list[bool] = []

    def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
        self.optimizer = Averaging(self.parameters())
        return [self.optimizer], []

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        self.seen.append(self.optimizer.param_groups[0]["training"])
        return super().val_step(global_step, batch, device)


def test_optimizers_are_switched_around_validation_and_at_the_end() -> None:
    net = AveragingNet()
    train(net, epochs=2)
    assert net.seen == [False] * 8
    assert net.optimizer.modes == ["train", "eval", "train", "eval", "train", "eval"]


@pytest.mark.parametrize("place", ["step-1.a1", "step-4.a1", "step-6.a1"])
def test_a_checkpoint_holds_the_weights_of_evaluation_and_resumes_exactly(tmp_path: Path, place: str) -> None:
    settings = Checkpoints(every_steps=1, every_epochs=1, keep_last=None, when_busy="wait")
    whole, rest, plain = AveragingNet(), AveragingNet(), AveragingNet()
    train(whole, epochs=2, run_dir=tmp_path / "run", checkpoints=settings)
    resume = tmp_path / "run/checkpoints" / place
    train(rest, epochs=2, run_dir=tmp_path / "rest", checkpoints=settings, resume=resume)
    train(plain, epochs=2)
    for other in (rest, plain):
        assert all(map(torch.equal, whole.parameters(), other.parameters()))


# ------------------------------------------------------------------------------------------------ optional hooks


@pytest.mark.parametrize("options", [{"precision": "float16"}, {"gpu_batch_size_limit": 2}, {"precision": "bfloat16"}])
def test_on_before_optimizer_step_receives_the_gradients_that_are_applied(options: dict[str, Any]) -> None:
    """Unscaled and clipped, of all micro-batches; in the module and in callbacks, once per step that is taken."""

    class Applied(Net):
        def on_before_optimizer_step(self, global_step: int) -> None:
            gradients = [p.grad.clone() for p in self.parameters() if p.grad is not None]
            seen.append((global_step, gradients, [p.detach().clone() for p in self.parameters()]))

    class Other(CallbackInterface):
        def on_before_optimizer_step(self, global_step: int) -> None:
            steps.append(global_step)

    seen: list[tuple[int, list[torch.Tensor], list[torch.Tensor]]] = []
    steps: list[int] = []
    outcome = train(Applied(rows=64, lr=1.0), callbacks=[Other()], clip_grads=True, max_grad_norm=0.1, **options)
    taken = len(outcome.of(TrainStepEnded))
    assert steps == [step for step, _, _ in seen] == list(range(taken))
    for (_, gradients, before), (_, _, after) in itertools.pairwise(seen):
        assert float(torch.cat([one.flatten() for one in gradients]).norm()) <= 0.1 + 1e-6
        for gradient, old, new in zip(gradients, before, after, strict=True):
            assert torch.allclose(old - gradient, new, atol=1e-6)


def test_on_begin_val_epoch_runs_inline_before_each_dataloader() -> None:
    calls: list[Any] = []

    class Zeroes(Net):
        def on_begin_val_epoch(self, global_step: int, key: str) -> None:
            assert not self.training
            calls.append((global_step, key))
            with torch.no_grad():
                self.linear.weight.zero_()

    def val_step(net: Net, global_step: int, batch: Any) -> Any:
        calls.append(float(net.linear.weight.abs().sum()))
        return net.forward_loss(batch)

    train(Zeroes(val_data=lambda net, size: {"a": net.batches(16), "b": net.batches(16)}, val_step=val_step))
    assert calls == [(2, "a"), 0.0, (2, "b"), 0.0]


@pytest.mark.parametrize("name", ["on_begin_val_epoch", "on_before_optimizer_step"])
def test_an_optional_hook_with_a_wrong_signature_or_lane_is_refused(name: str) -> None:
    net = type("Wrong", (Net,), {name: lambda self: None})()
    with pytest.raises(Exception, match=name):
        make_trainer(net)
    net = type("Wrong", (Net,), {name: fenced(lambda self, global_step, key="": None)})()
    with pytest.raises(ArgumentsError, match="only inline"):
        make_trainer(net).train()
