"""Runs that use everything that a resume must restore, places to interrupt them, and the comparison afterwards."""

from __future__ import annotations

import contextlib
import functools
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from events.checkpoint.store import CheckpointStore
from events.journal.history import read_history
from events.messages import (
    Event,
    MetricsLogged,
    NonFiniteLoss,
    StepSkipped,
    TrainEpochEnded,
    TrainEpochStarted,
    TrainStepEnded,
    ValEpochEnded,
    ValEpochStarted,
)
from events.protocol import Checkpoint, RunResult, Stop
from trainer import CallbackInterface, Checkpoints, ModuleInterface, Trainer, TrainerArguments, inline, observer

ROWS = 42  # 6 batches of 8, the last of 2 rows; 11 micro-batches of 4, so that the last group of 2 is smaller, too
STEPS_PER_EPOCH = 6
SEED = 3


class Crash(Exception):
    """Ends an attempt as the death of its process would."""


@dataclass(frozen=True)
class Case:
    """The features that a run uses."""

    workers: int = 0
    data: str = "map"  # map, kept, iterable, stateful, stream, list
    augment: bool = False  # random, where a row is read
    resume_data: str = "skip"
    precision: str = "float32"
    accumulation: int = 1
    scheduler: str = "step"  # step, epoch, plateau (val_loss/b), plateau-train, plateau-logged (never validates), none
    optimizers: str = "adam"  # adam, two, moments (float32 ones of bfloat16 weights, some of them frozen)
    val_steps: int | None = None  # validate every so many steps, instead of every epoch
    max_steps_per_epoch: int | None = None
    clip: bool = False
    observed: bool = True  # callbacks that get outputs, those of the epoch too
    seed: int | None = SEED
    epochs: int = 3

    @property
    def steps_per_epoch(self) -> int:
        # Each of four workers has a smaller last batch.
        steps = 8 if (self.data, self.workers, self.accumulation) == ("iterable", 4, 1) else STEPS_PER_EPOCH
        return min(self.max_steps_per_epoch or steps, steps)

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def validates(self) -> bool:
        return self.scheduler != "plateau-logged" or self.val_steps is not None

    def arguments(self, **others: Any) -> TrainerArguments:
        return TrainerArguments(
            **{
                "epochs": self.epochs,
                "train_batch_size": 8,
                "gpu_batch_size_limit": 8 // self.accumulation,
                "val_batch_size": 16,
                "max_train_steps_per_epoch": self.max_steps_per_epoch,
                "clip_grads": self.clip,
                "max_grad_norm": 0.5,
                "seed": self.seed,
                "device": "cpu",
                "precision": self.precision,
                "scheduler_interval": "epoch" if self.scheduler == "epoch" else "step",
                "monitor": {"plateau-train": "train_epoch_loss", "plateau-logged": "noise"}.get(
                    self.scheduler, "val_loss/b"
                ),
                "val_interval_steps": self.val_steps,
                "val_interval_epochs": int(self.validates),
                "resume_data": self.resume_data,
                **others,
            }
        )


@dataclass(frozen=True)
class At:
    """A place in a run, and the interruption there."""

    step: int  # the current one; for a validation, the last finished one
    place: str = "train"  # train, val, data (where a row is read, in this process), set-up
    key: str = "a"  # of the validation
    batch: int = 0  # of the validation, or within the step
    what: str = "stop"  # stop, crash, or save (and crash two steps later)


# -------------------------------------------------------------------------------------------------------- data


class Rows(Dataset[Any]):
    """Rows, with noise from every generator if wanted; ``reached`` is called where one is read in this process."""

    def __init__(self, augment: bool, reached: Callable[[], None] | None = None, rows: int = ROWS) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(rows, 6, generator=generator)
        self.y = self.x.sum(1, keepdim=True)
        self.augment = augment
        self.reached = reached
        self.in_worker: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        if get_worker_info() is not None:
            self.in_worker()
        elif self.reached is not None:
            self.reached()
        x = self.x[index]
        if self.augment:
            x = x + 0.1 * torch.randn(6) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        return x, self.y[index]


