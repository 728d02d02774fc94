"""Resuming with unusual modules and data: it is exact, or a warning or an error says why not."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from events.errors import CheckpointDamaged, CheckpointMismatch
from events.journal.history import read_history
from events.messages import CheckpointStaged
from trainer import CallbackInterface, Checkpoints, ModuleInterface, RunInterrupted, Trainer, TrainerArguments

EACH_STEP = Checkpoints(every_steps=1, every_minutes=None, keep_last=99, when_busy="wait")


class Net(ModuleInterface):
    """Five steps per epoch; ``seen`` identifies the batches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net: nn.Module = nn.Linear(4, 1)
        generator = torch.Generator().manual_seed(3)
        self.data = TensorDataset(torch.randn(20, 4, generator=generator), torch.randn(20, 1, generator=generator))
        self.seen: list[float] = []

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int, epochs: int) -> Any:
        self.estimated = estimated_global_steps_per_epoch
        return [torch.optim.Adam(self.parameters(), lr=0.05)], []

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        return DataLoader(self.data, batch_size, sampler=sampler(self.data))

    def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
        return DataLoader(self.data, batch_size)

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        self.seen.append(round(batch[0].sum().item(), 4))
        return self.loss(batch)

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return self.loss(batch)

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])


def train(net: Net, folder: Path, **options: Any) -> Any:
    own = {name: options.pop(name) for name in ("checkpoints", "resume", "callbacks", "run_id") if name in options}
    arguments = TrainerArguments(**{"epochs": 3, "train_batch_size": 4, "seed": 0, "device": "cpu"} | options)
    own = {"checkpoints": EACH_STEP, "run_id": "r"} | own
    return Trainer(net, arguments, run_dir=folder, sinks=[], **own).train()


class Conv(Net):
    """Has a fused optimizer, whose kernel walks through weights and state as they lie in memory."""

    def __init__(self, kind: Any, **options: float) -> None:
        super().__init__()
        self.kind, self.options = kind, options
        self.net = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.data = TensorDataset(torch.randn(20, 3, 8, 8), torch.randn(20, 8))

    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int, epochs: int) -> Any:
        return [self.kind(self.parameters(), lr=0.01, fused=True, **self.options)], []

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.mse_loss(self.net(batch[0]).mean((2, 3)), batch[1])


class OwnGenerator(Net):
    """Its dataloader draws when an epoch starts: before the state that a checkpoint within the epoch has of it."""

    def __init__(self, *, shuffle: bool) -> None:
        super().__init__()
        self.shuffle = shuffle
        self.generator = torch.Generator().manual_seed(7)

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        order = {"shuffle": True} if self.shuffle else {"sampler": sampler(self.data)}
        return DataLoader(self.data, batch_size, generator=self.generator, **order)

    def get_state(self) -> Any:
        return {"net": dict(self.state_dict()), "generator": self.generator.get_state()}

    def update_state(self, state: Any) -> None:
        self.load_state_dict(state["net"])
        self.generator.set_state(state["generator"])


class Counting(Net):
    """Counts in a method that is called once per epoch, and once more by a run that resumes within one."""

    calls = 0

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        self.calls += 1
        return super().get_train_dataloader(sampler, batch_size)

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return super().train_step(global_step, (batch[0] + 0.1 * self.calls, batch[1]), device)

    def get_state(self) -> Any:
        return {"net": dict(self.state_dict()), "calls": self.calls}

    def update_state(self, state: Any) -> None:
        self.load_state_dict(state["net"])
        self.calls = state["calls"]


class Grows(nn.Module):
    """Has state of another size at each step, and loads any."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(0))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.steps = torch.zeros_like(state_dict[f"{prefix}steps"])
        super()._load_from_state_dict(state_dict, prefix, *args)


class Growing(Net):
    def __init__(self) -> None:
        super().__init__()
        self.grows = Grows()

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        self.grows.steps = torch.cat([self.grows.steps, torch.ones(1)])
        return super().train_step(global_step, batch, device)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        *[(partial(Conv, kind), {}) for kind in (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)],
        (partial(Conv, torch.optim.SGD, momentum=0.9), {}),
        (Net, {"checkpoints": False}),
        *[
            (partial(OwnGenerator, shuffle=shuffle), {"resume_data": data})
            for shuffle in (True, False)
            for data in ("skip", "replay")
        ],
        (Counting, {}),
        (Growing, {}),
    ],
)
def test_a_resumed_run_has_the_batches_and_weights_of_one_that_was_not_interrupted(
    make: Callable[[], Net], options: dict[str, Any], tmp_path: Path
) -> None:
    """From steps within the first epoch, at its end, and within the second."""
    whole = make()
    train(whole, tmp_path / "whole")
    for step in (3, 5, 7):
        again = make()
        train(again, tmp_path / f"from-{step}", resume=tmp_path / f"whole/checkpoints/step-{step}.a1", **options)
        assert again.seen == whole.seen[step:], step
        assert all(map(torch.equal, again.state_dict().values(), whole.state_dict().values())), step


def test_state_that_does_not_fit_the_module_is_refused(tmp_path: Path) -> None:
    """Submodules that load in their own way may take another size; get_state() needs its update_state()."""
    train(Growing(), tmp_path / "whole", epochs=1)

    class Other(Growing):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 2)

    resume = tmp_path / "whole/checkpoints/step-3.a1"
    with pytest.raises(
        CheckpointMismatch, match=r"net\.weight has the shape \(1, 4\) there and \(2, 4\) here.* Nothing"
    ):
        train(Other(), tmp_path / "b", resume=resume)

    class Refuses(Grows):
        def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
            nn.Module._load_from_state_dict(self, state_dict, prefix, *args)

    net = Growing()
    net.grows = Refuses()
    with pytest.raises(
        CheckpointMismatch, match=r"part of which may have taken it over.*\n.*mismatch for grows\.steps"
    ):
        train(net, tmp_path / "c", resume=resume)
    with pytest.raises(CheckpointMismatch, match=r"it has grows\.steps, which the module lacks\. Nothing was changed"):
        train(Net(), tmp_path / "d", resume=resume)

    class Half(Net):
        def get_state(self) -> Any:
            return dict(self.state_dict()) | {"extra": 1}

    train(Half(), tmp_path / "a", epochs=1)
    with pytest.raises(CheckpointMismatch, match=r"it has extra, .*override update_state\(state\) too"):
        train(Half(), tmp_path / "b", resume=tmp_path / "a/checkpoints/step-3.a1")


class Counts(CallbackInterface):
    """Counts on the loop's thread, and has a slow hook on its own thread."""

    def __init__(self) -> None:
        self.count = 0
        self.restored: int | None = None

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        threading.Event().wait(0.02)

    def should_stop(self, global_step: int, metrics: Any) -> None:
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = self.restored = state["count"]


