"""Gradients that are not finite, sparse ones, complex ones, and those that no optimizer holds."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.training import Net, hooked, train
from torch import nn

from events.messages import NonFiniteGradient, NonFiniteLoss, StepSkipped, TrainStepEnded
from trainer.errors import ArgumentsError, NonFiniteGradientError, NonFiniteLossError, OptimizerError, StepOutputError
from trainer.loop.gradients import GradientCheck, clip_

POLICIES = [{}, {"clip_grads": True}, {"gpu_batch_size_limit": 4}, {"precision": "bfloat16"}]


class BadGradient(torch.autograd.Function):
    """Forward changes nothing; the gradient becomes ``value``."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: float) -> torch.Tensor:
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return torch.full_like(gradients[0], ctx.value), None


def bad_gradient_at(*calls: int, value: float = math.nan, rows: int = 48) -> Any:
    """A module whose loss stays finite, and whose gradients do not in these calls of `train_step`, from 1."""

    seen: list[int] = []

    def step(net: Net, global_step: int, batch: Any) -> Any:
        seen.append(global_step)
        loss, predicted = net.forward_loss(batch)
        return (BadGradient.apply(loss, value) if len(seen) in calls else loss), predicted

    return Net(rows=rows, train_step=step)


def weights_of(net: Any) -> list[Any]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def are_finite(net: Any) -> bool:
    return all(bool(parameter.isfinite().all()) for parameter in net.parameters())


