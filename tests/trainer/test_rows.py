"""The weight of a batch: its rows, counted or reported as a guess, or the module's own `batch_weight`."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.training import Net, train
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from events.messages import TrainEpochEnded, TrainStepEnded, ValEpochEnded
from trainer.data.rows import count_rows
from trainer.errors import BatchWeightError

ONES = torch.ones


@pytest.mark.parametrize(
    ("batch", "expected", "rows"),
    [
        ((ONES(4, 2), ONES(4)), 4, 4),
        ((ONES(3, 2), ONES(3)), 4, 3),  # rows were dropped, or it is the last batch
        (ONES(4, 2), 4, 4),
        ({"x": ONES(4, 2), "y": ONES(4), "scale": ONES(())}, 4, 4),
        (((ONES(4, 2), ONES(4, 3)), ONES(4)), 4, 4),
    ],
)
def test_a_batch_whose_tensors_agree_is_counted_without_a_doubt(batch: Any, expected: int, rows: int) -> None:
    """As many rows as requested, or fewer."""
    assert count_rows(batch, expected, exceeds=True) == (rows, None)


@pytest.mark.parametrize(
    ("batch", "expected", "rows", "doubt"),
    [
        ((ONES(1, 4, 4), ONES(1, 4, 4)), 2, 1, "tensors of one shape, which may be samples"),
        ([ONES(3, 8, 8), ONES(3, 9, 9), ONES(3, 7, 7), ONES(3, 7, 7)], 4, 4, "a list of 4 entries"),
        (((ONES(3, 8, 8), ONES(3, 9, 9)), (ONES(5, 4), ONES(1, 4))), 2, 2, "a list of 2 entries"),
        ([(ONES(3, 8), ONES(())), (ONES(3, 8), ONES(()))], None, 3, "containers"),
        ((ONES(7, 4, 2), ONES(7, 4)), 4, 7, "time first"),
        ((ONES(7, 4, 2), ONES(4)), 4, 4, "4 and 7"),
        ((ONES(12, 2), ONES(12)), 4, 12, "makes batches of 4"),
        ({"scale": ONES(()), "x": ONES(4, 2)}, 4, 4, "begins with a scalar"),
        ({"classes": ONES(10), "x": ONES(6, 2)}, None, 10, "6 and 10"),
        (SimpleNamespace(num_graphs=3), 4, 3, "num_graphs"),
        (["text"], 4, None, "without a tensor"),
        (ONES(()), 4, None, "scalars"),
    ],
)
def test_a_batch_that_may_be_counted_otherwise_is_a_doubt(
    batch: Any, expected: int | None, rows: int | None, doubt: str
) -> None:
    """Images in tuples, time first, scalars first, graphs, tensors that disagree, no tensor at all."""
    counted = count_rows(batch, expected, exceeds=True)
    assert counted.rows == rows
    assert doubt in str(counted.doubt)


class Gaps(Dataset[Any]):
    """Some of its rows are missing."""

    def __init__(self, net: Any) -> None:
        self.net = net

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> Any:
        return None if index in (0, 1, 2, 9) else (self.net.x[index], self.net.y[index])


def without_gaps(rows: list[Any]) -> Any:
    return default_collate([row for row in rows if row is not None])


def guesses(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "are a guess" in text]


def test_rows_that_collate_fn_drops_are_not_counted(caplog: pytest.LogCaptureFixture) -> None:
    """Neither in an accumulated step nor in val_loss and logged means; and nothing is reported."""

    class Dropping(Net):
        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            data = Gaps(self)
            return DataLoader(data, batch_size=batch_size, sampler=sampler(data), collate_fn=without_gaps)

        get_val_dataloaders = get_train_dataloader

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss, predicted = self.forward_loss(batch)
            self.log("error", (predicted - batch[1]).abs().mean())
            return loss

    net, whole = Dropping(), Net()
    outcome = train(net, train_batch_size=12, gpu_batch_size_limit=4, seed=1)
    kept = [at for at in range(12) if at not in (0, 1, 2, 9)]
    whole.x, whole.y = whole.x[kept], whole.y[kept]
    train(whole, train_batch_size=8, val_interval_epochs=0)
    torch.testing.assert_close(net.state_dict(), whole.state_dict())
    loss, predicted = net.forward_loss((net.x[kept], net.y[kept]))
    metrics = outcome.result.metrics
    assert metrics["val_loss"] == pytest.approx(loss.item())
    assert metrics["error"] == pytest.approx((predicted - net.y[kept]).abs().mean().item())
    assert [event.rows for event in [*outcome.of(TrainStepEnded), *outcome.of(ValEpochEnded)]] == [8, 8]
    assert guesses(caplog) == []


class Named(Net):
    """Its batches begin with a scalar, so that their rows are a guess."""

    def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
        return [{"scale": torch.ones(()), "x": x, "y": y} for x, y in self.batches(batch_size)]

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return self.forward_loss((batch["x"], batch["y"]))


class Weighed(Named):
    def batch_weight(self, batch: Any) -> float:
        return super().batch_weight(batch)


def test_a_guess_is_reported_once_unless_the_module_has_a_weight(caplog: pytest.LogCaptureFixture) -> None:
    """The warning has the method, the count, the reason and the fix; the default method counts rows."""
    assert [step.weight for step in train(Weighed(), val_interval_epochs=0).of(TrainStepEnded)] == [8.0, 8.0]
    assert guesses(caplog) == []
    train(Named(), epochs=3, val_interval_epochs=0)
    (text,) = guesses(caplog)
    for part in ("get_train_dataloader()", "counts 8", "batch_weight"):
        assert part in text


def test_the_guess_for_a_smaller_last_batch_uses_its_own_size(caplog: pytest.LogCaptureFixture) -> None:
    """Time first, and the only batch is smaller than requested."""
    sequences = TensorDataset(torch.zeros(3, 5, 4), torch.zeros(3, 5, 1))
    net = Net(
        train_data=lambda net, size: DataLoader(sequences, batch_size=8, collate_fn=time_first),
        train_step=lambda net, step, batch: net.forward_loss([part.transpose(0, 1) for part in batch]),  # type: ignore[arg-type]
    )
    train(net, val_interval_epochs=0)
    (text,) = guesses(caplog)
    assert "its second dimension has the requested 3 rows" in text


def time_first(samples: list[Any]) -> Any:
    return [part.transpose(0, 1) for part in default_collate(samples)]


class Tokens(Net):
    """A language model's part: most rows have few targets, and two micro-batches have none."""

    lengths = (6, 6, 1, 1, 5, 2, 1, 6, 0, 0)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        torch.manual_seed(0)
        self.linear = torch.nn.Linear(4, 5)
        self.x = torch.randn(10, 6, 4, generator=generator)
        self.y = torch.randint(0, 5, (10, 6), generator=generator)
        for row, length in enumerate(self.lengths):
            self.y[row, length:] = -100

    def forward_loss(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = batch
        return cross_entropy(self.linear(x).flatten(0, 1), y.flatten(), ignore_index=-100), x

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        loss, _ = self.forward_loss(batch)
        self.log("bits", loss / math.log(2))
        return loss

    def batch_weight(self, batch: Any) -> Any:
        return (batch[1] != -100).sum()


def test_accumulation_by_tokens_equals_one_large_batch() -> None:
    """Also if a micro-batch has none, whose loss is NaN; val_loss and train_epoch_loss are means over tokens."""
    small, large = Tokens(), Tokens()
    before = large.forward_loss((large.x, large.y))[0].item()
    outcome = train(small, train_batch_size=10, gpu_batch_size_limit=2)
    train(large, train_batch_size=10)
    torch.testing.assert_close(small.state_dict(), large.state_dict())
    (step,), (epoch,) = outcome.of(TrainStepEnded), outcome.of(TrainEpochEnded)
    assert (step.rows, step.weight) == (10, 28.0)
    assert step.loss == pytest.approx(before)
    assert epoch.loss == outcome.result.metrics["train_epoch_loss"] == pytest.approx(before)
    after = small.forward_loss((small.x, small.y))[0].item()
    assert outcome.result.metrics["val_loss"] == pytest.approx(after)
    assert outcome.result.metrics["bits"] == pytest.approx(after / math.log(2))


def test_the_epochs_mean_is_over_the_weights_of_its_steps() -> None:
    class Uneven(Net):
        def batch_weight(self, batch: Any) -> float:
            return 1.0 if torch.equal(batch[0], self.x[:8]) else 3.0

    outcome = train(Uneven(), val_interval_epochs=0)
    first, second = [event.loss for event in outcome.of(TrainStepEnded)]
    assert outcome.of(TrainEpochEnded)[0].loss == pytest.approx((first + 3 * second) / 4)


@pytest.mark.parametrize(
    ("weight", "says"),
    [
        (-1.0, "returned -1.0"),
        (math.nan, "returned nan"),
        (math.inf, "returned inf"),
        (None, "not a number"),
        ("4", "not a number"),
        (torch.ones(2), "not one number"),
        (torch.ones((), device="meta"), "on meta"),
        (0, "returned 0 for all of step 1"),
    ],
)
@pytest.mark.parametrize("limit", [None, 4])
def test_a_wrong_weight_is_refused_with_and_without_accumulation(weight: Any, says: str, limit: int | None) -> None:
    net = type("Wrong", (Net,), {"batch_weight": lambda self, batch: weight})()
    outcome = train(net, gpu_batch_size_limit=limit)
    assert isinstance(outcome.error, BatchWeightError)
    assert says in str(outcome.error)
