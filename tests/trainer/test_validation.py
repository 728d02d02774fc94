"""Validation and test: when, over which data, in which mode, and that training goes on as if nothing had been."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from events.messages import (
    MetricsLogged,
    RunEnded,
    TestEpochEnded,
    TestEpochStarted,
    TrainStepEnded,
    ValEpochEnded,
    ValEpochStarted,
)
from sinks import Memory
from trainer.errors import ContractError, EmptyDataLoader, EpochOutputsTooLarge

# --------------------------------------------------------------------------------------------------- bad input


def test_an_empty_validation_loader_says_which(kit: Any) -> None:
    """The message names the method and the key."""

    class Net(kit.Net):
        def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
            return {"full": self.batches(batch_size), "hollow": []}

    outcome = kit.train(Net())
    assert isinstance(outcome.error, EmptyDataLoader)
    assert "get_val_dataloaders() gave no batch for the key 'hollow'" in str(outcome.error)
    assert [e.key for e in outcome.of(ValEpochEnded)] == ["full"]


def test_losses_are_weighted_by_the_samplers_rows(kit: Any) -> None:
    """Where one tensor of a batch has as many rows as the sampler: the last batch is smaller, and counts less."""

    class Net(kit.Net):
        def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
            data = [(torch.tensor(float(at)), torch.ones(3)) for at in range(12)]

            def collate(rows: Any) -> Any:
                return {"weights": torch.ones(3), "values": torch.stack([value for value, _ in rows])}

            return DataLoader(data, batch_size=batch_size, sampler=sampler(data), collate_fn=collate)

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            return batch["values"].mean()

    (ended,) = kit.train(Net()).of(ValEpochEnded)
    assert (ended.rows, ended.loss) == (12, 5.5)


def test_outputs_that_outgrow_their_limit_end_the_run_with_the_hook_named(kit: Any) -> None:
    """Rather than the machine's memory."""

    class Net(kit.Net):
        def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None: ...

    outcome = kit.train(Net(), epoch_outputs_limit_bytes=1_000)
    assert isinstance(outcome.error, EpochOutputsTooLarge)
    assert "Net.on_end_val_epoch" in str(outcome.error)
    assert "epoch_outputs_limit_bytes" in str(outcome.error)


def test_an_exception_in_val_step_leaves_the_modes_as_they_were(kit: Any) -> None:
    """Gradients are on again, and the module is in train mode."""

    class Net(kit.Net):
        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            raise RuntimeError("val")

    net = Net()
    outcome = kit.train(net)
    assert isinstance(outcome.error, RuntimeError)
    assert net.training
    assert net.linear.training
    assert torch.is_grad_enabled()


# --------------------------------------------------------------------------------------------------------- when


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({}, [2, 4, 6, 8]),
        ({"val_interval_epochs": 0}, []),
        ({"val_interval_epochs": 3}, [6, 8]),
        ({"val_interval_steps": 3}, [3, 6, 8]),
        ({"val_interval_steps": 1000}, [8]),
        ({"val_interval_steps": 1, "max_steps": 3}, [1, 2, 3]),
        ({"max_steps": 5}, [2, 4, 5]),
        ({"max_steps": 5, "val_interval_epochs": 3}, [5]),
    ],
)
def test_validation_comes_at_its_interval(kit: Any, options: dict[str, Any], steps: list[int]) -> None:
    """After every so many epochs and the last one, or after every so many steps and the last one; 0 is never."""
    outcome = kit.train(kit.Net(), epochs=4, **options)
    assert [e.global_step for e in outcome.of(ValEpochEnded)] == steps


