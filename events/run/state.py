"""Where a run stands: one fold of its events, of which the console, the page, metrics exporters and results are views.

No I/O, no clock, no thread, and bounded memory, whatever is in the events.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec

from events.bounds import MAX_LINE_CHARS, MAX_NAME_CHARS, BoundDict, BoundText
from events.checkpoint.manifest import CheckpointName
from events.health import Health, ObserverState
from events.messages import (
    CheckpointDeleted,
    CheckpointFailed,
    CheckpointSaved,
    CheckpointStaged,
    CheckpointUploaded,
    CheckpointUploading,
    CommandTaken,
    Event,
    LedgerReported,
    RunEnded,
    RunResumed,
    RunStarted,
    StallLedger,
    TestEpochEnded,
    TestEpochStarted,
    TestStepEnded,
    TrainEpochEnded,
    TrainEpochStarted,
    TrainStepEnded,
    ValEpochEnded,
    ValEpochStarted,
    ValStepEnded,
)
from events.ranks import RankState
from events.run.pace import Pace
from events.run.summary import CheckpointState, EvaluationProgress, Summary, UploadState

MAX_CHECKPOINTS = 1_000
MAX_REASONS = 20
"""Maximum reasons per checkpoint."""
PLACES: frozenset[type[Event]] = frozenset({
    RunStarted, RunResumed, RunEnded, TrainEpochStarted, TrainStepEnded, TrainEpochEnded,
    ValEpochStarted, ValEpochEnded, TestEpochStarted, TestEpochEnded,
})  # fmt: skip
"""Events whose ``global_step`` is the run's. That of others may be long past: a checkpoint's that is durable now, or a
number's that was read late."""


