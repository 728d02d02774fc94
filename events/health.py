"""What is unhealthy about a run, read from its events alone: no clock, no thread, no I/O.

The console, the page, the list of runs and `RunResult.problems` all use this one fold, so they agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

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
    RankReported,
    RunEnded,
    RunStarted,
    StepSkipped,
    TestEpochEnded,
    ValEpochEnded,
    WarningLogged,
)
from events.ranks import RankTable
from events.text import plain_text

_MAX_OBSERVERS = 128
_MAX_ERRORS = 16
"""Names and texts are strangers', so their number has a bound."""
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
        self._handlers: dict[type[Event], Callable[..., None]] = {
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
            RankReported: lambda event: self.ranks.add(event),
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
        self.ranks = RankTable()
        self.observers: dict[str, ObserverState] = {}
        self._failed: dict[str, ObserverFailed] = {}  # the last failure of each that has not recovered
        self._counted: dict[str, dict[str, _Occurrences]] = {kind: {} for kind in _SENTENCES}
        self._errors: dict[str, None] = {}
        self._lost = 0
        self._gap = ""
        self._checkpoints: dict[str, str] = {}  # the last failure of each kind, until one succeeds
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
    def has_failing_checkpoints(self) -> bool:
        """Whether a checkpoint has failed, and none of its kind has succeeded since."""
        return bool(self._checkpoints)

    @property
    def problems(self) -> list[str]:
        """One sentence for each problem, the gravest first; empty for a healthy run."""
        found: list[str] = [self.failure] if self.failure is not None else []
        for kind, counted in self._counted.items():
            found += [one.sentence(kind, what) for what, one in counted.items()]
        for name, observer in self.observers.items():
            if name != _STREAM:
                found += [f"{name} {what}" for what in self._observer_problems(observer)]
        found += [*self._checkpoints.values(), *self._rejected.values()]
        found += self.ranks.problems
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

    def _count(self, kind: str, e: Event, what: str = "", in_a_row: int = 1, note: str = "") -> None:
        counted = self._counted[kind]
        if what not in counted and len(counted) < _MAX_ERRORS:
            counted[what] = _Occurrences(e.global_step, note)
        if what in counted:
            counted[what].add(in_a_row)

    def _non_finite_loss(self, e: NonFiniteLoss) -> None:
        self._count("loss", e, in_a_row=e.consecutive)

    def _non_finite_gradient(self, e: NonFiniteGradient) -> None:
        self._count("gradient", e, in_a_row=e.consecutive)

    def _evaluated(self, e: ValEpochEnded | TestEpochEnded) -> None:
        if e.loss is not None and not math.isfinite(e.loss):
            what = "validation loss" if isinstance(e, ValEpochEnded) else "test loss"
            self._count("evaluation", e, what if e.key == "default" else f"{what} of {e.key:.{MAX_NAME_CHARS}}")

    def _monitor_missing(self, e: MonitorMissing) -> None:
        what = f"{e.wanted_by:.{MAX_NAME_CHARS}} did not find the metric {e.monitor!r:.200}"
        self._count("monitor", e, what, note=", ".join(e.known)[:500] or "none")

    def _step_skipped(self, e: StepSkipped) -> None:
        # The loss scale of float16 is found by overflows, and a module that returns no loss has chosen to.
        if e.reason not in ("gradient_overflow", "no_loss"):
            self._count("skipped", e, "the loss" if e.reason == "non_finite_loss" else "a gradient")

    def _logged(self, e: WarningLogged) -> None:
        if e.level == "error" and len(self._errors) < _MAX_ERRORS:
            self._errors[e.message[:MAX_LINE_CHARS]] = None

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
            self._failed[e.observer] = msgspec.structs.replace(e, error=one.error)

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
        self._gap = e.reason[:MAX_LINE_CHARS]

    def _checkpoint_failed(self, e: CheckpointFailed) -> None:
        name = e.checkpoint[:MAX_NAME_CHARS]
        is_step = name.startswith("step-")
        kind = e.during if is_step or not name else name
        if kind in self._checkpoints or len(self._checkpoints) < _MAX_ERRORS:
            did = {"stage": "taken", "write": "written", "upload": "uploaded", "delete": "deleted"}[e.during]
            what = f"checkpoint {name}" if is_step else name or "a checkpoint"
            row = f", {e.consecutive:,} in a row" if e.consecutive > 1 else ""
            self._checkpoints[kind] = f"{what} could not be {did}{row}: {e.error[:MAX_LINE_CHARS]}"

    def _checkpoint_saved(self, e: CheckpointSaved) -> None:
        self._checkpoints.pop("stage", None)
        self._checkpoints.pop("write", None)

    def _checkpoint_uploaded(self, e: CheckpointUploaded) -> None:
        self._checkpoints.pop("upload", None)

    def _checkpoint_rejected(self, e: CheckpointRejected) -> None:
        name = e.checkpoint[:MAX_NAME_CHARS]
        if len(self._rejected) < _MAX_ERRORS:
            why = e.error[:MAX_LINE_CHARS]
            self._rejected[name] = f"checkpoint {name} is not valid and was not resumed from: {why}"


_SENTENCES = {
    "loss": "the loss was NaN or infinite in {steps}, first at step {first:,}",
    "gradient": "a gradient was NaN or infinite in {steps}, first at step {first:,}",
    "evaluation": "the {what} was NaN or infinite {times}, first at step {first:,}",
    "skipped": "{skipped} skipped ({what} was not finite), first after step {first:,}",
    "monitor": "{what} {times}, first at step {first:,} (there: {note})",
}
"""The sentences of problems that are counted, the gravest first."""


class _Occurrences(msgspec.Struct):
    """How often something happened. Of steps in a row only the 1st, 2nd, 4th, 8th... may be reported."""

    first: int
    """The step of the first time."""
    note: str = ""
    count: int = 0
    in_a_row: int = 0

    def add(self, in_a_row: int) -> None:
        """Count a report, which is one of ``in_a_row``."""
        self.count += in_a_row - self.in_a_row if in_a_row > self.in_a_row else in_a_row
        self.in_a_row = in_a_row

    def sentence(self, kind: str, what: str) -> str:
        """The problem in words."""
        skipped = _many(self.count, "step")
        return _SENTENCES[kind].format(
            what=what,
            note=self.note,
            first=self.first,
            skipped=skipped,
            steps=skipped if self.count == 1 else f"at least {skipped}",
            times="once" if self.count == 1 else f"{self.count:,} times",
        )


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
