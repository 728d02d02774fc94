"""What is unhealthy about a run, read from its events alone: no clock, no thread, no I/O.

The console, the page, the list of runs and `RunResult.problems` all use this one fold, so they agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import msgspec

from events.bounds import MAX_LINE_CHARS, MAX_NAME_CHARS, BoundName, BoundText, Int64
from events.messages import (
    CheckpointFailed,
    CheckpointRejected,
    CheckpointSaved,
    CheckpointUploaded,
    Event,
    JournalGap,
    MonitorMissing,
    NonFiniteGradient,
    NonFiniteLoss,
    ObserverDropped,
    ObserverFailed,
    ObserverRecovered,
    ObserversReported,
    RunEnded,
    RunStarted,
    StepSkipped,
    TestEpochEnded,
    ValEpochEnded,
    WarningLogged,
)
from events.text import plain_text

_MAX_OBSERVERS = 128
_MOST_ERRORS = 16
"""Names and texts are strangers', so their number has a bound."""
_REASONS = {"non_finite_loss": "the loss was not finite", "non_finite_gradient": "a gradient was not finite"}
_STREAM = "run.events"  # a reader of the run catches up with the events it missed, or gets an error


class ObserverState(msgspec.Struct):
    """One observer of an attempt, a sink, a callback or a writer, as servers send it."""

    name: BoundName
    state: Literal["ok", "failing", "disabled"] = "ok"
    queued: Int64 | None = None
    """Events that waited for it at its last report; None before the first."""
    lag_s: float | None = None
    dropped: Int64 = 0
    conflated: Int64 = 0
    failures: Int64 = 0
    """Its failed calls, as far as they are reported: of failures in a row the first and the last is."""
    error: BoundText | None = None
    """The last one."""