class RowStream(IterableDataset[Any]):
    """The same rows without a sampler, shared among the workers."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        share, shares = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        return (self.rows[index] for index in range(len(self.rows)) if index // 2 % shares == share)  # in pairs


class StatefulLoader:
    """A loader that knows its place; its order comes from its own generator, and differs each time."""

    def __init__(self, rows: Rows, batch_size: int) -> None:
        self.rows, self.batch_size = rows, batch_size
        self.generator = torch.Generator().manual_seed(100)
        self.order: list[int] = []
        self.place = 0
        self.resumed = False

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        if not self.resumed:
            self.order, self.place = torch.randperm(len(self.rows), generator=self.generator).tolist(), 0
        self.resumed = False
        while self.place < len(self.order):
            chosen = self.order[self.place : self.place + self.batch_size]
            self.place += len(chosen)
            rows = [self.rows[index] for index in chosen]
            yield torch.stack([x for x, _ in rows]), torch.stack([y for _, y in rows])
        self.order = []

    def state_dict(self) -> dict[str, Any]:
        return {"order": list(self.order), "place": self.place, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.place = list(state["order"]), state["place"]
        self.generator.set_state(state["generator"])
        self.resumed = bool(self.order)


# ----------------------------------------------------------------------------------------------------- the module


class Float32Moments(torch.optim.Optimizer):
    """Momentum in float32, whatever the dtype of the weights."""

    def __init__(self, params: Any, lr: float = 0.01) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        [group] = self.param_groups
        for parameter in group["params"]:
            if parameter.grad is not None:
                moment = self.state[parameter].setdefault("moment", torch.zeros_like(parameter, dtype=torch.float32))
                moment.mul_(0.9).add_(parameter.grad.float())
                parameter.sub_((group["lr"] * moment).to(parameter.dtype))


class Plateau(torch.optim.lr_scheduler.ReduceLROnPlateau):
    """Keeps the values that it was given."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__(optimizer, factor=0.5, patience=0)
        self.given: list[float] = []

    def step(self, metrics: Any, epoch: Any = None) -> None:
        self.given.append(float(metrics))
        super().step(metrics)


