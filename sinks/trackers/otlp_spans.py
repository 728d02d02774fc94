"""Spans of a run, built from its events. Pure code: no client, no I/O, no clock.

This fold shares nothing with `events.run.state.RunState` but the number of the attempt: a span is open from one event
to another. Identifiers are derived from the run's own, so that events that are delivered again, also by a replay, give
the same spans, which a trace store keeps once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import msgspec

from events.messages import (
    CheckpointFailed,
    CheckpointRejected,
    CheckpointSaved,
    CheckpointSkipped,
    CheckpointStaged,
    CheckpointUploaded,
    CommandTaken,
    Event,
    JournalGap,
    LoopHeld,
    MonitorMissing,
    NonFiniteGradient,
    NonFiniteLoss,
    ObserverDropped,
    ObserverFailed,
    ObserverRecovered,
    ObserverSlow,
    RankEnded,
    RunEnded,
    RunResumed,
    RunStarted,
    StepSkipped,
    TestEpochEnded,
    TestEpochStarted,
    TrainEpochEnded,
    TrainEpochStarted,
    TrainStepEnded,
    ValEpochEnded,
    ValEpochStarted,
    WeightsSaved,
)
from events.metrics import metrics_of

_NOTES = (
    CheckpointFailed, CheckpointRejected, CheckpointSkipped, CommandTaken, JournalGap, LoopHeld, MonitorMissing,
    NonFiniteGradient, NonFiniteLoss, ObserverDropped, ObserverFailed, ObserverRecovered, ObserverSlow, RankEnded,
    RunResumed,
    StepSkipped, WeightsSaved,
)  # fmt: skip
SPAN_TYPES: frozenset[type[Event]] = frozenset({
    RunStarted, RunEnded, TrainEpochStarted, TrainStepEnded, TrainEpochEnded, ValEpochStarted, ValEpochEnded,
    TestEpochStarted, TestEpochEnded, CheckpointStaged, CheckpointSaved, CheckpointUploaded, *_NOTES,
})  # fmt: skip
"""The types of events that start a span, end it or are noted in it."""

_MOST_NOTES = 128
"""Maximum notes per span, as in the SDKs; a loss may be NaN at every step."""
_HEADER = len(Event.__struct_fields__)

Status = Literal["unset", "ok", "error"]


class Note(msgspec.Struct):
    """A span event."""

    name: str
    time: float
    attributes: dict[str, object]


class TraceSpan(msgspec.Struct):
    """A part of a run, in Unix seconds."""

    name: str
    span_id: bytes
    start: float
    parent: bytes | None = None
    link: bytes | None = None
    """The span of the previous attempt, of the same trace."""
    end: float = 0.0
    status: Status = "unset"
    message: str = ""
    attributes: dict[str, object] = {}
    notes: list[Note] = []
    notes_left_out: int = 0


def trace_id(run_id: str) -> bytes:
    """The trace of all attempts at a run."""
    return _digest("trace", run_id)[:16]


def run_span_id(run_id: str, attempt: int) -> bytes:
    """The span of an attempt; the next attempt links to it without its events."""
    return _digest("run", run_id, attempt)[:8]


class Spans:
    """Builds the spans of a run, whose attempts may come one after the other.

    The run contains training epochs, which contain their validations; the run itself contains tests and checkpoints,
    because a checkpoint may be written during the next epoch. The first event of another attempt ends the open spans of
    the previous one, whose process was killed.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        self._begin_attempt(0)

    def _begin_attempt(self, attempt: int) -> None:
        self._attempt = attempt
        self._run_span_id = run_span_id(self._run_id, attempt)
        self._newest: Event | None = None
        self._run: TraceSpan | None = None
        self._run_start = 0.0
        self._epoch: TraceSpan | None = None
        self._epochs_done = -1  # the last epoch that has ended
        self._evaluations: dict[tuple[str, str], TraceSpan] = {}
        self._checkpoints: dict[str, TraceSpan] = {}

    def take(self, events: Sequence[Event]) -> list[TraceSpan]:
        """Add events in their order; returns the spans that they end."""
        ended: list[TraceSpan] = []
        for event in events:
            # Not only at `RunStarted`: a host of an attempt first delivers the rest of the previous one.
            if event.attempt != self._attempt:
                ended += self._cut_off()
                self._begin_attempt(event.attempt)
            self._newest = event
            self._begin(event)
            if isinstance(event, _NOTES):
                self._note(event)
            ended += self._end(event)
        return ended

    def _begin(self, event: Event) -> None:
        match event:
            case RunStarted():
                link = run_span_id(self._run_id, self._attempt - 1) if self._attempt > 1 else None
                self._run_start = event.time
                self._run = TraceSpan("run", self._run_span_id, event.time, link=link, attributes=_fields(event, _PLAN))
            case TrainEpochStarted():
                self._epoch = self._span("train_epoch", event)
            case TrainStepEnded() if self._epoch is None and event.epoch > self._epochs_done:
                # A run that resumes within an epoch publishes no start of it.
                self._epoch = self._span("train_epoch", event, event.step_s)
            case ValEpochStarted() | TestEpochStarted():
                self._evaluations[_evaluation(event)] = self._span(_evaluation(event)[0], event)
            case CheckpointStaged():
                self._checkpoints[event.checkpoint] = self._span("checkpoint", event)

    def _end(self, event: Event) -> list[TraceSpan]:
        begun: TraceSpan | None = None
        match event:
            case TrainEpochEnded():
                begun, self._epoch, self._epochs_done = self._epoch, None, event.epoch
                return [_ended(begun or self._span("train_epoch", event, event.duration_s), event, "ok")]
            case ValEpochEnded() | TestEpochEnded():
                kind = _evaluation(event)
                begun = self._evaluations.pop(kind, None)
                return [_ended(begun or self._span(kind[0], event, event.duration_s), event, "ok")]
            case CheckpointSaved():
                begun = self._checkpoints.pop(event.checkpoint, None)
                return [_ended(begun or self._span("checkpoint", event, event.durable_s), event, "ok")]
            case CheckpointFailed(during="stage" | "write"):
                begun = self._checkpoints.pop(event.checkpoint, None)
                return [_ended(begun or self._span("checkpoint", event), event, "error", event.error)]
            case CheckpointUploaded():
                return [_ended(self._span("checkpoint_upload", event, event.duration_s), event, "ok")]
            case RunEnded() if self._run is not None:
                return self._end_run(self._run, event)
        return []

    def _end_run(self, run: TraceSpan, event: RunEnded) -> list[TraceSpan]:
        """End the run and its open spans, except those of checkpoints, which are still being written."""
        status: Status = {"failed": "error", "cancelled": "unset"}.get(event.status, "ok")  # type: ignore[assignment]
        inner: Status = "error" if status == "error" else "unset"
        under_way = [*self._evaluations.values(), *([self._epoch] if self._epoch is not None else [])]
        self._run, self._epoch, self._evaluations = None, None, {}
        ended = [_ended(span, event, inner, event.reason or "") for span in under_way]
        return [*ended, _ended(run, event, status, event.reason or "")]

    def _cut_off(self) -> list[TraceSpan]:
        """End all open spans at the last event of their attempt, with an unknown status."""
        last = self._newest
        run = [] if self._run is None else [self._run]
        open_spans = [*self._evaluations.values(), *([self._epoch] if self._epoch is not None else [])]
        open_spans += [*self._checkpoints.values(), *run]
        return [] if last is None else [_closed(span, last, "unset") for span in open_spans]

    def _span(self, name: str, event: Event, lasted_s: float = 0.0) -> TraceSpan:
        """A span that starts with an event, or ``lasted_s`` before it, but not before this attempt."""
        start = max(event.time - lasted_s, min(self._run_start, event.time))
        evaluation = name == "validation" and self._epoch is not None
        parent = self._epoch.span_id if evaluation and self._epoch is not None else self._run_span_id
        return TraceSpan(name, _digest(event.run_id, event.attempt, event.seq)[:8], start, parent)

    def _note(self, event: Event) -> None:
        span = self._epoch if self._epoch is not None and event.stage is not None else self._run
        if span is None:
            return
        if len(span.notes) >= _MOST_NOTES:
            span.notes_left_out += 1
            return
        attributes = {"stagecast.global_step": event.global_step, **_fields(event)}
        span.notes.append(Note(type(event).__name__, event.time, attributes))


