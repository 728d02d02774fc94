"""The console's permanent lines, built from events. Pure code."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

from events.messages import (
    CheckpointFailed,
    CheckpointRejected,
    CheckpointSaved,
    CheckpointSkipped,
    CheckpointUploaded,
    CommandTaken,
    Event,
    JournalGap,
    LedgerReported,
    LoopHeld,
    MetricsLogged,
    NonFiniteGradient,
    NonFiniteLoss,
    ObserverDropped,
    ObserverFailed,
    ObserverRecovered,
    ObserverSlow,
    RankEnded,
    RankReported,
    RunEnded,
    RunResumed,
    RunStarted,
    TestEpochEnded,
    TraceSaved,
    TrainEpochEnded,
    TrainStepEnded,
    ValEpochEnded,
    WarningLogged,
    WeightsSaved,
)
from events.run.state import RunState
from sinks.console.results import ResultLines
from sinks.console.text import Field, Kind, Line, Span
from sinks.format import format_bytes, format_duration, ledger_shares, plain_text

HELD_S = 1.0
"""Minimum seconds of a held loop for a line."""
REPEAT_S = 10.0
"""Minimum seconds between two lines of one kind about one observer; others are counted."""
_MOST_TRACEBACK = 30
"""Maximum lines per traceback."""
_MOST_OPERATORS = 10
"""Maximum operators per trace."""
_MOST_RANKS = 4
"""Maximum ranks per report that get a line."""
_MOST_REPEATS = 256
"""Maximum kinds of lines that are counted, because names are untrusted text."""


class Chronicle:
    """Turns events into lines. Belongs to one writer, which adds each event to the `RunState` first."""

    def __init__(self, state: RunState, run_dir: str | None = None) -> None:
        self._state = state
        self._run_dir = run_dir
        self._has_ledger = False  # whether the run's ledger is reported and has no line
        self._results = ResultLines(state)
        # By kind of line: the time of the last one, and the number of suppressed ones since.
        self._repeats: dict[tuple[str, object], tuple[float, int]] = {}
        self._forgotten = 0
        self._problems: set[str] = set()  # those with a line
        self._ending: Line | None = None  # of a failed run: the last line
        self._healthy_end: tuple[RunEnded, str] | None = None  # shown, although a problem may follow
        self._buried = False  # whether lines follow the ending
        self._handlers: dict[type[Event], Callable[[Any], Iterable[Line]]] = {
            RunStarted: self._run_started,
            RunResumed: self._run_resumed,
            RunEnded: self._run_ended,
            RankEnded: _rank_ended,
            RankReported: self._rank_reported,
            TrainStepEnded: self._results.train_step_ended,
            ValEpochEnded: self._results.val_epoch_ended,
            TestEpochEnded: self._results.test_epoch_ended,
            TrainEpochEnded: self._results.train_epoch_ended,
            MetricsLogged: self._results.metrics_logged,
            NonFiniteLoss: self._non_finite_loss,
            NonFiniteGradient: self._non_finite_gradient,
            ObserverFailed: self._observer_failed,
            ObserverRecovered: self._observer_recovered,
            ObserverDropped: self._observer_dropped,
            ObserverSlow: self._observer_slow,
            WarningLogged: self._warning_logged,
            LoopHeld: self._loop_held,
            JournalGap: self._journal_gap,
            LedgerReported: self._ledger_reported,
            CommandTaken: self._command_taken,
            CheckpointSaved: self._checkpoint_saved,
            CheckpointSkipped: self._checkpoint_skipped,
            CheckpointFailed: self._checkpoint_failed,
            CheckpointUploaded: self._checkpoint_uploaded,
            CheckpointRejected: self._checkpoint_rejected,
            TraceSaved: _trace_saved,
            WeightsSaved: lambda e: [_line(e, "note", f"weights in {plain_text(e.path)} ({format_bytes(e.nbytes)})")],
        }

    @property
    def types(self) -> frozenset[type[Event]]:
        """The types of events that lines and their state are built from."""
        return self._state.types | frozenset(self._handlers)

    def take(self, event: Event) -> Iterable[Line]:
        """Return the lines for an event, mostly none. Of consecutive steps the last one is enough."""
        handler = self._handlers.get(type(event))
        lines = () if handler is None else handler(event)
        self._buried = self._buried or (self._ending is not None and type(event) is not RunEnded and bool(lines))
        return lines

    def finish(self) -> list[Line]:
        """Return the suppressed lines after the last event."""
        time = self._state.pace.time
        lines = [
            *self._results.finish(time),
            *self._held_back(time),
            *self._show_ledger(time),
            *self._new_problems(time),
        ]
        if self._healthy_end is not None and self._problems:  # they came after the line of the end
            e, text = self._healthy_end
            lines.append(_line(e, "warn", f"{text}, with {_many(len(self._problems), 'problem')}"))
        return [*lines, self._ending] if self._ending is not None and (lines or self._buried) else lines

    # ----------------------------------------------------------------------------------------- the run

    def _run_started(self, e: RunStarted) -> list[Line]:
        self._results.start()
        self._problems.clear()
        self._ending, self._buried = None, False
        self._healthy_end = None
        epoch = f" of {e.steps_per_epoch:,} steps" if e.steps_per_epoch is not None else ""
        if e.epochs is None:
            size = f"{e.max_steps or 0:,} steps" + (f", epochs{epoch}" if epoch else "")
        else:
            size = _many(e.epochs, "epoch") + epoch
            if e.max_steps is not None:
                size += f", at most {e.max_steps:,} steps"
        module = plain_text(e.module.rpartition(".")[2], 80)
        parts = [f"run {plain_text(e.run_id, 80)}", f"{module} on {plain_text(e.device, 40)}", size]
        if e.attempt > 1:
            parts.append(f"attempt {e.attempt}")
        if e.git_commit:
            parts.append(f"commit {plain_text(e.git_commit[:9])}{' with changes' if e.git_dirty else ''}")
        fields: list[Field] = [(Span(part, "" if i else "head"),) for i, part in enumerate(parts)]
        if self._run_dir is not None:
            fields.append((Span(f"in {plain_text(self._run_dir)}", "dim"),))
        lines = [Line(e.time, "note", fields)]
        if e.config:
            shown = ", ".join(f"{name}={value}" for name, value in itertools.islice(e.config.items(), 50))
            lines.append(_line(e, "note", f"config {plain_text(shown, 200)}"))
        return lines

    def _run_resumed(self, e: RunResumed) -> list[Line]:
        if e.checkpoint is None and not e.global_step:
            return [_line(e, "note", "started again: the steps of earlier attempts are superseded")]
        source = "" if e.checkpoint is None else f" from {plain_text(e.checkpoint, 80)}"
        return [_line(e, "note", f"resumed{source} at step {e.global_step:,}")]

    def _run_ended(self, e: RunEnded) -> list[Line]:
        phase = f" in {plain_text(e.phase, 80)}" if e.phase else ""
        began = self._state.began
        took = "" if began is None else f" after {format_duration(e.time - began)}"
        text = f"{e.status}{phase} at step {e.global_step:,}{took}"
        if e.reason:
            text += f": {plain_text(e.reason)}"
        before = [*self._results.finish(e.time), *self._held_back(e.time)]
        ledger, problems = self._show_ledger(e.time), self._new_problems(e.time)
        if e.status == "failed":  # the last line is the failure
            self._ending = _line(e, "bad", text)
            return [*before, *ledger, *problems, *_traceback(e), self._ending]
        self._ending = None
        if problems and not e.reason:
            text += f", with {_many(len(problems), 'problem')}"
        self._healthy_end = (e, text) if e.status == "finished" and not problems else None
        ending = _line(e, "good" if e.status == "finished" and not problems else "warn", text)
        return [*before, ending, *ledger, *problems]

    def _new_problems(self, time: float) -> list[Line]:
        """A line for each problem of the run that has none yet."""
        health = self._state.health
        new = [one for one in health.problems if one not in self._problems and one != health.failure]
        self._problems.update(new)
        return [Line(time, "warn", [(Span(f"problem: {plain_text(one)}", "warn"),)]) for one in new]

    def _ledger_reported(self, e: LedgerReported) -> list[Line]:
        self._has_ledger = self._has_ledger or e.scope == "run"
        return self._show_ledger(e.time) if self._state.has_ended else []

    def _show_ledger(self, time: float) -> list[Line]:
        """The ledger comes last, before or after `RunEnded` was published."""
        if not self._has_ledger:
            return []
        self._has_ledger, ledger = False, self._state.ledger
        shares = [(Span(f"{row} ", "dim"), Span(share)) for row, share in ledger_shares(ledger)]
        return [Line(time, "note", [(Span(f"loop time {format_duration(ledger.wall_s)}"),), *shares])]

    def _command_taken(self, e: CommandTaken) -> list[Line]:
        known = {"pause": "paused", "resume": "resumed", "stop": "stopping", "checkpoint": "checkpoint requested"}
        text = f"{known.get(e.command, plain_text(e.command, 40))} at step {e.global_step:,}"
        return [_line(e, "note", f"{text}: {plain_text(e.reason)}" if e.reason else text)]

    def _rank_reported(self, e: RankReported) -> Iterable[Line]:
        slow = self._state.health.ranks.newly_slow
        lines: list[Line] = []
        for one in slow[:_MOST_RANKS]:
            text = f"warning: {plain_text(one.sentence)}"
            lines += self._sparsely(e, "slow ranks", "warn", text, part=one.rank)
        if len(slow) > _MOST_RANKS:
            lines.append(_line(e, "warn", f"warning: {len(slow) - _MOST_RANKS:,} more ranks hold up the others"))
        return lines

    # ------------------------------------------------------------------------------------- checkpoints

    def _checkpoint_saved(self, e: CheckpointSaved) -> Iterable[Line]:
        why = plain_text(", ".join(e.reasons), 80)
        took = f"{format_bytes(e.nbytes)}, durable after {format_duration(e.durable_s)}"
        text = f"checkpoint {plain_text(e.checkpoint, 80)} ({why}): {took}"
        if e.missing:
            return [_line(e, "warn", f"warning: {text}, without the state of {plain_text(', '.join(e.missing), 200)}")]
        return self._sparsely(
            e, "checkpoints", "note", text, always=not {"stop", "end", "command"}.isdisjoint(e.reasons)
        )

    def _checkpoint_skipped(self, e: CheckpointSkipped) -> Iterable[Line]:
        writing = f"{plain_text(', '.join(e.writing), 80)} are still being written"
        if e.busy_rank:
            writing = f"rank {e.busy_rank} is still writing the ones before it"
        text = f"warning: no checkpoint at step {e.global_step:,}: {writing}"
        return self._sparsely(e, "checkpoints left out", "warn", text)

    def _checkpoint_failed(self, e: CheckpointFailed) -> Iterable[Line]:
        did = {"stage": "take", "write": "write", "upload": "upload", "delete": "delete"}[e.during]
        times = f", {e.consecutive:,} in a row" if e.consecutive > 1 else ""
        what = f"checkpoint {plain_text(e.checkpoint, 80)}" if e.checkpoint else "checkpoint"
        text = f"error: could not {did} {what}{times}: {plain_text(e.error)}"
        return self._sparsely(e, f"failures to {did} checkpoints", "bad", text, always=e.during in ("stage", "write"))

    def _checkpoint_uploaded(self, e: CheckpointUploaded) -> Iterable[Line]:
        took = f"{format_bytes(e.nbytes)} in {format_duration(e.duration_s)}"
        return self._sparsely(e, "uploads", "note", f"uploaded to {plain_text(e.url)}: {took}")

    def _checkpoint_rejected(self, e: CheckpointRejected) -> list[Line]:
        text = f"warning: checkpoint {plain_text(e.checkpoint, 80)} is incomplete, an older one is tried"
        return [_line(e, "warn", f"{text}: {plain_text(e.error)}")]

    # ---------------------------------------------------------------------------------- what went wrong

    def _non_finite_loss(self, e: NonFiniteLoss) -> Iterable[Line]:
        text = f"warning: the loss of step {e.global_step:,} is {e.loss} ({_outcome(e)})"
        return self._sparsely(e, "non-finite losses", "warn", text, always=e.action == "stopped")

    def _non_finite_gradient(self, e: NonFiniteGradient) -> Iterable[Line]:
        text = f"warning: a gradient of step {e.global_step:,} is NaN or infinite ({_outcome(e)})"
        return self._sparsely(e, "non-finite gradients", "warn", text, always=e.action == "stopped")

    def _observer_failed(self, e: ObserverFailed) -> Iterable[Line]:
        times = f", {e.failures:,} in a row" if e.failures > 1 else ""
        outcome = {"fatal": "the run ends", "disabled": "disabled", "retrying": "retrying"}[e.action]
        during = f" in {plain_text(e.during, 60)}" if e.during else ""
        text = f"{_name(e)} failed{during}{times}, {outcome}: {plain_text(e.error)}"
        if e.action == "retrying":
            return self._sparsely(e, f"failures of {_name(e)}", "warn", f"warning: {text}")
        return [_line(e, "bad", f"error: {text}")]

    def _observer_recovered(self, e: ObserverRecovered) -> Iterable[Line]:
        text = f"{_name(e)} recovered after {format_duration(e.outage_s)} and {_many(e.failures, 'failure')}"
        return self._sparsely(e, f"recoveries of {_name(e)}", "good", text)

    def _observer_dropped(self, e: ObserverDropped) -> Iterable[Line]:
        if e.dropped == 0:  # only replaced by newer ones, as the observer asked
            return []
        text = f"warning: {_many(e.dropped, 'event')} did not reach {_name(e)}"
        return self._sparsely(e, f"drops by {_name(e)}", "warn", text)

    def _observer_slow(self, e: ObserverSlow) -> Iterable[Line]:
        during = plain_text(e.during, 60)
        text = f"warning: {_name(e)} has been in {during} for {format_duration(e.running_s)}"
        return self._sparsely(e, f"slow calls of {_name(e)}", "warn", text)

    def _loop_held(self, e: LoopHeld) -> Iterable[Line]:
        if e.wait_s < HELD_S:
            return []
        by = plain_text(", ".join(e.observers), 200) or "an unknown observer"
        reasons = {"fence": "its hook to return", "backpressure": "room in its queue", "checkpoint": "the disk"}
        why = reasons[e.cause]
        waited = format_duration(e.wait_s)
        if e.released:
            text = f"warning: the loop continues after waiting {waited} for {by} ({why})"
        else:
            text = f"warning: the loop has been waiting {waited} for {by} ({why})"
        return self._sparsely(e, f"waits of the loop for {by}", "warn", text, part=e.released)

    def _warning_logged(self, e: WarningLogged) -> list[Line]:
        more = f" [and {e.repeats:,} more before]" if e.repeats else ""
        kind: Kind = "bad" if e.level == "error" else "warn"
        return [_line(e, kind, f"{e.level}: {plain_text(e.message)}{more}")]

    def _journal_gap(self, e: JournalGap) -> list[Line]:
        where = f"(seq {e.first_seq:,} to {e.last_seq:,})"
        text = f"error: the journal lacks {_many(e.lost, 'event')} {where}: {plain_text(e.reason)}"
        return [_line(e, "bad", text)]

    def _sparsely(
        self, e: Event, what: str, kind: Kind, text: str, *, part: object = None, always: bool = False
    ) -> list[Line]:
        """A line, unless one of its kind was shown within `REPEAT_S`, so that events of each step do not flood."""
        key = (what, part)
        shown, held = self._repeats.get(key, (-math.inf, 0))
        if not always and e.time - shown < REPEAT_S:
            self._repeats[key] = (shown, held + 1)
            return []
        self._repeats.pop(key, None)  # moved to the end: the first one is the oldest
        self._repeats[key] = (e.time, 0)
        if len(self._repeats) > _MOST_REPEATS:
            oldest = next(iter(self._repeats))
            self._forgotten += self._repeats.pop(oldest)[1]
        return [_line(e, kind, f"{text} [and {held:,} more before]" if held else text)]

    def _held_back(self, time: float) -> list[Line]:
        counts: dict[str, int] = {}
        for (what, _), (_, held) in self._repeats.items():
            counts[what] = counts.get(what, 0) + held
        counts["others"] = self._forgotten
        self._repeats.clear()
        self._forgotten = 0
        said = [(Span(f"{what}: {held:,} more"),) for what, held in counts.items() if held]
        return [Line(time, "warn", [(Span("not shown above:"),), *said])] if said else []


def _line(event: Event, kind: Kind, text: str) -> Line:
    return Line(event.time, kind, [(Span(text, kind),)])


def _traceback(e: RunEnded) -> list[Line]:
    """The end of a traceback, which has the user's frames; the journal has all of it."""
    # Without the marks below a line, which wrapping may separate from it.
    rows = [row for row in (e.traceback or "").splitlines() if row.strip(" ~^")]
    shown = rows[-_MOST_TRACEBACK:]
    if len(rows) > len(shown):
        shown.insert(0, f"... {len(rows) - len(shown):,} lines before")
    return [Line(e.time, "note", [(Span(plain_text(row, 300), "dim"),)]) for row in shown]