class Net(ModuleInterface):
    """Dropout, batch norm and noise of every generator, in training and in validation; logs from steps and hooks."""

    def __init__(self, case: Case, at: At | None = None) -> None:
        super().__init__()
        self.case, self.at = case, at
        self.act: Callable[[str], None] = lambda what: None
        self.losses: list[tuple[int, float]] = []
        self.frozen = case.optimizers == "moments"
        self.working_on, self.micro_steps, self.val_batches = 0, 0, 0
        self.reads = 0
        self.first = nn.Linear(6, 16)
        self.rest = nn.Sequential(nn.BatchNorm1d(16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 1))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
                else:
                    parameter.fill_(0.1)
            self.rest[0].weight.fill_(1.0)
        if self.frozen:
            self.to(torch.bfloat16)
        self.rows = Rows(case.augment, self._read)
        self.val_rows = Rows(False, rows=40)
        self.kept: Any = None

    def _reach(self, place: str, step: int, batch: int, key: str = "a") -> None:
        if self.at is not None and At(step, place, key, batch, self.at.what) == self.at:
            what, self.at = self.at.what, None
            self.act(what)

    def _read(self) -> None:
        self._reach("data", self.working_on + 1, self.reads)
        self.reads += 1

    def get_optimizers_schedulers(self, steps: int, epochs: int) -> Any:
        case = self.case
        self.length = steps, epochs
        torch.rand(()), random.random()  # as a module that initialises something here
        if case.optimizers == "two":
            self.optimizers = [
                torch.optim.SGD(self.first.parameters(), lr=0.02, momentum=0.9),
                torch.optim.AdamW(self.rest.parameters(), lr=0.01),
            ]
        elif case.optimizers == "moments":
            self.optimizers = [Float32Moments(self.parameters())]
        else:
            self.optimizers = [torch.optim.Adam(self.parameters(), lr=0.02)]
        make: dict[str, Callable[[Any], Any]] = {
            "none": lambda optimizer: None,
            "step": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.7),
            "epoch": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
            "plateau": Plateau,
        }
        self.schedulers = [make[case.scheduler.partition("-")[0]](one) for one in self.optimizers]
        return self.optimizers, [one for one in self.schedulers if one is not None]

    def get_train_dataloader(self, sampler: type[Any], batch_size: int) -> Any:
        self._reach("set-up", self.working_on + 1, 0)
        case = self.case
        if case.data == "stateful":  # for all epochs
            self.kept = self.kept or StatefulLoader(self.rows, batch_size)
            return self.kept
        if case.data == "iterable":
            return DataLoader(RowStream(self.rows), batch_size, num_workers=case.workers)
        if case.data in ("list", "stream"):
            loader = DataLoader(self.rows, batch_size)
            return list(loader) if case.data == "list" else iter(loader)
        if case.data == "kept" and self.kept is not None:
            return self.kept
        self.kept = DataLoader(self.rows, batch_size, sampler=sampler(self.rows), num_workers=case.workers)
        return self.kept

    def get_val_dataloaders(self, sampler: type[Any], batch_size: int) -> Any:
        self.val_batches = 0
        return {
            "a": [(x, y, "a") for x, y in DataLoader(self.val_rows, batch_size)],
            "b": [(x, y, "b") for x, y in DataLoader(self.val_rows, batch_size // 2)],
        }

    def _loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        noise = 0.05 * torch.randn(x.shape) + 0.05 * random.random() + 0.05 * float(np.random.rand())
        dtype = self.first.weight.dtype
        return nn.functional.mse_loss(self.rest(self.first((x + noise).to(dtype))), y.to(dtype))

    def train_step(self, global_step: int, batch: Any, device: Any) -> Any:
        if global_step != self.working_on:
            self.working_on, self.micro_steps, self.reads = global_step, 0, 0
        if self.frozen:
            self.first.requires_grad_(global_step <= 5)
        self._reach("train", global_step, self.micro_steps)
        self.micro_steps += 1
        x, y = batch
        loss = self._loss(x, y)
        self.losses.append((global_step, loss.item()))
        self.log("noise", torch.rand(()))
        return loss, (x * 2).detach()

    def val_step(self, global_step: int, batch: Any, device: Any) -> Any:
        x, y, key = batch
        self._reach("val", global_step, self.val_batches, key)
        self.val_batches += 1
        if self.val_batches == 3 and key == "a":  # the first dataloader has that many batches
            self.val_batches = 0
        loss = self._loss(x, y)
        self.log("spread", loss * 2)
        return loss, y

    @observer
    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        if self.case.observed:
            self.log("late", float(outputs[0].sum()))  # on its own thread, perhaps much later

    def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
        self.log("fenced", float(outputs[0].sum()))


# -------------------------------------------------------------------------------------------------- the callbacks


class Stateful(CallbackInterface):
    """The state of a callback: a list, and a tensor."""

    def __init__(self) -> None:
        self.lines: list[Any] = []
        self.average = torch.zeros(())

    def write(self, *line: Any) -> None:
        self.lines.append(line)

    def state_dict(self) -> dict[str, Any]:
        return {"lines": list(self.lines), "average": self.average.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.lines, self.average = list(state["lines"]), state["average"]


class Observed(Stateful):
    """On its own thread, with outputs of steps and of epochs."""

    def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
        self.write("begin", global_step, epoch)

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self.average = 0.9 * self.average + outputs[0].mean()
        self.write("step", global_step, *(float(one.sum()) for one in outputs))

    def on_end_train_epoch(self, global_step: int, *outputs: Any) -> None:
        self.write("epoch", global_step, *((tuple(one.shape), float(one.sum())) for one in outputs))

    def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
        self.write("val", global_step, key, *((tuple(one.shape), float(one.sum())) for one in outputs))


class Inlined(Stateful):
    """On the loop's thread; keeps an average of the weights."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net
        self.average = torch.zeros(16, 6)

    @inline
    def on_begin_train_epoch(self, global_step: int, epoch: int) -> None:
        self.write("begin", epoch, random.random(), float(torch.rand(())))

    @inline
    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self.average = 0.5 * self.average + 0.5 * self.net.first.weight.detach().float()
        self.write("step", global_step)

    @inline
    def on_end_val_epoch(self, global_step: int, *outputs: Any, key: str = "default") -> None:
        self.write("val", global_step, key)


class Mixed(Stateful):
    """One hook on the loop's thread, by the contract, and others on its own."""

    def on_end_backward(self, global_step: int, loss_tensor: torch.Tensor) -> None:
        self.average = self.average + loss_tensor.detach().float()

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self.write("step", global_step)


# ------------------------------------------------------------------------------------------------------- running


class Watched(Trainer):
    """A trainer whose session the test can reach."""

    session: Any = None

    def _session(self, *args: Any, **options: Any) -> Any:
        self.session = super()._session(*args, **options)
        return self.session


@dataclass
class Attempt:
    net: Net
    callbacks: list[Stateful]
    trainer: Watched
    result: RunResult | None = None

    @property
    def checkpoint(self) -> str:
        assert self.result is not None
        assert self.result.checkpoint is not None
        return self.result.checkpoint


def prepare(
    case: Case,
    folder: Path | str,
    *,
    at: At | None = None,
    resume: Any = None,
    checkpoints: bool | Checkpoints = True,
    sinks: Any = (),
    callbacks: Any = (),
    **arguments: Any,
) -> Attempt:
    """Build an attempt."""
    net = Net(case, at)
    own: list[Stateful] = [Inlined(net), Mixed()]
    if case.observed:
        own.append(Observed())
    trainer = Watched(
        net,
        case.arguments(**arguments),
        callbacks=[*own, *callbacks],
        sinks=list(sinks),
        run_dir=folder,
        run_id="r",
        checkpoints=checkpoints,
        resume=resume,
    )

    def act(what: str) -> None:
        if what == "crash":
            raise Crash
        if what == "stop":
            trainer.session.control.send(Stop(id="stop"))
        if what == "save":
            trainer.session.control.send(Checkpoint(id="save"))
            net.at = At(max(net.working_on, 1) + 2, what="crash")

    net.act = act
    return Attempt(net, own, trainer)


def attempt(case: Case, folder: Path | str, **options: Any) -> Attempt:
    """Build an attempt, and run it to its end."""
    one = prepare(case, folder, **options)
    if case.seed is None:
        torch.manual_seed(SEED)  # as the host does that gives its trainer no seed
        random.seed(SEED)
        np.random.seed(SEED)
    with contextlib.suppress(Crash):
        one.result = one.trainer.train()
    return one


@dataclass
class Trace:
    """The outcome of a run, of which all has to be equal."""

    losses: list[tuple[int, float]]
    weights: dict[str, torch.Tensor]
    optimizers: list[Any]
    schedulers: list[Any]
    callbacks: list[Any]
    metrics: dict[str, float]
    global_step: int
    epochs: int
    length: tuple[int, int]
    history: list[Any]
    late: dict[str, list[Any]] = field(default_factory=dict)


def trace(one: Attempt, folder: Path | str) -> Trace:
    assert one.result is not None
    assert one.result.status == "finished"
    history, late = history_of(folder)
    return Trace(
        losses=list(one.net.losses),
        weights={name: value.clone() for name, value in one.net.state_dict().items()},
        optimizers=[optimizer.state_dict() for optimizer in one.net.optimizers],
        schedulers=[scheduler.state_dict() for scheduler in one.net.schedulers if scheduler is not None],
        callbacks=[callback.state_dict() for callback in one.callbacks],
        metrics=dict(one.result.metrics),
        global_step=one.result.global_step,
        epochs=one.result.epochs,
        length=one.net.length,
        history=history,
        late=late,
    )


@functools.cache
def straight(case: Case) -> Trace:
    """Train without an interruption, and without checkpoints."""
    case = replace(case, resume_data="skip")
    with tempfile.TemporaryDirectory() as folder:
        return trace(attempt(case, folder, checkpoints=False), folder)


_IN_ORDER = (
    TrainEpochStarted,
    TrainStepEnded,
    TrainEpochEnded,
    ValEpochStarted,
    ValEpochEnded,
    StepSkipped,
    MetricsLogged,
)
# An attempt with other limits estimates another length of the run.
_OF_AN_ATTEMPT = ("run_id", "attempt", "seq", "time", "step_s", "duration_s", "of_seq", "total_steps")


def history_of(folder: Path | str) -> tuple[list[Any], dict[str, list[Any]]]:
    """The events of a run's journal, without times, in order; and by name the metrics that were logged later."""
    in_order: list[Any] = []
    late: dict[str, list[Any]] = {}
    for event in read_history(Path(folder) / "journal"):
        if isinstance(event, MetricsLogged) and event.of_seq is not None:
            for name, value in event.metrics.items():
                late.setdefault(f"{name}/{event.key}", []).append((event.global_step, value))
        elif isinstance(event, NonFiniteLoss):
            late.setdefault("non-finite", []).append(plain(event))
        elif isinstance(event, _IN_ORDER):
            in_order.append(plain(event))
    return in_order, late


def plain(event: Event) -> tuple[Any, ...]:
    """The fields of an event that do not depend on the attempt."""
    fields = {name: getattr(event, name) for name in event.__struct_fields__ if name not in _OF_AN_ATTEMPT}
    return type(event).__name__, *fields.items()


def differences(found: Any, expected: Any, path: str = "") -> list[str]:
    """Where two states differ in any bit."""
    if isinstance(expected, torch.Tensor):
        if not isinstance(found, torch.Tensor) or found.dtype != expected.dtype or found.shape != expected.shape:
            return [f"{path}: {found!r:.60} for {expected!r:.60}"]
        bits, others = (one.contiguous().view(-1).view(torch.uint8) for one in (found, expected))
        return [] if torch.equal(bits, others) else [f"{path}: other values"]
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = [f"{path}: keys {list(found)} for {list(expected)}"] if found.keys() != expected.keys() else []
        return keys + [
            line for key in expected if key in found for line in differences(found[key], expected[key], f"{path}.{key}")
        ]
    if isinstance(expected, (list, tuple)) and isinstance(found, (list, tuple)):
        lines = [f"{path}: {len(found)} for {len(expected)}"] if len(found) != len(expected) else []
        for number, (one, other) in enumerate(zip(found, expected, strict=False)):
            lines += differences(one, other, f"{path}[{number}]")
        return lines
    same = found == expected or (found != found and expected != expected)
    return [] if same else [f"{path}: {found!r:.80} for {expected!r:.80}"]


def assert_continues(last: Attempt, folder: Path | str, expected: Trace) -> None:
    """Assert that the last attempt of an interrupted run has the outcome of the uninterrupted run."""
    found, expected = trace(last, folder), replace(expected, metrics=dict(expected.metrics))
    tail = expected.losses[len(expected.losses) - len(found.losses) :]
    problems = differences(found.losses, tail, "losses")
    if not found.losses or found.losses[0][0] > found.global_step:
        # No step was finished: what a hook logged after the checkpoint is in the history, but not in the result.
        found.metrics.pop("late", None)
        expected.metrics.pop("late", None)
    for name in (one.name for one in fields(Trace) if one.name != "losses"):
        problems += differences(getattr(found, name), getattr(expected, name), name)
    assert not problems, "\n".join(problems[:20])


def random_story(number: int) -> tuple[Case, list[At], int]:
    """A case, its interruptions, and the number of steps between checkpoints; 0, 2 and 4 workers in turn."""
    chance = random.Random(number)
    workers = (0, 2, 4)[number % 3]
    data = chance.choice(
        ["map", "map", "kept", "iterable"]
        if workers
        else ["map", "map", "kept", "iterable", "stateful", "stream", "list"]
    )
    augment = chance.random() < 0.5
    precision = chance.choice(["float32", "float32", "bfloat16", "float16"])
    case = Case(
        workers=workers,
        data=data,
        augment=augment,
        resume_data="replay" if augment and workers else chance.choice(["skip", "skip", "replay"]),
        precision=precision,
        accumulation=chance.choice([1, 1, 2]),
        scheduler=chance.choice(["step", "epoch", "plateau", "plateau-train", "plateau-logged", "none"]),
        # float16's scaler takes no bfloat16 weights.
        optimizers=chance.choice(["adam", "two"] if precision == "float16" else ["adam", "two", "moments"]),
        val_steps=chance.choice([None, None, 4]),
        # A kept loader that is left in the middle of an epoch cannot report its place.
        max_steps_per_epoch=None if data == "stateful" else chance.choice([None, None, 4]),
        clip=chance.random() < 0.4,
        observed=chance.random() < 0.7,
        seed=chance.choice([SEED, SEED, None]),
    )
    places = []
    for step in sorted(chance.sample(range(1, case.steps + 1), chance.choice([1, 1, 2, 3]))):
        place, what = (
            chance.choice(["train", "train", "train", "val", "data"]),
            chance.choice(["stop", "crash", "save"]),
        )
        if place == "val" and case.validates:
            interval = case.val_steps or case.steps_per_epoch
            step, key = min(-(-step // interval), case.steps // interval) * interval, chance.choice("ab")
            places.append(At(step, place, key, chance.randrange(3 if key == "a" else 5), what))
        else:
            last = step % case.steps_per_epoch == 0  # which has a single micro-batch
            batch = chance.randrange(case.accumulation) if place == "train" and not last else 0
            # Where workers read the rows, or they are read in advance, this process does not reach that place.
            reads = workers == 0 and data != "list" and place == "data"
            places.append(At(step, place, "a", batch, what) if reads or place == "train" else At(step, what=what))
    return case, places, chance.choice([1, 3, 5])


def run_story(case: Case, places: list[At], every_steps: int, folder: Path) -> Attempt:
    """Interrupt a run at each of these places, and resume it; return its last attempt, which finishes."""
    checkpoints = Checkpoints(every_steps=every_steps, when_busy="wait", best="val_loss/a")
    resume = None
    for at in [*places, None]:
        newest = next(reversed(CheckpointStore(folder / "checkpoints").names()), None)
        one = attempt(case, folder, at=at, resume=resume, checkpoints=checkpoints)
        # A new run would be exact, too.
        assert not one.net.losses or one.net.losses[0][0] == (newest.step if newest is not None else 0) + 1
        # Later attempts may start after the place, and skipped steps change the number of steps.
        assert at is None or one.net.at != at or resume or case.precision == "float16", f"it did not come to {at}"
        resume = "auto"
    return one
