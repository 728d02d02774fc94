"""Totals of a run, as a few families of numbers, for sinks that show the present. Imports no third-party client.

Counters start at zero in each attempt, as the counters of a process do, also if a sink receives several attempts one
after the other, from a replay or in a host that delivers the rest of the previous one. A collector recognizes the
restart by the start time, Prometheus by the fall to zero; both add up over it.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import threading
from collections.abc import Sequence
from typing import Literal, NamedTuple

from events.log import logger
from events.messages import (
    CheckpointFailed,
    CheckpointSaved,
    CheckpointSkipped,
    CheckpointStaged,
    CheckpointUploaded,
    CommandTaken,
    Event,
    LedgerReported,
    NonFiniteGradient,
    NonFiniteLoss,
    ObserverDropped,
    ObserverFailed,
    ObserverRecovered,
    RunEnded,
    RunResumed,
    RunStarted,
    StallLedger,
    StepSkipped,
    TrainEpochStarted,
    TrainStepEnded,
)
from events.metrics import METRIC_TYPES, metrics_of
from events.run.state import RunState
from sinks.files.appended import newer, position_of


class Family(NamedTuple):
    """Numbers of one meaning, distinguished by labels."""

    name: str
    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


FAMILIES: tuple[Family, ...] = (
    Family("metric", "gauge", "Newest value of each metric: losses, what user code logs, system/...", ("name",)),
    Family("global_step", "gauge", "Optimizer steps finished over all attempts."),
    Family("epoch", "gauge", "Training epoch, from 0."),
    Family("run_info", "gauge", "The run; always 1.", ("attempt", "module", "device", "host", "stagecast", "torch")),
    Family("run_state", "gauge", "1 for the state of the run, 0 for the others.", ("state",)),
    Family("steps", "counter", "Optimizer steps finished in this attempt."),
    Family("rows", "counter", "Rows trained in this attempt, if they could be counted."),
    Family("steps_skipped", "counter", "Steps that the optimizers skipped.", ("reason",)),
    Family("non_finite_losses", "counter", "Losses that were NaN or infinite."),
    Family("non_finite_gradients", "counter", "Steps with a finite loss and a NaN or infinite gradient."),
    Family("checkpoints", "counter", "Checkpoints by outcome.", ("outcome",)),
    Family("checkpoint_saved_timestamp_seconds", "gauge", "Unix time at which the last checkpoint became durable."),
    Family("observer_up", "gauge", "0 for an observer that fails or is disabled.", ("observer",)),
    Family("observer_failures", "counter", "Failed calls of an observer, counted when reported.", ("observer",)),
    Family("observer_dropped", "counter", "Events that did not reach an observer, or any (bus).", ("observer",)),
    Family("observer_conflated", "counter", "Events replaced by a newer one in an observer's queue.", ("observer",)),
    Family("ledger_seconds", "counter", "Time of the loop by cause; the rows add up to all of it.", ("row",)),
    Family("device_idle_seconds", "counter", "Device time between the work of two steps, if it is known."),
    Family("metric_values_left_out", "counter", "Values of metrics beyond the limit on distinct names."),
)  # fmt: skip

STEP_BOUNDS_S: tuple[float, ...] = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
"""Upper bounds of the buckets of step times, in seconds."""

TOTALS_TYPES: frozenset[type[Event]] = METRIC_TYPES | {
    RunStarted, RunResumed, RunEnded, CommandTaken, TrainEpochStarted, NonFiniteLoss, NonFiniteGradient, StepSkipped,
    CheckpointStaged, CheckpointSaved, CheckpointSkipped, CheckpointFailed, CheckpointUploaded,
    ObserverFailed, ObserverRecovered, ObserverDropped,
}  # fmt: skip
"""The types of events that change a number here."""

_STATES = ("running", "paused", "finished", "stopped", "cancelled", "failed")
_OUTCOMES = ("staged", "saved", "skipped", "failed", "uploaded", "upload_failed", "delete_failed")
_LEDGER_ROWS = [row for row in StallLedger.__struct_fields__ if row not in ("wall_s", "device_idle_s", "steps")]
_LABEL_CHARS = 256

Samples = dict[tuple[str, ...], float]


class Steps(NamedTuple):
    """Times of steps: counts up to each of `STEP_BOUNDS_S` and, last, beyond them; their number, and their sum."""

    buckets: list[int]
    total: int
    sum_s: float


class Totals:
    """Adds up an attempt at a run, until the first event of the next. One thread adds events; any thread may read.

    Events come in the order of the run's history, so one that was delivered before is ignored.

    Args:
        max_names: Maximum distinct names of metrics. The values of others are skipped and counted, with one warning.
        user: The sink, for that warning.
    """

    def __init__(self, max_names: int, user: str) -> None:
        self.time = 0.0
        """Unix seconds of the newest event."""
        self.started = 0.0
        """Unix seconds of the attempt's first event."""
        self._lock = threading.Lock()
        self._max_names = max_names
        self._user = user
        self._last = (0, 0)
        self._warned = False
        self._begin_attempt()

    def _begin_attempt(self) -> None:
        self._state = RunState()
        self.started = 0.0
        self._samples: dict[str, Samples] = {family.name: {} for family in FAMILIES}
        self._steps = Steps([0] * (len(STEP_BOUNDS_S) + 1), 0, 0.0)
        for name in ("steps", "rows", "non_finite_losses", "non_finite_gradients", "metric_values_left_out"):
            self._samples[name][()] = 0.0  # present from the start, because a rate needs a first value
        self._samples["checkpoints"] = {(outcome,): 0.0 for outcome in _OUTCOMES}
        self._samples["ledger_seconds"] = {(row.removesuffix("_s"),): 0.0 for row in _LEDGER_ROWS}

    def take(self, events: Sequence[Event]) -> list[Event]:
        """Add a batch; returns its new events."""
        with self._lock:
            new = list(newer(events, self._last))
            for attempt, group in itertools.groupby(new, key=lambda event: event.attempt):
                if attempt != self._last[0]:
                    self._begin_attempt()
                events = list(group)
                self._last = position_of(events[-1])
                self.started = self.started or events[0].time
                self.time = max(self.time, *(event.time for event in events))
                self._state.add(events)
                for event in events:
                    self._count(event)
                    if not isinstance(event, LedgerReported):  # its rows are counters here
                        self._show(event)
        return new

    def read(self) -> tuple[list[tuple[Family, Samples]], Steps]:
        """Copy all families with a number, and the times of steps, as one consistent state."""
        with self._lock:
            samples = self._samples | self._of_state()
            families = [(family, dict(samples.get(family.name, {}))) for family in FAMILIES]
            steps = self._steps._replace(buckets=list(self._steps.buckets))
        return [(family, samples) for family, samples in families if samples], steps

    def _set(self, family: str, value: float, *labels: str) -> None:
        self._samples[family][labels] = value

    def _add(self, family: str, value: float, *labels: str) -> None:
        samples = self._samples[family]
        samples[labels] = samples.get(labels, 0.0) + value

    def _show(self, event: Event) -> None:
        known = self._samples["metric"]
        for name, value in metrics_of(event):
            label = (label_text(name),)
            if label in known or len(known) < self._max_names:
                known[label] = value
                continue
            if not self._warned:
                self._warned = True
                logger.warning(
                    f"{self._user} shows the first {self._max_names} names of metrics and skips {name[:100]!r} and"
                    f" others: log fewer distinct names, or give max_names"
                )
            self._add("metric_values_left_out", 1)

    def _of_state(self) -> dict[str, Samples]:
        """The families that show the known state of the run."""
        run, observers = self._state.run, {label_text(name): one for name, one in self._state.observers.items()}
        failed = {(name,): one for name, one in observers.items() if one.failures}
        lossy = {(name,): one for name, one in observers.items() if one.dropped or one.conflated}
        found: dict[str, Samples] = {
            "observer_up": {label: float(one.state == "ok") for label, one in failed.items()},
            "observer_failures": {label: one.failures for label, one in failed.items()},
            "observer_dropped": {label: one.dropped for label, one in lossy.items()},
            "observer_conflated": {label: one.conflated for label, one in lossy.items()},
        }
        if run.status != "unknown" or run.global_step:
            found |= {"global_step": {(): run.global_step}, "epoch": {(): run.epoch}}
        if run.status != "unknown":
            versions = [self._state.versions.get(name, "") for name in ("stagecast", "torch")]
            labels = (str(run.attempt), run.module, run.device, run.host, *versions)
            found["run_info"] = {tuple(map(label_text, labels)): 1.0}
        state = "paused" if run.paused else run.status
        if state in _STATES:
            found["run_state"] = {(known,): float(known == state) for known in _STATES}
        return found

    def _count(self, event: Event) -> None:
        match event:
            case TrainStepEnded():
                self._add("steps", 1)
                self._add("rows", event.rows or 0)
                buckets, total, sum_s = self._steps
                buckets[bisect.bisect_left(STEP_BOUNDS_S, event.step_s)] += 1
                self._steps = Steps(buckets, total + 1, sum_s + event.step_s)
            case StepSkipped():
                self._add("steps_skipped", 1, event.reason)
            case NonFiniteLoss():
                self._add("non_finite_losses", 1)
            case NonFiniteGradient():
                self._add("non_finite_gradients", 1)
            case LedgerReported():
                self._count_ledger(event)
            case CheckpointSaved():
                self._add("checkpoints", 1, "saved")
                self._set("checkpoint_saved_timestamp_seconds", event.time)
            case CheckpointFailed():
                self._add(
                    "checkpoints", 1, f"{event.during}_failed" if event.during in ("upload", "delete") else "failed"
                )
            case CheckpointStaged() | CheckpointSkipped() | CheckpointUploaded():
                self._add("checkpoints", 1, type(event).__name__.removeprefix("Checkpoint").lower())

    def _count_ledger(self, event: LedgerReported) -> None:
        # The report of the whole attempt, at its end, includes the time since the last interval.
        put = self._add if event.scope == "interval" else self._set
        for row in _LEDGER_ROWS:
            put("ledger_seconds", getattr(event.ledger, row), row.removesuffix("_s"))
        if event.ledger.device_idle_s is not None:
            put("device_idle_seconds", event.ledger.device_idle_s)


def label_text(text: str) -> str:
    """Convert a text to a label: lone surrogates are escaped, and a text of more than 256 characters ends in a hash,
    so that labels stay distinct."""
    data = text.encode(errors="backslashreplace")
    text = data.decode()
    if len(text) <= _LABEL_CHARS:
        return text
    return f"{text[: _LABEL_CHARS - 9]}~{hashlib.sha256(data).hexdigest()[:8]}"
