"""Validation, limits, callbacks and interruptions do not change the results of a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, TensorDataset

from events.errors import CheckpointMismatch
from trainer import CallbackInterface, Checkpoints, ModuleInterface, RunInterrupted, Trainer, TrainerArguments
from trainer.callbacks import EMA
from trainer.errors import ArgumentsError, DataLoaderError

EACH_EPOCH = Checkpoints(every_epochs=1, every_minutes=None, keep_last=None, when_busy="wait", weights=False)


WORKERS: Any = {"num_workers": 1, "persistent_workers": True}
Loader = Callable[[Any, type[Any], int], Any]
"""Builds a training dataloader from a module, the sampler and the batch size."""


def sampled(net: Net, sampler: type[Any], batch_size: int) -> Any:
    return DataLoader(net.data, batch_size, sampler=sampler(net.data))


class Net(ModuleInterface):
    """Regression over rows that can be told apart; ``keeps``: one dataloader for all epochs."""

    def __init__(self, rows: int = 12, loader: Loader = sampled, *, keeps: bool = False) -> None:
        super().__init__()
        self.make_loader, self.keeps, self.kept = loader, keeps, None
        self.generator = torch.Generator().manual_seed(5)
        torch.manual_seed(1)
        self.net: nn.Module = nn.Linear(2, 1)
        generator = torch.Generator().manual_seed(2)
        self.data: Any = TensorDataset(torch.randn(rows, 2, generator=generator), torch.arange(float(rows)))
        self.seen: list[list[float]] = []
        self.told: tuple[Any, ...] = ()

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int, epochs: int) -> Any:
        self.told = estimated_global_steps_per_epoch, epochs, self.total_steps
        return [torch.optim.SGD(self.parameters(), lr=0.01)], []

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        if self.kept is None or not self.keeps:
            self.kept = self.make_loader(self, sampler, batch_size)
        return self.kept

    def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
        return None

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        rows, numbers = batch
        self.seen.append(numbers.tolist())
        return (self.net(rows).squeeze(1) - numbers).pow(2).mean()

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return (self.net(batch[0]).squeeze(1) - batch[1]).pow(2).mean()


def train(
    net: Net,
    folder: Path | None = None,
    *,
    callbacks: Any = (),
    resume: Any = None,
    checkpoints: Checkpoints = EACH_EPOCH,
    **options: Any,
) -> Any:
    arguments = TrainerArguments(**{"train_batch_size": 4, "seed": 0, "device": "cpu"} | options)
    own: dict[str, Any] = {"journal": False, "checkpoints": False}
    if folder is not None:
        own = {"run_dir": folder, "run_id": "r", "checkpoints": checkpoints}
    return Trainer(net, arguments, sinks=[], callbacks=callbacks, resume=resume, **own).train()


# ------------------------------------------------------------------------------------------ the length of the run


class Stream(IterableDataset[Any]):
    """Rows without end."""

    def __iter__(self) -> Any:
        while True:
            yield torch.zeros(2), torch.zeros(())


def endless(net: Net, sampler: type[Any], batch_size: int) -> Any:
    return DataLoader(Stream(), batch_size)


@pytest.mark.parametrize(
    ("loader", "limits", "told", "steps", "epochs"),
    [
        (sampled, {}, (3, 1, 3), 3, 1),
        (sampled, {"epochs": 4}, (3, 4, 12), 12, 4),
        (sampled, {"max_steps": 2}, (2, 1, 2), 2, 1),
        (sampled, {"max_steps": 6}, (3, 2, 6), 6, 2),
        (sampled, {"max_steps": 8}, (3, 3, 8), 8, 3),
        (sampled, {"max_steps": 4, "epochs": 5}, (2, 2, 4), 4, 2),
        (sampled, {"max_steps": 99, "epochs": 2}, (3, 2, 6), 6, 2),
        (sampled, {"max_train_steps_per_epoch": 2, "epochs": 3}, (2, 3, 6), 6, 3),
        (sampled, {"max_train_steps_per_epoch": 2, "max_steps": 5}, (2, 3, 5), 5, 3),
        (sampled, {"gpu_batch_size_limit": 2, "max_steps": 2}, (2, 1, 2), 2, 1),
        (endless, {"max_steps": 5}, (5, 1, 5), 5, 1),
        (endless, {"max_steps": 6, "max_train_steps_per_epoch": 2}, (2, 3, 6), 6, 3),
        (endless, {"epochs": 2, "max_train_steps_per_epoch": 2}, (2, 2, 4), 4, 2),
    ],
)
def test_schedulers_get_the_length_of_the_run(
    loader: Loader, limits: dict[str, int], told: tuple[int, int, int], steps: int, epochs: int
) -> None:
    net = Net(loader=loader)
    result = train(net, **limits)
    assert net.told == told
    assert (result.global_step, result.epochs) == (steps, epochs)
    assert net.total_steps is None


def test_a_schedule_of_that_length_ends_where_the_run_ends() -> None:
    class OneCycle(Net):
        def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            self.cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=steps * epochs)
            return [optimizer], [self.cycle]

    net = OneCycle(loader=endless)
    train(net, max_steps=10)
    assert net.cycle.last_epoch == 10


@pytest.mark.parametrize(
    ("first", "then", "told", "steps"),
    [
        ({"epochs": 2, "max_steps": 2}, {"epochs": 2, "max_steps": 99}, (3, 2, 5), 5),  # one epoch was cut
        ({"epochs": 2, "max_steps": 2}, {"epochs": 3}, (3, 3, 8), 8),
        ({"epochs": 1}, {"epochs": 3}, (3, 3, 9), 9),
        ({"epochs": 1}, {"epochs": 3, "max_train_steps_per_epoch": 2}, (2, 4, 7), 7),
        ({"epochs": 1}, {"epochs": 3, "train_batch_size": 3}, (4, 3, 11), 11),
        ({"epochs": 1}, {"epochs": 3, "reset_optimizers_schedulers": True}, (3, 2, 9), 9),  # new ones: what is left
    ],
)
def test_a_resumed_run_with_other_limits_has_the_length_of_those(
    tmp_path: Path, first: dict[str, Any], then: dict[str, Any], told: tuple[int, int, int], steps: int
) -> None:
    train(Net(), tmp_path / "a", **first)
    (checkpoint,) = (tmp_path / "a/checkpoints").glob("step-*.a1")
    net = Net()
    result = train(net, resume=checkpoint, **then)
    assert net.told == told
    assert result.global_step == steps


class BadLength:
    def __init__(self, length: Any) -> None:
        self.length = length

    def __len__(self) -> int:
        if isinstance(self.length, Exception):
            raise self.length
        return self.length  # type: ignore[no-any-return]

    def __iter__(self) -> Any:
        yield torch.zeros(4, 2), torch.zeros(4)


@pytest.mark.parametrize("length", [RuntimeError("no"), TypeError("None has no len()"), -1, 2.0, None, 2**70])
def test_an_invalid_length_is_named_with_its_class(length: Any) -> None:
    with pytest.raises(DataLoaderError, match=r"len\(\) of a BadLength failed \("):
        train(Net(loader=lambda *given: BadLength(length)))


def test_a_length_of_data_that_nothing_needs_may_be_missing() -> None:
    class Unsized(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            raise RuntimeError("unknown")

        def __getitem__(self, index: int) -> Any:
            return torch.zeros(2), torch.tensor(float(index))

    net = Net(loader=lambda net, sampler, size: DataLoader(Unsized(), size, sampler=range(12)))
    assert train(net).global_step == 3


# --------------------------------------------------------------------------------------------- the order of data


def in_batches(net: Net, sampler: type[Any], batch_size: int) -> Any:
    return DataLoader(net.data, batch_sampler=BatchSampler(sampler(net.data), batch_size, False))


def distributed(net: Net, sampler: type[Any], batch_size: int) -> Any:
    return DataLoader(net.data, batch_size, sampler=DistributedSampler(net.data, num_replicas=1, rank=0))


KEPT: dict[str, Loader] = {
    "sampler": sampled,
    "sampler and workers": lambda net, kind, size: DataLoader(net.data, size, sampler=kind(net.data), **WORKERS),
    "distributed sampler": distributed,
    "batch sampler": in_batches,
    "shuffle": lambda net, kind, size: DataLoader(net.data, size, shuffle=True),
    "shuffle and workers": lambda net, kind, size: DataLoader(net.data, size, shuffle=True, **WORKERS),
    "generator": lambda net, kind, size: DataLoader(net.data, size, shuffle=True, generator=net.generator),
    "generator and workers": lambda net, kind, size: DataLoader(
        net.data, size, shuffle=True, generator=net.generator, **WORKERS
    ),
}
"""Ways to build a dataloader that a module may keep, as one with persistent workers has to be kept."""


@pytest.mark.parametrize(("loader", "keeps"), [*((name, True) for name in KEPT), ("generator", False)])
def test_a_kept_loader_gets_a_new_order_each_epoch(loader: str, keeps: bool, tmp_path: Path) -> None:
    """By seed and epoch, so a resumed run has the same, at the border of an epoch and within one.

    Its other random numbers are those of the whole run too, though torch draws one for new workers.
    """
    net = Net(loader=KEPT[loader], keeps=keeps)
    steps = Checkpoints(every_steps=1, every_minutes=None, keep_last=None, when_busy="wait", weights=False)
    train(net, tmp_path / "whole", epochs=3, checkpoints=steps)
    after = torch.rand(())
    orders = [[row for batch in net.seen[first : first + 3] for row in batch] for first in (0, 3, 6)]
    assert len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(12)) for order in orders)
    for step in (3, 4):
        again = Net(loader=KEPT[loader], keeps=keeps)
        train(again, epochs=3, resume=tmp_path / f"whole/checkpoints/step-{step}.a1")
        assert again.seen == net.seen[step:]
        assert torch.rand(()) == after


@pytest.mark.parametrize("loader", ["sampler and workers", "shuffle and workers", "generator"])
def test_a_kept_loader_has_its_order_after_an_interrupted_validation(loader: str, tmp_path: Path) -> None:
    """The epoch's data has ended, so the resumed run does not iterate the dataloader in that epoch."""

    class Validated(Net):
        interrupts = False

        def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
            return DataLoader(self.data, batch_size, sampler=sampler(self.data))

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            if self.interrupts:
                signal.raise_signal(signal.SIGINT)
            self.interrupts = False
            return super().val_step(global_step, batch, device)

    whole, stopped, again = (Validated(loader=KEPT[loader], keeps=True) for _ in range(3))
    train(whole, epochs=3)
    after = torch.rand(())
    stopped.interrupts = True
    with pytest.raises(RunInterrupted):
        train(stopped, tmp_path, epochs=3)
    train(again, tmp_path, epochs=3, resume="auto")
    assert stopped.seen + again.seen == whole.seen
    assert torch.rand(()) == after


