"""Validation and test: when, over which data, in which mode, and that training continues unchanged."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from support.training import Diary, Net, make_trainer, train
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler

from events.messages import (
    MetricsLogged,
    RunEnded,
    TestEpochEnded,
    TestEpochStarted,
    ValEpochEnded,
    ValEpochStarted,
)
from sinks import Memory
from trainer import ModuleInterface
from trainer.errors import ContractError, EmptyDataLoader, EpochOutputsTooLarge

# --------------------------------------------------------------------------------------------------- bad input


def test_an_empty_validation_loader_is_named_by_its_key() -> None:
    outcome = train(Net(val_data=lambda net, size: {"full": net.batches(size), "hollow": []}))
    assert isinstance(outcome.error, EmptyDataLoader)
    assert "get_val_dataloaders() gave no batch for the key 'hollow'" in str(outcome.error)
    assert [e.key for e in outcome.of(ValEpochEnded)] == ["full"]


def test_outputs_that_exceed_their_limit_end_the_run_with_the_hook_named() -> None:
    class Reads(Net):
        def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None: ...

    outcome = train(Reads(), epoch_outputs_limit_bytes=1_000)
    assert isinstance(outcome.error, EpochOutputsTooLarge)
    assert "Reads.on_end_val_epoch" in str(outcome.error)
    assert "epoch_outputs_limit_bytes" in str(outcome.error)


def test_an_exception_in_val_step_restores_the_modes() -> None:
    def val_step(net: Net, global_step: int, batch: Any) -> Any:
        raise RuntimeError("val")

    net = Net(val_step=val_step)
    assert isinstance(train(net).error, RuntimeError)
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
def test_validation_runs_at_its_interval_and_at_the_end(options: dict[str, Any], steps: list[int]) -> None:
    outcome = train(Net(), epochs=4, **options)
    assert [e.global_step for e in outcome.of(ValEpochEnded)] == steps


def test_a_skipped_step_does_not_validate_again() -> None:
    """global_step stays at the interval while steps are skipped."""
    net = Net(rows=48, scales=dict.fromkeys((3, 4), float("nan")))
    outcome = train(net, non_finite="skip", val_interval_steps=2)
    assert [e.global_step for e in outcome.of(ValEpochEnded)] == [2, 4]


@pytest.mark.parametrize("nothing", [None, {}])
def test_no_validation_loader_is_no_validation(nothing: Any) -> None:
    outcome = train(Net(val_data=lambda net, size: nothing))
    assert outcome.result.status == "finished"
    assert outcome.of(ValEpochStarted) == []


# --------------------------------------------------------------------------------------------------------- what


def test_every_key_is_validated_in_order_with_its_own_outputs_and_loss() -> None:
    """Hooks receive the key and that loader's outputs collated; the events have steps, rows and the loss over rows."""
    diary = Diary()
    net = Net(rows=20, val_data=lambda net, size: {"b": net.batches(size), "a": net.batches(size)[:1]})
    outcome = train(net, callbacks=[diary])
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


def test_a_single_loader_has_the_key_default_and_the_plain_metric_name() -> None:
    outcome = train(Net())
    (ended,) = outcome.of(ValEpochEnded)
    assert (ended.key, ended.loss) == ("default", outcome.result.metrics["val_loss"])


def test_max_val_steps_per_epoch_ends_each_loader_and_reads_no_further() -> None:
    read: list[int] = []

    def stream(net: Net, size: int) -> Iterator[Any]:
        for number, batch in enumerate(net.batches(size)):
            read.append(number)
            yield batch

    net = Net(rows=64, val_data=lambda net, size: {"a": stream(net, size), "b": stream(net, size)})
    outcome = train(net, max_val_steps_per_epoch=2)
    assert [e.steps for e in outcome.of(ValEpochEnded)] == [2, 2]
    assert [e.steps for e in outcome.of(ValEpochStarted)] == [2, 2]
    assert read == [0, 1, 0, 1]


def test_the_validation_batch_is_val_batch_size_or_the_micro_batch() -> None:
    sizes: list[Any] = []

    class Sized(Net):
        def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
            sizes.append((sampler, batch_size))
            return self.batches(batch_size)

    train(Sized(), gpu_batch_size_limit=4)
    train(Sized(), gpu_batch_size_limit=4, val_batch_size=16)
    assert sizes == [(SequentialSampler, 4), (SequentialSampler, 16)]


# -------------------------------------------------------------------------------------------- what val_loss is


def returning(*outputs: Any, data: Any = None) -> Net:
    """A module whose val_step returns these outputs, one for each batch of four rows."""
    left = list(outputs)
    batches = [torch.ones(4, 1)] * len(outputs) if data is None else data
    return Net(val_data=lambda net, size: batches, val_step=lambda *_: left.pop(0))


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
    caplog: pytest.LogCaptureFixture, outputs: list[Any], loss: float | None
) -> None:
    """A number for the batch, or one for each row; None is not a loss."""
    (ended,) = train(returning(*outputs)).of(ValEpochEnded)
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
def test_a_value_that_is_not_a_loss_is_never_averaged(caplog: pytest.LogCaptureFixture, first: Any) -> None:
    """Class indices, flags, complex numbers, vectors of another length; a smaller last batch does not make them one."""
    outcome = train(returning(first, first, torch.tensor(1.0)))
    assert outcome.of(ValEpochEnded)[0].loss is None
    assert "val_loss" not in outcome.result.metrics
    assert len([text for text in caplog.messages if "no loss first" in text]) == 1


