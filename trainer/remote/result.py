"""The result of a run, built from its events and a summary of those before them.

No I/O and no clock: `trainer.remote.connect` feeds it what comes over the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, cast

import msgspec

from events.messages import Event, Status, WeightsSaved
from events.metrics import result_metrics
from events.protocol import RunResult
from events.run.state import MAX_CHECKPOINTS, RunState
from events.run.summary import CheckpointState, Summary
from events.text import plain_text

UNDER_WAY = frozenset({"running", "unknown"})
"""States of a run that has not ended."""
LOOK_BACK = 4_096
"""Number of events before a summary that are folded too, for what the summary lacks."""

MOST_SEQ = 2**53
"""Maximum number of an event, a step or an epoch: the largest that every JSON reader holds exactly."""
_MAX_BYTES = 64 * 2**20
"""Maximum bytes of the names of a result's metrics."""
_ENTRY_BYTES = 200
_Count = Annotated[int, msgspec.Meta(ge=0, le=MOST_SEQ)]

_NO_RESULT = ("system/", "ledger/")
_OF_STEPS = frozenset({"lr", "grad_norm", "step_s", "rows_per_s"})


class RunSnapshot(msgspec.Struct):
    """A run after one event, as its server sends it. Other members of the message are ignored."""

    cursor: _Count
    run: Summary
    checkpoints: list[CheckpointState] = []


class ResultBuilder:
    """Makes a `RunResult` of the `RunState` that events lead to.

    Args:
        snapshot: The run as its server knows it. The events must begin at most `LOOK_BACK` before its cursor, or at the
            run's beginning.
    """

    def __init__(self, snapshot: RunSnapshot) -> None:
        run = snapshot.run
        self._bytes = 0
        self._weights: tuple[int, str] | None = None  # the attempt that wrote them, and their path
        self._run_id = run.run_id
        self._known_attempt = run.attempt
        known = msgspec.structs.replace(run, status="unknown", ended=None)  # the events contain the end
        self._state = RunState(known, checkpoints={one.name: one for one in snapshot.checkpoints[-MAX_CHECKPOINTS:]})
        self._metrics = {name: float(value) for name, value in run.latest.items() if _is_in_result(name)}

    @property
    def is_full(self) -> bool:
        """Whether the names take more memory than those of any run: do not add events then."""
        return self._bytes > _MAX_BYTES

    def add(self, events: Sequence[Event]) -> None:
        """Take the next events."""
        current = [event for event in events if event.attempt >= self._known_attempt]  # those before may be superseded
        self._state.add(current)
        for event in current:
            if isinstance(event, WeightsSaved):
                self._weights = event.attempt, plain_text(event.path, 4_000)
            for name, value in result_metrics(event):
                if name not in self._metrics:
                    self._bytes += _ENTRY_BYTES + 4 * len(name)
                self._metrics[name] = value

    @property
    def result(self) -> RunResult | None:
        """How the run ended; None if it has not."""
        state, run = self._state, self._state.run
        if run.ended is None:
            return None
        best, newest = state.best_checkpoint, state.newest_checkpoint
        return RunResult(
            run_id=self._run_id,
            attempt=run.attempt,
            status=cast("Status", run.status),
            reason=None if run.reason is None else plain_text(run.reason, 4_000),
            global_step=run.global_step,
            epochs=state.epochs_done,
            metrics=dict(self._metrics),
            ledger=state.ledger,
            checkpoint=newest.folder if newest is not None else None,
            problems=state.health.problems,
            weights=self._weights[1] if self._weights is not None and self._weights[0] == run.attempt else None,
            best_checkpoint=best.folder if best is not None else None,
            best_metric=best.metric if best is not None else None,
            best=run.best if best is not None else None,
        )


def _is_in_result(name: str) -> bool:
    return name not in _OF_STEPS and not name.startswith(_NO_RESULT)
