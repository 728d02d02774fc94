"""The position of the loop, from which a resumed run continues."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
import torch

from events.bounds import INT_MAX
from trainer.data.rng import RngState

Phase = Literal["begin", "train", "validate", "end"]
_Count = Annotated[int, msgspec.Meta(ge=0, le=INT_MAX)]


class Position(msgspec.Struct):
    """Updated by the loop's thread; copied into each checkpoint.

    ``global_step`` and ``epoch`` are in the run's `events.origin.Origin`.
    """

    phase: Phase = "begin"
    """``begin``: before the epoch. ``train``: between two of its steps. ``validate``: in a validation between
    two steps. ``end``: after its last step and before its validation."""
    batches: int = 0
    """Micro-batches of this epoch in finished steps."""
    used_up: bool = False
    """Whether the epoch's data has ended: another iteration of the dataloader would start a new pass."""
    first_step: int = 0
    """``global_step`` at the start of the epoch."""
    elapsed_s: float = 0.0
    """Seconds of this epoch in earlier attempts."""
    validated_at: int = 0
    """``global_step`` of the last validation."""
    judges_epoch: bool = False
    """Whether a due validation of this epoch had no data, so that monitors use the epoch's training metrics."""
    validated_keys: list[str] = []
    """Finished dataloaders of the current validation."""
    skipped_in_a_row: int = 0
    first_skipped: int = 0
    """The step that the first skipped one would have been."""
    sampler_seed: int = 0
    epoch_size: tuple[_Count, _Count, _Count | None, bool] | None = None
    """`trainer.loop.step_plan.EpochSize` of the data when the plan of the run's steps was made; None if unknown."""
    limits: str | None = None
    """`trainer.loop.step_plan.StepPlan.key` of that plan."""
    planned_steps: int = 0
    """Optimizer steps of the earlier epochs by that plan; the finished ones where ``max_steps`` ended an epoch."""
    data_rows: int | None = None
    """Length of this epoch's data set, or of its dataloader; None without a length."""
    loader_state: object = None
    """Result of the dataloader's ``state_dict``; None without one."""
    began: float = 0.0
    """``time.monotonic`` at which this attempt started the epoch; valid in this process only."""
    batching: tuple[int, int] | None = None
    """Rows of a micro-batch, and micro-batches of a step on each rank, at the start of this epoch."""
    world_size: int = 1
    """Ranks that shared the data of this epoch."""
    generators_at_iter: list[torch.Tensor] | None = None
    """States of the dataloader's generators (`generators_of` in `trainer.data.loaders`) before its iteration, or after
    the end of its data."""
    keeps_workers: bool = False
    """Whether persistent workers of an earlier epoch load this one."""
    rng_at_val_loaders: RngState | None = None
    """The random generators before the current validation's dataloaders were created."""
    rng_at_loader: RngState | None = None
    """The random generators before the epoch's dataloader was created..."""
    rng_at_iter: RngState | None = None
    """...before its iteration..."""
    rng_at_validation: RngState | None = None
    """...and before the current dataloader of a validation."""

    def seed_of_workers(self, epoch: int) -> int | None:
        """Return the seed with which persistent workers are restarted for an epoch; None if there are none."""
        return (self.sampler_seed + epoch) % 2**63 if self.keeps_workers else None


SAVED_FIELDS = tuple(name for name in Position.__struct_fields__ if name not in ("began", "rng_at_validation"))
"""The fields that a checkpoint holds."""

RANK_FIELDS = ("loader_state", "generators_at_iter", "rng_at_val_loaders", "rng_at_loader", "rng_at_iter")
"""The fields that differ between the ranks of a run."""


class SavedCallback(msgspec.Struct):
    """State of a callback in a checkpoint."""

    key: str
    kind: str | None
    state: object


class SavedObjects(msgspec.Struct):
    """State of metric objects in a checkpoint."""

    states: dict[str, dict[str, object]] = {}
    logged: list[tuple[str | None, str]] = []


class SavedMetrics(msgspec.Struct):
    """State of metrics in a checkpoint."""

    validation: dict[str, object]
    epoch: dict[str, object]
    validated_at: object
    seen: list[str]
    followed_loss: tuple[object, object]
    objects: SavedObjects = msgspec.field(default_factory=SavedObjects)


class SavedAverage(msgspec.Struct):
    """Averaged weights in a checkpoint."""

    key: str
    """Of the callback that averages."""
    validated: bool
    """Whether its metric is that of these weights."""
    stale: bool
    """Whether batch norm statistics in it are those of an earlier average."""
    module: object
    """The module's state with the averaged weights."""


class SavedState(msgspec.Struct):
    """Required fields and types of a checkpoint's state. Restoring checks their content."""

    global_step: _Count
    epoch: _Count
    position: Position
    rng: dict[str, object]
    module: object
    frozen: list[str]
    optimizers: list[dict[object, object]]
    schedulers: list[dict[object, object] | None]
    metrics: SavedMetrics
    callbacks: list[SavedCallback]
    averaged: SavedAverage | None = None