class RunState(msgspec.Struct, dict=True):
    """The newest known state of one run. Not thread-safe: it belongs to one reader.

    Events come in the order of ``seq``. It may join late, miss events that the bus may drop, and see several attempts,
    so every number can be unknown, and each event is taken as the newest truth. The fields are what a view stores; the
    rest is of the running attempt alone.
    """

    run: Summary = msgspec.field(default_factory=Summary)
    arguments: dict[str, Any] = {}
    config: dict[str, Any] = {}
    versions: BoundDict[BoundText] = {}
    checkpoints: Annotated[dict[str, CheckpointState], msgspec.Meta(max_length=MAX_CHECKPOINTS)] = {}

    def __post_init__(self) -> None:
        self.health = Health()
        self._begin_attempt(self.run.epoch)
        self._handlers: dict[type[Event], Callable[..., None]] = {
            RunStarted: self._run_started,
            RunResumed: self._run_resumed,
            RunEnded: self._run_ended,
            TrainEpochStarted: self._train_epoch_started,
            TrainEpochEnded: self._train_epoch_ended,
            ValEpochStarted: self._evaluation_started,
            TestEpochStarted: self._evaluation_started,
            ValStepEnded: self._evaluation_step_ended,
            TestStepEnded: self._evaluation_step_ended,
            ValEpochEnded: self._evaluation_ended,
            TestEpochEnded: self._evaluation_ended,
            CommandTaken: self._command_taken,
            LedgerReported: self._ledger_reported,
            CheckpointStaged: self._checkpoint_staged,
            CheckpointSaved: self._checkpoint_saved,
            CheckpointFailed: self._checkpoint_failed,
            CheckpointUploading: self._checkpoint_uploading,
            CheckpointUploaded: self._checkpoint_uploaded,
            CheckpointDeleted: self._checkpoint_deleted,
        }
        self.types: frozenset[type[Event]] = self.health.types | {TrainStepEnded, *self._handlers}
        """The types of events that change it."""

    def _join(self, event: Event) -> None:
        """Start with the first known event of an attempt; its `RunStarted` may have been missed."""
        self._begin_attempt(event.epoch)
        run = self.run
        run.attempt, run.status, run.reason, run.ended, run.paused = event.attempt, "running", None, None, False

    def _begin_attempt(self, epochs_done: int) -> None:
        self.pace = Pace()
        self.ledger = StallLedger()
        """Of the whole attempt; all zero before it is reported."""
        self.evaluation: EvaluationProgress | None = None
        self.step_in_epoch = 0
        self.epochs_done = epochs_done
        """Training epochs finished."""
        self.began: float | None = None
        """Unix seconds at which the attempt began; None if that was missed."""

    # ------------------------------------------------------------------------------------------ questions

    @property
    def observers(self) -> dict[str, ObserverState]:
        """The observers of the attempt, by name."""
        return self.health.observers

    @property
    def ranks(self) -> dict[int, RankState]:
        """The ranks of the attempt, by number; empty for a single process."""
        return self.health.ranks.ranks

    @property
    def has_ended(self) -> bool:
        """Whether the loop has ended."""
        return self.run.ended is not None

    @property
    def steps(self) -> int | None:
        """Optimizer steps that the current epoch will have; None when unknown or already exceeded."""
        steps, run = self.run.steps_per_epoch, self.run
        if steps is not None and run.max_steps is not None:
            steps = min(steps, self.step_in_epoch + max(0, run.max_steps - run.global_step))
        return steps if steps is not None and self.step_in_epoch <= steps else None

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps that the whole run will have; None when unknown or already exceeded."""
        total, run = self.run.max_steps, self.run
        if run.total_steps is not None:
            total = run.total_steps
        elif run.epochs is not None and run.steps_per_epoch is not None:
            planned = run.epochs * run.steps_per_epoch
            total = planned if total is None else min(total, planned)
        return total if total is not None and run.global_step <= total else None

    @property
    def epoch_left_s(self) -> float | None:
        """Seconds of training left in this epoch, at the present rate."""
        return None if self.steps is None or not self.pace.rate else (self.steps - self.step_in_epoch) / self.pace.rate

    @property
    def run_left_s(self) -> float | None:
        """Seconds left of the run, at its mean speed so far with validation and without pauses."""
        total, step_s = self.total_steps, self.pace.step_s(self.run.global_step)
        return None if total is None or step_s is None else (total - self.run.global_step) * step_s

    @property
    def newest_checkpoint(self) -> CheckpointState | None:
        """The newest durable checkpoint."""
        return next((one for one in reversed(self.checkpoints.values()) if one.is_current), None)

    @property
    def best_checkpoint(self) -> CheckpointState | None:
        """The best durable checkpoint by the run's own metric, of equal ones the newest."""
        sign = 1 if self.run.best_mode == "max" else -1
        scored = [
            (sign * one.metric, name, one)
            for one in self.checkpoints.values()
            if one.is_current and one.metric is not None and math.isfinite(one.metric) and (name := _parsed(one))
        ]
        return max(scored, key=lambda one: one[:2])[2] if scored and self.run.best is not None else None

    # --------------------------------------------------------------------------------------------- events

    def add(self, events: Sequence[Event]) -> None:
        """Add events in their order."""
        for _ in self.follow(events):
            pass

    def follow(self, events: Iterable[Event]) -> Iterator[Event]:
        """Add events, and yield each once the state has it; of steps in a row only the last."""
        steps: list[TrainStepEnded] = []  # added at once: most events are these, and they cost the most
        for event in events:
            if event.attempt > self.run.attempt:
                if steps:
                    yield self._add_steps(steps)
                    steps.clear()
                self._join(event)
            if type(event) is TrainStepEnded:
                steps.append(event)
                continue
            if type(event) in self.types:
                if steps:
                    yield self._add_steps(steps)
                    steps.clear()
                self._add(event)
            yield event
        if steps:
            yield self._add_steps(steps)

    def _add_steps(self, steps: Sequence[TrainStepEnded]) -> TrainStepEnded:
        last = steps[-1]
        if last.epoch != self.run.epoch or last.global_step < self.run.global_step:
            self.pace.interrupt()
        self.run.global_step, self.run.epoch, self.step_in_epoch = last.global_step, last.epoch, last.step_in_epoch
        self.evaluation = None
        self.pace.train(steps)
        return last

    def _add(self, event: Event) -> None:
        kind = type(event)
        if kind is RunStarted:
            self._begin_attempt(event.epoch)
        self.pace.move(event.time)
        handler = self._handlers.get(kind)
        if handler is not None:
            handler(event)
        if kind in PLACES:
            self.run.global_step, self.run.epoch = event.global_step, event.epoch
        self.health.add(event)

    # -------------------------------------------------------------------------------------------- the run

    def _run_started(self, e: RunStarted) -> None:
        self.began = e.time
        self.run = Summary(
            run_id=e.run_id,
            attempt=e.attempt,
            status="running",
            module=e.module,
            device=e.device,
            host=e.host,
            command_line=e.command_line,
            git_commit=e.git_commit,
            git_dirty=e.git_dirty,
            started=self.run.started or e.time,
            best=e.best,
            best_mode=e.best_mode,
            epochs=e.epochs,
            steps_per_epoch=e.steps_per_epoch,
            max_steps=e.max_steps,
            total_steps=e.total_steps,
            commands=self.run.commands,
            damage=self.run.damage,
            pushed=self.run.pushed,
            latest=self.run.latest,
        )
        self.arguments, self.config, self.versions = e.arguments, e.config, e.versions

    def _run_resumed(self, e: RunResumed) -> None:
        """The run went back: later checkpoints are not of its history."""
        parent = CheckpointName.parse(e.checkpoint) if e.after_seq != 0 and e.checkpoint else None
        for one in self.checkpoints.values():
            name = _parsed(one) or CheckpointName(0, 0)
            if name.attempt < e.attempt and (parent is None or name > parent):
                one.superseded = True

    def _run_ended(self, e: RunEnded) -> None:
        self.run.status, self.run.reason, self.run.ended = e.status, e.reason, e.time
        self.evaluation = None
        self._resume()

    def _command_taken(self, e: CommandTaken) -> None:
        if e.command == "pause":
            self.run.paused = True
            self.pace.pause()
        elif e.command in ("resume", "stop"):
            self._resume()

    def _resume(self) -> None:
        self.run.paused = False
        self.pace.resume()

    def _ledger_reported(self, e: LedgerReported) -> None:
        if e.scope == "run":
            self.ledger = e.ledger

    # ------------------------------------------------------------------------------------------ the stages

    def _train_epoch_started(self, e: TrainEpochStarted) -> None:
        self.step_in_epoch, self.epochs_done = 0, e.epoch
        if e.steps is not None:
            if self.run.steps_per_epoch not in (None, e.steps):
                self.pace.forget()  # steps of another size
            self.run.steps_per_epoch = e.steps
        self.run.total_steps = e.total_steps
        self.pace.interrupt()

    def _train_epoch_ended(self, e: TrainEpochEnded) -> None:
        self.epochs_done = e.epoch + 1
        self._evaluation_ended(e)

    def _evaluation_started(self, e: ValEpochStarted | TestEpochStarted) -> None:
        stage = "val" if isinstance(e, ValEpochStarted) else "test"
        self.evaluation = EvaluationProgress(stage, e.key, 0, e.steps)

    def _evaluation_step_ended(self, e: ValStepEnded | TestStepEnded) -> None:
        stage = "val" if isinstance(e, ValStepEnded) else "test"
        now = self.evaluation
        if now is None or (now.stage, now.key) != (stage, e.key):  # its beginning was missed
            now = self.evaluation = EvaluationProgress(stage, e.key)
        now.step = e.step
        if now.steps is not None and e.step > now.steps:
            now.steps = None

    def _evaluation_ended(self, e: Event) -> None:
        self.evaluation = None
        self.pace.interrupt()  # the time spent here is not training

    # ------------------------------------------------------------------------------------- the checkpoints

    def _checkpoint(self, name: str) -> CheckpointState:
        found = self.checkpoints.get(name)
        if found is None:
            found = CheckpointState(name)
            if name and len(name) <= MAX_NAME_CHARS:
                self.checkpoints[name] = found
            if len(self.checkpoints) > MAX_CHECKPOINTS:
                # The oldest that is gone, or, if all are there, the oldest but the best.
                best = self.best_checkpoint
                gone = (name for name, one in self.checkpoints.items() if one.state in ("failed", "deleted"))
                rest = (name for name, one in self.checkpoints.items() if one is not best)
                del self.checkpoints[next(gone, None) or next(rest)]
        return found

    def _checkpoint_staged(self, e: CheckpointStaged) -> None:
        one = self._checkpoint(e.checkpoint)
        one.global_step, one.epoch, one.time, one.nbytes = e.global_step, e.epoch, e.time, e.nbytes
        one.blocked_s, one.metric, one.reasons, one.state = e.blocked_s, e.metric, _reasons(e), "staged"

    def _checkpoint_saved(self, e: CheckpointSaved) -> None:
        one = self._checkpoint(e.checkpoint)
        one.global_step, one.epoch, one.time, one.nbytes = e.global_step, e.epoch, one.time or e.time, e.nbytes
        one.durable_s, one.metric, one.reasons, one.state = e.durable_s, e.metric, _reasons(e), "durable"
        one.path = e.path if len(e.path) <= MAX_LINE_CHARS else ""

    def _checkpoint_failed(self, e: CheckpointFailed) -> None:
        one = self._checkpoint(e.checkpoint)
        one.error = e.error[:MAX_LINE_CHARS]
        if e.during == "upload":
            one.upload = _upload(one, "failed")
        elif e.during in ("stage", "write"):
            one.state, one.global_step, one.time = "failed", e.global_step, e.time

    def _checkpoint_uploading(self, e: CheckpointUploading) -> None:
        self._checkpoint(e.checkpoint).upload = UploadState("uploading", e.done_bytes, e.total_bytes)

    def _checkpoint_uploaded(self, e: CheckpointUploaded) -> None:
        self._checkpoint(e.checkpoint).upload = UploadState("uploaded", e.nbytes, e.nbytes)

    def _checkpoint_deleted(self, e: CheckpointDeleted) -> None:
        if (one := self.checkpoints.get(e.checkpoint)) is None:
            return
        if e.where == "local":
            one.state = "deleted"
        else:
            one.upload = _upload(one, "deleted")


def _reasons(e: CheckpointStaged | CheckpointSaved) -> list[str]:
    return [reason[:MAX_NAME_CHARS] for reason in e.reasons[:MAX_REASONS]]


def _upload(one: CheckpointState, state: Literal["failed", "deleted"]) -> UploadState:
    return msgspec.structs.replace(one.upload or UploadState(state, 0, one.nbytes), state=state)


def _parsed(one: CheckpointState) -> CheckpointName | None:
    return CheckpointName.parse(one.name)