def seeded_alone(net: Net, sampler: type[Any], batch_size: int) -> Any:
    return DataLoader(net.data, batch_size, shuffle=True, generator=torch.Generator().manual_seed(5))


def seeded_globally(net: Net, sampler: type[Any], batch_size: int) -> Any:
    torch.manual_seed(5)
    return DataLoader(net.data, batch_size, shuffle=True)


def in_one_order(net: Net, sampler: type[Any], batch_size: int) -> Any:
    return DataLoader(torch.utils.data.Subset(net.data, list(sampler(net.data))), batch_size)


class EpochOfItsOwn(TensorDataset):
    epoch: Any = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


def with_own_epoch(net: Net, sampler: type[Any], batch_size: int) -> Any:
    net.data = EpochOfItsOwn(*net.data.tensors)
    return KEPT["sampler and workers"](net, sampler, batch_size)


def with_shared_epoch(net: Net, sampler: type[Any], batch_size: int) -> Any:
    loader = with_own_epoch(net, sampler, batch_size)
    net.data.shared = torch.zeros(()).share_memory_()
    return loader


@pytest.mark.parametrize(
    ("loader", "keeps", "text"),
    [
        (seeded_alone, False, "get_train_dataloader() seeds the generator that shuffles in each epoch"),
        (seeded_globally, False, "get_train_dataloader() seeds the generator that shuffles in each epoch"),
        (in_one_order, True, "iterates the given sampler only when it makes it"),
        (with_own_epoch, True, "set_epoch() of EpochOfItsOwn does not reach persistent workers"),
        (with_shared_epoch, True, None),
        (KEPT["generator"], False, None),
    ],
)
def test_a_repeated_order_is_named_in_a_warning(
    loader: Loader, keeps: bool, text: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A data set that shares its epoch with its workers gets no warning."""
    train(Net(loader=loader, keeps=keeps), epochs=3)
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == (text is not None)
    assert text is None or text in warnings[0]


def test_data_that_changed_its_length_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(Net(), tmp_path / "a", epochs=1)
    checkpoint = tmp_path / "a/checkpoints/step-3.a1"
    train(Net(), epochs=2, resume=checkpoint)
    assert "the training data has the length" not in caplog.text
    train(Net(16), epochs=2, resume=checkpoint)
    assert "the training data has the length 16 and had 12 before the checkpoint" in caplog.text


def test_data_whose_length_depends_on_the_epoch_is_not_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def growing(net: Net, sampler: type[Any], batch_size: int) -> Any:
        data = TensorDataset(*(one[: 4 * (sampler.epoch + 1)] for one in net.data.tensors))
        return DataLoader(data, batch_size, sampler=sampler(data))

    train(Net(loader=growing), tmp_path / "a", epochs=1)
    train(Net(loader=growing), epochs=3, resume=tmp_path / "a/checkpoints/step-1.a1")
    assert "the training data has the length" not in caplog.text


# --------------------------------------------------------------------------------------------------- validation


class Noisy(Net):
    """Draws from every generator in training and in validation."""

    def draw(self) -> float:
        import random

        import numpy as np

        return random.random() + float(np.random.rand()) + float(torch.rand(()))

    def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
        self.draw()
        return {"a": DataLoader(self.data, batch_size, shuffle=True), "b": DataLoader(self.data, batch_size)}

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return super().train_step(global_step, batch, device) * self.draw()

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        self.draw()
        return super().val_step(global_step, batch, device)

    def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
        self.draw()


class SharedGenerator(Noisy):
    """Shuffles both with one generator of its own."""

    def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
        return self.get_train_dataloader(sampler, batch_size)


@pytest.mark.parametrize(("kind", "loader"), [(Noisy, "sampler"), (SharedGenerator, "generator")])
def test_validation_does_not_change_training(kind: type[Net], loader: str) -> None:
    """It has its own random numbers, also in dataloaders and hooks, at any interval."""
    weights = []
    for options in ({"val_interval_epochs": 0}, {"val_interval_epochs": 1}, {"val_interval_steps": 2}):
        net = kind(loader=KEPT[loader])
        train(net, epochs=3, **options)
        weights.append(net.net.weight.detach().clone())
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


# -------------------------------------------------------------------------------------------------------- state


class Count(CallbackInterface):
    def __init__(self, what: str, *, by: int = 1) -> None:
        self.what, self.by, self.total = what, by, 0

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self.total += self.by

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total = state["total"]


def test_callbacks_of_one_class_keep_their_own_state_in_any_order(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By their constructor arguments; one with changed arguments takes the only state of its class that is left."""
    train(Net(), tmp_path / "a", callbacks=[Count("ones"), Count("tens", by=10)], epochs=1)
    checkpoint = tmp_path / "a/checkpoints/step-3.a1"
    swapped = [Count("tens", by=10), Count("ones")]
    train(Net(), callbacks=swapped, epochs=2, resume=checkpoint)
    assert [one.total for one in swapped] == [60, 6]
    alone = Count("tens", by=10)
    train(Net(), callbacks=[alone], epochs=2, resume=checkpoint)
    assert alone.total == 60
    assert "has state for callbacks that the run does not have: Count(what='ones')" in caplog.text
    changed = [Count("hundreds", by=100), Count(what="ones")]
    train(Net(), callbacks=changed, epochs=2, resume=checkpoint)
    assert [one.total for one in changed] == [330, 6]
    taken = "Count(what='hundreds', by=100) takes over the state of Count(what='tens', by=10)"
    assert taken in caplog.text


def test_a_callback_with_a_key_of_its_own_takes_no_other_state(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = Count("x"), Count("x")
    old.state_key, new.state_key = "old", "new"  # type: ignore[attr-defined]
    train(Net(), tmp_path / "a", callbacks=[old], epochs=1)
    train(Net(), callbacks=[new], epochs=2, resume=tmp_path / "a/checkpoints/step-3.a1")
    assert new.total == 3
    assert "has no state for the callback new" in caplog.text
    assert "has state for callbacks that the run does not have: old" in caplog.text


def test_arguments_of_any_kind_tell_callbacks_apart(tmp_path: Path) -> None:
    kinds: list[Any] = [{"a": 1}, {"a": 2}, torch.float16, torch.float32, [1, 2], [1, 3], len, repr, {"x", "y", "z"}]
    train(Net(), tmp_path, callbacks=[Count(one) for one in kinds], epochs=1)
    assert Count({"z", "x", "y"})._stagecast_built_with == "what={'x', 'y', 'z'}"  # type: ignore[arg-type]

    class Odd:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError("no attributes")

    assert Count([Odd()])._stagecast_built_with == "what=[Odd]"  # type: ignore[arg-type]


def test_states_that_cannot_be_told_apart_are_an_error(tmp_path: Path) -> None:
    """On saving and on restoring; a state_key distinguishes them."""
    with pytest.raises(ArgumentsError, match="give each a state_key of its own"):
        train(Net(), tmp_path / "a", callbacks=[Count("x"), Count("x")], epochs=1)
    train(Net(), callbacks=[Count("x"), Count("x")], epochs=1)  # nothing is saved
    keyed = [Count("x"), Count("x")]
    keyed[0].state_key = "first"  # type: ignore[attr-defined]
    train(Net(), tmp_path / "b", callbacks=keyed, epochs=1)
    with pytest.raises(CheckpointMismatch, match="give it the state_key that it had"):
        train(
            Net(),
            tmp_path / "c",
            callbacks=[Count("y"), Count("z")],
            epochs=2,
            resume=tmp_path / "b/checkpoints/step-3.a1",
        )


def test_an_average_with_another_decay_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    net = Net()
    train(net, tmp_path / "a", callbacks=[EMA(net, decay=0.9)], epochs=1)
    again = Net()
    resume = tmp_path / "a/checkpoints/step-3.a1"
    train(again, callbacks=[EMA(again, decay=0.99)], epochs=2, resume=resume)
    assert "EMA(decay=0.99) continues an average that was taken with decay=0.9" in caplog.text


class Unfreezing(Net):
    """Trains its body from the second epoch on."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(2, 2).requires_grad_(False)

    def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
        if epoch == 1:
            self.body.requires_grad_(True)

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return super().train_step(global_step, (self.body(batch[0]), batch[1]), device)


def test_requires_grad_is_restored(tmp_path: Path) -> None:
    whole, again = Unfreezing(), Unfreezing()
    train(whole, tmp_path / "whole", epochs=3)
    train(again, epochs=3, resume=tmp_path / "whole/checkpoints/step-6.a1")
    assert again.body.weight.requires_grad
    assert all(map(torch.equal, whole.state_dict().values(), again.state_dict().values()))


def test_a_parameter_that_is_frozen_again_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(Unfreezing(), tmp_path / "a", epochs=1)
    again = Unfreezing()
    again.body.requires_grad_(True)
    train(again, epochs=1, resume=tmp_path / "a/checkpoints/step-3.a1")
    assert "requires_grad of body.weight, body.bias is False again" in caplog.text


def test_seeded_runs_side_by_side_are_told_apart_in_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    train(Net(), epochs=1)
    train(Net(), epochs=1)
    assert "share the random generators" not in caplog.text
    inside, ended = threading.Event(), threading.Event()

    class Waiting(Net):
        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            inside.set()
            assert ended.wait(20)
            return super().train_step(global_step, batch, device)

    thread = threading.Thread(target=train, args=(Waiting(),), kwargs={"epochs": 1})
    thread.start()
    assert inside.wait(20)
    train(Net(), epochs=1)
    ended.set()
    thread.join()
    assert caplog.text.count("share the random generators of this process") == 1