class Health:
    """The problems of a run's newest attempt. Not thread-safe: it belongs to one reader.

    It takes the events in their order. It may join late, or miss events that the bus may drop; every count is then a
    lower bound.
    """

    def __init__(self) -> None:
        self._attempt = 0
        self._forget()
        self._handlers: dict[type[Event], Callable[[Any], None]] = {
            NonFiniteLoss: self._non_finite_loss,
            NonFiniteGradient: self._non_finite_gradient,
            StepSkipped: self._step_skipped,
            MonitorMissing: self._monitor_missing,
            ValEpochEnded: self._evaluated,
            TestEpochEnded: self._evaluated,
            WarningLogged: self._logged,
            ObserverFailed: self._observer_failed,
            ObserverRecovered: self._observer_recovered,
            ObserverDropped: self._observer_dropped,
            ObserversReported: self._observers_reported,
            JournalGap: self._journal_gap,
            CheckpointFailed: self._checkpoint_failed,
            CheckpointSaved: self._checkpoint_saved,
            CheckpointUploaded: self._checkpoint_uploaded,
            CheckpointRejected: self._checkpoint_rejected,
            RunStarted: lambda event: None,  # a new attempt begins healthy
            RunEnded: self._run_ended,
        }
        self.types = frozenset(self._handlers)
        """The types of events that change it."""

    def _forget(self) -> None:
        """Start a new attempt."""
        self.failure: str | None = None
        """How the run failed, the first of `problems`; None if it has not."""
        self._ended = False
        self.observers: dict[str, ObserverState] = {}
        self._failed: dict[str, ObserverFailed] = {}  # the last failure of each that has not recovered
        self._losses = _Streaks()
        self._gradients = _Streaks()
        self._evaluations: dict[str, tuple[int, int]] = {}  # what was evaluated -> how often not finite, first step
        self._skipped: dict[str, tuple[int, int]] = {}  # reason -> how often, after which step first
        self._missing: dict[tuple[str, str], tuple[int, MonitorMissing]] = {}  # how often, and the first
        self._errors: dict[str, None] = {}
        self._lost = 0
        self._gap = ""
        self._checkpoints: dict[str, CheckpointFailed] = {}  # what failed last and has not succeeded since
        self._rejected: dict[str, str] = {}

    def add(self, event: Event) -> None:
        """Take an event of any type, in the order of ``seq``. Cheap for the types that change nothing."""
        handler = self._handlers.get(type(event))
        if handler is None or event.attempt < self._attempt:
            return
        if event.attempt > self._attempt:  # not with `RunStarted`: a sink may have failed to open before it
            self._attempt = event.attempt
            self._forget()
        handler(event)

    @property
    def has_failing_observers(self) -> bool:
        """Whether an observer has failed and not recovered."""
        return bool(self._failed)

    @property
    def problems(self) -> list[str]:
        """One sentence for each problem, the gravest first; empty for a healthy run."""
        found: list[str] = [self.failure] if self.failure is not None else []
        if self._losses.count:
            found.append(
                f"the loss was NaN or infinite in {self._losses.times('step')}, first at step {self._losses.first:,}"
            )
        if self._gradients.count:
            found.append(
                f"a gradient was NaN or infinite in {self._gradients.times('step')}, first at step"
                f" {self._gradients.first:,}"
            )
        for what, (count, step) in self._evaluations.items():
            found.append(f"the {what} was NaN or infinite {_times(count)}, first at step {step:,}")
        for reason, (count, step) in self._skipped.items():
            found.append(f"{_many(count, 'step')} skipped ({_REASONS.get(reason, reason)}), first after step {step:,}")
        for (monitor, wanted_by), (count, first) in self._missing.items():
            known = ", ".join(first.known) or "none"
            found.append(
                f"{wanted_by} did not find the metric {monitor!r:.200} {_times(count)}, first at step"
                f" {first.global_step:,} (there: {known:.500})"
            )
        for name, observer in self.observers.items():
            if name != _STREAM:
                found += [f"{name} {what}" for what in self._observer_problems(observer)]
        for failed in self._checkpoints.values():
            found.append(_failed_checkpoint(failed))
        found += [
            f"checkpoint {name} is not valid and was not resumed from: {why}" for name, why in self._rejected.items()
        ]
        if self._lost:
            found.append(f"the journal lacks {_many(self._lost, 'event')}: {self._gap}")
        found += self._errors
        return [plain_text(one, MAX_LINE_CHARS) for one in found]

    # ------------------------------------------------------------------------------------------ the run

    def _run_ended(self, e: RunEnded) -> None:
        self._ended = True
        if e.status == "failed" or e.traceback is not None:  # or it was cancelled, and hung
            how = "failed" if e.status == "failed" else f"was {e.status}"
            phase = f" in {e.phase}" if e.phase else ""
            reason = f": {e.reason}" if e.reason else ""
            self.failure = plain_text(f"the run {how}{phase} after step {e.global_step:,}{reason}", MAX_LINE_CHARS)

    def _non_finite_loss(self, e: NonFiniteLoss) -> None:
        self._losses.add(e.global_step, e.consecutive)

    def _non_finite_gradient(self, e: NonFiniteGradient) -> None:
        self._gradients.add(e.global_step, e.consecutive)

    def _evaluated(self, e: ValEpochEnded | TestEpochEnded) -> None:
        if e.loss is not None and not math.isfinite(e.loss):
            what = "validation loss" if isinstance(e, ValEpochEnded) else "test loss"
            what = what if e.key == "default" else f"{what} of {e.key}"
            _count(self._evaluations, what, e.global_step)

    def _monitor_missing(self, e: MonitorMissing) -> None:
        count, first = self._missing.get((e.monitor, e.wanted_by), (0, e))
        if count or len(self._missing) < _MOST_ERRORS:
            self._missing[e.monitor, e.wanted_by] = count + 1, first

    def _step_skipped(self, e: StepSkipped) -> None:
        if e.reason != "gradient_overflow":  # usual with float16: its loss scale is found that way
            _count(self._skipped, e.reason, e.global_step)

    def _logged(self, e: WarningLogged) -> None:
        if e.level == "error" and len(self._errors) < _MOST_ERRORS:
            self._errors[e.message] = None

    # ------------------------------------------------------------------------------------ the observers

    def _observer(self, name: str) -> ObserverState:
        known = self.observers.get(name)
        if known is None:
            known = ObserverState(name)
            if len(name) <= MAX_NAME_CHARS:
                self.observers[name] = known
            if len(self.observers) > _MAX_OBSERVERS:  # those that failed stay
                del self.observers[next(other for other in self.observers if other not in self._failed)]
        return known

    def _observer_failed(self, e: ObserverFailed) -> None:
        one = self._observer(e.observer)
        self._count_failures(one, e.failures)
        one.state = "failing" if e.action == "retrying" else "disabled"
        one.error = e.error[:MAX_LINE_CHARS]
        if e.observer in self.observers:
            self._failed[e.observer] = e

    def _observer_recovered(self, e: ObserverRecovered) -> None:
        one = self._observer(e.observer)
        self._count_failures(one, e.failures)
        self._failed.pop(e.observer, None)
        one.state = "ok"

    def _count_failures(self, one: ObserverState, in_a_row: int) -> None:
        """Of failures in a row, the first and the last is reported, each with how many there were."""
        before = self._failed.get(one.name)
        counted = before.failures if before is not None and before.action == "retrying" else 0
        one.failures += max(0, in_a_row - counted)

    def _observer_dropped(self, e: ObserverDropped) -> None:
        one = self._observer(e.observer)
        one.dropped, one.conflated = one.dropped + e.dropped, one.conflated + e.conflated

    def _observers_reported(self, e: ObserversReported) -> None:
        for health in e.observers:
            one = self._observer(health.observer)
            one.state, one.queued, one.lag_s = health.state, health.queued, health.lag_s
            one.dropped, one.conflated = max(one.dropped, health.dropped), max(one.conflated, health.conflated)
            failed = self._failed.get(one.name)
            if health.state == "ok" and failed is not None and failed.action == "retrying":
                del self._failed[one.name]  # a sink host that was started again reports no recovery

    def _observer_problems(self, one: ObserverState) -> list[str]:
        """The problems of an observer, without its name."""
        queued = (one.queued or 0) if self._ended else 0
        failed = self._failed.get(one.name)
        if failed is not None:
            during = f" in {failed.during}" if failed.during else ""
            times = f" {failed.failures:,} times" if failed.failures > 1 else ""
            outcome = {"fatal": "ended the run", "disabled": "is disabled", "retrying": "has not recovered"}
            missed = f" ({_many(one.dropped + queued, 'event')} not delivered)" if one.dropped + queued else ""
            return [f"failed{times}{during} and {outcome[failed.action]}{missed}: {failed.error}"]
        found = []
        if one.state != "ok":
            found.append("is disabled" if one.state == "disabled" else "is failing")
        if one.dropped:
            found.append(f"missed {_many(one.dropped, 'event')}, which its queue had no room for")
        if queued:
            found.append(f"did not get the last {_many(queued, 'event')}")
        return found

    # --------------------------------------------------------------------------------------- the disk

    def _journal_gap(self, e: JournalGap) -> None:
        self._lost += e.lost
        self._gap = e.reason

    def _checkpoint_failed(self, e: CheckpointFailed) -> None:
        kind = e.during if e.checkpoint.startswith("step-") or not e.checkpoint else e.checkpoint
        if kind in self._checkpoints or len(self._checkpoints) < _MOST_ERRORS:
            self._checkpoints[kind] = e

    def _checkpoint_saved(self, e: CheckpointSaved) -> None:
        self._checkpoints.pop("stage", None)
        self._checkpoints.pop("write", None)

    def _checkpoint_uploaded(self, e: CheckpointUploaded) -> None:
        self._checkpoints.pop("upload", None)

    def _checkpoint_rejected(self, e: CheckpointRejected) -> None:
        if len(self._rejected) < _MOST_ERRORS:
            self._rejected[e.checkpoint] = e.error


