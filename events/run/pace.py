"""How fast a run trains, by the times of its events alone: no clock, no thread."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

from events.messages import TrainStepEnded

_RATE_WINDOW_S = 15.0
"""The rate is the mean over this time..."""
_RATE_SAMPLES = 4
"""...or over this many samples, where steps are slower than that."""
_SMOOTHING = 0.98
"""Weight that the displayed loss keeps of itself per step."""


class Pace:
    """The speed and the smoothed loss of an attempt, which may miss any step.

    Attributes:
        time: Unix seconds of the newest event; 0.0 before the first.
        elapsed_s: Seconds from the first event to the newest.
        loss: Smoothed loss of the newest steps; NaN or infinite as soon as the newest one is.
        rate: Steps per second while training; None until two steps were seen.
    """

    def __init__(self) -> None:
        self.time = 0.0
        self.elapsed_s = 0.0
        self.loss: float | None = None
        self.rate: float | None = None
        self._began: float | None = None
        self._smooth: float | None = None
        self._samples: deque[tuple[float, int]] = deque(maxlen=256)
        self._paused_at: float | None = None
        self._idle_s = 0.0
        self._most_rows = 0
        self._origin: tuple[float, int] | None = None  # (working time, step) of the first step seen

    def move(self, time: float) -> None:
        """An event happened at this time."""
        if self._began is None:
            self._began = time
        self.time = time
        # Observer events are timed by other threads: time must not run backwards because of one.
        self.elapsed_s = max(self.elapsed_s, time - self._began)

    def interrupt(self) -> None:
        """The time until the next step is not training."""
        self._samples.clear()

    def forget(self) -> None:
        """Measure the mean time of a step anew, because steps take another time from now on."""
        self._origin = None

    def pause(self) -> None:
        """The loop waits for a resume."""
        self._paused_at = self.elapsed_s
        self.interrupt()

    def resume(self) -> None:
        """The loop no longer waits, if it did."""
        if self._paused_at is not None:
            self._idle_s += self.elapsed_s - self._paused_at
        self._paused_at = None

    def train(self, steps: Sequence[TrainStepEnded]) -> None:
        """Add consecutive steps at once: most events are these, and they cost the most."""
        first, last = steps[0], steps[-1]
        self.move(last.time)
        if last.rows is not None and last.rows > self._most_rows:  # fewer are those of an epoch's last step
            self._most_rows = last.rows
            self.forget()
        if self._origin is None:
            since_s = self.elapsed_s - self._idle_s - max(0.0, last.time - first.time)
            self._origin = (since_s, first.global_step)
        self._smooth_losses([step.loss for step in steps if step.loss is not None])
        samples = self._samples
        if len(steps) > 1 and not samples:
            samples.append((first.time, first.global_step))
        samples.append((last.time, last.global_step))
        while len(samples) > _RATE_SAMPLES and samples[-1][0] - samples[0][0] > _RATE_WINDOW_S:
            samples.popleft()
        seconds, count = samples[-1][0] - samples[0][0], samples[-1][1] - samples[0][1]
        # Otherwise the last rate stays: a clock was set back, or this is the first sample.
        if seconds > 0 and count > 0:
            self.rate = count / seconds

    def step_s(self, global_step: int) -> float | None:
        """Mean seconds per step from the first one seen to this one, with validation and without pauses."""
        if self._origin is None or global_step <= self._origin[1]:
            return None
        worked_s = self.elapsed_s - self._idle_s - self._origin[0]
        return worked_s / (global_step - self._origin[1]) if worked_s > 0 else None

    def _smooth_losses(self, losses: list[float]) -> None:
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