def test_a_callbacks_state_is_that_of_the_checkpoints_step_though_its_thread_lags(tmp_path: Path) -> None:
    settings = Checkpoints(every_epochs=1, keep_last=9, when_busy="wait")
    first = Counts()
    train(Net(), tmp_path / "a", checkpoints=settings, callbacks=[first])
    again = Counts()
    train(Net(), tmp_path / "b", callbacks=[again], resume=tmp_path / "a/checkpoints/step-10.a1")
    assert again.restored == 2
    assert again.count == first.count


@pytest.mark.parametrize("settings", [{"val_interval_steps": 3}, {}], ids=["due", "under way"])
def test_a_best_checkpoint_is_taken_after_an_interrupted_validation(settings: dict[str, Any], tmp_path: Path) -> None:
    """Interrupted before it, or between the dataloader that has the metric and the next."""
    stop_at = 3 if settings else 5

    class Stopped(Net):
        def __init__(self, run: Any = None) -> None:
            super().__init__()
            self.stops, self.val_steps = True, 0

        def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
            return {"a": DataLoader(self.data, 4), "b": DataLoader(self.data, 4)}

        def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
            self.val_steps += 1
            if self.stops and not settings and self.val_steps == 8:  # in "b"
                os.kill(os.getpid(), 2)
            return super().val_step(global_step, batch, device)

        def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
            if self.stops and settings and global_step == stop_at:
                os.kill(os.getpid(), 2)
            return super().train_step(global_step, batch, device)

    checkpoints = Checkpoints(best="val_loss/a", at_end=False, keep_last=9, keep_best=9, every_minutes=None)
    with pytest.raises(RunInterrupted) as stop:
        train(Stopped(), tmp_path, checkpoints=checkpoints, **settings)
    assert (stop.value.result.status, stop.value.result.global_step) == ("stopped", stop_at)
    net = Stopped()
    net.stops = False
    train(net, tmp_path, checkpoints=checkpoints, resume="auto", **settings)
    staged = [e for e in read_history(tmp_path / "journal") if isinstance(e, CheckpointStaged) and e.attempt == 2]
    assert (staged[0].global_step, "best" in staged[0].reasons) == (stop_at, True)
    assert staged[0].metric is not None


def test_a_checkpoint_that_was_moved_and_linked_back_is_not_followed(tmp_path: Path) -> None:
    first = train(Net(), tmp_path / "run", epochs=2, checkpoints=True)
    moved = tmp_path / "elsewhere"
    shutil.move(first.checkpoint, moved)
    os.symlink(moved, first.checkpoint)
    with pytest.raises(CheckpointDamaged, match=r"step-10\.a1.*it is a symbolic link"):
        train(Net(), tmp_path / "run", checkpoints=True, resume="auto")
    assert train(Net(), tmp_path / "run", checkpoints=True, resume=moved).global_step == 15
    assert (moved / "manifest.json").is_file()


def test_new_schedulers_receive_the_present_length_of_an_epoch(tmp_path: Path) -> None:
    train(Net(), tmp_path / "a", epochs=1)
    net = Net()
    options = {"train_batch_size": 10, "reset_optimizers_schedulers": True}
    train(net, tmp_path / "b", resume=tmp_path / "a/checkpoints/step-5.a1", **options)
    assert net.estimated == 2


class Warm:
    def step(self) -> None:
        pass


class Scheduled(Net):
    def get_optimizers_schedulers(self, estimated_global_steps_per_epoch: int, epochs: int) -> Any:
        return super().get_optimizers_schedulers(estimated_global_steps_per_epoch, epochs)[0], [Warm()]


class Streams(Net):
    stream: Iterator[Any] | None = None

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        self.stream = self.stream or iter(lambda: [torch.ones(4, 4), torch.ones(4, 1)], None)
        return self.stream


class WantsOutputs(CallbackInterface):
    def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("make", "step", "callbacks", "warning"),
    [
        (Scheduled, 5, (), "has no state of the scheduler Warm, which starts over"),
        (Streams, 5, (), "returned an iterator, which starts from its beginning in each process"),
        (Net, 3, (WantsOutputs(),), "this checkpoint holds no outputs for the current epoch"),
    ],
)
def test_state_that_starts_over_is_a_warning(
    make: type[Net], step: int, callbacks: Any, warning: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"max_train_steps_per_epoch": 5, "epochs": 2}
    train(make(), tmp_path / "a", **options)
    assert warning not in caplog.text
    resume = tmp_path / f"a/checkpoints/step-{step}.a1"
    train(make(), tmp_path / "b", callbacks=callbacks, resume=resume, **options)
    assert warning in caplog.text