@pytest.mark.parametrize("is_manual", [False, True])
def test_on_a_cpu_cleared_gradients_of_a_large_model_keep_their_memory_until_the_next_backward(
    is_manual: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.loop.gradients._LARGE", 0)
    gradient: Callable[[], object] = lambda: None  # of the step before  # noqa: E731
    seen: list[tuple[str, bool, bool]] = []

    def look(where: str, net: Net) -> None:
        seen.append((where, net.linear.weight.grad is None, gradient() is None))

    class InBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
            look("backward", net)
            return gradients[0]

    def step(net: Net, global_step: int, batch: Any) -> Any:
        look("forward", net)
        loss = InBackward.apply(net.forward_loss(batch)[0])
        if is_manual:
            net.optimize(loss)
        return loss

    def keep(*_: Any) -> None:
        nonlocal gradient
        gradient = weakref.ref(net.linear.weight.grad)

    net = Net(rows=24, train_step=step, val_step=lambda net, *_: look("validation", net))
    net.manual_optimization = is_manual
    train(net, callbacks=[hooked("on_before_optimizer_step", keep)()])
    steps = [("forward", True, False), ("backward", True, True)]  # each: is it cleared, is its memory free
    assert seen[2:] == [*steps * 2, *[("validation", True, True)] * 3]
    assert gradient() is None


# ---------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("options", POLICIES)
def test_a_gradient_that_is_not_finite_is_skipped_alone(options: dict[str, Any]) -> None:
    net = bad_gradient_at(2, value=math.inf, rows=48)
    outcome = train(net, non_finite="skip", val_interval_epochs=0, **options)
    assert outcome.result.global_step == 5
    assert are_finite(net)
    assert [(e.reason, e.global_step) for e in outcome.of(StepSkipped)] in (
        [("non_finite_gradient", 1)],
        [("non_finite_gradient", 0)],  # with two micro-batches the second call is of the first step
    )
    assert [(e.action, e.consecutive) for e in outcome.of(NonFiniteGradient)] == [("skipped", 1)]
    assert outcome.of(NonFiniteLoss) == []
    if not options:
        plain = Net(rows=48)
        batches = plain.batches(8)
        plain.get_train_dataloader = lambda sampler, size: batches[:1] + batches[2:]
        train(plain, val_interval_epochs=0)
        assert all(map(torch.equal, weights_of(net), weights_of(plain)))


@pytest.mark.parametrize("options", POLICIES)
def test_stop_ends_the_run_before_the_weights_are_harmed(options: dict[str, Any]) -> None:
    net = bad_gradient_at(5, value=math.nan)
    outcome = train(net, non_finite="stop", val_interval_epochs=0, **options)
    step = 3 if "gpu_batch_size_limit" in options else 5
    assert isinstance(outcome.error, NonFiniteGradientError)
    assert f"a gradient of step {step} is NaN or infinite" in str(outcome.error)
    assert are_finite(net)
    assert [e.action for e in outcome.of(NonFiniteGradient)] == ["stopped"]
    assert len(outcome.of(TrainStepEnded)) == step - 1


@pytest.mark.parametrize("options", POLICIES)
def test_warn_trains_on_and_names_the_first_step(options: dict[str, Any]) -> None:
    outcome = train(bad_gradient_at(5), val_interval_epochs=0, **options)
    step = 3 if "gpu_batch_size_limit" in options else 5
    assert [(e.global_step, e.action) for e in outcome.of(NonFiniteGradient)] == [(step, "warned")]
    assert [e.global_step for e in outcome.of(NonFiniteLoss)][:1] == [step + 1]
    assert outcome.result.global_step == 6
    ended = outcome.of(TrainStepEnded)
    if "clip_grads" not in options:
        assert [e.non_finite_gradient for e in ended[:step]] == [None] * (step - 1) + [1.0]


@pytest.mark.parametrize(
    ("value", "options", "kind"),
    [(math.nan, {}, NonFiniteLossError), (1.0, {"precision": "float16"}, NonFiniteGradientError)],
    ids=["loss", "float16"],
)
def test_the_number_of_skipped_steps_is_limited(value: float, options: Any, kind: type[Exception]) -> None:
    seen: list[int] = []

    def step(net: Net, global_step: int, batch: Any) -> Any:
        seen.append(global_step)
        loss = net.forward_loss(batch)[0] * 1e-3  # or float16 would overflow by itself
        if len(seen) in (1, 2, 3, 5):
            return loss
        return loss * value if value != 1.0 else BadGradient.apply(loss, math.inf)

    outcome = train(Net(rows=80, train_step=step), non_finite="skip", epochs=9, max_skipped_steps=4, **options)
    assert isinstance(outcome.error, kind)
    assert "4 steps in a row were skipped (max_skipped_steps), the first at step 5" in str(outcome.error)
    assert len(outcome.of(StepSkipped)) == 5
    assert outcome.of(TrainStepEnded)[-1].global_step == 4


@pytest.mark.parametrize("policy", ["skip", "stop", "warn"])
def test_a_nan_gradient_that_no_loss_scale_mends_is_reported_in_float16(policy: str) -> None:
    """The scale is halved down to 1 first; then the gradient is the cause, at which ``stop`` ends the run."""
    net = bad_gradient_at(*range(3, 100), rows=8 * 40)
    outcome = train(net, precision="float16", non_finite=policy, max_skipped_steps=25)
    assert isinstance(outcome.error, NonFiniteGradientError)
    overflows = [e for e in outcome.of(StepSkipped) if e.reason == "gradient_overflow"]
    assert len(overflows) == 16  # 2**16 is the first scale
    found = outcome.of(NonFiniteGradient)
    assert {e.action for e in found} == {"stopped" if policy == "stop" else "skipped"}
    assert len(found) == (1 if policy == "stop" else 9)
    assert are_finite(net)


def test_a_nan_loss_in_float16_is_named_as_such() -> None:
    """The scaler skips the step with any policy, but does not name the loss as the cause."""

    def step(net: Net, global_step: int, batch: Any) -> Any:
        loss = net.forward_loss(batch)[0] * 1e-3  # or float16 would overflow by itself
        return loss * math.nan if global_step == 2 else loss

    outcome = train(Net(train_step=step), precision="float16", epochs=2, max_skipped_steps=2)
    assert isinstance(outcome.error, NonFiniteLossError)
    assert {e.reason for e in outcome.of(StepSkipped)} == {"non_finite_loss"}
    outcome = train(Net(train_step=step), precision="float16", non_finite="stop")
    assert isinstance(outcome.error, NonFiniteLossError)
    assert "the loss of step 2" in str(outcome.error)


def test_the_old_name_of_the_policy_is_refused_with_the_new_one() -> None:
    with pytest.raises(ArgumentsError, match=r"non_finite_loss.*non_finite"):
        train(Net(), non_finite_loss="skip")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, None])
