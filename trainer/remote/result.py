"""The result of a run, built from its events and a summary of those before them.

No I/O and no clock: `trainer.remote.connect` feeds it what comes over the network.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec

from events.checkpoint.manifest import CheckpointName
from events.health import Health
from events.messages import (
    CheckpointDeleted,
    CheckpointSaved,
    Event,
    LedgerReported,
    MetricsLogged,
    RunEnded,
    RunResumed,
    RunStarted,
    StallLedger,
    TestEpochEnded,
    TrainEpochEnded,
    TrainEpochStarted,
    TrainStepEnded,
    ValEpochEnded,
)
from events.metrics import metrics_of
from events.protocol import RunResult
from events.text import plain_text

UNDER_WAY = frozenset({"running", "unknown"})
"""States of a run that has not ended."""
LOOK_BACK = 4_096
"""Number of events before a summary that are folded too, for what the summary lacks."""

MOST_SEQ = 2**53
"""Maximum number of an event, a step or an epoch: the largest that every JSON reader holds exactly."""
_MOST_BYTES = 64 * 2**20
"""Maximum bytes of the names and paths of a result."""
_ENTRY_BYTES = 200
_Count = Annotated[int, msgspec.Meta(ge=0, le=MOST_SEQ)]
_Number = float | Literal["nan", "inf", "-inf"]

_NO_RESULT = ("system/", "ledger/")
_OF_STEPS = frozenset({"lr", "grad_norm", "step_s", "rows_per_s"})
_METRIC_TYPES = (MetricsLogged, ValEpochEnded, TestEpochEnded, TrainEpochEnded)


class RunSummary(msgspec.Struct):
    """The server's summary of a run. Its other fields are ignored."""

    run_id: str
    attempt: _Count = 0
    status: str = "unknown"
    reason: str | None = None
    global_step: _Count = 0
    epoch: _Count = 0
    latest: dict[str, _Number] = {}
    best: str | None = None
    best_mode: str = "min"


class CheckpointSummary(msgspec.Struct):
    """The server's summary of a checkpoint."""

    name: str
    state: str = ""
    metric: _Number | None = None


class RunSnapshot(msgspec.Struct):
    """A run after one event."""

    cursor: _Count
    run: RunSummary
    checkpoints: list[CheckpointSummary] = []


class ResultBuilder:
    """Folds events into a `RunResult`.

    Args:
        snapshot: The events begin at most `LOOK_BACK` before its cursor, or at the beginning of the run.
    """

    def __init__(self, snapshot: RunSnapshot) -> None:
        run = snapshot.run
        self._bytes = 0
        self._run_id = run.run_id
        self._known_attempt = run.attempt
        self._attempt = run.attempt
        self._ended: RunEnded | None = None
        self._health = Health()
        self._epochs = run.epoch  # kept if no epoch begins or ends among the events
        self._ledger = StallLedger()
        self._metrics = {name: float(value) for name, value in run.latest.items() if _is_in_result(name)}
        durable = [one.name for one in snapshot.checkpoints if one.state == "durable"]
        self._checkpoint = durable[-1] if durable else None
        self._monitor, self._mode = run.best, run.best_mode
        # By name, the folder (or the name, where no event has named it) and the metric.
        self._scored: dict[str, tuple[str, float]] = {}
        for one in snapshot.checkpoints:
            if one.state == "durable" and one.metric is not None:
                self._score(one.name, one.name, float(one.metric))

    @property
    def is_full(self) -> bool:
        """Whether the names and paths take more memory than those of any run: do not add events then."""
        return self._bytes > _MOST_BYTES

    def add(self, events: Sequence[Event]) -> None:
        """Fold the next events."""
        for event in events:
            if event.attempt >= self._known_attempt:  # earlier ones may be superseded
                self._add(event)

    def _add(self, event: Event) -> None:
        self._health.add(event)
        if isinstance(event, TrainStepEnded):
            if event.loss is not None:
                self._metrics["train_loss"] = event.loss
        elif isinstance(event, _METRIC_TYPES):
            for name, value in metrics_of(event):
                if name not in self._metrics:
                    self._bytes += _ENTRY_BYTES + 4 * len(name)
                self._metrics[name] = value
            if isinstance(event, TrainEpochEnded):
                self._epochs = event.epoch + 1
        elif isinstance(event, RunStarted):
            self._attempt, self._ended, self._epochs = event.attempt, None, event.epoch
            self._monitor, self._mode = event.best, event.best_mode
        elif isinstance(event, RunResumed):
            self._forget_after(event)
        elif isinstance(event, TrainEpochStarted):
            self._epochs = event.epoch
        elif isinstance(event, LedgerReported) and event.scope == "run":
            self._ledger = event.ledger
        elif isinstance(event, CheckpointSaved | CheckpointDeleted):
            self._add_checkpoint(event)
        elif isinstance(event, RunEnded):
            self._ended = event

    def _add_checkpoint(self, event: CheckpointSaved | CheckpointDeleted) -> None:
        if isinstance(event, CheckpointSaved):
            self._checkpoint = event.path
            if event.metric is not None:
                self._score(event.checkpoint, event.path, event.metric)
        elif event.where == "local":
            self._scored.pop(event.checkpoint, None)

    def _score(self, name: str, place: str, metric: float) -> None:
        if math.isfinite(metric) and CheckpointName.parse(name) is not None:
            self._bytes += _ENTRY_BYTES + 4 * (len(name) + len(place))
            self._scored[name] = place, metric

    def _forget_after(self, event: RunResumed) -> None:
        """The run went back: checkpoints of superseded steps no longer belong to it."""
        parent = CheckpointName.parse(event.checkpoint) if event.after_seq != 0 and event.checkpoint else None
        self._scored = {
            name: one
            for name, one in self._scored.items()
            if _age(name).attempt >= event.attempt or (parent is not None and _age(name) <= parent)
        }

    @property
    def _best(self) -> tuple[str | None, float | None]:
        """The best durable checkpoint, of equal ones the newest, and its metric."""
        if self._monitor is None or not self._scored:
            return None, None
        sign = 1 if self._mode == "max" else -1
        return max(
            sorted(self._scored.items(), key=lambda one: _age(one[0]), reverse=True), key=lambda one: sign * one[1][1]
        )[1]

    @property
    def result(self) -> RunResult | None:
        """How the run ended; None if it has not."""
        if self._ended is None:
            return None
        best_checkpoint, best_metric = self._best
        return RunResult(
            run_id=self._run_id,
            attempt=self._attempt,
            status=self._ended.status,
            reason=None if self._ended.reason is None else plain_text(self._ended.reason, 4_000),
            global_step=self._ended.global_step,
            epochs=self._epochs,
            metrics=dict(self._metrics),
            ledger=self._ledger,
            checkpoint=self._checkpoint,
            problems=self._health.problems,
            best_checkpoint=best_checkpoint,
            best_metric=best_metric,
        )


def _age(name: str) -> CheckpointName:
    """A checkpoint's name, by which it compares with others."""
    return CheckpointName.parse(name) or CheckpointName(0, 0)


def _is_in_result(name: str) -> bool:
    return name not in _OF_STEPS and not name.startswith(_NO_RESULT)
