"""A small module to train, a callback that writes down its hooks, and ways to run them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from events.journal.reader import JournalReader
from events.messages import Event, MetricsLogged
from events.protocol import RunResult
from sinks import Memory
from trainer import CallbackInterface, ModuleInterface, Trainer, TrainerArguments, fenced, inline, observer

EventT = TypeVar("EventT", bound=Event)
Batch = tuple[torch.Tensor, torch.Tensor]
Step = Callable[["Net", int, Any], Any]
"""A step of `Net`: it receives the module, ``global_step`` and the batch."""
Data = Callable[["Net", int], Any]
"""Builds the dataloader(s) of a stage; it receives the module and the batch size."""


class Net(ModuleInterface):
    """A linear regression over a few rows, which come in order and in lists: no torch dataloader.

    Args:
        rows: Rows of the data.
        lr: Learning rate of the default optimizer, SGD.
        act: Called with ``global_step`` at the start of each `train_step`.
        train_step: The step, called after ``act`` instead of `forward_loss`.
        val_step: The validation step, called instead of `forward_loss`.
        scales: Factors of the loss, by the number of the `train_step` call, from 1.
        optimizers: Builds what `get_optimizers_schedulers` returns from the module.
        train_data: Builds the training dataloader.
        val_data: Builds the validation dataloader(s).
        test_data: Builds the test dataloader(s); without it there is no test stage.
    """

    def __init__(
        self,
        rows: int = 16,
        lr: float = 0.05,
        *,
        act: Callable[[int], object] | None = None,
        train_step: Step | None = None,
        val_step: Step | None = None,
        scales: Mapping[int, float] | None = None,
        optimizers: Callable[[Any], tuple[Iterable[torch.optim.Optimizer], Iterable[Any]]] | None = None,
        train_data: Data | None = None,
        val_data: Data | None = None,
        test_data: Data | None = None,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, 4, generator=generator)
        self.y = self.x.sum(1, keepdim=True) + 0.1 * torch.randn(rows, 1, generator=generator)
        self.lr = lr
        self.act, self.scales, self.calls = act, scales, 0
        self.own_train_step, self.own_val_step, self.own_optimizers = train_step, val_step, optimizers
        self.train_data, self.val_data, self.test_data = train_data, val_data, test_data
        self.linear = nn.Linear(4, 1)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(1, 4, generator=generator))
            self.linear.bias.zero_()

    def batches(self, batch_size: int) -> list[Batch]:
        starts = range(0, len(self.x), batch_size)
        return [(self.x[i : i + batch_size], self.y[i : i + batch_size]) for i in starts]

    def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
        self.told = (steps, epochs)
        if self.own_optimizers is not None:
            return self.own_optimizers(self)
        return [torch.optim.SGD(self.parameters(), lr=self.lr)], []

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        return self.batches(batch_size) if self.train_data is None else self.train_data(self, batch_size)

    def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
        return self.batches(batch_size) if self.val_data is None else self.val_data(self, batch_size)

    def get_test_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
        return None if self.test_data is None else self.test_data(self, batch_size)

    def forward_loss(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = batch
        predicted = self.linear(x)
        return nn.functional.mse_loss(predicted, y), predicted

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        if self.act is not None:
            self.act(global_step)
        own = self.own_train_step
        outputs = self.forward_loss(batch) if own is None else own(self, global_step, batch)
        if self.scales is None:
            return outputs
        self.calls += 1
        loss, *rest = outputs
        return loss * self.scales.get(self.calls, 1.0), *rest

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        return self.forward_loss(batch) if self.own_val_step is None else self.own_val_step(self, global_step, batch)


class Boom(Exception):
    """An error of the user's."""


def failing(error: BaseException, at: int = 2) -> Net:
    """Return a module that raises the error in the step of this number."""

    def act(step: int) -> None:
        if step == at:
            raise error

    return Net(act=act)


def logging_net(log: Callable[[Any, int, Batch], object], **options: Any) -> Net:
    """Return a module that calls ``log(module, global_step, batch)`` in each train step."""

    def step(net: Net, global_step: int, batch: Batch) -> Any:
        log(net, global_step, batch)
        return net.forward_loss(batch)

    return Net(train_step=step, **options)


