"""The protocol between a run and whoever watches it: events out, commands in.

In process the messages are handed over as they are. Any other transport carries the same messages encoded by
`events.wire`, so that a `Run` behaves alike wherever its loop is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol

import msgspec

from events.card import result_card
from events.messages import Event, StallLedger, Status


class Command(msgspec.Struct, frozen=True, tag=str.lower, tag_field="command", kw_only=True):
    """A request to the loop, taken at its next step boundary in the order of arrival; a stop wins over all others."""

    id: str
    """Chosen by the sender; `CommandTaken` repeats it."""
    reason: str | None = None


class Stop(Command, frozen=True, tag=str.lower):
    """End training after the current step, orderly: the hooks of the end run, the result says ``stopped``."""

    checkpoint: bool = True
    """Whether to take a checkpoint first, if the run takes any."""


class Pause(Command, frozen=True, tag=str.lower):
    """Wait at the next step boundary until `Resume` or `Stop`."""


class Resume(Command, frozen=True, tag=str.lower):
    """Go on after `Pause`."""


class Checkpoint(Command, frozen=True, tag=str.lower):
    """Take a checkpoint at the next step boundary, and go on. `CheckpointSaved` repeats the ``id`` when it is durable,
    `CheckpointFailed` when it will not be."""


AnyCommand = Stop | Pause | Resume | Checkpoint


class ObserverReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the events for one observer.

    ``published == delivered + dropped + conflated + left``: every event that was meant for it is in one of the four.
    """

    observer: str
    state: Literal["closed", "disabled", "stuck", "failed"]
    """``closed``: drained and closed. ``disabled``: by its error policy. ``stuck``: still busy at the drain's deadline.
    ``failed``: its closing raised."""
    published: int = 0
    delivered: int = 0
    dropped: int = 0
    conflated: int = 0
    left: int = 0
    """Still queued, or in a delivery that did not return, when the deadline passed."""
    error: str | None = None


_LOSSES = ("train_loss", "train_epoch_loss", "val_loss")
_MOST_LOSSES = 8


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a run ended. Plain host data."""

    run_id: str
    attempt: int
    status: Status
    reason: str | None = None
    global_step: int = 0
    epochs: int = 0
    """Training epochs finished."""
    metrics: dict[str, float] = {}
    """The last value of each logged metric, of ``train_loss`` (the last step's), ``train_epoch_loss`` (the mean of the
    last epoch) and ``val_loss`` (``val_loss/KEY`` for other keys)."""
    ledger: StallLedger = StallLedger()
    observers: list[ObserverReport] = []
    run_dir: str | None = None
    checkpoint: str | None = None
    """Folder of the run's newest durable checkpoint: of this attempt, else the one that it has gone on from."""
    best_checkpoint: str | None = None
    """Folder of the run's durable checkpoint with the best `Checkpoints.best`; None if it has none."""
    best_metric: float | None = None
    """The value of ``Checkpoints.best`` in it..."""
    best: str | None = None
    """...and the name of that metric."""
    weights: str | None = None
    """The file with the weights alone that this attempt wrote at its end (`Checkpoints.weights`)."""
    problems: list[str] = []
    """What is unhealthy about this attempt, one sentence each (`events.health`). Empty: nothing is."""

    def __repr__(self) -> str:
        """Return the identity of the run, its end and its losses; `msgspec.structs.asdict` has all."""
        shown = {"run_id": self.run_id, "status": self.status, "global_step": self.global_step, "epochs": self.epochs}
        losses = {name: value for name, value in self.metrics.items() if name.split("/")[0] in _LOSSES}
        few = dict(list(losses.items())[:_MOST_LOSSES])
        texts = [f"{name}={value!r}" for name, value in (shown | few).items()]
        texts += [f"checkpoint={self.checkpoint!r}"] if self.checkpoint else []
        texts += [f"problems={len(self.problems)}"] if self.problems else []
        return f"RunResult({', '.join(texts)})"

    def _repr_html_(self) -> str:
        """Return the card that a notebook shows."""
        return result_card(self)


class EventStream(Protocol):
    """The events of a run from a cursor on. One consumer; not to be shared between tasks."""

    @property
    def cursor(self) -> int:
        """``seq`` of the last event that was returned: pass it as ``since`` to continue elsewhere."""
        ...

    async def receive(self) -> list[Event]:
        """Wait for the next batch, at least one event. Raises `anyio.EndOfStream` after the run's last event."""
        ...

    def __aiter__(self) -> EventStream: ...

    async def __anext__(self) -> Event: ...

    async def aclose(self) -> None:
        """Stop receiving."""
        ...


class Commands(Protocol):
    """Where a run takes commands: its loop in this process, or its folder (`events.run.inbox.commands_of`)."""

    def send(self, command: AnyCommand, /) -> None:
        """Hand over a command. Any thread; may wait for a disk, but not for the run."""
        ...


class Connection(Commands, Protocol):
    """What carries the protocol: the loop of this process, a child process, a network. Its `send` never waits."""

    @property
    def run_id(self) -> str: ...

    def events(self, since: int | None, types: Iterable[type[Event]] | None) -> EventStream:
        """Open a stream of the run's events."""
        ...

    async def result(self) -> RunResult:
        """Wait for the end of the run. Raises the run's exception, or `RunCancelled`."""
        ...
