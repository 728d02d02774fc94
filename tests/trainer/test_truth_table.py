"""How a run can end, with the hooks and events of each way.

The module trains two epochs of two steps and validates two batches. In each row one thing happens at one place, in the
second step (or second batch, or wherever the place comes first). The row has the status of the run, the hooks that a
callback receives and the events, in order:

- **finished** and **stopped** runs end with ``on_end_train``, the others do not.
- An epoch that was cut short by a stop, a cancellation or an error has neither ``on_end_train_epoch`` nor a
  ``TrainEpochEnded``; nor has a validation that was cut short its ``on_end_val_epoch`` and ``ValEpochEnded``.
- ``RunStarted`` is always first. ``RunEnded`` always comes; only an observer's failure at it follows.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import anyio
import anyio.to_thread
import pytest
import torch
from support.threads import WAIT_S, trainer_threads, wait_until_failed
from support.training import Diary, Net, make_trainer

from events.errors import RunCancelled
from events.messages import Event, MetricsLogged, ObserversReported, TrainStepEnded, WarningLogged
from events.sink import Delivery
from sinks import Memory
from trainer import CallbackInterface, inline

pytestmark = pytest.mark.anyio

EPOCH = "epoch+ step step val+ val- epoch-"
HOOKS = "begin step step val epoch"


class Row(NamedTuple):
    what: str
    """What happens: ``stop``, ``pause`` (and then stop), ``cancel``, ``error``, or nothing."""
    place: str
    """Where: a method or a hook of the module, or an observer."""
    status: str
    hooks: str
    events: str


TABLE = [
    # -- nothing happens
    Row("", "", "finished", f"{HOOKS} {HOOKS} end", f"run+ {EPOCH} {EPOCH} ledger run-"),
    # -- a stop is taken at the next boundary, in every phase
    Row("stop", "get_train_dataloader", "stopped", "begin end", "run+ epoch+ stop ledger run-"),
    Row("stop", "on_begin_train_epoch", "stopped", "begin end", "run+ epoch+ stop ledger run-"),
    Row("stop", "waiting for data", "stopped", "begin step end", "run+ epoch+ step stop ledger run-"),
    Row("stop", "train_step", "stopped", "begin step step end", "run+ epoch+ step step stop ledger run-"),
    Row("stop", "on_end_train_step", "stopped", "begin step step end", "run+ epoch+ step step stop ledger run-"),
    Row("stop", "val_step", "stopped", "begin step step end", "run+ epoch+ step step val+ stop ledger run-"),
    Row("stop", "on_end_val_epoch", "stopped", f"{HOOKS} begin end", f"run+ {EPOCH} epoch+ stop ledger run-"),
    Row("stop", "on_end_train_epoch", "stopped", f"{HOOKS} begin end", f"run+ {EPOCH} epoch+ stop ledger run-"),
    Row("stop", "on_end_train", "finished", f"{HOOKS} {HOOKS} end", f"run+ {EPOCH} {EPOCH} ledger run-"),
    Row("pause", "train_step", "stopped", "begin step step end", "run+ epoch+ step step pause stop ledger run-"),
    Row("pause", "val_step", "stopped", "begin step step end", "run+ epoch+ step step val+ pause stop ledger run-"),
    Row("pause", "waiting for data", "stopped", "begin step end", "run+ epoch+ step pause stop ledger run-"),
    # -- so is a cancellation
    Row("cancel", "get_train_dataloader", "cancelled", "begin", "run+ epoch+ ledger run-"),
    Row("cancel", "waiting for data", "cancelled", "begin step", "run+ epoch+ step ledger run-"),
    Row("cancel", "train_step", "cancelled", "begin step step", "run+ epoch+ step step ledger run-"),
    Row("cancel", "val_step", "cancelled", "begin step step", "run+ epoch+ step step val+ ledger run-"),
    Row("cancel", "on_begin_train_epoch", "cancelled", "begin", "run+ epoch+ ledger run-"),
    Row("cancel", "on_end_train_step", "cancelled", "begin step step", "run+ epoch+ step step ledger run-"),
    Row("cancel", "on_end_val_epoch", "cancelled", "begin step step val", "run+ epoch+ step step val+ val- ledger run-"),
    Row("cancel", "on_end_train_epoch", "cancelled", HOOKS, f"run+ {EPOCH} ledger run-"),
    Row("cancel while paused", "train_step", "cancelled", "begin step step", "run+ epoch+ step step pause ledger run-"),
    # -- an exception of the module's methods
    Row("error", "get_train_dataloader", "failed", "", "run+ ledger run-"),
    Row("error", "get_optimizers_schedulers", "failed", "", "run+ ledger run-"),
    Row("error", "waiting for data", "failed", "begin step", "run+ epoch+ step ledger run-"),
    Row("error", "train_step", "failed", "begin step", "run+ epoch+ step ledger run-"),
    Row("error", "backward", "failed", "begin step", "run+ epoch+ step ledger run-"),
    Row("error", "optimizer", "failed", "begin step", "run+ epoch+ step ledger run-"),
    Row("error", "scheduler", "failed", "begin step", "run+ epoch+ step ledger run-"),
    Row("error", "get_val_dataloaders", "failed", "begin step step", "run+ epoch+ step step ledger run-"),
    Row("error", "val_step", "failed", "begin step step", "run+ epoch+ step step val+ ledger run-"),
    # -- an exception of one of the module's hooks: fenced ones ...
    Row("error", "on_begin_train_epoch", "failed", "begin", "run+ epoch+ fatal ledger run-"),
    Row("error", "on_end_val_epoch", "failed", "begin step step val", "run+ epoch+ step step val+ val- fatal ledger run-"),
    Row("error", "on_end_train_epoch", "failed", HOOKS, f"run+ {EPOCH} fatal ledger run-"),
    Row("error", "on_end_train", "finished", f"{HOOKS} {HOOKS} end", f"run+ {EPOCH} {EPOCH} ledger run- fatal run-"),
    # -- ... and inline ones, in the middle of the second step and at its end
    Row("error", "on_end_backward", "failed", "begin step", "run+ epoch+ step fatal ledger run-"),
    Row("error", "on_end_train_step", "failed", "begin step step", "run+ epoch+ step step fatal ledger run-"),
    # -- a fatal observer fails at the first step, and the loop hears of it during the second
    Row("error", "a callback", "failed", "begin step step", "run+ epoch+ step fatal step ledger run-"),
    Row("error", "a sink", "failed", "begin step step", "run+ epoch+ step fatal step ledger run-"),
]

SHORT_EVENTS = {
    "RunStarted": "run+",
    "TrainEpochStarted": "epoch+",
    "TrainStepEnded": "step",
    "ValEpochStarted": "val+",
    "ValEpochEnded": "val-",
    "TrainEpochEnded": "epoch-",
    "LedgerReported": "ledger",
    "RunEnded": "run-",
}
SHORT_HOOKS = {
    "on_begin_train_epoch": "begin",
    "on_end_train_step": "step",
    "on_end_val_epoch": "val",
    "on_end_train_epoch": "epoch",
    "on_end_train": "end",
}


class Boom(Exception):
    """What the user's code raises."""


