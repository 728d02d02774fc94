"""`LearningRateMonitor`, and `bind_optimizers`, by which any callback gets at the run's optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from events.messages import MetricsLogged, ObserverFailed, StepSkipped, TrainStepEnded
from events.sink import CALLBACK_DELIVERY
from trainer import CallbackInterface, Checkpoints
from trainer.callbacks import LearningRateMonitor
from trainer.errors import ArgumentsError, ContractError


def scheduled(kit: Any, kind: Any = torch.optim.SGD, **options: Any) -> Any:
    """One optimizer, whose rate is halved after each step."""

    class Scheduled(kit.Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            optimizer = kind(self.parameters(), **{"lr": 0.5} | options)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]

    return Scheduled(rows=64)


def logged(outcome: Any) -> dict[str, list[tuple[int, float]]]:
    """Each metric's values, with their steps."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in outcome.of(MetricsLogged):
        for name, value in event.metrics.items():
            found.setdefault(name, []).append((event.global_step, value))
    return found


def rates_of_steps(outcome: Any) -> list[tuple[int, float]]:
    return [(event.global_step, event.lr) for event in outcome.of(TrainStepEnded)]


# ----------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"module": torch.nn.Linear(1, 1)}, "module must be the trained ModuleInterface, not Linear("),
        ({"module": CallbackInterface}, "not the class CallbackInterface"),
        ({"every_n_steps": 0}, "every_n_steps must be an integer >= 1, not 0"),
        ({"every_n_steps": "1"}, "every_n_steps must be an integer >= 1, not '1'"),
        ({"momentum": "yes"}, "momentum must be True or False, not 'yes'"),
    ],
)
def test_arguments_that_cannot_work_are_refused(kit: Any, arguments: dict[str, Any], problem: str) -> None:
    """When it is made."""
    with pytest.raises(ArgumentsError, match=r"^LearningRateMonitor: ") as caught:
        LearningRateMonitor(**{"module": kit.Net()} | arguments)
    assert problem in str(caught.value)


def test_another_module_is_refused(kit: Any) -> None:
    """What is logged through it would go nowhere."""
    error = kit.train(kit.Net(), callbacks=[LearningRateMonitor(kit.Net())]).error
    assert isinstance(error, ContractError)
    assert "LearningRateMonitor has a Net that this run does not train" in str(error)
    assert "raised by LearningRateMonitor.bind_optimizers" in error.__notes__


def test_a_failure_may_only_disable_it(kit: Any) -> None:
    """As its policy says."""
    delivery = kit.replace(CALLBACK_DELIVERY, on_error="disable")
    outcome = kit.train(kit.Net(), callbacks=[(LearningRateMonitor(kit.Net()), delivery)])
    assert outcome.result.status == "finished"
    assert [(event.during, event.action) for event in outcome.of(ObserverFailed)] == [("bind_optimizers", "disabled")]
    assert logged(outcome) == {}


# ------------------------------------------------------------------------------------------------------- what it logs


@pytest.mark.parametrize("options", [{}, {"gpu_batch_size_limit": 3}, {"scheduler_interval": "epoch", "epochs": 3}])
def test_it_logs_the_rate_that_each_step_was_taken_with(kit: Any, options: dict[str, Any]) -> None:
    """Exactly, however many micro-batches a step has; not the rate that comes next."""
    net = scheduled(kit)
    outcome = kit.train(net, callbacks=[LearningRateMonitor(net)], **options)
    rates = rates_of_steps(outcome)
    assert logged(outcome) == {"lr/optimizer0/group0": rates}
    assert len({rate for _, rate in rates}) > 2