def test_a_skipped_step_does_not_validate_again(kit: Any) -> None:
    """global_step stays at the interval while steps are skipped."""

    class Net(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            loss, _ = self.forward_loss(batch)
            return loss * float("nan") if self.calls in (3, 4) else loss

    outcome = kit.train(Net(rows=48), non_finite="skip", val_interval_steps=2)
    assert [e.global_step for e in outcome.of(ValEpochEnded)] == [2, 4]


def test_no_validation_loader_is_no_validation(kit: Any) -> None:
    """None, or an empty dictionary, as the contract allows."""
    for nothing in (None, {}):

        class Net(kit.Net):
            def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
                return nothing  # noqa: B023 - used within this iteration

        outcome = kit.train(Net())
        assert outcome.result.status == "finished"
        assert outcome.of(ValEpochStarted) == []


# --------------------------------------------------------------------------------------------------------- what


def test_every_key_is_validated_in_order_with_outputs_and_loss_of_its_own(kit: Any) -> None:
    """Hooks get the key and that loader's outputs collated; the events carry steps, rows and the loss over rows."""

    class Net(kit.Net):
        def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
            return {"b": self.batches(batch_size), "a": self.batches(batch_size)[:1]}

    diary = kit.Diary()
    net = Net(rows=20)
    outcome = kit.train(net, callbacks=[diary])
    first, second = outcome.of(ValEpochEnded)
    assert (first.key, first.steps, first.rows) == ("b", 3, 20)
    assert (second.key, second.steps, second.rows) == ("a", 1, 8)
    with torch.no_grad():
        losses = [net.forward_loss(batch)[0].item() for batch in net.batches(8)]
    mean = sum(loss * rows for loss, rows in zip(losses, (8, 8, 4), strict=True)) / 20
    assert first.loss == pytest.approx(mean, rel=1e-9)
    assert second.loss == pytest.approx(losses[0], rel=1e-9)
    assert outcome.result.metrics["val_loss/b"] == first.loss
    (_, (outputs_b, key_b)), (_, (outputs_a, key_a)) = diary.of("on_end_val_epoch")
    assert (key_b, key_a) == ("b", "a")
    assert [tuple(t.shape) for t in outputs_b] == [(3,), (20, 1)]
    assert [tuple(t.shape) for t in outputs_a] == [(1,), (8, 1)]
    assert outputs_b[0].tolist() == losses


def test_a_single_loader_has_the_key_default(kit: Any) -> None:
    """And its loss the plain name."""
    outcome = kit.train(kit.Net())
    assert outcome.of(ValEpochEnded)[0].key == "default"
    assert outcome.result.metrics["val_loss"] == outcome.of(ValEpochEnded)[0].loss


def test_a_limit_ends_each_loader_and_reads_no_further(kit: Any) -> None:
    """max_val_steps_per_epoch holds for each key."""
    read: list[int] = []

    class Net(kit.Net):
        def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
            def stream() -> Iterator[Any]:
                for number, batch in enumerate(self.batches(batch_size)):
                    read.append(number)
                    yield batch

            return {"a": stream(), "b": stream()}

    outcome = kit.train(Net(rows=64), max_val_steps_per_epoch=2)
    assert [e.steps for e in outcome.of(ValEpochEnded)] == [2, 2]
    assert [e.steps for e in outcome.of(ValEpochStarted)] == [2, 2]
    assert read == [0, 1, 0, 1]


def test_outputs_that_begin_with_no_single_number_have_no_loss(kit: Any) -> None:
    """val_step may return logits first, or nothing at all."""

    class Net(kit.Net):
        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            return self.forward_loss(batch)[1]

    class Nothing(kit.Net):
        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            return None

    assert kit.train(Net()).of(ValEpochEnded)[0].loss is None
    assert kit.train(Nothing()).of(ValEpochEnded)[0].loss is None


def test_validation_gets_its_batch_size(kit: Any) -> None:
    """val_batch_size, else the micro-batch."""
    sizes = []

    class Net(kit.Net):
        def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
            sizes.append((sampler, batch_size))
            return self.batches(batch_size)

    kit.train(Net(), gpu_batch_size_limit=4)
    kit.train(Net(), gpu_batch_size_limit=4, val_batch_size=16)
    assert sizes == [(torch.utils.data.SequentialSampler, 4), (torch.utils.data.SequentialSampler, 16)]


# -------------------------------------------------------------------------------------------------------- modes


class Frozen(nn.Module):
    """A layer whose batch norm the user has frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(x))


def test_validation_runs_in_eval_mode_without_gradients_and_restores_each_submodule(kit: Any) -> None:
    """What was in train mode is again, what the user keeps in eval mode stays there: a frozen batch norm."""
    seen: list[tuple[str, bool, bool, bool, bool]] = []

    class Net(kit.Net):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Frozen()
            self.layer.norm.eval()

        def look(self, where: str) -> None:
            modes = (self.training, self.layer.norm.training, self.layer.drop.training)
            seen.append((where, torch.is_grad_enabled(), *modes))

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.look("train")
            return self.forward_loss((self.layer(batch[0]), batch[1]))

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.look("val")
            return self.forward_loss((self.layer(batch[0]), batch[1]))

    net = Net()
    before = net.layer.norm.running_mean.clone()
    kit.train(net, epochs=2)
    assert set(seen) == {("train", True, True, False, True), ("val", False, False, False, False)}
    assert torch.equal(net.layer.norm.running_mean, before)
    assert net.training


def test_a_hook_that_changes_modes_during_validation_does_not_change_training(kit: Any) -> None:
    """A module that samples from itself with ``self.train()`` afterwards must not unfreeze what is frozen."""
    modes: list[bool] = []

    class Net(kit.Net):
        def __init__(self) -> None:
            super().__init__()
            self.layer = Frozen()
            self.layer.norm.eval()

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            modes.append(self.layer.norm.training)
            return self.forward_loss((self.layer(batch[0]), batch[1]))

        def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
            self.train()

    kit.train(Net(), epochs=2)
    assert modes == [False] * 4


def test_a_module_that_comes_in_eval_mode_is_trained_in_train_mode(kit: Any) -> None:
    """As a module does that was evaluated before."""
    modes = []

    class Net(kit.Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            modes.append((self.training, self.linear.training))
            return super().train_step(global_step, batch, device)

    kit.train(Net().eval())
    assert modes == [(True, True)] * 2


def test_validation_changes_nothing_in_training(kit: Any) -> None:
    """The same losses with validation after every step and without any."""

    def losses(**options: Any) -> list[float]:
        return [e.loss for e in kit.train(kit.Net(), epochs=2, seed=1, **options).of(TrainStepEnded)]

    assert losses(val_interval_steps=1) == losses(val_interval_epochs=0)


# ------------------------------------------------------------------------------------------------ Trainer.test()


class Tested:
    """Mixed into the module: two test dataloaders."""

    def get_test_dataloaders(self, sampler: Any, batch_size: int) -> Any:
        return {"a": self.batches(batch_size), "b": self.batches(batch_size)[:1]}  # type: ignore[attr-defined]


def test_test_returns_the_outputs_of_every_key_and_publishes_their_events(kit: Any) -> None:
    """In eval mode and without gradients; val_step serves as the test_step that the module does not have."""

    class Net(Tested, kit.Net):
        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            assert not self.training
            assert not torch.is_grad_enabled()
            self.log("seen", 1)
            return self.forward_loss(batch)

    memory = Memory()
    net = Net(rows=20)
    outputs = kit.make_trainer(net, sinks=[memory]).test()
    assert list(outputs) == ["a", "b"]
    assert [tuple(t.shape) for t in outputs["a"]] == [(3,), (20, 1)]
    assert [tuple(t.shape) for t in outputs["b"]] == [(1,), (8, 1)]
    assert net.training
    first, second = memory.of(TestEpochEnded)
    assert (first.key, first.steps, first.rows, first.stage) == ("a", 3, 20, "test")
    assert second.loss == pytest.approx(outputs["b"][0].item())
    assert [(e.key, e.stage) for e in memory.of(MetricsLogged)] == [("a", "test"), ("b", "test")]
    assert [type(e) for e in memory.events if isinstance(e, (TestEpochStarted, RunEnded))] == [
        TestEpochStarted,
        TestEpochStarted,
        RunEnded,
    ]


def test_test_step_goes_before_val_step(kit: Any) -> None:
    """A module that has one is tested with it."""

    class Net(Tested, kit.Net):
        def test_step(self, global_step: int, batch: Any, device: Any) -> Any:
            return torch.full((2,), 7.0)

    assert kit.make_trainer(Net()).test()["b"][0].tolist() == [7.0, 7.0]


def test_testing_runs_no_training_hooks(kit: Any) -> None:
    """The contract has no hook for a test."""
    diary = kit.Diary()

    class Net(Tested, kit.Net): ...

    kit.make_trainer(Net(), callbacks=[diary]).test()
    assert diary.lines == []


def test_test_without_dataloaders_says_what_to_implement(kit: Any) -> None:
    """The contract's default returns none."""
    with pytest.raises(ContractError, match=r"get_test_dataloaders\(\) returned no dataloader: implement it"):
        kit.make_trainer(kit.Net()).test()


def test_an_exception_in_test_step_comes_out_as_itself(kit: Any) -> None:
    """With a note that says where."""
    error = KeyError("mine")

    class Net(Tested, kit.Net):
        def test_step(self, global_step: int, batch: Any, device: Any) -> Any:
            raise error

    with pytest.raises(KeyError) as caught:
        kit.make_trainer(Net()).test()
    assert caught.value is error
    assert "test_step" in caught.value.__notes__[0]


# -------------------------------------------------------------------------------------------- what val_loss is


def returning(kit: Any, outputs: list[Any]) -> Any:
    """A module whose validation has one batch of four rows for each of these outputs of val_step."""

    class Net(kit.Net):
        def get_val_dataloaders(self, sampler: Any, batch_size: int) -> Any:
            return [torch.ones(4, 1)] * len(outputs)

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            return left.pop(0)

    left = list(outputs)
    return Net()


@pytest.mark.parametrize(
    ("outputs", "loss"),
    [
        ([torch.tensor(1.0), None, torch.tensor(3.0)], 2.0),
        ([torch.tensor(1.0), (None, torch.ones(4)), torch.tensor(3.0)], 2.0),
        ([torch.tensor([1.0, 2.0, 3.0, 6.0]), torch.tensor(5.0)], 4.0),
        ([torch.tensor([[1.0]]), torch.tensor([3.0])], 2.0),
        ([1.0, torch.tensor(3.0, dtype=torch.float64)], 2.0),
        ([numpy.float32(1.0), (numpy.array(3.0), "more")], 2.0),
        ([None, None], None),
    ],
)
def test_val_loss_is_the_mean_over_the_batches_that_have_a_loss(
    kit: Any, caplog: pytest.LogCaptureFixture, outputs: list[Any], loss: float | None
) -> None:
    """A number for the batch, or one for each row; None is no loss."""
    (ended,) = kit.train(returning(kit, outputs)).of(ValEpochEnded)
    assert ended.loss == loss
    assert "no loss first" not in caplog.text


@pytest.mark.parametrize(
    "first",
    [
        torch.tensor(3),
        torch.tensor(True),
        torch.tensor([1, 2, 3, 4]),
        torch.tensor(1j),
        torch.ones(5),
        torch.ones(4, 1),
        torch.ones(4, 3),
        "text",
    ],
)
def test_what_is_not_a_loss_is_never_averaged(kit: Any, caplog: pytest.LogCaptureFixture, first: Any) -> None:
    """Class indices, flags, complex numbers, vectors of another length; a smaller last batch does not make them one."""
    outcome = kit.train(returning(kit, [first, first, torch.tensor(1.0)]))
    assert outcome.of(ValEpochEnded)[0].loss is None
    assert "val_loss" not in outcome.result.metrics
    assert len([text for text in caplog.messages if "no loss first" in text]) == 1


def test_losses_of_samples_count_as_rows_where_the_batch_does_not_tell(kit: Any) -> None:
    """A batch of texts, with a vector of losses for each."""

    net = returning(kit, [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([5.0])])
    net.get_val_dataloaders = lambda sampler, batch_size: [["a", "b", "c"], ["d"]]
    assert kit.train(net).of(ValEpochEnded)[0].loss == 2.0


def test_a_hook_gets_the_outputs_of_the_batches_that_returned_some(kit: Any) -> None:
    """Collated as if the others had not been there."""
    diary = kit.Diary()
    outputs = [(torch.tensor(1.0), torch.ones(4)), None, (torch.tensor(3.0), torch.ones(4))]
    kit.train(returning(kit, outputs), callbacks=[diary])
    ((_, ((losses, rows), _)),) = diary.of("on_end_val_epoch")
    assert losses.tolist() == [1.0, 3.0]
    assert rows.shape == (8,)
