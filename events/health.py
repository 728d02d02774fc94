"""What is unhealthy about a run, read from its events alone: no clock, no thread, no I/O.

The console, the page, the list of runs and `RunResult.problems` all use this one fold, so they agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

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

_MOST_OBSERVERS = 64
_MOST_CHARS = 4_000
"""Maximum characters per problem: names and errors in it may be a stranger's."""
_MOST_ERRORS = 16
"""Names and texts are strangers', so their number has a bound."""
_REASONS = {"non_finite_loss": "the loss was not finite", "non_finite_gradient": "a gradient was not finite"}
_STREAM = "run.events"  # a reader of the run catches up with the events it missed, or gets an error


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
        self._observers: dict[str, _Observer] = {}
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
        return any(observer.failed is not None for observer in self._observers.values())

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
        for name, observer in self._observers.items():
            found += [f"{name} {what}" for what in observer.problems(self._ended)]
        for failed in self._checkpoints.values():
            found.append(_failed_checkpoint(failed))
        found += [
            f"checkpoint {name} is not valid and was not resumed from: {why}" for name, why in self._rejected.items()
        ]
        if self._lost:
            found.append(f"the journal lacks {_many(self._lost, 'event')}: {self._gap}")
        found += self._errors
        return [plain_text(one, _MOST_CHARS) for one in found]

    # ------------------------------------------------------------------------------------------ the run

    def _run_ended(self, e: RunEnded) -> None:
        self._ended = True
        if e.status == "failed" or e.traceback is not None:  # or it was cancelled, and hung
            how = "failed" if e.status == "failed" else f"was {e.status}"
            phase = f" in {e.phase}" if e.phase else ""
            reason = f": {e.reason}" if e.reason else ""
            self.failure = plain_text(f"the run {how}{phase} after step {e.global_step:,}{reason}", _MOST_CHARS)

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

    def _observer(self, name: str) -> _Observer:
        known = self._observers.get(name)
        if known is None:
            known = _Observer()
            if name != _STREAM and len(self._observers) < _MOST_OBSERVERS:
                self._observers[name] = known
        return known

    def _observer_failed(self, e: ObserverFailed) -> None:
        self._observer(e.observer).failed = e

    def _observer_recovered(self, e: ObserverRecovered) -> None:
        self._observer(e.observer).failed = None

    def _observer_dropped(self, e: ObserverDropped) -> None:
        if e.dropped:  # those that were conflated were replaced by newer ones, as that observer wants it
            self._observer(e.observer).dropped += e.dropped

    def _observers_reported(self, e: ObserversReported) -> None:
        for health in e.observers:
            if (
                health.observer not in self._observers
                and health.state == "ok"
                and not (health.queued or health.dropped)
            ):
                continue
            observer = self._observer(health.observer)
            observer.queued = health.queued
            observer.dropped = max(observer.dropped, health.dropped)
            observer.state = health.state
            if health.state == "ok" and observer.failed is not None and observer.failed.action == "retrying":
                observer.failed = None  # a sink host that was started again reports no recovery

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


class _Observer:
    """What is known of one observer."""

    def __init__(self) -> None:
        self.failed: ObserverFailed | None = None
        """Its last failure, unless it has recovered."""
        self.dropped = 0
        self.queued = 0
        self.state = "ok"

    def problems(self, ended: bool) -> list[str]:
        """What to say behind its name."""
        queued = self.queued if ended else 0
        if self.failed is not None:
            during = f" in {self.failed.during}" if self.failed.during else ""
            times = f" {self.failed.failures:,} times" if self.failed.failures > 1 else ""
            outcome = {"fatal": "ended the run", "disabled": "is disabled", "retrying": "has not recovered"}
            missed = f" ({_many(self.dropped + queued, 'event')} not delivered)" if self.dropped + queued else ""
            return [f"failed{times}{during} and {outcome[self.failed.action]}{missed}: {self.failed.error}"]
        found = []
        if self.state != "ok":
            found.append("is disabled" if self.state == "disabled" else "is failing")
        if self.dropped:
            found.append(f"missed {_many(self.dropped, 'event')}, which its queue had no room for")
        if queued:
            found.append(f"did not get the last {_many(queued, 'event')}")
        return found


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