_PLAN = (
    "module", "epochs", "steps_per_epoch", "max_steps", "device", "host", "pid", "git_commit", "git_dirty",
    "command_line",
)  # fmt: skip


def _ended(span: TraceSpan, event: Event, status: Status, message: str = "") -> TraceSpan:
    """End a span by the event with its outcome."""
    _closed(span, event, status, message)
    metrics = {f"stagecast.metric.{name}": value for name, value in metrics_of(event)}
    span.attributes |= _fields(event) | metrics
    return span


def _closed(span: TraceSpan, event: Event, status: Status, message: str = "") -> TraceSpan:
    span.end = max(event.time, span.start)  # the machine's clock may have been set back
    span.status, span.message = status, message
    place = {"stagecast.run_id": event.run_id, "stagecast.attempt": event.attempt}
    place |= {"stagecast.epoch": event.epoch, "stagecast.global_step": event.global_step}
    span.attributes = place | span.attributes
    return span


def _fields(event: Event, names: Sequence[str] | None = None) -> dict[str, object]:
    """The fields of an event, without its header."""
    fields = ((name, getattr(event, name)) for name in names or type(event).__struct_fields__[_HEADER:])
    return {f"stagecast.{name}": value for name, value in fields if value is not None and value != []}


def _evaluation(event: Event) -> tuple[str, str]:
    name = "test" if isinstance(event, TestEpochStarted | TestEpochEnded) else "validation"
    return name, getattr(event, "key", "default")


def _digest(*parts: object) -> bytes:
    # As JSON: no two lists of parts have the same text.
    texts = [str(part).encode(errors="backslashreplace").decode() for part in parts]
    return hashlib.sha256(msgspec.json.encode(texts)).digest()