def test_losses_are_weighted_by_the_rows_of_the_sampler_or_of_the_losses() -> None:
    """One tensor of a batch has as many rows as the sampler; or a batch of texts has a vector with a loss for each."""

    class Sampled(Net):
        def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
            data = [(torch.tensor(float(at)), torch.ones(3)) for at in range(12)]

            def collate(rows: Any) -> Any:
                return {"weights": torch.ones(3), "values": torch.stack([value for value, _ in rows])}

            return DataLoader(data, batch_size=batch_size, sampler=sampler(data), collate_fn=collate)

    (ended,) = train(Sampled(val_step=lambda net, step, batch: batch["values"].mean())).of(ValEpochEnded)
    assert (ended.rows, ended.loss) == (12, 5.5)
    texts = returning(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([5.0]), data=[["a", "b", "c"], ["d"]])
    assert train(texts).of(ValEpochEnded)[0].loss == 2.0


def test_a_hook_receives_the_outputs_of_the_batches_that_returned_some() -> None:
    diary = Diary()
    outputs = [(torch.tensor(1.0), torch.ones(4)), None, (torch.tensor(3.0), torch.ones(4))]
    train(returning(*outputs), callbacks=[diary])
    ((_, ((losses, rows), _)),) = diary.of("on_end_val_epoch")
    assert losses.tolist() == [1.0, 3.0]
    assert rows.shape == (8,)


# -------------------------------------------------------------------------------------------------------- modes


class Frozen(Net):
    """A module whose batch norm the user has frozen; it records the modes of its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.norm.eval()
        self.seen: set[tuple[str, bool, bool, bool, bool]] = set()

    def forward_loss(self, batch: Any, where: str = "val") -> Any:
        self.seen.add((where, torch.is_grad_enabled(), self.training, self.norm.training, self.drop.training))
        return super().forward_loss((self.drop(self.norm(batch[0])), batch[1]))

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return self.forward_loss(batch, "train")


class ChangesModes(Frozen):
    """Samples from itself and calls ``self.train()`` afterwards."""

    def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
        self.train()


@pytest.mark.parametrize("kind", [Frozen, ChangesModes])
def test_validation_runs_in_eval_mode_without_gradients_and_restores_each_submodule(kind: type[Frozen]) -> None:
    """A module that comes in eval mode is trained in train mode; the frozen batch norm stays frozen."""
    net = kind()
    before = net.norm.running_mean.clone()  # type: ignore[union-attr]
    train(net, epochs=2)
    assert net.seen == {("train", True, True, False, True), ("val", False, False, False, False)}
    assert torch.equal(net.norm.running_mean, before)  # type: ignore[arg-type]
    assert net.training


def test_a_module_in_eval_mode_is_trained_in_train_mode() -> None:
    modes: list[tuple[bool, bool]] = []

    def step(net: Net, global_step: int, batch: Any) -> Any:
        modes.append((net.training, net.linear.training))
        return net.forward_loss(batch)

    net = Net(train_step=step)
    train(net.eval())
    assert modes == [(True, True)] * 2


# ------------------------------------------------------------------------------------------------ Trainer.test()


def two_loaders(net: Net, size: int) -> dict[str, Any]:
    return {"a": net.batches(size), "b": net.batches(size)[:1]}


def test_test_returns_the_outputs_of_every_key_and_publishes_their_events() -> None:
    """In eval mode, without gradients and without hooks; val_step replaces a missing test_step."""

    def val_step(net: Net, global_step: int, batch: Any) -> Any:
        assert not net.training
        assert not torch.is_grad_enabled()
        net.log("seen", 1)
        return net.forward_loss(batch)

    memory, diary = Memory(), Diary()
    net = Net(rows=20, val_step=val_step, test_data=two_loaders)
    outputs = make_trainer(net, sinks=[memory], callbacks=[diary]).test()
    assert list(outputs) == ["a", "b"]
    assert [tuple(t.shape) for t in outputs["a"]] == [(3,), (20, 1)]
    assert [tuple(t.shape) for t in outputs["b"]] == [(1,), (8, 1)]
    assert net.training
    first, second = memory.of(TestEpochEnded)
    assert (first.key, first.steps, first.rows, first.stage) == ("a", 3, 20, "test")
    assert second.loss == pytest.approx(outputs["b"][0].item())
    assert [(e.key, e.stage) for e in memory.of(MetricsLogged)] == [("a", "test"), ("b", "test")]
    order = [type(e) for e in memory.events if isinstance(e, (TestEpochStarted, RunEnded))]
    assert order == [TestEpochStarted, TestEpochStarted, RunEnded]
    assert diary.lines == []


def test_test_uses_the_modules_test_step_and_raises_its_exception_with_a_note() -> None:
    error = KeyError("mine")

    class Tested(Net):
        broken = False

        def test_step(self, global_step: int, batch: Any, device: Any) -> Any:
            if self.broken:
                raise error
            return torch.full((2,), 7.0)

    net = Tested(test_data=two_loaders)
    assert make_trainer(net).test()["b"][0].tolist() == [7.0, 7.0]
    net.broken = True
    with pytest.raises(KeyError) as caught:
        make_trainer(net).test()
    assert caught.value is error
    assert "test_step" in caught.value.__notes__[0]


def test_test_without_dataloaders_names_the_method_to_implement() -> None:
    """The default of the contract returns none."""
    net = type("Untested", (Net,), {"get_test_dataloaders": ModuleInterface.get_test_dataloaders})()
    with pytest.raises(ContractError, match=r"get_test_dataloaders\(\) returned no dataloader: implement it"):
        make_trainer(net).test()