HOOKED = [*SHORT_HOOKS, "on_end_backward"]


def module_that_acts(place: str, act: Callable[[], None], *, at: int) -> Net:
    """A module that calls ``act`` when the run reaches a place for the ``at``-th time."""
    visits = itertools.count(1)

    def reach(here: str) -> None:
        if here == place and next(visits) == at:
            act()

    def hook(name: str) -> Any:
        def call(*_: Any, **__: Any) -> None:
            reach(name)

        return inline(call) if name == "on_end_train_step" else call

    def optimizers(net: Net) -> Any:
        reach("get_optimizers_schedulers")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        optimizer.register_step_pre_hook(lambda *_: reach("optimizer"))
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
        take = scheduler.step
        scheduler.step = lambda *_: (reach("scheduler"), take())  # type: ignore[method-assign,assignment]
        return [optimizer], [scheduler]

    def train_data(net: Net, size: int) -> Any:
        reach("get_train_dataloader")
        return (reach("waiting for data") or batch for batch in net.batches(size))

    def train_step(net: Net, global_step: int, batch: Any) -> Any:
        reach("train_step")
        loss, _ = net.forward_loss(batch)
        loss.register_hook(lambda gradient: reach("backward"))
        return loss

    made: Net = type("Acting", (Net,), {name: hook(name) for name in HOOKED})(
        optimizers=optimizers,
        train_data=train_data,
        train_step=train_step,
        val_data=lambda net, size: reach("get_val_dataloaders") or net.batches(size),
        val_step=lambda net, step, batch: reach("val_step") or net.forward_loss(batch),
    )
    return made