def test_every_group_of_every_optimizer_has_its_own(kit: Any) -> None:
    """And its momentum, where it has one."""

    class Two(kit.Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            groups = [{"params": [self.linear.weight], "lr": 0.1}, {"params": [], "lr": 0.2, "betas": (0.8, 0.9)}]
            return [torch.optim.Adam(groups), torch.optim.SGD([self.linear.bias], 0.3, momentum=0.7)], []

    net = Two()
    outcome = kit.train(net, callbacks=[LearningRateMonitor(net, momentum=True)], max_steps=1)
    assert logged(outcome) == {
        "lr/optimizer0/group0": [(1, 0.1)],
        "momentum/optimizer0/group0": [(1, 0.9)],
        "lr/optimizer0/group1": [(1, 0.2)],
        "momentum/optimizer0/group1": [(1, 0.8)],
        "lr/optimizer1/group0": [(1, 0.3)],
        "momentum/optimizer1/group0": [(1, 0.7)],
    }


def test_an_optimizer_without_momentum_has_none(kit: Any) -> None:
    """Nothing is made up."""
    net = scheduled(kit, torch.optim.Adagrad)
    outcome = kit.train(net, callbacks=[LearningRateMonitor(net, momentum=True)])
    assert list(logged(outcome)) == ["lr/optimizer0/group0"]


def test_a_group_that_is_added_later_is_there_from_then_on(kit: Any) -> None:
    """Groups are looked at when they are logged."""

    class Grows(kit.Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            self.optimizer = torch.optim.SGD([self.linear.weight], lr=0.1)
            return [self.optimizer], []

        def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
            if epoch == 1:
                self.optimizer.add_param_group({"params": [self.linear.bias], "lr": 0.2})

    net = Grows(rows=8)
    outcome = kit.train(net, callbacks=[LearningRateMonitor(net)], epochs=2)
    assert logged(outcome)["lr/optimizer0/group1"] == [(2, 0.2)]


def test_a_rate_that_is_a_tensor_is_logged_as_it_was(kit: Any) -> None:
    """Schedulers change it in place, before its number is read."""
    net = scheduled(kit, torch.optim.Adam, lr=torch.tensor(0.5))
    outcome = kit.train(net, callbacks=[LearningRateMonitor(net)])
    assert logged(outcome)["lr/optimizer0/group0"] == [(step, 0.5**step) for step in range(1, 9)]


def test_only_every_nth_step_is_logged(kit: Any) -> None:
    """Counted from the run's beginning."""
    net = scheduled(kit)
    outcome = kit.train(net, callbacks=[LearningRateMonitor(net, 3)])
    assert logged(outcome)["lr/optimizer0/group0"] == [(3, 0.125), (6, 0.5**6)]


def test_a_step_that_was_skipped_logs_nothing(kit: Any) -> None:
    """The one that is taken in its place does."""

    class Spikes(type(scheduled(kit))):  # type: ignore[misc]
        calls = 0

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.calls += 1
            loss, predicted = self.forward_loss(batch)
            return (loss * float("nan") if self.calls == 2 else loss), predicted

    net = Spikes(rows=64)
    outcome = kit.train(net, callbacks=[LearningRateMonitor(net, 2)], non_finite="skip")
    assert len(outcome.of(StepSkipped)) == 1
    assert logged(outcome)["lr/optimizer0/group0"] == [rate for rate in rates_of_steps(outcome) if rate[0] % 2 == 0]


def test_any_callback_can_have_the_optimizers(kit: Any) -> None:
    """It needs no more than the method; it is called once, before the first hook."""
    calls: list[Any] = []

    class Own(CallbackInterface):
        def bind_optimizers(self, optimizers: Any) -> None:
            calls.append([type(one).__name__ for one in optimizers])

        def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
            calls.append(epoch)

    kit.train(kit.Net(), callbacks=[Own()], epochs=2)
    assert calls == [["SGD"], 0, 1]


@pytest.mark.anyio
async def test_it_logs_in_a_run_within_an_event_loop(kit: Any) -> None:
    """As in `train`."""
    net, memory = scheduled(kit), kit.Memory()
    async with kit.make_trainer(net, callbacks=[LearningRateMonitor(net)], sinks=[memory]).run() as run:
        await run.result()
    values = [event.metrics for event in memory.events if type(event) is MetricsLogged]
    assert values == [{"lr/optimizer0/group0": 0.5**step} for step in range(1, 9)]


def test_a_resumed_run_logs_what_an_uninterrupted_one_does(kit: Any, tmp_path: Path) -> None:
    """The schedulers go on where they were, and the count of steps, too."""
    run = {"run_dir": tmp_path / "run", "run_id": "r", "checkpoints": Checkpoints(every_minutes=None)}
    values = []
    for epochs, resume in ((1, None), (2, "auto")):
        net = scheduled(kit)
        outcome = kit.train(net, callbacks=[LearningRateMonitor(net, 3)], epochs=epochs, resume=resume, **run)
        values += logged(outcome)["lr/optimizer0/group0"]
    assert values == [(step, 0.5**step) for step in (3, 6, 9, 12, 15)]
