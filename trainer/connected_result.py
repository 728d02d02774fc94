"""The result of a run, as it can be told from its events and a summary of what was before them.

No I/O and no clock: `trainer.connection` feeds it what comes over the network.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from events.messages import (
    CheckpointSaved,
    Event,
    LedgerReported,
    MetricsLogged,
    RunEnded,
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

UNDER_WAY = frozenset({"running", "unknown"})
"""States of a run that more is to come of."""
LOOK_BACK = 4_096
"""Events before a summary that are folded in beside it: what a summary does not tell stands among them."""

_NO_RESULT = ("system/", "ledger/")
_OF_STEPS = frozenset({"lr", "grad_norm", "step_s", "rows_per_s", "train_epoch_loss"})
_METRIC_TYPES = (MetricsLogged, ValEpochEnded, TestEpochEnded)


class RunSummary(msgspec.Struct):
    """A run in a few words, as the server tells it. What else it says is left aside."""

    run_id: str
    attempt: int = 0
    status: str = "unknown"
    reason: str | None = None
    global_step: int = 0
    epoch: int = 0
    latest: dict[str, float | str] = {}


class CheckpointSummary(msgspec.Struct):
    """One checkpoint, as the server tells it."""

    name: str
    state: str = ""


class Snapshot(msgspec.Struct):
    """A run as it stood at one event."""

    cursor: int
    run: RunSummary
    checkpoints: list[CheckpointSummary] = []


class ResultBuilder:
    """Folds events into a `RunResult`.

    Args:
        snapshot: What is known of the run. The events are to begin at most `LOOK_BACK` before its cursor, or at the
            run's beginning.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        run = snapshot.run
        self._run_id = run.run_id
        self._known_attempt = run.attempt
        self._attempt = run.attempt
        self._ended: RunEnded | None = None
        self._epochs = run.epoch  # stays, if no epoch has begun or ended among the events: it is under way since long
        self._ledger = StallLedger()
        self._metrics = {name: float(value) for name, value in run.latest.items() if _is_in_result(name)}
        durable = [one.name for one in snapshot.checkpoints if one.state == "durable"]
        self._checkpoint = durable[-1] if durable else None

    def add(self, events: Sequence[Event]) -> None:
        """Take the next events."""
        for event in events:
            if event.attempt >= self._known_attempt:  # what came before may be superseded
                self._add(event)

    def _add(self, event: Event) -> None:
        if isinstance(event, TrainStepEnded):
            if event.loss is not None:
                self._metrics["train_loss"] = event.loss
        elif isinstance(event, _METRIC_TYPES):
            self._metrics.update(metrics_of(event))
        elif isinstance(event, RunStarted):
            self._attempt, self._ended, self._epochs = event.attempt, None, event.epoch
        elif isinstance(event, TrainEpochStarted):
            self._epochs = event.epoch
        elif isinstance(event, TrainEpochEnded):
            self._epochs = event.epoch + 1
        elif isinstance(event, LedgerReported) and event.scope == "run":
            self._ledger = event.ledger
        elif isinstance(event, CheckpointSaved):
            self._checkpoint = event.path
        elif isinstance(event, RunEnded):
            self._ended = event

    @property
    def result(self) -> RunResult | None:
        """How the run ended; None if it has not."""
        if self._ended is None:
            return None
        return RunResult(
            run_id=self._run_id,
            attempt=self._attempt,
            status=self._ended.status,
            reason=self._ended.reason,
            global_step=self._ended.global_step,
            epochs=self._epochs,
            metrics=dict(self._metrics),
            ledger=self._ledger,
            checkpoint=self._checkpoint,
        )


def _is_in_result(name: str) -> bool:
    return name not in _OF_STEPS and not name.startswith(_NO_RESULT)
