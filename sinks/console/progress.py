"""Where a run stands, read from its events alone: no clock, no terminal, no thread.

Whoever watches may join late, miss any step event (they are conflated) and see several attempts, so every
number here can be unknown, and each event is taken as the newest truth.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import msgspec

from events.messages import (
    CommandTaken,
    Event,
    RunEnded,
    RunResumed,
    RunStarted,
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

_RATE_WINDOW_S = 15.0
"""The rate is the mean over this time..."""
_RATE_SAMPLES = 4
"""...or over this many samples, where steps are slower than that."""
_SMOOTHING = 0.98
"""Weight that the displayed loss keeps of itself per step."""


class Evaluation(msgspec.Struct):
    """Validation or testing that is under way."""

    stage: str
    key: str
    step: int = 0
    steps: int | None = None


class Progress:
    """The newest known state of one run. Not thread-safe: it belongs to one writer.

    Attributes:
        epochs: Epochs planned; None until a `RunStarted` was seen.
        epoch: The current epoch, from 0.
        step_in_epoch: Optimizer steps finished in it.
        global_step: Optimizer steps finished in the run.
        loss: Smoothed loss of the newest steps; NaN or infinite as soon as the newest one is.
        rate: Steps per second while training, by the times of the events; None until two steps were seen.
        evaluation: What is being validated or tested, if anything.
        paused: Whether the loop waits for a resume.
        ended: Whether the run has ended.
        elapsed_s: Seconds since the first event seen of this attempt.
        time: Unix seconds of the newest event; 0.0 before the first.
    """

    def __init__(self) -> None:
        self._forget()

    def _forget(self) -> None:
        """Start over: a new attempt."""
        self.epochs: int | None = None
        self.epoch = 0
        self.step_in_epoch = 0
        self.global_step = 0
        self.loss: float | None = None
        self.rate: float | None = None
        self.evaluation: Evaluation | None = None
        self.paused = False
        self.ended = False
        self.elapsed_s = 0.0
        self.time = 0.0
        self._steps_per_epoch: int | None = None
        self._max_steps: int | None = None
        self._epoch_steps: int | None = None
        self._smooth: float | None = None
        self._samples: deque[tuple[float, int]] = deque(maxlen=256)
        self._began: float | None = None
        self._paused_at: float | None = None
        self._idle_s = 0.0
        self._origin: tuple[float, int] | None = None  # (working time, step) of the first step seen

    # ------------------------------------------------------------------------------------------ questions

    @property
    def steps(self) -> int | None:
        """Optimizer steps that the current epoch will have; None when unknown or already exceeded."""
        steps = self._epoch_steps
        if steps is None:
            return None
        if self._max_steps is not None:
            steps = min(steps, self.step_in_epoch + max(0, self._max_steps - self.global_step))
        return steps if self.step_in_epoch <= steps else None

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps that the whole run will have; None when unknown or already exceeded."""
        total = self._max_steps
        if self.epochs is not None and self._steps_per_epoch is not None:
            planned = self.epochs * self._steps_per_epoch
            total = planned if total is None else min(total, planned)
        return total if total is not None and self.global_step <= total else None

    @property
    def epoch_left_s(self) -> float | None:
        """Seconds of training left in this epoch, at the present rate."""
        return None if self.steps is None or not self.rate else (self.steps - self.step_in_epoch) / self.rate

    @property
    def run_left_s(self) -> float | None:
        """Seconds left of the run, at its mean speed so far with validation and without pauses."""
        total = self.total_steps
        if total is None or self._origin is None or self.global_step <= self._origin[1]:
            return None
        worked_s = self.elapsed_s - self._idle_s - self._origin[0]
        step_s = worked_s / (self.global_step - self._origin[1])
        return (total - self.global_step) * step_s if step_s > 0 else None

    # --------------------------------------------------------------------------------------------- events

    def take_steps(self, steps: Sequence[TrainStepEnded]) -> None:
        """Take consecutive step events at once: most events are these, and this costs the most."""
        last = steps[-1]
        self._clock(last)
        if last.epoch != self.epoch or last.global_step < self.global_step:
            self._samples.clear()
        if last.epoch != self.epoch:
            self.epoch, self._epoch_steps = last.epoch, self._steps_per_epoch
        self.step_in_epoch = last.step_in_epoch
        self.global_step = last.global_step
        self.evaluation = None
        if self._origin is None:
            since_s = self.elapsed_s - self._idle_s - max(0.0, last.time - steps[0].time)
            self._origin = (since_s, steps[0].global_step)
        self._take_losses([step.loss for step in steps if step.loss is not None])
        if len(steps) > 1 and not self._samples:
            self._samples.append((steps[0].time, steps[0].global_step))
        self._samples.append((last.time, last.global_step))
        self._measure_rate()

    def take(self, event: Event) -> None:
        """Take any event but `TrainStepEnded`."""
        if isinstance(event, RunStarted):
            self._forget()
            self.epochs, self._max_steps = event.epochs, event.max_steps
            self._steps_per_epoch = self._epoch_steps = event.steps_per_epoch
        self._clock(event)
        match event:
            case RunStarted() | RunResumed():
                self.epoch, self.global_step = event.epoch, event.global_step
                self._samples.clear()
            case TrainEpochStarted():
                self.epoch, self.step_in_epoch, self.global_step = event.epoch, 0, event.global_step
                self._epoch_steps = event.steps if event.steps is not None else self._steps_per_epoch
                self._samples.clear()
            case ValEpochStarted() | TestEpochStarted():
                stage = "val" if isinstance(event, ValEpochStarted) else "test"
                self.evaluation = Evaluation(stage, event.key, 0, event.steps)
            case ValStepEnded() | TestStepEnded():
                self._evaluate("val" if isinstance(event, ValStepEnded) else "test", event.key, event.step)
            case ValEpochEnded() | TestEpochEnded() | TrainEpochEnded():
                self.evaluation = None
                self._samples.clear()  # the time spent here is not the rate of training
            case CommandTaken(command="pause"):
                self.paused, self._paused_at = True, self.elapsed_s
                self._samples.clear()
            case CommandTaken(command="resume" | "stop"):
                self._resume()
            case RunEnded():
                self._resume()
                self.ended, self.evaluation, self.global_step = True, None, event.global_step
            case _:
                pass

    def _clock(self, event: Event) -> None:
        if self._began is None:
            self._began = event.time
        self.time = event.time
        # Observer events are timed by other threads: never let one turn time back.
        self.elapsed_s = max(self.elapsed_s, event.time - self._began)

    def _evaluate(self, stage: str, key: str, step: int) -> None:
        now = self.evaluation
        if now is None or now.stage != stage or now.key != key:  # its beginning was missed
            now = self.evaluation = Evaluation(stage, key)
        now.step = step
        if now.steps is not None and step > now.steps:
            now.steps = None

    def _resume(self) -> None:
        if self._paused_at is not None:
            self._idle_s += self.elapsed_s - self._paused_at
        self.paused, self._paused_at = False, None

    def _take_losses(self, losses: list[float]) -> None:
        if not losses:
            return
        total, count = sum(losses), len(losses)
        if not math.isfinite(total):
            finite = [loss for loss in losses if math.isfinite(loss)]
            total, count = sum(finite), len(finite)
        if count:
            kept = _SMOOTHING**count
            mean = total / count
            self._smooth = mean if self._smooth is None else kept * self._smooth + (1 - kept) * mean
        self.loss = self._smooth if math.isfinite(losses[-1]) else losses[-1]

    def _measure_rate(self) -> None:
        samples = self._samples
        while len(samples) > _RATE_SAMPLES and samples[-1][0] - samples[0][0] > _RATE_WINDOW_S:
            samples.popleft()
        seconds, steps = samples[-1][0] - samples[0][0], samples[-1][1] - samples[0][1]
        # Else the last rate stands: a clock was set back, or this is the first sample.
        if seconds > 0 and steps > 0:
            self.rate = steps / seconds
