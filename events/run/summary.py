"""Plain data about a run, bounded as it is decoded: what servers send and views store."""

from __future__ import annotations

from typing import Literal

import msgspec

from events.bounds import AttemptNumber, BoundDict, BoundList, BoundName, BoundText, Int64, NonFinite, UnixTime

RunStatus = Literal[
    "unknown", "queued", "running", "finished", "stopped", "cancelled", "failed", "lost", "silent", "damaged"
]
"""``queued``: a service will run it (`events.run.job`). ``lost``: its process has died. ``silent``: it is pushed from
elsewhere, and nothing arrives; it may be running."""


class Summary(msgspec.Struct, omit_defaults=False):
    """A run in a few words, as servers send it and views are stored: see `sinks.live.app`."""

    run_id: BoundName = ""
    attempt: AttemptNumber = 0
    status: RunStatus = "unknown"
    reason: BoundText | None = None
    module: BoundName = ""
    device: BoundName = ""
    host: BoundName = ""
    command_line: BoundText | None = None
    git_commit: BoundName | None = None
    git_dirty: bool | None = None
    """As in `events.messages.RunStarted`."""
    started: UnixTime = 0.0
    updated: UnixTime = 0.0
    """Unix seconds of the newest event: of a run that died, its last sign of life."""
    ended: UnixTime | None = None
    """Unix seconds at which the loop ended; None while it runs, and for a run that died."""
    problems: BoundList[BoundText] = []
    """The damage, if there is any, and what is unhealthy, as `events.health.Health` finds it."""
    damage: BoundName | None = None
    """Why the run folder cannot be read, or not completely; None for a valid one. The status is ``damaged`` if that
    leaves it unknown."""
    best: BoundName | None = None
    """The metric by which the run keeps its best checkpoints..."""
    best_mode: Literal["min", "max"] = "min"
    """...and whether its least or its greatest value is the best."""
    global_step: Int64 = 0
    epoch: Int64 = 0
    epochs: Int64 | None = None
    steps_per_epoch: Int64 | None = None
    max_steps: Int64 | None = None
    total_steps: Int64 | None = None
    paused: bool = False
    commands: bool = False
    pushed: bool = False
    """Whether it trains elsewhere, and a sink `Push` sends it: then it takes no commands here."""
    latest: BoundDict[float | NonFinite] = {}
    label: BoundName = ""
    """Name in `events.table.notes`, which people see in place of ``run_id``..."""
    colour: BoundName = ""
    """...and the run's colour there: ``#rrggbb``."""

    def settle(self, *, is_held: bool, is_pushed: bool | None = None) -> None:
        """Set the status of a run without `RunEnded`: whether it is running, lost, silent or damaged.

        Args:
            is_held: Whether a process holds the run folder (`events.run.folder.is_held`).
            is_pushed: Whether it is pushed from elsewhere (`events.run.folder.is_pushed`); None: as before.
        """
        if is_pushed is not None:
            self.pushed = is_pushed
        if self.status in ("finished", "stopped", "cancelled", "failed"):
            return
        if is_held and self.attempt:
            self.status = "running"
        elif self.damage is not None:
            self.status = "damaged"
        elif self.attempt:
            self.status = "silent" if self.pushed else "lost"


class UploadState(msgspec.Struct):
    """The upload of a checkpoint."""

    state: Literal["uploading", "uploaded", "failed", "deleted"]
    done_bytes: Int64 = 0
    total_bytes: Int64 = 0


class CheckpointState(msgspec.Struct):
    """One checkpoint, and what has become of it."""

    name: BoundName
    global_step: Int64 = 0
    epoch: Int64 = 0
    time: UnixTime = 0.0
    nbytes: Int64 = 0
    durable_s: float | None = None
    blocked_s: float | None = None
    metric: float | None = None
    reasons: BoundList[BoundText] = []
    state: Literal["staged", "durable", "failed", "deleted"] = "staged"
    upload: UploadState | None = None
    error: BoundText | None = None
    path: BoundText = ""
    """Its folder on the run's machine; empty until it is durable."""
    superseded: bool = False
    """Whether the run has resumed from an earlier one since."""

    @property
    def folder(self) -> str:
        """Its path, or its name where no path is known."""
        return self.path or self.name

    @property
    def is_current(self) -> bool:
        """Whether it is durable, and of the history that the run continues."""
        return self.state == "durable" and not self.superseded


class EvaluationProgress(msgspec.Struct):
    """A validation or a test that is under way."""

    stage: str
    key: str
    step: int = 0
    steps: int | None = None