class _Streaks:
    """Steps in a row, of which only the 1st, 2nd, 4th, 8th... may be reported."""

    def __init__(self) -> None:
        self.first = 0
        self._before = 0  # in the streaks before this one
        self._streak = 0

    @property
    def count(self) -> int:
        return self._before + self._streak

    def add(self, step: int, consecutive: int) -> None:
        if not self.count:
            self.first = step
        if consecutive <= self._streak:
            self._before += self._streak
        self._streak = consecutive

    def times(self, noun: str) -> str:
        """How often, in words."""
        return _many(self.count, noun) if self.count == 1 else f"at least {_many(self.count, noun)}"


def _failed_checkpoint(e: CheckpointFailed) -> str:
    did = {"stage": "taken", "write": "written", "upload": "uploaded", "delete": "deleted"}[e.during]
    what = f"checkpoint {e.checkpoint}" if e.checkpoint.startswith("step-") else e.checkpoint or "a checkpoint"
    row = f", {e.consecutive:,} in a row" if e.consecutive > 1 else ""
    return f"{what} could not be {did}{row}: {e.error}"


def _count(counts: dict[str, tuple[int, int]], what: str, step: int) -> None:
    count, first = counts.get(what, (0, step))
    if count or len(counts) < _MOST_ERRORS:
        counts[what] = (count + 1, first)


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"