class Scored(Net):
    """Takes one step per epoch; the validation after the n-th step logs the n-th ``score``, unless that is None."""

    def __init__(self, *scores: float | None, **options: Any) -> None:
        super().__init__(rows=8, **options)
        self.scores = scores

    def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
        if (score := self.scores[global_step - 1]) is not None:
            self.log("score", score)


class Diary(CallbackInterface):
    """Writes down every hook: ``(name, global_step, arguments)``; and on which thread it ran."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, int, Any]] = []
        self.threads: set[str] = set()

    def _write(self, name: str, global_step: int, rest: Any) -> None:
        self.threads.add(threading.current_thread().name)
        self.lines.append((name, global_step, rest))

    def of(self, name: str) -> list[tuple[int, Any]]:
        return [(step, rest) for line, step, rest in self.lines if line == name]

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.lines]

    def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
        self._write("on_begin_train_epoch", global_step, epoch)

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self._write("on_end_train_step", global_step, outputs)

    def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
        self._write("on_end_train_epoch", global_step, outputs)

    def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
        self._write("on_end_val_epoch", global_step, (outputs, key))

    def on_end_train(self, global_step: int) -> None:
        self._write("on_end_train", global_step, None)


class InlineDiary(Diary):
    """One that also writes down the hook that runs on the loop's thread, and so at any place among the others."""

    def on_end_backward(self, global_step: int, loss_tensor: torch.Tensor) -> None:
        self._write("on_end_backward", global_step, loss_tensor.detach().clone())


LANES = {"inline": inline, "fenced": fenced, "observer": observer}


def hooked(name: str, act: Callable[..., object], lane: str | None = None, kind: type = CallbackInterface) -> Any:
    """Return a class ``Probe`` with one hook, ``act(callback, global_step, *outputs)``, marked with a lane or not."""

    def hook(self: object, *args: object, **kwargs: object) -> object:
        return act(self, *args, **kwargs)

    return type("Probe", (kind,), {name: hook if lane is None else LANES[lane](hook)})


class Outcome:
    """How a run ended, and what it published."""

    def __init__(self, result: RunResult | None, error: BaseException | None, memory: Memory) -> None:
        self._result = result
        self.error = error
        self.events = memory.events

    @property
    def result(self) -> RunResult:
        """The result, also of a run that a signal stopped, whose exception holds it."""
        if self._result is None:
            assert self.error is not None
            raise self.error
        return self._result

    def of(self, kind: type[EventT]) -> list[EventT]:
        return [event for event in self.events if type(event) is kind]

    def logged(self) -> dict[str, list[tuple[int, float]]]:
        """Return each metric's values with their steps."""
        found: dict[str, list[tuple[int, float]]] = {}
        for event in self.of(MetricsLogged):
            for name, value in event.metrics.items():
                found.setdefault(name, []).append((event.global_step, value))
        return found

    def names(self, *without: type[Event]) -> list[str]:
        return [type(event).__name__ for event in self.events if type(event) not in without]


_OWN = ("journal", "run_id", "run_dir", "checkpoints", "resume", "sinks_in", "config", "init_from")


def make_trainer(
    module: ModuleInterface, *, callbacks: Iterable[CallbackInterface] = (), sinks: Any = (), **options: Any
) -> Trainer:
    """Build a trainer on the CPU that writes nothing and takes no checkpoints, unless the ``options`` ask for them."""
    own = {name: options.pop(name) for name in _OWN if name in options}
    arguments = TrainerArguments(**({"train_batch_size": 8, "device": "cpu"} | options))
    return Trainer(
        module, arguments, callbacks=callbacks, sinks=sinks, **({"journal": False, "checkpoints": False} | own)
    )


def train(module: ModuleInterface, *, sinks: Iterable[Any] = (), **options: Any) -> Outcome:
    """Train to the end, however it ends, and keep all events."""
    memory = Memory()
    ready = make_trainer(module, sinks=[memory, *sinks], **options)
    try:
        result, error = ready.train(), None
    except BaseException as caught:
        result, error = getattr(caught, "result", None), caught
    return Outcome(result, error, memory)


def read_journal(run_dir: str | os.PathLike[str]) -> list[Event]:
    """Read every event of a run's journal."""
    reader = JournalReader(Path(run_dir) / "journal")
    events: list[Event] = []
    while batch := reader.read(10_000):
        events += batch
    assert not list(reader.skipped)
    return events
