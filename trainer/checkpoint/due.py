"""When a checkpoint is due, and which metrics are among the best. Without clock, thread or I/O."""

from __future__ import annotations

import math
import sys

from events.checkpoint.settings import Checkpoints
from events.checkpoint.snapshot import Snapshot

NEVER = sys.maxsize


class DuePolicy:
    """Decides when checkpoints are due, by their settings.

    Attributes:
        step: ``global_step`` from which `after_step` must be called...
        ns: ...or the time of the clock from which it must.
        agreed_ns: The time from which rank 0 proposes a checkpoint to the others, whose clocks differ.

    Args:
        settings: None disables checkpoints.
        alone: Whether the run has a single rank.
    """

    def __init__(self, settings: Checkpoints | None, *, alone: bool = True) -> None:
        self.step = self.ns = self.agreed_ns = NEVER
        self._settings = settings
        self._alone = alone
        self._is_best = False  # the last metric is among the best, and its checkpoint is not taken yet
        self._postponed: list[str] = []

    def start(self, global_step: int, now_ns: int) -> None:
        """Start training."""
        if self._settings is not None:
            self.step = global_step + 1
            self.taken(now_ns)

    def taken(self, now_ns: int) -> None:
        """Restart the minutes after a checkpoint was taken or skipped."""
        self._is_best = False
        minutes = self._settings.every_minutes if self._settings is not None else None
        due_ns = NEVER if minutes is None else now_ns + int(min(minutes, 1e6) * 60e9)
        self.ns, self.agreed_ns = (due_ns, NEVER) if self._alone else (NEVER, due_ns)

    def found_best(self, global_step: int) -> None:
        """Note that the metric of this step is among the best."""
        self._is_best = True
        self.step = min(self.step, global_step)

    def after_step(self, global_step: int, now_ns: int, *, last: bool) -> list[str]:
        """Return why a checkpoint is due after a step.

        Args:
            last: The step is the last of its epoch: `after_epoch` returns the reasons instead, so that one checkpoint
                serves both.
        """
        if self._settings is None:
            return []
        reasons = []
        every = self._settings.every_steps
        if every is not None and global_step >= self.step and global_step % every == 0:
            reasons.append("steps")
        self.step = NEVER if every is None else global_step + every - global_step % every
        if now_ns >= self.ns:
            reasons.append("minutes")
        if self._is_best:
            reasons.append("best")
        if last:
            reasons, self._postponed = [], reasons
        return reasons

    def after_epoch(self, epoch: int, now_ns: int) -> list[str]:
        """Return why a checkpoint is due after an epoch."""
        if self._settings is None:
            return []
        reasons, self._postponed = self._postponed, []
        if self._settings.every_epochs is not None and (epoch + 1) % self._settings.every_epochs == 0:
            reasons.append("epochs")
        if self._is_best and "best" not in reasons:
            reasons.append("best")
        if not reasons and now_ns >= self.ns:
            reasons.append("minutes")
        return reasons


class BestScores:
    """The best metrics of a run's checkpoints, by step.

    Args:
        saved: Metrics of the checkpoints of earlier attempts.
    """

    def __init__(self, settings: Checkpoints, saved: dict[int, float]) -> None:
        self._sign = 1 if settings.best_mode == "max" else -1
        self._keep = settings.keep_best
        self._scores: dict[int, tuple[float, Snapshot | None]] = {step: (one, None) for step, one in saved.items()}
        """With the snapshots whose write may still fail."""

    def add(self, global_step: int, score: float, snapshot: Snapshot) -> None:
        """Add the metric of a new checkpoint."""
        self._scores[global_step] = score, snapshot

    def enters(self, global_step: int, score: float) -> bool:
        """Whether a metric is among the best `Checkpoints.keep_best`."""
        if not math.isfinite(score):
            return False
        sign = self._sign
        # A failed checkpoint does not count, nor one of this step, which holds the same weights.
        ranked = sorted(
            (
                (sign * other, step, snapshot)
                for step, (other, snapshot) in self._scores.items()
                if step != global_step and not (snapshot is not None and snapshot.failed)
            ),
            key=lambda one: one[:2],
            reverse=True,
        )
        best = ranked[: self._keep]
        enters = len(best) < self._keep or bool(best and sign * score > best[-1][0])
        own = self._scores.get(global_step)
        if own is not None and not (own[1] is not None and own[1].failed):
            enters = enters and sign * score > sign * own[0]
        # Those behind the best return if one of the best fails to be written.
        durable = [one for one in ranked if one[2] is None or one[2].durable][: self._keep]
        kept = [*durable, *(one for one in ranked if one[2] is not None and not one[2].durable)]
        self._scores = {step: (sign * other, snapshot) for other, step, snapshot in kept}
        if own is not None:
            self._scores[global_step] = own
        return enters