@pytest.mark.parametrize(
    "make",
    [
        lambda v: [torch.ones(3), torch.tensor([1.0, v])],
        lambda v: [torch.ones(3, dtype=torch.float64), torch.tensor([v])],
        lambda v: [torch.ones(3, dtype=torch.bfloat16), torch.tensor([v], dtype=torch.float16)],
        lambda v: [torch.ones(3), torch.tensor(complex(1.0, v))],
        lambda v: [torch.empty(0), torch.tensor([[v]]).t()],
        lambda v: [torch.sparse_coo_tensor([[0, 0]], [1.0, v], (4,), check_invariants=True), torch.ones(2)],
        lambda v: [torch.tensor([3e38, 3e38, 3e38]), torch.tensor(v)],
    ],
    ids=["two", "types", "half", "complex", "empty", "sparse", "huge"],
)
def test_every_kind_of_gradient_is_looked_at_and_none_is_changed(make: Any, bad: float | None) -> None:
    """Exactly NaN and infinity are found: not numbers whose norm would overflow."""
    gradients = make(2.0 if bad is None else bad)
    before = [one.to_dense().clone() for one in gradients]
    check = GradientCheck()
    for _ in range(3):  # what one step found does not count for the next
        found = check.find(gradients)
        assert (found is not None and found.item() > 0) == (bad is not None)
        for one, was in zip(gradients, before, strict=True):
            assert torch.equal(one.to_dense(), was) or bad is not None
        finite = check.find([torch.ones(2)])
        assert finite is not None
        assert finite.item() == 0


@pytest.mark.parametrize(
    ("sizes", "turns"), [([10] * 50, 1), ([2**20] * 3, 3), ([10, 2**21, 10, 2**19, 2**19, 10], 4), ([2**22], 1)]
)
def test_in_turn_each_gradient_is_checked_once_per_round(sizes: list[int], turns: int) -> None:
    for bad in range(len(sizes)):
        gradients = [torch.full((size,), math.nan if i == bad else 1.0) for i, size in enumerate(sizes)]
        check = GradientCheck(in_turn=True)
        found = [check.find(gradients) for _ in range(2 * turns)]
        assert sum(one is not None and one.item() > 0 for one in found) == 2


@pytest.mark.parametrize("policy", ["warn", "skip"])
def test_a_gradient_of_a_large_model_is_reported_at_its_step_unless_it_only_warns(policy: Any) -> None:
    def step(net: Net, global_step: int, batch: Any) -> Any:
        calls.append(global_step)
        loss = net.forward_loss(batch)[0]
        return (BadGradient.apply(loss, math.nan) if len(calls) == 2 else loss) + net.wide.weight.mean()

    calls: list[int] = []
    net = Net(rows=48, train_step=step)
    net.wide = nn.Linear(1, 3 * 2**20)
    outcome = train(net, non_finite=policy, val_interval_epochs=0)
    first = min(event.global_step for event in [*outcome.of(NonFiniteGradient), *outcome.of(NonFiniteLoss)])
    assert first == 1 if policy == "skip" else first in (2, 3)  # a skipped step has no number of its own


def test_an_empty_list_of_gradients_is_not_checked() -> None:
    assert GradientCheck().find([]) is None


# -------------------------------------------------------------------------------------------------- clipping


