"""What a batch counts: rows that are counted or announced as a guess, and the module's own `batch_weight`."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
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
def test_a_batch_whose_tensors_agree_is_counted_without_a_word(batch: Any, expected: int, rows: int) -> None:
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


def test_rows_that_collate_fn_drops_count_nowhere(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Neither in an accumulated step nor in val_loss and logged means; and nothing is announced."""

    class Net(kit.Net):
        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            data = Gaps(self)
            return DataLoader(data, batch_size=batch_size, sampler=sampler(data), collate_fn=without_gaps)

        get_val_dataloaders = get_train_dataloader

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss, predicted = self.forward_loss(batch)
            self.log("error", (predicted - batch[1]).abs().mean())
            return loss

    net, whole = Net(), kit.Net()
    outcome = kit.train(net, train_batch_size=12, gpu_batch_size_limit=4, seed=1)
    kept = [at for at in range(12) if at not in (0, 1, 2, 9)]
    whole.x, whole.y = whole.x[kept], whole.y[kept]
    kit.train(whole, train_batch_size=8, val_interval_epochs=0)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, whole.state_dict()[name])
    loss, predicted = net.forward_loss((net.x[kept], net.y[kept]))
    metrics = outcome.result.metrics
    assert metrics["val_loss"] == pytest.approx(loss.item())
    assert metrics["error"] == pytest.approx((predicted - net.y[kept]).abs().mean().item())
    assert [event.rows for event in [*outcome.of(TrainStepEnded), *outcome.of(ValEpochEnded)]] == [8, 8]
    assert "are a guess" not in caplog.text


def test_a_guess_is_announced_once(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It names the method, the count, the reason and the way to choose."""

    class Net(kit.Net):
        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            return [{"scale": torch.ones(()), "x": x, "y": y} for x, y in self.batches(batch_size)]

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            return self.forward_loss((batch["x"], batch["y"]))

    kit.train(Net(), epochs=3, val_interval_epochs=0)
    (text,) = [text for text in caplog.messages if "are a guess" in text]
    assert "get_train_dataloader()" in text
    assert "counts 8" in text
    assert "batch_weight" in text


def test_a_last_smaller_batch_is_looked_at_with_its_own_size(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Time first, and the only batch is smaller than requested."""

    class Net(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            return self.forward_loss([part.transpose(0, 1) for part in batch])

        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            sequences = TensorDataset(torch.zeros(3, 5, 4), torch.zeros(3, 5, 1))
            return DataLoader(sequences, batch_size=8, collate_fn=time_first)

    kit.train(Net(), val_interval_epochs=0)
    (text,) = [text for text in caplog.messages if "are a guess" in text]
    assert "its second dimension has the requested 3 rows" in text


def time_first(samples: list[Any]) -> Any:
    return [part.transpose(0, 1) for part in default_collate(samples)]


class Tokens:
    """A language model's part: most rows have few targets, and two micro-batches have none."""

    lengths = (6, 6, 1, 1, 5, 2, 1, 6, 0, 0)

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.linear = torch.nn.Linear(4, 5)
        self.x = torch.randn(10, 6, 4, generator=generator)
        self.y = torch.randint(0, 5, (10, 6), generator=generator)
        for row, length in enumerate(self.lengths):
            self.y[row, length:] = -100

    def forward_loss(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = batch
        return cross_entropy(self.linear(x).flatten(0, 1), y.flatten(), ignore_index=-100), x

    def batch_weight(self, batch: Any) -> Any:
        return (batch[1] != -100).sum()


def test_accumulation_by_tokens_equals_one_large_batch(kit: Any) -> None:
    """Also where a micro-batch has none, whose loss is NaN; val_loss and train_epoch_loss are means over tokens."""

    class Net(Tokens, kit.Net):
        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            loss, _ = self.forward_loss(batch)
            self.log("bits", loss / math.log(2))
            return loss

    torch.manual_seed(0)
    small = Net()
    torch.manual_seed(0)
    large = Net()
    before = large.forward_loss((large.x, large.y))[0].item()
    outcome = kit.train(small, train_batch_size=10, gpu_batch_size_limit=2)
    kit.train(large, train_batch_size=10)
    for name, value in small.state_dict().items():
        torch.testing.assert_close(value, large.state_dict()[name])
    (step,), (epoch,) = outcome.of(TrainStepEnded), outcome.of(TrainEpochEnded)
    assert (step.rows, step.weight) == (10, 28.0)
    assert step.loss == pytest.approx(before)
    assert epoch.loss == outcome.result.metrics["train_epoch_loss"] == pytest.approx(before)
    after = small.forward_loss((small.x, small.y))[0].item()
    assert outcome.result.metrics["val_loss"] == pytest.approx(after)
    assert outcome.result.metrics["bits"] == pytest.approx(after / math.log(2))


def test_steps_of_different_weight_count_by_it_in_the_epochs_mean(kit: Any) -> None:
    """As they count by rows otherwise."""

    class Net(kit.Net):
        def batch_weight(self, batch: Any) -> float:
            return 1.0 if torch.equal(batch[0], self.x[:8]) else 3.0

    outcome = kit.train(Net(), val_interval_epochs=0)
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
def test_what_is_not_a_weight_is_refused(kit: Any, weight: Any, says: str, limit: int | None) -> None:
    """With and without accumulation."""

    class Net(kit.Net):
        def batch_weight(self, batch: Any) -> Any:
            return weight

    outcome = kit.train(Net(), gpu_batch_size_limit=limit)
    assert isinstance(outcome.error, BatchWeightError)
    assert says in str(outcome.error)


def test_an_own_weight_needs_no_count_of_rows(kit: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A module with a batch_weight is not asked for rows; the default method counts rows."""

    class Net(kit.Net):
        def get_train_dataloader(self, sampler: Any, batch_size: int) -> Any:
            return [{"scale": torch.ones(()), "x": self.x, "y": self.y}]

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            return self.forward_loss((batch["x"], batch["y"]))

        def batch_weight(self, batch: Any) -> float:
            return super().batch_weight(batch)

    (step,) = kit.train(Net(), val_interval_epochs=0).of(TrainStepEnded)
    assert step.weight == 16.0
    assert "are a guess" not in caplog.text