def _rank_ended(e: RankEnded) -> list[Line]:
    place = f"attempt {e.ended_attempt}, rank {e.ended_rank} on {plain_text(e.host)}"
    return [_line(e, "warn", f"{place} {e.status}: {plain_text(e.reason or '')}")]


def _trace_saved(e: TraceSaved) -> list[Line]:
    steps = f"steps {e.first_step:,} to {e.last_step:,}" if e.last_step > e.first_step else f"step {e.last_step:,}"
    rows = [
        f"{format_duration(one.self_s)} in {one.calls:,} x {plain_text(one.name, 60)}" + " (device)" * one.on_device
        for one in e.operators[:_MOST_OPERATORS]
    ]
    head = f"trace of {steps} in {plain_text(e.path)} ({format_bytes(e.nbytes)})"
    return [_line(e, "note", head), *(_line(e, "note", f"  {row}") for row in rows)]


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _outcome(e: NonFiniteLoss | NonFiniteGradient) -> str:
    row = f", {e.consecutive:,} in a row" if e.consecutive > 1 else ""
    return {"warned": "trained on it", "skipped": "step skipped", "stopped": "stopping"}[e.action] + row


def _name(event: ObserverFailed | ObserverRecovered | ObserverDropped | ObserverSlow) -> str:
    return plain_text(event.observer, 80)