@pytest.mark.parametrize("options", [{}, {"gpu_batch_size_limit": 4}, {"precision": "float16"}])
def test_sparse_gradients_are_clipped_as_dense_ones(options: dict[str, Any]) -> None:
    class Embedding(Net):
        def __init__(self, sparse: bool) -> None:
            super().__init__(lr=0.5)
            torch.manual_seed(0)
            self.table = nn.Embedding(5, 4, sparse=sparse)

        def forward_loss(self, batch: Any) -> Any:
            index = torch.arange(len(batch[0])) % 3
            predicted = self.linear(self.table(index))
            return nn.functional.mse_loss(predicted, batch[1]), predicted

    sparse, dense = Embedding(True), Embedding(False)
    norms = [
        [e.grad_norm for e in train(net, clip_grads=True, max_grad_norm=0.1, **options).of(TrainStepEnded)]
        for net in (sparse, dense)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for one, other in zip(weights_of(sparse), weights_of(dense), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def parameter_with(gradient: torch.Tensor | None, like: torch.Tensor | None = None) -> nn.Parameter:
    tensor = gradient if like is None else like
    parameter = nn.Parameter(torch.zeros_like(tensor.to_dense() if tensor is not None else torch.zeros(2)))
    parameter.grad = gradient
    return parameter


def test_the_norm_alone_is_measured_with_an_infinite_limit() -> None:
    """Gradients are not scaled: infinity divided by an infinite norm would be NaN."""
    one = parameter_with(torch.tensor([3.0, math.inf]))
    assert clip_([one], math.inf).item() == math.inf
    assert one.grad is not None
    assert one.grad.tolist() == [3.0, math.inf]


@pytest.mark.parametrize("max_norm", [1.0, math.inf])
def test_clipping_accepts_parameters_of_every_kind(max_norm: float) -> None:
    assert clip_([], max_norm).item() == 0
    assert clip_([parameter_with(None)], max_norm).item() == 0
    zero = parameter_with(torch.zeros(3))
    assert clip_([zero], max_norm).item() == 0
    assert zero.grad is not None
    assert zero.grad.tolist() == [0.0] * 3
    empty = torch.sparse_coo_tensor(torch.zeros(1, 0, dtype=torch.long), torch.zeros(0), (4,), check_invariants=True)
    mixed = [
        parameter_with(empty),
        parameter_with(torch.tensor([3.0], dtype=torch.float64)),
        parameter_with(torch.tensor([4.0j])),
        parameter_with(None),
    ]
    assert clip_(mixed, max_norm).item() == pytest.approx(5.0)
    assert mixed[2].grad is not None
    assert mixed[2].grad.abs().item() == pytest.approx(0.8 if max_norm == 1.0 else 4.0)


# ----------------------------------------------------------------------------------------- held by no optimizer


def test_gradients_that_no_optimizer_holds_yet_do_not_add_up() -> None:
    """Parameters that are unfrozen between epochs, within one, or by a hook, and added to the optimizer later."""
    seen: list[tuple[int, float | None]] = []

    class Own(Net):
        def __init__(self) -> None:
            super().__init__(rows=24)
            self.body = nn.Linear(4, 4)
            self.body.requires_grad_(False)

        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            self.optimizer = torch.optim.SGD(self.linear.parameters(), lr=0.0)
            return [self.optimizer], []

        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            return self.batches(batch_size)[:1] * 3

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            x, y = batch
            return nn.functional.mse_loss(self.linear(self.body(x)), y)

        def on_end_backward(self, global_step: int, loss_tensor: Any) -> None:
            weight, bias = self.body.weight.grad, self.body.bias.grad
            seen.append(tuple(None if one is None else float(one.norm()) for one in (weight, bias)))
            if global_step == 1:
                self.body.bias.requires_grad_(True)

        def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
            if epoch == 1:
                self.body.weight.requires_grad_(True)
            if epoch == 2:
                self.optimizer.add_param_group({"params": list(self.body.parameters()), "lr": 0.0})

    train(Own(), epochs=3)
    weight, bias = seen[-1]
    assert seen == [(None, None)] * 2 + [(None, bias)] + [(weight, bias)] * 6


@pytest.mark.parametrize("how", ["created", "attached", "group removed"])
def test_gradients_of_a_parameter_that_loses_or_lacks_its_optimizer_do_not_add_up(how: str) -> None:
    """Parameters that are created or attached in train_step, or whose group is removed, within an epoch."""
    seen: list[float] = []

    class Own(Net):
        def __init__(self) -> None:
            super().__init__(rows=48)
            self.spare = [nn.Linear(4, 4, bias=False)]  # hidden in a list
            if how == "group removed":
                self.body = self.spare[0]

        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            self.optimizer = torch.optim.SGD(self.linear.parameters(), lr=0.0)
            if how == "group removed":
                self.optimizer.add_param_group({"params": list(self.body.parameters()), "lr": 0.0})
            return [self.optimizer], []

        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            return self.batches(batch_size)[:1] * 5

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            x, y = batch
            if global_step == 2:
                if how == "created":
                    torch.manual_seed(0)
                    self.body = nn.Linear(4, 4, bias=False)
                elif how == "attached":
                    self.body = self.spare[0]
                else:
                    self.optimizer.param_groups.pop()
            return nn.functional.mse_loss(self.linear(self.body(x) if hasattr(self, "body") else x), y)

        def on_end_backward(self, global_step: int, loss_tensor: Any) -> None:
            if hasattr(self, "body"):
                seen.append(float(self.body.weight.grad.norm()))

    train(Own())
    assert len(seen) >= 4
    assert seen == pytest.approx([seen[0]] * len(seen))


# ------------------------------------------------------------------------------------------------ clear errors


def optimizers(net: Net) -> Any:
    net.optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return [net.optimizer], []


def step_net(step: Callable[[Net, torch.Tensor], torch.Tensor]) -> Net:
    return Net(optimizers=optimizers, train_step=lambda net, _, batch: step(net, net.forward_loss(batch)[0]))


def test_a_complex_loss_is_named() -> None:
    """Torch's own error would be that gradients can be created only for real scalars."""
    outcome = train(step_net(lambda net, loss: loss * (1 + 1j)))
    assert isinstance(outcome.error, StepOutputError)
    assert "returned a complex loss (torch.complex64)" in str(outcome.error)


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("detach", [False, True])
def test_a_backward_within_train_step_is_named(detach: bool, retain: bool) -> None:
    """Torch's own error would be about a second pass through the graph, or the gradients would be applied twice."""

    def step(net: Any, loss: torch.Tensor) -> torch.Tensor:
        loss.backward(retain_graph=retain)  # type: ignore[no-untyped-call]
        return loss.detach() if detach else loss

    outcome = train(step_net(step))
    assert isinstance(outcome.error, StepOutputError)
    assert "seems to have called backward() itself" in str(outcome.error)
    assert "manual_optimization" in str(outcome.error)


def test_a_step_within_train_step_is_refused() -> None:
    """The trainer would step a second time. The optimizer is usable again after the run."""

    def step(net: Any, loss: torch.Tensor) -> torch.Tensor:
        loss.backward(retain_graph=True)  # type: ignore[no-untyped-call]
        net.optimizer.step()
        return loss

    net = step_net(step)
    outcome = train(net)
    assert isinstance(outcome.error, OptimizerError)
    assert "SGD.step() itself" in str(outcome.error)
    assert "manual_optimization" in str(outcome.error)
    net.optimizer.step()


def test_a_hook_may_step_an_optimizer() -> None:
    steps = hooked("on_end_train_step", lambda net, *_: net.optimizer.step(), "inline", Net)

    assert train(steps(optimizers=optimizers)).result.global_step == 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda o: o, "it returned one SGD: return [optimizer], []"),
        (lambda o: {"optimizer": o}, "it returned a dict"),
        (lambda o: (o, []), "instead of a list: write [optimizer]"),
        (lambda o: ([o], torch.optim.lr_scheduler.StepLR(o, 1)), "instead of a list: write [scheduler]"),
    ],
)
def test_a_return_value_for_another_trainer_is_refused_with_the_right_form(make: Any, said: str) -> None:

    outcome = train(Net(optimizers=lambda net: make(torch.optim.SGD(net.parameters(), lr=0.1))))
    assert isinstance(outcome.error, OptimizerError)
    assert said in str(outcome.error)