IN_THE_SECOND_STEP = {
    *("train_step", "backward", "optimizer", "scheduler", "on_end_backward", "on_end_train_step", "waiting for data")
}


class FailingSink:
    """Fails at the first step that it receives, while the loop is in the second."""

    delivery = Delivery(on_error="fatal", latency_s=0.001)

    def __init__(self, fail: Callable[[], None]) -> None:
        self.fail = fail

    def open(self, run: Any) -> FailingSink:
        return self

    def write(self, events: Sequence[Event]) -> None:
        if any(isinstance(event, TrainStepEnded) for event in events):
            self.fail()

    def close(self) -> None: ...


class FailingCallback(CallbackInterface):
    def __init__(self, fail: Callable[[], None]) -> None:
        self.fail = fail

    def on_end_train_step(self, global_step: int, *outputs: Any) -> None:
        self.fail()


def spelled(events: Sequence[Event]) -> str:
    """The events in the words of the table."""
    words = []
    for event in events:
        name = type(event).__name__
        if name == "CommandTaken":
            words.append(event.command)  # type: ignore[attr-defined]
        elif name == "ObserverFailed":
            words.append(event.action)  # type: ignore[attr-defined]
        elif not isinstance(event, MetricsLogged | WarningLogged | ObserversReported):
            words.append(SHORT_EVENTS[name])
    return " ".join(words)


class Scene:
    """One row, performed."""

    def __init__(self, row: Row) -> None:
        self.row = row
        self.reached, self.entered = threading.Event(), threading.Event()
        self.boom = Boom(row.place)
        self.run: Any = None

    def act(self) -> None:
        """Do what the row names, on the thread of its place."""
        assert self.entered.wait(WAIT_S)
        if self.row.place in ("a callback", "a sink"):
            self.reached.set()
            wait_until_failed(self.run)
        elif self.row.what == "error":
            raise self.boom
        elif self.row.what == "stop":
            self.run.stop()
        elif self.row.what in ("pause", "cancel while paused"):
            self.run.pause()
        elif self.row.what == "cancel":
            self.reached.set()
            wait_until_failed(self.run)

    def fail(self) -> None:
        """Fail in an observer, once the loop is in the second step."""
        assert self.reached.wait(WAIT_S)
        raise self.boom

    async def body(self) -> None:
        """What the host does meanwhile."""
        if self.row.what in ("pause", "cancel while paused"):
            stream = self.run.events(since=0)
            async for event in stream:
                if spelled([event]) == "pause":
                    break
            await stream.aclose()
        if self.row.what == "pause":
            self.run.stop()
        if self.row.what == "cancel":
            await anyio.to_thread.run_sync(self.reached.wait, WAIT_S)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.what or 'nothing'} at {row.place}".replace(" ", "_"))
async def test_hooks_and_events_are_those_of_the_table(row: Row) -> None:
    scene, diary, memory = Scene(row), Diary(), Memory()
    observes = row.place in ("a callback", "a sink")
    at = 2 if observes or row.place in IN_THE_SECOND_STEP else 1
    module = module_that_acts("train_step" if observes else row.place, scene.act, at=at)
    callbacks: list[Any] = [diary, *([FailingCallback(scene.fail)] if row.place == "a callback" else [])]
    sinks: list[Any] = [memory, *([FailingSink(scene.fail)] if row.place == "a sink" else [])]
    trainer = make_trainer(module, epochs=2, callbacks=callbacks, sinks=sinks)

    error: BaseException | None = None
    with anyio.CancelScope() as scope:
        try:
            async with trainer.run() as scene.run:
                scene.entered.set()
                await scene.body()
                if row.what.startswith("cancel"):
                    scope.cancel()
                    await anyio.sleep_forever()
        except Boom as caught:
            error = caught

    assert spelled(memory.events) == row.events
    assert " ".join(SHORT_HOOKS[name] for name in diary.names) == row.hooks
    ended = next(event for event in memory.events if spelled([event]) == "run-")
    assert ended.status == row.status  # type: ignore[attr-defined]
    assert trainer_threads(loops=True) == []
    if row.what == "error":
        assert error is scene.boom
        assert error.__cause__ is None
        assert any("global_step" in note or "failingsink" in note for note in error.__notes__)
    else:
        assert error is None
    assert scope.cancelled_caught == row.what.startswith("cancel")
    if row.what.startswith("cancel"):
        with pytest.raises(RunCancelled):
            await scene.run.result()
    elif row.what != "error":
        assert (await scene.run.result()).status == row.status
