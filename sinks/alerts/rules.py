"""The rules of alerts: from the events of a run to messages. No clock, thread or network of their own."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from events.messages import (
    CommandTaken,
    Event,
    MetricsLogged,
    NonFiniteGradient,
    NonFiniteLoss,
    RunEnded,
    RunStarted,
    SystemSampled,
    TestEpochEnded,
    TrainEpochEnded,
    TrainEpochStarted,
    TrainStepEnded,
    ValEpochEnded,
    ValEpochStarted,
)
from events.metrics import metrics_of
from events.run.pushed import is_pushed

Kind = Literal["failed", "nan", "stalled", "no_improvement", "disk", "finished"]

EVENTS: frozenset[type[Event]] = frozenset(
    {
        CommandTaken,
        MetricsLogged,
        NonFiniteGradient,
        NonFiniteLoss,
        RunEnded,
        RunStarted,
        SystemSampled,
        TestEpochEnded,
        TrainEpochEnded,
        TrainEpochStarted,
        TrainStepEnded,
        ValEpochEnded,
        ValEpochStarted,
    }
)
"""The types of events that the rules read."""

_NO_PROGRESS = (SystemSampled, NonFiniteLoss, NonFiniteGradient)
"""Events of other threads, which arrive while the loop stands still, too."""


class AlertMessage(msgspec.Struct, frozen=True):
    """One alert. Its fields are those of the JSON that a webhook receives."""

    kind: Kind
    text: str
    """One line."""
    run_id: str
    time: float
    """Seconds since the epoch of Unix: that of the event, or when the run was found stalled."""
    host: str
    step: int
    """``global_step``."""
    run_dir: str | None = None


class AlertLimits(msgspec.Struct, frozen=True):
    """The numbers of the rules; see the fields of `sinks.Alert`."""

    stalled_s: float
    monitor: str
    mode: Literal["min", "max"]
    patience: int
    disk_percent: float


class Rules:
    """The state of the rules for one run. Each condition gives one message until it is over.

    Used on one thread at a time.
    """

    def __init__(self, limits: AlertLimits, run_id: str, run_dir: str | None) -> None:
        self._limits = limits
        self._run_id = run_id
        self._run_dir = run_dir
        self._host = ""
        self._step = 0
        self._moved_at: float | None = None  # when progress was last seen; None before the first, paused or ended
        self._told: set[Kind] = set()  # conditions that are not over
        self._best: float | None = None
        self._best_step = 0
        self._waited = 0
        self._has_ended = False

    def take(self, event: Event, now: float) -> list[AlertMessage]:
        """Return the messages that one event gives, which arrives ``now`` (seconds since the epoch of Unix)."""
        self._step = max(self._step, event.global_step)
        if type(event) not in _NO_PROGRESS:
            self._moved_at = now
            self._told.discard("stalled")
        found: list[AlertMessage | None] = []
        if isinstance(event, RunStarted):
            self._host, self._step, self._has_ended = event.host, event.global_step, False
            self._told -= {"nan", "failed", "finished"}
        elif isinstance(event, RunEnded):
            self._moved_at, self._has_ended = None, True
            found.append(self._ended(event))
        elif isinstance(event, CommandTaken) and event.command == "pause":
            self._moved_at = None
        elif isinstance(event, NonFiniteLoss | NonFiniteGradient):
            what = "the loss" if isinstance(event, NonFiniteLoss) else "a gradient"
            found.append(self._message("nan", f"{what} is NaN or infinite at step {event.global_step}", event.time))
        elif isinstance(event, SystemSampled):
            found.append(self._disk(event))
        else:
            found += [self._judge(value, event) for name, value in metrics_of(event) if name == self._limits.monitor]
        return [one for one in found if one is not None]

    def look(self, now: float) -> AlertMessage | None:
        """Return the message about a run that makes no progress, as of ``now``."""
        if self._moved_at is None or now - self._moved_at < self._limits.stalled_s:
            return None
        stood_s = now - self._moved_at
        return self._message("stalled", f"no progress for {stood_s:,.0f} s, since step {self._step}", now)

    @property
    def due(self) -> float | None:
        """When `look` has to be called; None: not before the next event."""
        if self._moved_at is None or "stalled" in self._told:
            return None
        return self._moved_at + self._limits.stalled_s

    def closed(self, now: float) -> AlertMessage | None:
        """No event will follow: return the message about a run whose process was killed, or that is silent.

        Reads the lock file of the run folder.
        """
        if self._has_ended or not self._host:
            return None
        if self._run_dir is not None and is_pushed(self._run_dir):  # only its sender's server is here
            said = f"nothing arrives after step {self._step}: its process, its machine or its network may be down"
            return self._message("stalled", said, now)
        return self._message("failed", f"its process ended without a word after step {self._step}", now)

    def _ended(self, event: RunEnded) -> AlertMessage | None:
        if event.status == "failed":
            where = f" in {event.phase}" if event.phase else ""
            return self._message("failed", f"failed{where} at step {self._step}: {event.reason}", event.time)
        why = f": {event.reason}" if event.reason else ""
        return self._message("finished", f"{event.status} at step {self._step}{why}", event.time)

    def _disk(self, event: SystemSampled) -> AlertMessage | None:
        used = event.disk_used_percent
        if used is None:
            return None
        if used < self._limits.disk_percent:
            self._told.discard("disk")
            return None
        return self._message("disk", f"the disk of the run's folder is {used:.1f} % full", event.time)

    def _judge(self, value: float, event: Event) -> AlertMessage | None:
        sign = 1 if self._limits.mode == "min" else -1
        if math.isfinite(value) and (self._best is None or sign * value < sign * self._best):
            self._best, self._best_step, self._waited = value, event.global_step, 0
            self._told.discard("no_improvement")
            return None
        self._waited += 1
        if self._waited < self._limits.patience:
            return None
        best = "it was never finite" if self._best is None else f"the best is {self._best:g} of step {self._best_step}"
        text = f"{self._limits.monitor} has not improved for {self._waited} values ({value:g}); {best}"
        return self._message("no_improvement", text, event.time)

    def _message(self, kind: Kind, what: str, time: float) -> AlertMessage | None:
        if kind in self._told:
            return None
        self._told.add(kind)
        line = " ".join(f"{self._run_id}: {what}".split())
        return AlertMessage(kind, line[:1_000], self._run_id, time, self._host, self._step, self._run_dir)
