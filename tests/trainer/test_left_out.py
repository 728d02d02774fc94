"""Batches for which `train_step` returns None: they are left out of their step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.training import Net, read_journal, train
from torch import nn

from events.messages import StepSkipped, TrainStepEnded, WarningLogged
from trainer import Checkpoints
from trainer.errors import BatchWeightError, OptimizerError, StepOutputError


def without(*left_out: int) -> Callable[[Any, int, Any], Any]:
    """A step that returns None for the calls of these numbers, from 1."""
    calls = iter(range(1, 1_000))

    def step(net: Net, global_step: int, batch: Any) -> Any:
        call = next(calls)
        net.log("call", call)
        return None if call in left_out else net.forward_loss(batch)

    return step


def by_hand(left_out: set[int], micro_batches: int, batch_size: int, **options: Any) -> list[list[float]]:
    """The weights after each step, then its loss, of a loop that computes the mean over all rows that count at once."""
    net = Net(**options)
    (optimizer,), _ = net.get_optimizers_schedulers(0, 0)
    batches = net.batches(batch_size // micro_batches)
    weights = []
    for first in range(0, len(batches), micro_batches):
        group = [one for i, one in enumerate(batches[first : first + micro_batches], first + 1) if i not in left_out]
        if group:
            x, y = (torch.cat(parts) for parts in zip(*group, strict=True))
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(net.linear(x), y)
            loss.backward()
            optimizer.step()
            weights.append([*net.linear.weight.detach().flatten().tolist(), loss.item()])
    return weights


@pytest.mark.parametrize(
    ("left_out", "micro_batches", "rows", "skipped"),
    [
        ({2}, 1, [8, 8, 8], [1]),
        ({1, 2}, 1, [8, 8], [0, 0]),
        ({2}, 2, [4, 8, 8, 8], []),
        ({1}, 2, [4, 8, 8, 8], []),
        ({3, 4, 7}, 2, [8, 8, 4], [1]),
        ({2, 3, 4, 9, 13}, 4, [2, 8, 6, 6], []),
    ],
)
def test_the_weights_are_those_of_a_loop_over_the_batches_that_count(
    left_out: set[int], micro_batches: int, rows: list[int], skipped: list[int]
) -> None:
    """``global_step`` counts the steps that were taken; a skipped one is published after those before it."""
    seen: list[list[float]] = []

    class Watched(Net):
        def on_end_train_step(self, global_step: int) -> None:
            seen.append(self.linear.weight.detach().flatten().tolist())

    limit = {"gpu_batch_size_limit": 8 // micro_batches} if micro_batches > 1 else {}
    outcome = train(Watched(rows=32, train_step=without(*left_out)), epochs=1, **limit)
    steps = outcome.of(TrainStepEnded)
    assert [one.rows for one in steps] == rows
    assert [one.global_step for one in steps] == list(range(1, len(rows) + 1))
    assert [(one.global_step, one.reason) for one in outcome.of(StepSkipped)] == [(at, "no_loss") for at in skipped]
    found = [[*weights, one.loss] for weights, one in zip(seen, steps, strict=True)]
    for here, expected in zip(found, by_hand(left_out, micro_batches, 8, rows=32), strict=True):
        assert here == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert outcome.result.problems == []


def test_the_run_says_once_that_batches_are_left_out(tmp_path: Any) -> None:
    outcome = train(Net(rows=32, train_step=without(1, 3)), epochs=1, journal=True, run_dir=tmp_path / "run")
    assert outcome.error is None
    said = [one.message for one in read_journal(tmp_path / "run") if isinstance(one, WarningLogged)]
    assert [text for text in said if "returned None" in text] == [
        "Net.train_step() returned None for a batch; such batches are left out of their step, and a step without any"
        " other is skipped"
    ]


def test_a_run_that_is_resumed_goes_over_the_same_batches(tmp_path: Any) -> None:
    """Skipped steps use up their batches."""

    def step(net: Net, global_step: int, batch: Any) -> Any:
        return None if batch[0][0, 0] > 0 else net.forward_loss(batch)

    def fail_at(global_step: int) -> None:
        if global_step == 6:
            raise InterruptedError

    options: dict[str, Any] = {"train_batch_size": 2, "epochs": 2}
    kept: dict[str, Any] = {"run_dir": tmp_path / "run", "run_id": "one", "checkpoints": Checkpoints(every_steps=3)}
    whole = train(Net(rows=40, train_step=step), **options)
    failed = train(Net(rows=40, train_step=step, act=fail_at), **kept, **options)
    assert isinstance(failed.error, InterruptedError)
    resumed = train(Net(rows=40, train_step=step), resume="auto", **kept, **options)
    first = resumed.of(TrainStepEnded)[0].global_step
    assert first in (4, 6)  # the error may have come before the second checkpoint was complete
    assert resumed.of(TrainStepEnded)[0].epoch == 0
    losses = [one.loss for one in whole.of(TrainStepEnded)]
    assert [one.loss for one in resumed.of(TrainStepEnded)] == losses[first - 1 :]
    assert whole.of(StepSkipped)


def test_too_many_steps_without_a_loss_fail_the_run() -> None:
    outcome = train(Net(rows=64, train_step=lambda *_: None), max_skipped_steps=3)
    assert isinstance(outcome.error, StepOutputError)
    assert "3 steps in a row were skipped (max_skipped_steps), the first at step 1" in str(outcome.error)
    assert len(outcome.of(StepSkipped)) == 3


def backward_alone(net: Net, global_step: int, batch: Any) -> None:
    net.forward_loss(batch)[0].backward()


@pytest.mark.parametrize("returned", [(), []])
def test_an_empty_result_is_still_an_error(returned: Any) -> None:
    outcome = train(Net(train_step=lambda *_: returned))
    assert isinstance(outcome.error, StepOutputError)
    assert "returned nothing" in str(outcome.error)


def test_a_step_that_calls_backward_itself_and_returns_none_is_an_error() -> None:
    outcome = train(Net(train_step=backward_alone))
    assert isinstance(outcome.error, StepOutputError)
    assert "called backward() itself" in str(outcome.error)


def test_a_closure_optimizer_leaves_a_batch_out() -> None:
    """All evaluations of a step are over the same batches."""

    def step(net: Net, global_step: int, batch: Any) -> Any:
        return None if float(batch[0][0, 0]) == first else net.forward_loss(batch)

    def lbfgs(net: Any) -> Any:
        return [torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)], []

    first = float(Net(rows=32).x[0, 0])
    outcome = train(Net(rows=32, train_step=step, optimizers=lbfgs), epochs=1)
    assert outcome.error is None
    assert [one.global_step for one in outcome.of(StepSkipped)] == [0]
    assert len(outcome.of(TrainStepEnded)) == 3


def test_a_closure_that_changes_its_mind_is_an_error() -> None:
    def lbfgs(net: Any) -> Any:
        return [torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=3)], []

    outcome = train(Net(train_step=without(2), optimizers=lbfgs))
    assert isinstance(outcome.error, StepOutputError)
    assert "LBFGS computes the loss several times" in str(outcome.error)


class Manual(Net):
    manual_optimization = True


def test_a_manual_step_may_return_nothing() -> None:
    """Its loss is then that of its last update; without an update it is skipped."""

    def step(net: Any, global_step: int, batch: Any) -> None:
        loss, _ = net.forward_loss(batch)
        if not skip.pop(0):
            losses.append(loss.item())
            net.optimize(loss)

    losses: list[float] = []
    skip = [False, True, False, False]
    outcome = train(Manual(rows=32, train_step=step), epochs=1)
    assert outcome.error is None
    assert [one.loss for one in outcome.of(TrainStepEnded)] == pytest.approx(losses)
    assert [(one.global_step, one.reason) for one in outcome.of(StepSkipped)] == [(1, "no_loss")]


def test_weights_of_batches_that_are_left_out_do_not_count() -> None:
    """Here the rows that count are those with a weight."""

    class Weighted(Net):
        def batch_weight(self, batch: Any) -> float:
            return float(batch[0].shape[0] * 2)

    outcome = train(Weighted(rows=32, train_step=without(2)), epochs=1, gpu_batch_size_limit=4)
    assert [one.weight for one in outcome.of(TrainStepEnded)] == [8.0, 16.0, 16.0, 16.0]


def test_a_batch_without_weight_may_be_left_out() -> None:
    """Only a step that is trained on must have a weight."""

    class Weighted(Net):
        def batch_weight(self, batch: Any) -> float:
            return float(batch[0][0, 0] != self.x[8, 0]) * 8

    def step(net: Net, global_step: int, batch: Any) -> Any:
        return net.forward_loss(batch) if net.batch_weight(batch) or keeps else None

    keeps = False
    outcome = train(Weighted(rows=32, train_step=step), epochs=1)
    assert [one.global_step for one in outcome.of(StepSkipped)] == [1]
    assert [one.weight for one in outcome.of(TrainStepEnded)] == [8.0] * 3
    keeps = True
    assert isinstance(train(Weighted(rows=32, train_step=step), epochs=1).error, BatchWeightError)


def test_an_optimizer_that_is_stepped_in_train_step_is_still_refused() -> None:
    class Own(Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            return [self.optimizer], []

    def step(net: Any, global_step: int, batch: Any) -> None:
        net.optimizer.step()

    assert isinstance(train(Own(train_step=step)).error, OptimizerError)
