"""The training loop: its order, global steps, data and numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.training import Diary, InlineDiary, Net, train
from torch.utils.data import DataLoader, TensorDataset

from events.messages import (
    NonFiniteLoss,
    RunEnded,
    RunStarted,
    StepSkipped,
    TrainEpochEnded,
    TrainEpochStarted,
    TrainStepEnded,
)
from trainer.errors import EmptyDataLoader, NonFiniteLossError


def bare_losses(net: Any, batches: list[Any], epochs: int, lr: float = 0.05) -> list[float]:
    """Train with a loop written by hand and return its losses."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    losses = []
    for _ in range(epochs):
        for batch in batches:
            loss, _ = net.forward_loss(batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


# ------------------------------------------------------------------------------------- data that is not there


def test_an_empty_train_loader_is_an_error() -> None:

    outcome = train(Net(train_data=lambda net, batch_size: []))
    assert isinstance(outcome.error, EmptyDataLoader)
    assert "get_train_dataloader() gave no batch in epoch 0" in str(outcome.error)
    assert outcome.of(TrainEpochEnded) == []


def test_a_loader_that_is_used_up_names_the_epoch() -> None:
    stream = iter(Net().batches(8))

    outcome = train(Net(train_data=lambda net, batch_size: stream), epochs=2)
    assert isinstance(outcome.error, EmptyDataLoader)
    assert "in epoch 1: an iterator or generator is used up after one epoch: return a new one" in str(outcome.error)
    assert len(outcome.of(TrainEpochEnded)) == 1


@pytest.mark.parametrize("returned", [None, 3, "text", {"a": []}])
def test_an_invalid_train_loader_is_refused(returned: Any) -> None:

    outcome = train(Net(train_data=lambda net, batch_size: returned))
    assert isinstance(outcome.error, TypeError)
    assert "get_train_dataloader()" in str(outcome.error)
    assert repr(returned) in str(outcome.error)


# ---------------------------------------------------------------------------------------------- global steps


def test_every_method_and_hook_gets_the_global_step_that_the_contract_says() -> None:
    """train_step gets the number of the current step; val_step and the hooks get that of the finished ones."""
    seen: list[tuple[str, int]] = []

    class Own(Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            seen.append(("train_step", global_step))
            return super().train_step(global_step, batch, device)

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            seen.append(("val_step", global_step))
            return super().val_step(global_step, batch, device)

        def on_end_backward(self, global_step: int, loss_tensor: Any) -> None:
            seen.append(("on_end_backward", global_step))

    diary = InlineDiary()
    outcome = train(Own(rows=16), callbacks=[diary], epochs=2, gpu_batch_size_limit=4)

    step = [("train_step", 0), ("on_end_backward", -1)] * 2
    expected = []
    for epoch in range(2):
        for one in (1, 2):
            expected += [(name, 2 * epoch + one + shift) for name, shift in step]
        expected += [("val_step", 2 * epoch + 2)] * 4
    assert seen == expected
    assert diary.of("on_begin_train_epoch") == [(0, 0), (2, 1)]
    assert [s for s, _ in diary.of("on_end_train_step")] == [1, 2, 3, 4]
    assert [s for s, _ in diary.of("on_end_backward")] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [s for s, _ in diary.of("on_end_val_epoch")] == [2, 4]
    assert [s for s, _ in diary.of("on_end_train_epoch")] == [2, 4]
    assert [s for s, _ in diary.of("on_end_train")] == [4]
    assert [(e.global_step, e.epoch, e.step_in_epoch) for e in outcome.of(TrainStepEnded)] == [
        (1, 0, 1),
        (2, 0, 2),
        (3, 1, 1),
        (4, 1, 2),
    ]
    assert outcome.result.global_step == 4
    assert outcome.result.epochs == 2


def test_the_optimizers_are_asked_for_once_with_the_steps_to_expect() -> None:
    net = Net(rows=20)
    outcome = train(net, epochs=3)
    assert net.told == (3, 3)
    assert [e.steps for e in outcome.of(TrainEpochStarted)] == [3, 3, 3]


def test_the_loader_of_the_estimate_is_used_for_the_first_epoch() -> None:
    calls = []

    def train_data(net: Net, batch_size: int) -> Any:
        calls.append(batch_size)
        return net.batches(batch_size)

    train(Net(train_data=train_data), epochs=3, gpu_batch_size_limit=4)
    assert calls == [4, 4, 4]


# ----------------------------------------------------------------------------------------------------- numbers


def test_losses_and_weights_are_those_of_a_loop_written_by_hand() -> None:
    net, bare = Net(), Net()
    outcome = train(net, epochs=3)
    expected = bare_losses(bare, bare.batches(8), 3)
    assert [e.loss for e in outcome.of(TrainStepEnded)] == expected
    assert torch.equal(net.linear.weight, bare.linear.weight)
    assert outcome.result.metrics["train_loss"] == expected[-1]


@pytest.mark.parametrize("rows", [16, 20, 13])
def test_accumulated_steps_equal_those_of_the_whole_batch(rows: int) -> None:
    """Micro-batches are weighted by rows, also a smaller last one, or in a smaller last group."""
    torch.set_default_dtype(torch.float64)
    try:
        whole, parts = Net(rows), Net(rows)
        expected = train(whole, epochs=2)
        outcome = train(parts, epochs=2, gpu_batch_size_limit=2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.allclose(whole.linear.weight, parts.linear.weight, rtol=1e-12, atol=1e-12)
    pairs = [(e.loss, e.rows) for e in expected.of(TrainStepEnded)]
    assert [e.rows for e in outcome.of(TrainStepEnded)] == [rows for _, rows in pairs]
    assert [e.loss for e in outcome.of(TrainStepEnded)] == pytest.approx([loss for loss, _ in pairs], rel=1e-12)


def test_micro_batches_without_countable_rows_weigh_the_same() -> None:
    net = Net(
        train_data=lambda net, batch_size: [1.0, 3.0, 5.0],
        train_step=lambda net, step, batch: net.linear.bias.sum() * 0 + batch,
    )

    outcome = train(net, train_batch_size=2, gpu_batch_size_limit=1, val_interval_epochs=0)
    assert [(e.loss, e.rows) for e in outcome.of(TrainStepEnded)] == [(2.0, None), (5.0, None)]


def test_the_loss_of_an_epoch_is_the_mean_over_its_rows() -> None:
    outcome = train(Net(rows=20), epochs=2)
    steps = outcome.of(TrainStepEnded)
    for epoch, ended in enumerate(outcome.of(TrainEpochEnded)):
        mine = [e for e in steps if e.epoch == epoch]
        assert [e.rows for e in mine] == [8, 8, 4]
        assert ended.loss == pytest.approx(sum(e.loss * e.rows for e in mine) / 20, rel=1e-12)
        assert ended.steps == 3


def test_the_same_seed_gives_the_same_losses() -> None:
    def step(net: Net, global_step: int, batch: Any) -> Any:
        x, y = batch
        return torch.nn.functional.mse_loss(net.linear(torch.nn.functional.dropout(x, 0.3)), y)

    class Random(Net):
        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            data = TensorDataset(self.x, self.y)
            return DataLoader(data, batch_size=batch_size, sampler=sampler(data))

    def losses(seed: int) -> list[float]:
        return [e.loss for e in train(Random(train_step=step), seed=seed, epochs=2).of(TrainStepEnded)]

    assert losses(3) == losses(3)
    assert losses(3) != losses(4)


def test_without_a_seed_the_host_program_decides() -> None:
    """Shuffling draws from torch's generator, so seeding that repeats a run."""
    orders: list[list[float]] = []

    class Shuffled(Net):
        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            data = TensorDataset(torch.arange(16.0)[:, None])
            return DataLoader(data, batch_size=batch_size, sampler=sampler(data))

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            orders[-1].extend(batch[0][:, 0].tolist())
            return self.linear.bias.sum()

    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        orders.append([])
        train(Shuffled(), val_interval_epochs=0, epochs=2)
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:16] != orders[0][16:], "each epoch has an order of its own"


def test_any_iterable_is_a_dataloader() -> None:

    net = Net(rows=20, train_data=lambda net, size: iter(net.batches(size)))
    outcome = train(net, epochs=2)
    assert net.told == (0, 2)
    assert outcome.result.global_step == 6
    assert [e.steps for e in outcome.of(TrainEpochStarted)] == [None, None]
    assert outcome.of(RunStarted)[0].steps_per_epoch is None


def test_an_endless_stream_ends_at_the_limit_of_an_epoch() -> None:
    """max_train_steps_per_epoch is then the estimate, too."""

    net = Net(train_data=lambda net, size: itertools.cycle(net.batches(size)))
    outcome = train(net, epochs=2, max_train_steps_per_epoch=5)
    assert net.told == (5, 2)
    assert [e.steps for e in outcome.of(TrainEpochEnded)] == [5, 5]


# ------------------------------------------------------------------------------------------------------ limits


def test_max_steps_ends_the_run_within_an_epoch_which_is_still_validated() -> None:
    diary = Diary()
    outcome = train(Net(rows=32), callbacks=[diary], epochs=9, max_steps=6)
    assert outcome.result.status == "finished"
    assert outcome.result.global_step == 6
    assert [e.steps for e in outcome.of(TrainEpochEnded)] == [4, 2]
    assert diary.names[-3:] == ["on_end_val_epoch", "on_end_train_epoch", "on_end_train"]
    assert outcome.of(RunEnded)[0].global_step == 6


def test_max_steps_at_the_end_of_an_epoch_starts_no_other() -> None:
    outcome = train(Net(rows=32), epochs=9, max_steps=8)
    assert outcome.result.epochs == 2
    assert len(outcome.of(TrainEpochStarted)) == 2


def test_a_limit_leaves_the_batch_after_it_unread() -> None:
    """A stream may be shared, or slow."""
    read = []

    def train_data(net: Net, batch_size: int) -> Iterator[Any]:
        for number, batch in enumerate(net.batches(batch_size)):
            read.append(number)
            yield batch

    train(Net(rows=64, train_data=train_data), max_train_steps_per_epoch=3, val_interval_epochs=0)
    assert read == [0, 1, 2]


# ------------------------------------------------------------------------------------------- non-finite losses


def nan_at(*steps: int, value: float = math.nan) -> Any:
    class Diverges(Net):
        calls = 0

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.calls += 1
            loss, predicted = self.forward_loss(batch)
            self.log("calls", self.calls)
            return (loss * value if self.calls in steps else loss), predicted

    return Diverges(rows=48)


def test_a_nan_loss_is_reported_and_stays_in_the_event() -> None:
    outcome = train(nan_at(3), val_interval_epochs=0)
    losses = [e.loss for e in outcome.of(TrainStepEnded)]
    assert outcome.result.global_step == 6
    assert [math.isnan(loss) for loss in losses] == [False, False, True, True, True, True]
    reports = outcome.of(NonFiniteLoss)
    assert [(e.global_step, e.consecutive, e.action) for e in reports] == [
        (3, 1, "warned"),
        (4, 2, "warned"),
        (6, 4, "warned"),
    ]
    assert all(math.isnan(e.loss) for e in reports)


def test_skip_drops_the_step_and_does_not_count_it() -> None:
    net, bare = nan_at(2, 3, value=math.inf), Net(rows=48)
    outcome = train(net, non_finite="skip", val_interval_epochs=0)
    batches = bare.batches(8)
    expected = bare_losses(bare, batches[:1] + batches[3:], 1)
    assert [e.loss for e in outcome.of(TrainStepEnded)] == expected
    assert [e.global_step for e in outcome.of(TrainStepEnded)] == [1, 2, 3, 4]
    assert [(e.global_step, e.reason) for e in outcome.of(StepSkipped)] == [(1, "non_finite_loss")] * 2
    assert [(e.loss, e.action, e.consecutive) for e in outcome.of(NonFiniteLoss)] == [
        (math.inf, "skipped", 1),
        (math.inf, "skipped", 2),
    ]
    logged = [value for e in outcome.events if hasattr(e, "metrics") for value in e.metrics.values()]
    assert logged == [1, 4, 5, 6]
    assert outcome.result.global_step == 4


def test_stop_ends_the_run_with_an_error_that_names_the_step() -> None:
    outcome = train(nan_at(2), non_finite="stop", epochs=100_000, val_interval_epochs=0)
    assert isinstance(outcome.error, NonFiniteLossError)
    assert "the loss of step 2 is NaN or infinite" in str(outcome.error)
    assert outcome.of(RunEnded)[0].status == "failed"
    assert outcome.of(NonFiniteLoss)[0].action == "stopped"
