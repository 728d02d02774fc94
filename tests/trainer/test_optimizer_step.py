"""A step of an optimizer without torch's wrapper has the effects of ``optimizer.step()``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from trainer.loop.optimizers import take_step


class Counting(torch.optim.Optimizer):
    """Gradient descent that counts its steps, inside ``step`` itself."""

    steps = 0

    def __init__(self, parameters: list[torch.Tensor], lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad


@pytest.fixture
def optimizer() -> Counting:
    weight = torch.ones(2, requires_grad=True)
    weight.grad = torch.ones(2)
    return Counting([weight], lr=0.5)


def weight_of(optimizer: torch.optim.Optimizer) -> list[float]:
    weight: torch.Tensor = optimizer.param_groups[0]["params"][0]
    return weight.tolist()


def test_a_step_skips_the_hook_of_the_trainer_and_changes_the_weights(optimizer: Counting) -> None:
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("ours"))
    take_step(optimizer, own_hooks=1)
    assert (called, optimizer.steps, weight_of(optimizer)) == ([], 1, [0.5, 0.5])


@pytest.mark.parametrize(
    "register",
    [
        lambda optimizer, hook: optimizer.register_step_pre_hook(hook),
        lambda optimizer, hook: optimizer.register_step_post_hook(hook),
        lambda optimizer, hook: register_optimizer_step_pre_hook(hook),
        lambda optimizer, hook: register_optimizer_step_post_hook(hook),
    ],
    ids=["pre", "post", "global pre", "global post"],
)
def test_hooks_of_others_run_and_so_does_that_of_the_trainer(register: Callable[..., Any], optimizer: Counting) -> None:
    called: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: called.append("ours"))
    handle = register(optimizer, lambda *_: called.append("theirs"))
    take_step(optimizer, own_hooks=1)
    handle.remove()
    assert sorted(called) == ["ours", "theirs"]
    assert optimizer.steps == 1


def test_a_step_that_was_replaced_on_the_instance_is_called(optimizer: Counting) -> None:
    called: list[str] = []
    vars(optimizer)["step"] = lambda: called.append("replaced")
    take_step(optimizer, own_hooks=0)
    assert (called, optimizer.steps) == (["replaced"], 0)


def test_a_scheduler_notices_the_step(optimizer: Counting) -> None:
    """It would warn that it steps first, and warnings are errors here."""
    scheduler = StepLR(optimizer, 1, gamma=0.1)
    take_step(optimizer, own_hooks=0)
    scheduler.step()
    assert optimizer.steps == 1
    assert scheduler.get_last_lr() == [0.05]


def test_the_profiler_sees_the_range_of_the_step(optimizer: Counting) -> None:
    with torch.profiler.profile() as profile:
        take_step(optimizer, own_hooks=0)
    assert "Optimizer.step#Counting.step" in [event.name for event in profile.events() or ()]
    assert optimizer.steps == 1
